"""What was made on the way is removed again when the way is not gone to its end."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def undone_on_failure() -> Iterator[contextlib.ExitStack]:
    """Callbacks of the stack are called, the last first, only when the body fails."""
    with contextlib.ExitStack() as undo:
        yield undo
        undo.pop_all()
