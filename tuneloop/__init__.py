"""tuneloop: from a base model and a verifiable task to a LoRA adapter that is proven better."""

__version__ = "0.1.0"
