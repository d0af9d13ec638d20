"""A double of the endpoints of vLLM's OpenAI server that the follower uses; the real one needs a model and minutes.

It answers as vLLM 0.32 does (`vllm/entrypoints/openai/models/serving.py`): a name that is taken is refused, a folder
that cannot be loaded is an error and changes nothing. tests/e2e/test_vllm_server.py asks the real one.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


class VllmDouble:
    """The server, and the faults that it is to show.

    Attributes:
        adapters: name -> folder that it answers for.
        largest_rank: adapters above it are refused, as by `--max-lora-rank`.
        updating: whether VLLM_ALLOW_RUNTIME_LORA_UPDATING is on.
        key: what clients must send; empty: nothing.
        silent: whether it does what it is asked and then ends the connection without an answer.
        calls: what was asked of it, in order: "load NAME FOLDER".
    """

    def __init__(self) -> None:
        self.adapters: dict[str, str] = {}
        self.largest_rank, self.updating, self.key, self.silent = 64, True, "", False
        self.calls: list[str] = []
        double = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if not self._allowed():
                    return
                base = {"id": "base", "object": "model", "root": "/models/base", "parent": None}
                cards = [{"id": name, "root": root, "parent": "base"} for name, root in double.adapters.items()]
                self._answer(200, {"object": "list", "data": [base, *cards]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if not self._allowed():
                    return
                if not double.updating:
                    self._answer(404, {"detail": "Not Found"})
                    return
                answer = double.load(body["lora_name"], body["lora_path"], body.get("load_inplace", False))
                if not double.silent:
                    self._answer(*answer)

            def _allowed(self) -> bool:
                if double.key and self.headers.get("Authorization") != f"Bearer {double.key}":
                    self._answer(401, {"error": "Unauthorized"})
                    return False
                return True

            def _answer(self, status: int, body: dict | str) -> None:
                data = (json.dumps(body) if isinstance(body, dict) else body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def load(self, name: str, folder: str, in_place: bool) -> tuple[int, dict | str]:
        self.calls.append(f"load {name} {Path(folder).name}")
        if name in self.adapters and not in_place:
            return 400, _error(400, f"The lora adapter '{name}' has already been loaded.")
        try:
            rank = json.loads((Path(folder) / "adapter_config.json").read_text())["r"]
        except FileNotFoundError:
            return 404, _error(404, f"No adapter found for {folder}")
        if rank > self.largest_rank:
            return 500, _error(500, f"LoRA rank {rank} is greater than max_lora_rank {self.largest_rank}.")
        self.adapters[name] = folder
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def start_again(self) -> None:
        """Forget everything, as a container that is started again."""
        self.adapters.clear()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _error(code: int, message: str) -> dict:
    return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": code}}


@pytest.fixture
def vllm_double():
    """A running double without adapters."""
    double = VllmDouble()
    yield double
    double.close()
