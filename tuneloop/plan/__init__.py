"""Memory and time of a run, predicted from its config and the model's config.json alone; see docs/plan.md.

shapes: the model's dimensions; inputs: what is planned from; activations, rollout, memory, lora_rl: bytes; timing:
seconds; devices: the hardware; plan: both on one kind of it; fit: the nearest setting that fits; render: the table.
Nothing here imports torch.
"""
