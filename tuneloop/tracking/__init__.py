"""Sends the metrics of training to MLflow and Weights & Biases, beside the files that are always written.

Imports neither torch nor a tracker's package before a tracker is configured.
"""

from tuneloop.tracking.tracking import tracked

__all__ = ["tracked"]
