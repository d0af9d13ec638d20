"""Calls of a server's API that outlive throttling, restarts and lost connections, and errors in one line.

The generated clients of Kubeflow Pipelines and of Kubernetes raise alike exceptions, with `status`, `reason`, `headers`
and `body`; so neither package is imported here.
"""

import email.utils
import json
import random
import ssl
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tuneloop.errors import TryAgain, TuneloopError, UserError

T = TypeVar("T")

TIMEOUT_SECONDS = (10.0, 60.0)  # to connect, and between two pieces of an answer; both clients wait for ever by default
LONGEST_WAIT_SECONDS = 15.0
_FIRST_WAIT_SECONDS = 0.5
_BRIEF_SECONDS = 5.0
_TRIES_OF_500 = 3  # a server's bug stays; a database that was restarted comes back
_BUSY = (429, 502, 503, 504)
_NOT_OF_RIGHTS = ("admission webhook", "exceeded quota", "violates PodSecurity")  # 403 of Kubernetes, too
_LOGIN_PAGES = (301, 302, 303, 307, 308)


class Refused(UserError):
    """The server answered that it will not do it.

    Attributes:
        status: HTTP's code.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


@dataclass
class _Trouble(Exception):
    """An attempt that is worth repeating.

    Attributes:
        reason: in a few words.
        wait: seconds that the server asks to wait for; None: it does not say.
        maybe_done: the request may have been carried out.
    """

    reason: str
    wait: float | None = None
    maybe_done: bool = True


@dataclass
class ApiServer:
    """A server whose API is called.

    Attributes:
        name: as messages call it.
        login: what the user does when the server knows no credentials, or old ones.
        patience_seconds: how long one call is repeated for while the server is away or too busy.
        renew: fetches credentials anew; called once when they have expired.
    """

    name: str
    login: str
    patience_seconds: float = 120.0
    renew: Callable[[], object] | None = None
    _answered: bool = field(default=False, init=False)

    def call(self, action: Callable[[], T]) -> T:
        """The result of a request that may be repeated without harm.

        Raises:
            Refused: the server says no.
            TryAgain: it could not be reached for `patience_seconds`.
        """
        patience = _Patience(self)
        while True:
            try:
                return self._attempt(action)
            except _Trouble as trouble:
                patience.wait(trouble)

    def ensure(self, find: Callable[[], T | None], make: Callable[[], T]) -> tuple[T, bool]:
        """What `find` finds, or what `make` makes when there is none; a lost answer of `make` makes no second one.

        Returns:
            It, and whether it was made here.

        Raises:
            Refused, TryAgain: as `call`.
        """
        found = self.call(find)
        patience, maybe_done = _Patience(self), False
        while found is None:
            try:
                return self._attempt(make), True
            except _Trouble as trouble:
                maybe_done = maybe_done or trouble.maybe_done
                patience.wait(trouble)
                found = self.call(find)
            except Refused as error:
                found = self.call(find) if error.status == 409 else None
                if found is None:
                    raise
        return found, maybe_done

    def briefly(self, action: Callable[[], T]) -> T:
        """`call` for what is cleaned up behind a failure, which nobody wants to wait for."""
        patience, self.patience_seconds = self.patience_seconds, min(self.patience_seconds, _BRIEF_SECONDS)
        try:
            return self.call(action)
        finally:
            self.patience_seconds = patience

    def absent_as_none(self, action: Callable[[], T]) -> T | None:
        """`action`'s result, None when the server answers 404: for the `find` of `ensure`."""
        try:
            return action()
        except Exception as error:
            if getattr(error, "status", None) == 404:
                self._answered = True
                return None
            raise

    def _attempt(self, action: Callable[[], T], renewed: bool = False) -> T:
        try:
            result = action()
        except TuneloopError:
            raise
        except Exception as error:
            if getattr(error, "status", None) == 401 and self.renew and not renewed:
                self.renew()
                return self._attempt(action, renewed=True)
            raise self._judged(error) from None
        self._answered = True
        return result

    def _judged(self, error: Exception) -> Exception:
        """What a failed attempt means; a bug is the error itself."""
        status = getattr(error, "status", None)
        if isinstance(status, int) and status and hasattr(error, "reason"):
            return self._judged_answer(status, error)
        cause = _connection_error(error)
        if cause is None:
            return error
        text = " ".join(str(cause).split())
        if "CERTIFICATE_VERIFY_FAILED" in text or isinstance(cause, ssl.SSLCertVerificationError):
            return UserError(f"{self.name}: its certificate is not trusted; name its authority's file with --ca-file")
        if not self._answered and type(cause).__name__ == "NameResolutionError":
            return UserError(f"{self.name}: no such host; correct --host, or the cluster's address in your kubeconfig")
        return _Trouble(f"cannot be reached ({_short(text)})")

    def _judged_answer(self, status: int, error: Any) -> Exception:
        message = _message(error)
        if status == 401 or status in _LOGIN_PAGES:
            return Refused(f"{self.name}: does not know you ({status}: {message}); {self.login}", 401)
        if status == 403 and not any(text in message for text in _NOT_OF_RIGHTS):
            return Refused(f"{self.name}: you may not do this ({message}); ask for the role that may", 403)
        if status == 429:
            return _Trouble(f"is too busy ({status})", _retry_after(error), maybe_done=False)
        if status in _BUSY or status >= 500:
            return _Trouble(f"is unavailable ({status}: {message})", _retry_after(error))
        return Refused(f"{self.name}: refused ({status}: {message})", status)


