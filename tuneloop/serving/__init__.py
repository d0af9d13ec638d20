"""Serving what the registry's alias names: vLLM answers, and a follower beside it moves with the alias.

`python -m tuneloop.serving follow` and `python -m tuneloop.serving fetch-base`; neither imports torch or vLLM.
"""
