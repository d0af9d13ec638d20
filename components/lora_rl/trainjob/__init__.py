"""lora_rl on several nodes of a cluster: a TrainJob of Kubeflow Trainer, created and followed by the step."""
