"""An HTTP server on 127.0.0.1 for doubles of APIs, with the faults that clients have to live with put in front."""

import json
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response


@dataclass
class Fault:
    """What happens to the next requests that match.

    Attributes:
        method, path: the request's; a path matches where it holds this text.
        status: answered without doing anything; 0: the connection breaks.
        times: how many more requests.
        headers: of the answer.
        done: the request is carried out before the answer is lost.
        seconds: after which it is carried out and answered as usual, whether or not the client still waits.
    """

    method: str = ""
    path: str = ""
    status: int = 0
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    done: bool = False
    seconds: float = 0.0

    def matches(self, request: Request) -> bool:
        return self.times > 0 and self.method in ("", request.method) and self.path in request.path


class _Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept, and a body that is cut off is known to be

    def log(self, *_: Any) -> None:
        """Connections break on purpose here."""

    def log_request(self, *_: Any) -> None:
        """Requests are in `FaultyServer.requests`."""


class FaultyServer:
    """Serves `answer`, which a subclass gives.

    Attributes:
        faults: see `Fault`; the first that matches happens.
        away_until: `time.monotonic()` until which every connection breaks.
        token: the only bearer token that is known; empty: anybody may call.
        requests: every (method, path) that came.
        violations: what of requests and answers the published API does not allow; tests expect none.
    """

    def __init__(self) -> None:
        self.reset()
        self._one_at_a_time = threading.Lock()
        self._server = make_server("127.0.0.1", 0, self._handle, threaded=True, request_handler=_Quiet)
        self.url = f"http://127.0.0.1:{self._server.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def reset(self) -> None:
        """No faults, and nothing stored."""
        self.faults: list[Fault] = []
        self.away_until = 0.0
        self.token = ""
        self.requests: list[tuple[str, str]] = []
        self.violations: list[str] = []

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()

    def answer(self, request: Request) -> Response:
        """The API itself."""
        raise NotImplementedError

    def error(self, status: int, message: str) -> Response:
        """An error as this API says it."""
        raise NotImplementedError

    def _handle(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        request = Request(environ)
        request.get_data(cache=True, parse_form_data=True)
        self.requests.append((request.method, request.path))
        if time.monotonic() < self.away_until:
            return _break(environ)
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return self.error(401, "the token has expired")(environ, start_response)
        fault = next((fault for fault in self.faults if fault.matches(request)), None)
        if fault:
            fault.times -= 1
            if fault.done:
                with self._one_at_a_time:
                    self.answer(request)
            if fault.seconds:
                time.sleep(fault.seconds)
            elif not fault.status:
                return _break(environ)
            else:
                response = self.error(fault.status, "on purpose")
                response.headers.update(fault.headers)
                return response(environ, start_response)
        with self._one_at_a_time:
            response = self.answer(request)
        return response(environ, start_response)


def json_response(content: Any, status: int = 200) -> Response:
    """An answer of JSON."""
    return Response(json.dumps(content), status=status, content_type="application/json")


def _break(environ: dict[str, Any]) -> Iterable[bytes]:
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    return []
