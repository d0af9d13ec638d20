"""GSM8K's rows (Cobbe et al., 2021, arXiv:2110.14168): worked answers that end in `#### <number>`."""

import re
from collections.abc import Mapping
from typing import Any

from tuneloop.data.columns import Conversation
from tuneloop.data.record import BadRow, Row

_ANNOTATION = re.compile(r"<<[^<>]*>>")  # <<48/2=24>>, a calculator call beside the number it gives
_NUMBER = re.compile(r"-?(\d+\.?\d*|\.\d+)")


class Gsm8kParser:
    """Reads `question` and `answer`; the answer becomes the final number, the completion the worked text.

    Commas, a dollar sign and a percent sign are taken off the number; annotations are taken out of the text.
    """

    columns: Mapping[str, str] = {"question": "", "answer": ""}

    def __init__(self, template: str = "{prompt}", system_prompt: str = ""):
        self._conversation = Conversation(template, system_prompt)

    def __call__(self, value: Mapping[str, Any]) -> Row:
        roles, contents = self._conversation.messages(value.get("question"))
        worked = value.get("answer")
        if not isinstance(worked, str) or not worked:
            raise BadRow("the answer is missing" if not worked else f"the answer is a {type(worked).__name__}")
        text, mark, number = worked.rpartition("####")
        if not mark:
            raise BadRow("the answer has no final line `#### <number>`")
        number = number.strip().replace(",", "").strip("$%").rstrip(".")
        if not _NUMBER.fullmatch(number):
            raise BadRow(f"what follows #### is not a number: {number[:40]!r}")
        return Row(roles, contents, number, f"{_ANNOTATION.sub('', text).rstrip()}\n#### {number}".lstrip())
