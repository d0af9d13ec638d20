"""A real HTTP S3 endpoint on 127.0.0.1 for tests: `from tests.s3_server import s3_server  # noqa: F401`.

moto checks a condition and then stores, in two moves; S3 promises one. Requests are therefore handled one at a time.
Faults can be put in front: a status for the next requests of a method, an answer that is lost, a body that is cut off,
or trouble by chance.
"""

import collections
import functools
import random
import socket
import threading
import time
import urllib.request
from collections.abc import Iterable
from typing import Any

import boto3
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

BUCKET = "models"


class S3Server:
    """The endpoint, and the faults that it is to show.

    Attributes:
        refuse: (method, status, S3 error code) -> how many more requests are refused so.
        lose_completions: how many more multipart uploads are completed but answered by 500; when they are completed
            again they are gone.
        lose_answers: how many more writes are carried out but answered by 500.
        cut_bodies: how many more bodies of GET end after `cut_share` of their bytes.
        ignore_conditions: headers (IF_MATCH, IF_NONE_MATCH) of writes that are carried out whatever those say.
        trouble: by chance a request is answered 503 (10 in 100), its connection breaks half-way (3) or it is slow (3).
        troubles: how often each happened.
        requests: every (method, path) that came.
    """

    def __init__(self) -> None:
        self.reset()
        self._app = DomainDispatcherApplication(create_backend_app)
        self._one_at_a_time = threading.Lock()
        self._server = make_server("127.0.0.1", 0, self._handle, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def client(self) -> Any:
        """A plain boto3 client, to look behind the code under test."""
        return boto3.session.Session().client("s3", endpoint_url=self.url)  # pyright: ignore

    def reset(self) -> None:
        """Show no faults, and forget the requests."""
        self.refuse: dict[tuple[str, int, str], int] = {}
        self.lose_answers = self.lose_completions = self.cut_bodies = 0
        self.cut_share = 0.5
        self.ignore_conditions: set[str] = set()
        self.trouble = False
        self.troubles: collections.Counter[str] = collections.Counter()
        self._draw = random.Random(0)
        self.requests: list[tuple[str, str]] = []

    def _handle(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        method = environ["REQUEST_METHOD"]
        self.requests.append((method, environ["PATH_INFO"]))
        for (refused, status, code), left in self.refuse.items():
            if refused == method and left > 0:
                self.refuse[refused, status, code] -= 1
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                return _error(start_response, status, code)
        kind = self._trouble() if self.trouble else ""
        if kind == "503":
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            return _error(start_response, 503, "SlowDown")
        if kind == "slow":
            time.sleep(0.5)
        if kind == "broken" and method != "GET":
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0) // 2)
            return _break(environ)
        environ = {name: value for name, value in environ.items() if name[5:] not in self.ignore_conditions}
        answer: list[Any] = []
        with self._one_at_a_time:
            body = b"".join(self._app(environ, lambda *arguments: answer.extend(arguments[:2])))
        if method == "PUT" and self.lose_answers:
            self.lose_answers -= 1
            return _error(start_response, 500, "InternalError")
        if method == "POST" and "uploadId" in environ.get("QUERY_STRING", "") and self.lose_completions:
            self.lose_completions -= 1
            self.refuse["POST", 404, "NoSuchUpload"] = 1
            return _error(start_response, 500, "InternalError")
        start_response(*answer)
        if method == "GET" and self.cut_bodies and len(body) > 1:
            self.cut_bodies -= 1
            body = body[: int(len(body) * self.cut_share)]
        if kind == "broken" and method == "GET":
            body = body[: len(body) // 2]
        return [body]

    def _trouble(self) -> str:
        chance = self._draw.random()
        kind = "503" if chance < 0.10 else "broken" if chance < 0.13 else "slow" if chance < 0.16 else ""
        self.troubles[kind] += 1
        return kind


def _break(environ: dict[str, Any]) -> Iterable[bytes]:
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    return []


def _error(start_response: Any, status: int, code: str) -> Iterable[bytes]:
    body = f"<Error><Code>{code}</Code><Message>on purpose</Message></Error>".encode()
    start_response(f"{status} X", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [body]


@functools.cache
def _server() -> S3Server:
    return S3Server()  # one a process: starting it takes longer than most tests


@pytest.fixture
def s3_server(monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """A running endpoint with an empty bucket `models`, named by the standard environment variables."""
    server = _server()
    server.reset()
    for name, value in {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    urllib.request.urlopen(urllib.request.Request(f"{server.url}/moto-api/reset", method="POST")).close()
    urllib.request.urlopen(urllib.request.Request(f"{server.url}/{BUCKET}", method="PUT")).close()
    return server
