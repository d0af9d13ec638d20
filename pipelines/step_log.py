"""The steps' own output, picked out of what kfp.local prints around it."""

import re
from collections import deque
from typing import TextIO

from components.node import STEP_BEGINS, STEP_ENDS

_INDENT = "    "  # kfp.local writes it before every line of a task, and before none of its own banners
_EXECUTOR = "[KFP Executor"


class StepLog:
    """A text stream that shows the lines of the steps, each behind its step's name, and hides kfp's own.

    Attributes:
        step: the step that has begun and has not ended.
        killed: the step that never ended, although another one has begun since.
    """

    def __init__(self, stream: TextIO):
        self.step = ""
        self.killed = ""
        self._stream = stream
        self._rest = ""
        self._hidden: deque[str] = deque(maxlen=60)

    def write(self, text: str) -> int:
        """Take part of the log; whole lines are shown at once."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._take(line)
        return len(text)

    def flush(self) -> None:
        """Pass on to the stream."""
        self._stream.flush()

    def isatty(self) -> bool:
        """False: lines are rewritten, so nobody should draw on this stream."""
        return False

    def hidden(self) -> str:
        """The last lines that were not shown: where a step that died before its first line left its traceback."""
        return "\n".join(self._hidden)

    def _take(self, line: str) -> None:
        text = line.removeprefix(_INDENT)
        if text == line or text.startswith(_EXECUTOR):
            self._hidden.append(line)
        elif begins := re.fullmatch(rf"{STEP_BEGINS}(\w+)", text):
            self.killed = self.killed or self.step
            self.step = begins[1]
            self._hidden.clear()
            self._show(f"── {self.step} {'─' * (76 - len(self.step))}")
        elif self.step and text == f"{STEP_ENDS}{self.step}":
            self.step = ""
        elif self.step:
            if text.strip():
                self._show(f"{self.step} | {text.removeprefix(f'{self.step}: ')}")
        else:
            self._hidden.append(text)

    def _show(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()
