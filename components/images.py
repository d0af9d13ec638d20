"""The images that the steps run in. Set the variables before compiling to pin a registry and a digest."""

import os

BASE_IMAGE = os.environ.get("TUNELOOP_BASE_IMAGE", "tuneloop/base:dev")  # data, merge, evaluation, registry
TRAIN_IMAGE = os.environ.get("TUNELOOP_TRAIN_IMAGE", "tuneloop/train:dev")  # training and rollouts