class _Patience:
    """How long one call goes on trying."""

    def __init__(self, server: ApiServer):
        self._server = server
        self._ends = time.monotonic() + server.patience_seconds
        self._tries = self._tries_of_500 = 0

    def wait(self, trouble: _Trouble) -> None:
        """Wait until the next attempt.

        Raises:
            TryAgain: there is none.
        """
        self._tries += 1
        self._tries_of_500 += "(500:" in trouble.reason
        wait = min(LONGEST_WAIT_SECONDS, _FIRST_WAIT_SECONDS * 2 ** (self._tries - 1)) * random.uniform(0.5, 1.0)
        if trouble.wait is not None:
            wait = trouble.wait + random.uniform(0.0, _FIRST_WAIT_SECONDS)
        name, patience = self._server.name, self._server.patience_seconds
        if time.monotonic() + wait > self._ends or self._tries_of_500 >= _TRIES_OF_500:
            asks = f", and asks to wait {trouble.wait:.0f} s" if trouble.wait else ""
            raise TryAgain(f"{name}: {trouble.reason}{asks}; the same command can be given again")
        if self._tries == 2:
            print(f"{name}: {trouble.reason}; trying for up to {patience:.0f} s", file=sys.stderr, flush=True)
        time.sleep(wait)


def _connection_error(error: Exception) -> Exception | None:
    """The error below `error` that says what is wrong with the connection; None when nothing is."""
    import urllib3

    context = error.__context__
    if getattr(error, "status", None) == 0:
        return error
    if isinstance(error, AttributeError) and getattr(context, "status", None) == 0:
        return context if isinstance(context, Exception) else None  # the client's own slip after a TLS error
    if isinstance(error, urllib3.exceptions.MaxRetryError) and isinstance(error.reason, Exception):
        return error.reason
    if isinstance(error, (urllib3.exceptions.HTTPError, ConnectionError, TimeoutError, ssl.SSLError)):
        return error
    return None


def _retry_after(error: Any) -> float | None:
    """Seconds of the header Retry-After: a number, or a date (RFC 9110)."""
    text = (getattr(error, "headers", None) or {}).get("Retry-After")
    if not text:
        return None
    if text.strip().isdecimal():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def _message(error: Any) -> str:
    """What the server says, which is JSON with `message` where it is an API that answers."""
    body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else str(error.body or "")
    try:
        said = json.loads(body)
    except ValueError:
        said = None
    if isinstance(said, dict):
        body = str(said.get("message") or said.get("error_message") or said.get("error") or body)
    elif body.lstrip().startswith("<"):
        body = ""  # a page for people
    return _short(" ".join(body.split()) or str(error.reason or "no reason given"))


def _short(text: str, most: int = 240) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
