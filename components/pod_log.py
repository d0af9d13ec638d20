"""A pod's log, line by line and each line once, through connections that break."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from components.api_calls import TIMEOUT_SECONDS, ApiServer, Refused

_QUIET_SECONDS = 300.0  # of a log, after which the connection is made anew
_OVERLAP_SECONDS = 5  # read again after a reconnection; lines are known by their time


class PodLog:
    """The log of one container of one pod.

    Args:
        core: gives kubernetes' CoreV1Api, which may be another one after credentials were renewed.
        take: is called with each line.
    """

    def __init__(
        self, server: ApiServer, core: Callable[[], Any], namespace: str, pod: str, container: str,
        take: Callable[[str], None],
    ):  # fmt: skip
        self._server, self._core, self._take = server, core, take
        self._namespace, self._pod, self._container = namespace, pod, container
        self._last, self._at_last = "", set[str]()

    def read(self, follow: bool = True) -> bool:
        """Read the log from where it was left until it ends; False when the connection broke before.

        Args:
            follow: wait for what is not written yet.

        Raises:
            TryAgain: the server is away.
        """
        import urllib3

        response = self._open(follow)
        if response is None:
            return True
        rest = b""
        try:
            for piece in response.stream():
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    self._line(line.decode(errors="replace"))
        except urllib3.exceptions.HTTPError:
            return False  # a line that was cut off comes whole with the next connection
        finally:
            response.close()
        if rest:
            self._line(rest.decode(errors="replace"))
        return True

    def _open(self, follow: bool) -> Any:
        """The log as a stream; None when there is none, or none yet."""
        try:
            return self._server.call(
                lambda: self._core().read_namespaced_pod_log(
                    self._pod,
                    self._namespace,
                    container=self._container,
                    follow=follow,
                    timestamps=True,
                    _preload_content=False,
                    _request_timeout=(TIMEOUT_SECONDS[0], _QUIET_SECONDS),
                    **self._since(),
                )
            )
        except Refused as error:
            if error.status in (400, 404):  # its container has not started, or the pod is removed
                return None
            raise

    def _since(self) -> dict[str, int]:
        """The API's argument that leaves out most of what was read: whole seconds until now, and a few more."""
        if not self._last:
            return {}
        then = datetime.fromisoformat(self._last)  # in the node's own time zone
        return {"since_seconds": max(1, int((datetime.now(UTC) - then).total_seconds()) + _OVERLAP_SECONDS)}

    def _line(self, line: str) -> None:
        """Hand on a line, which begins with its time, unless it was handed on before."""
        moment, _, text = line.partition(" ")
        if moment < self._last or (moment == self._last and text in self._at_last):
            return
        self._at_last = {text} if moment != self._last else self._at_last | {text}
        self._last = moment
        self._take(text)
