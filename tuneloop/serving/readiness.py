"""A small HTTP endpoint for the cluster's probes: is the adapter's name answered, and what does the follower say."""

import json
import threading
from collections.abc import Callable
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tuneloop.serving.alias_follower import Status


class Readiness:
    """`GET /ready` answers 200 while the adapter is served and 503 otherwise, with the last status as JSON.

    Args:
        port: 0 for any free one.
        is_served: asked at every request.
    """

    def __init__(self, port: int, is_served: Callable[[], bool], host: str = "0.0.0.0"):
        self.status = Status()
        readiness = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                known = self.path == "/ready"
                code = 404 if not known else 200 if is_served() else 503
                body = json.dumps(asdict(readiness.status) if known else {"see": "/ready"}).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """A probe every few seconds is no news."""

        self._server = ThreadingHTTPServer((host, port), Handler)
        self.port: int = self._server.server_address[1]

    def __enter__(self) -> "Readiness":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
