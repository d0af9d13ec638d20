"""Which paths of vLLM's server other machines reach.

vLLM loads and unloads adapters for whoever reaches its port: by `/v1/load_lora_adapter`, and by `/adapters`, which asks
for no key, as `/invocations` does not, because vLLM's key covers what begins with /v1 and little else. A network policy
knows ports and no paths. So clients get what is named here, and the follower, on the same machine, everything.
"""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

OPEN_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics"})
LOOPBACK = frozenset({"127.0.0.1", "::1"})  # a mesh's proxy in the pod comes from another address, such as 127.0.0.6

Message = MutableMapping[str, Any]


class Doors:
    """ASGI middleware, for vLLM's `--middleware`, that answers 403 to other machines but on `OPEN_PATHS`."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self._app = app

    async def __call__(self, scope: Message, receive: Callable[..., Any], send: Callable[..., Awaitable[None]]) -> None:
        """Answer one request, or hand it on."""
        if scope["type"] == "lifespan" or self._is_open(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await _refuse(send)

    @staticmethod
    def _is_open(scope: Message) -> bool:
        host = (scope.get("client") or ("",))[0]
        return host in LOOPBACK or scope["path"].removeprefix(scope.get("root_path", "")) in OPEN_PATHS


async def _refuse(send: Callable[..., Awaitable[None]]) -> None:
    message = f"open to this machine only; others reach {', '.join(sorted(OPEN_PATHS))}"
    body = json.dumps({"error": {"message": message, "type": "PermissionDeniedError", "code": 403}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": body})
