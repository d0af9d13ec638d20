"""Where rows come from, one class a kind."""

from tuneloop.data.sources.huggingface import HuggingFaceSource
from tuneloop.data.sources.jsonl import JsonlSource
from tuneloop.data.sources.parquet import ParquetSource
from tuneloop.data.sources.reasoning_gym import ReasoningGymSource

__all__ = ["HuggingFaceSource", "JsonlSource", "ParquetSource", "ReasoningGymSource"]
