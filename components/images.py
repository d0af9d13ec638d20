"""The images that the steps run in. Set the variables before compiling to name a registry and a digest."""

import os

from tuneloop import __version__

# check, data_prep, promote, report: what holds no model, and runs without torch
BASE_IMAGE = os.environ.get("TUNELOOP_BASE_IMAGE", f"tuneloop/base:{__version__}")
# sft_warmup, lora_rl, merge_adapter, evaluate
TRAIN_IMAGE = os.environ.get("TUNELOOP_TRAIN_IMAGE", f"tuneloop/train:{__version__}")
