"""What a running vLLM OpenAI server is asked: which adapters it has, and to load one.

The endpoints are vLLM's own, `/v1/models` and `/v1/load_lora_adapter`; it has the second one when it was started with
`--enable-lora` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True.
"""

import json
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any

from tuneloop.errors import TryAgain, UserError


class ServerDown(TryAgain):
    """The server does not answer."""


class AdapterRefused(UserError):
    """The server does not take this adapter; what it had before is untouched."""


class VllmServer:
    """A vLLM server at a URL such as http://127.0.0.1:8000.

    Args:
        key: the key that the server was started with (`VLLM_API_KEY`); empty for none.
        timeout: seconds that a request may take; loading an adapter reads it from the disk.
    """

    def __init__(self, url: str, key: str = "", timeout: float = 120.0):
        self.url, self._key, self._timeout = url.rstrip("/"), key, timeout

    def adapters(self) -> dict[str, str]:
        """Name -> folder of the adapters that the server answers for.

        Raises:
            UserError: it refuses the key, or other machines.
            ServerDown: it does not answer, or not yet.
        """
        status, answer = self._request("/v1/models", None)
        if status != 200:
            raise ServerDown(f"{self.url}: answers {status} to /v1/models ({_message(answer)})")
        return {card["id"]: card["root"] for card in answer["data"] if card.get("parent")}

    def load(self, name: str, folder: Path) -> None:
        """Let a name mean the adapter in a folder; what it meant before answers until then.

        Raises:
            AdapterRefused: the server says no, and why.
            ServerDown: it does not answer.
        """
        body = {"lora_name": name, "lora_path": str(folder), "load_inplace": True}
        status, answer = self._request("/v1/load_lora_adapter", body)
        if status == 404 and "error" not in answer:  # the route itself is missing
            raise UserError(f"{self.url}: cannot load adapters while it runs; start vLLM with --enable-lora and "
                            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True")  # fmt: skip
        if status != 200:
            raise AdapterRefused(f"vLLM refuses {folder.name}: {_message(answer)}")

    def _request(self, path: str, body: dict[str, Any] | None) -> tuple[int, dict[str, Any]]:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.url + path, data, headers)
            with urllib.request.urlopen(request, timeout=self._timeout) as response:
                return response.status, _parse(response.read())
        except urllib.error.HTTPError as error:
            with error:
                answer = _parse(error.read())
                if error.code == 401:
                    raise UserError(f"{self.url}: refuses the key; set VLLM_API_KEY as vLLM has it") from None
                if error.code == 403:
                    raise UserError(
                        f"{self.url}: forbids {path} ({_message(answer)}); follow vLLM where it runs"
                    ) from None
                return error.code, answer
        except (OSError, HTTPException) as error:
            raise ServerDown(f"{self.url}: does not answer ({getattr(error, 'reason', error)})") from None


def _parse(data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except ValueError:
        values = None
    return values if isinstance(values, dict) else {"text": data.decode(errors="replace")}


def _message(answer: dict[str, Any]) -> str:
    error = answer.get("error")
    return str(error.get("message") if isinstance(error, dict) else answer.get("text") or answer)[:500]
