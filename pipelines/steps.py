"""The DAG's steps by name; imports nothing, so that the command line's help is quick."""

# Every step in the order of the DAG, and which step's output each of its inputs is.
STEPS: dict[str, dict[str, str]] = {
    "check": {},
    "data_prep": {},
    "sft_warmup": {"data": "data_prep"},
    "lora_rl": {"data": "data_prep", "warmup": "sft_warmup"},
    "merge_adapter": {"training": "lora_rl", "data": "data_prep", "warmup": "sft_warmup"},
    "evaluate": {"data": "data_prep", "warmup": "sft_warmup", "training": "lora_rl"},
    "promote": {"training": "lora_rl", "evaluation": "evaluate", "data": "data_prep", "merge": "merge_adapter"},
}
STEP_NAMES = tuple(STEPS)
NODES = (*STEP_NAMES, "report")  # what a console shows of a run
