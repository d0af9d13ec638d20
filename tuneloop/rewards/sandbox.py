"""A child process that scores what a model wrote, so that no completion can hang or bloat the run.

Third-party scorers evaluate expressions such as `9**9**9**9`. A Python signal handler cannot interrupt the C code that
computes it, and signals do not reach threads. The child puts itself under kernel limits instead: an interval timer on
CPU time (so that a busy machine changes nothing) whose signal ends the process, and a cap on memory.
"""

import contextlib
import importlib
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from functools import cache
from typing import IO, Any

from tuneloop.errors import TryAgain

CPU_SECONDS = 2.0  # of one call; math-verify and reasoning-gym need milliseconds
MEMORY_BYTES = 4 * 2**30

logger = logging.getLogger(__name__)


class SandboxError(Exception):
    """The function raised in the child; the text is its exception."""


class Exhausted(Exception):
    """The call ran out of CPU time or memory, and the child with it."""


class Sandbox:
    """Calls one function in a child process; arguments and results travel as JSON.

    The child starts with the first call, is shared by threads, and starts anew after a call that exhausted it. It ends
    when this object does, and when this process dies.
    """

    def __init__(self, target: str, cpu_seconds: float = CPU_SECONDS):
        """Args: `target` is `package.module:function`; `cpu_seconds` bounds one call."""
        self.target, self.cpu_seconds = target, cpu_seconds
        self._child: subprocess.Popen[str] | None = None
        self._owner = 0
        self._lock = threading.Lock()

    def call(self, *arguments: Any) -> Any:
        """The function's result.

        Raises:
            SandboxError: the function raised.
            Exhausted: it used more CPU time or memory than it may; a warning shows the arguments.
            TryAgain: something else killed the child.
        """
        with self._lock:
            child = self._running()
            assert child.stdin
            assert child.stdout
            line = ""
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(json.dumps(arguments) + "\n")
                child.stdin.flush()
                line = child.stdout.readline()
            if not line.endswith("\n"):
                self._child = None
                code = child.wait()
                if code in (-signal.SIGKILL, -signal.SIGTERM):  # our limits end it in other ways
                    raise TryAgain(f"the process that scores completions ({self.target}) was killed from outside")
                logger.warning("%s gave up on %.200s (exit %s); scored 0", self.target, json.dumps(arguments), code)
                raise Exhausted(f"{self.target}: exit code {code}")
        answer = json.loads(line)
        if "error" in answer:
            raise SandboxError(answer["error"])
        return answer["value"]

    def _running(self) -> "subprocess.Popen[str]":
        if self._child is None or self._owner != os.getpid():  # a forked process must not share its parent's pipes
            child = subprocess.Popen(
                [sys.executable, "-m", "tuneloop.rewards.sandbox", self.target, str(self.cpu_seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
            )
            assert child.stdout
            if child.stdout.readline() != "ready\n":
                raise RuntimeError(f"the child process of {self.target} did not start (exit code {child.wait()})")
            self._child, self._owner = child, os.getpid()
            weakref.finalize(self, _end, child, self._owner)
        return self._child


def _end(child: "subprocess.Popen[str]", owner: int) -> None:
    if os.getpid() != owner:
        return
    for pipe in (child.stdin, child.stdout):
        if pipe:
            with contextlib.suppress(OSError):
                pipe.close()
    child.kill()
    child.wait()


@cache
def shared_sandbox(target: str) -> Sandbox:
    """The one sandbox of this process for `target`."""
    return Sandbox(target)


def _serve(target: str, cpu_seconds: float) -> None:
    """The child: read a JSON list of arguments a line, answer with a JSON line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what scorers print must not mix with the answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; end of input ends us
    module, _, name = target.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    _reply(answers, "ready")
    for line in sys.stdin:
        arguments = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        try:
            reply = {"value": function(*arguments)}
        except MemoryError:
            os._exit(1)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"[:500]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        _reply(answers, json.dumps(reply))


def _reply(stream: IO[str], text: str) -> None:
    stream.write(text + "\n")
    stream.flush()


if __name__ == "__main__":
    _serve(sys.argv[1], float(sys.argv[2]))
