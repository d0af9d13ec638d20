"""What was made on the way is removed again when the way is not gone to its end."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

from components.api_calls import ApiServer
from tuneloop.errors import TuneloopError

T = TypeVar("T")


class Undo:
    """Takes back, in reverse, what has been done to a server."""

    def __init__(self, server: ApiServer):
        self._server = server
        self._stack = contextlib.ExitStack()

    def on_failure(self, what: str, action: Callable[[], object]) -> None:
        """Have `action` called; where that fails too, say that `what` is left."""
        self._stack.callback(self._try, what, action)

    def ensure(
        self, what: str, find: Callable[[], T | None], make: Callable[[], T], remove: Callable[[T], object]
    ) -> tuple[T, bool]:
        """`ApiServer.ensure`, taken back by `remove` if it was made here, even when the making is interrupted."""
        before = self._server.call(find)
        if before is not None:
            return before, False
        mine = True

        def take_back() -> None:
            found = find() if mine else None
            if found is not None:
                remove(found)

        self.on_failure(what, take_back)
        found, mine = self._server.ensure(find, make)
        return found, mine

    def _try(self, what: str, action: Callable[[], object]) -> None:
        try:
            self._server.briefly(lambda: self._server.absent_as_none(action))
        except TuneloopError as error:
            print(f"warning: {what} may be left, which the same command uses again: {error}", file=sys.stderr)


@contextlib.contextmanager
def undone_on_failure(server: ApiServer) -> Iterator[Undo]:
    """An `Undo` that is carried out when the body fails or is interrupted."""
    undo = Undo(server)
    with undo._stack as stack:
        yield undo
        stack.pop_all()
