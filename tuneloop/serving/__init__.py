"""Serving what the registry's alias names: vLLM answers, and a follower beside it moves with the alias.

`python -m tuneloop.serving vllm`, `follow` and `fetch-base`; the last two import neither torch nor vLLM.
"""
