"""Which paths of vLLM's server other machines reach; tests/e2e/test_vllm_server.py asks the real one."""

import asyncio
import json

import pytest

from tuneloop.serving.doors import Doors


@pytest.mark.parametrize(
    ("client", "path", "reached"),
    [
        ("127.0.0.1", "/v1/load_lora_adapter", True),  # the follower
        ("10.1.2.3", "/v1/chat/completions", True),
        ("10.1.2.3", "/health", True),  # the kubelet
        ("10.1.2.3", "/metrics", True),
        ("10.1.2.3", "/v1/load_lora_adapter", False),
        ("10.1.2.3", "/v1/unload_lora_adapter", False),
        ("10.1.2.3", "/adapters", False),
        ("10.1.2.3", "/invocations", False),
        ("10.1.2.3", "/v1/chat/completions/../load_lora_adapter", False),
        ("127.0.0.6", "/v1/load_lora_adapter", False),  # other machines, by a mesh's proxy
        (None, "/v1/load_lora_adapter", False),
    ],
)
def test_other_machines_reach_the_model_and_no_adapters(client: str | None, path: str, reached: bool):
    called, sent = [], []

    async def app(scope, receive, send):
        called.append(scope["path"])

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": path, "client": (client, 5) if client else None}
    asyncio.run(Doors(app)(scope, None, send))  # type: ignore[arg-type]
    assert called == ([path] if reached else [])
    assert [message["status"] for message in sent if "status" in message] == ([] if reached else [403])
    if not reached:
        assert "open to this machine only" in json.loads(sent[1]["body"])["error"]["message"]
