"""Command lines that refuse a wrong argument as they refuse everything else: one line, exit code 2."""

import argparse
import inspect
import sys
from collections.abc import Callable
from typing import NoReturn

from tuneloop.errors import EXIT_USER_ERROR


class CommandLine(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line and that accepts no abbreviated options."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        """Print the one line and leave."""
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_USER_ERROR)


def first_paragraph(function: Callable) -> str:
    """What a function does, by its docstring, for the help of its command: without Args, Returns and Raises."""
    return (inspect.getdoc(function) or "").partition("\n\n")[0]
