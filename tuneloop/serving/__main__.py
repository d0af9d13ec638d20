"""`python -m tuneloop.serving vllm | follow | fetch-base`."""

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from tuneloop.errors import EXIT_OK, EXIT_USER_ERROR, TuneloopError, UserError
from tuneloop.registry import PRODUCTION, Registry
from tuneloop.registry.layout import check_name
from tuneloop.serving.alias_follower import AliasFollower, Status
from tuneloop.serving.readiness import Readiness
from tuneloop.serving.vllm_launcher import launch
from tuneloop.serving.vllm_server import VllmServer

LONGEST_WAIT_SECONDS = 300.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if arguments[:1] == ["vllm"]:  # all that follows is vLLM's own
            launch(arguments[1:])
            return EXIT_OK
        options = _parser().parse_args(arguments)
        options.command(options)
    except TuneloopError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return EXIT_OK


def follow(options: argparse.Namespace) -> None:
    """Follow an alias until SIGTERM or Ctrl-C.

    Raises:
        UserError: the registry's URI or the adapter's name cannot be one.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    server = VllmServer(options.server, os.environ.get("VLLM_API_KEY", ""))
    registry = Registry(options.registry)
    check_name(options.adapter, "adapter")
    check_name(options.alias, "alias")
    follower = AliasFollower(registry, options.adapter, options.alias, server, options.folder.absolute(), options.base)
    print(f"following {options.adapter} {options.alias} in {options.registry}", flush=True)
    failures, said = 0, Status()
    with Readiness(options.port, follower.is_served) as readiness:
        while not stop.is_set():
            status = readiness.status = follower.look()
            if status != said:
                print(describe(options.adapter, status), flush=True)
            said = status
            failures = failures + 1 if status.problem and not status.waiting else 0
            wait(stop, options.interval, wait_seconds(options.interval, failures), follower.is_served)


def describe(adapter: str, status: Status) -> str:
    """One line for the log."""
    served = f"version {status.served} is served" if status.served else "nothing is served"
    return f"{adapter}: {served}" + (f"; {status.problem}" if status.problem else "")


def wait(stop: threading.Event, interval: float, seconds: float, is_served: Callable[[], bool]) -> None:
    """Wait; of more than an interval only as long as the adapter is served, which it is not by a vLLM started again."""
    end = time.monotonic() + seconds
    while not stop.wait(max(0.0, min(interval, end - time.monotonic()))):
        if time.monotonic() >= end or not is_served():
            return


def wait_seconds(interval: float, failures: int) -> float:
    """Until the next look: the interval, doubled at every failure in a row, up to five minutes."""
    return min(interval * 2 ** min(failures, 16), max(interval, LONGEST_WAIT_SECONDS))


def fetch_base(options: argparse.Namespace) -> None:
    """Fetch a base model into the cache and let `--to` point at it.

    Raises:
        UserError: there is no such model, or `--to` is in the way.
        TryAgain: the store or the hub is unavailable.
    """
    from tuneloop.models.sources import resolve_model

    link: Path = options.to
    if link.exists() and not link.is_symlink():
        raise UserError(f"{link}: is in the way; name a path that does not exist")
    folder = resolve_model(options.model)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(folder.absolute())
    print(f"{link} is {options.model}", flush=True)


class _OneLine(argparse.ArgumentParser):
    """A parser whose errors are one line, as every other refusal."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_USER_ERROR)


def _parser() -> argparse.ArgumentParser:
    parser = _OneLine(prog="python -m tuneloop.serving", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_OneLine)
    commands.add_parser("vllm", help="vLLM's OpenAI server, with its own options", add_help=False)
    following = commands.add_parser("follow", help="keep a vLLM server on the version that an alias names")
    following.add_argument("--registry", required=True, metavar="URI", help="a folder or s3://bucket/prefix")
    following.add_argument("--adapter", required=True, metavar="NAME", help="the adapter, and the model's name in vLLM")
    following.add_argument("--alias", default=PRODUCTION, help=f"the alias (default: {PRODUCTION})")
    following.add_argument("--server", default="http://127.0.0.1:8000", metavar="URL", help="vLLM's OpenAI server")
    following.add_argument("--folder", type=Path, default=Path("adapters"), help="where adapters are kept for vLLM")
    following.add_argument("--base", default="", metavar="URI", help="refuse adapters of another base than this")
    following.add_argument("--interval", type=_seconds, default=15.0, metavar="SECONDS", help="between two looks (15)")
    following.add_argument("--port", type=int, default=8081, help="of GET /ready (8081)")
    following.set_defaults(command=follow)
    fetching = commands.add_parser("fetch-base", help="fetch a base model, so that vLLM needs no network")
    fetching.add_argument("--model", required=True, metavar="URI", help="a folder, hf:// or s3:// URI")
    fetching.add_argument("--to", type=Path, required=True, help="the path that shall point at it")
    fetching.set_defaults(command=fetch_base)
    return parser


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.01 <= value <= 3600:
        raise argparse.ArgumentTypeError("give 0.01 to 3600 seconds")
    return value


if __name__ == "__main__":
    sys.exit(main())
