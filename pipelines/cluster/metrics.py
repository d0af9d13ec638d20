"""The last metric of each step of a run, from the run's folder in the object store."""

import json
import time
from typing import Any

from pipelines.cluster.run_view import ENDED, SUCCEEDED, RunView
from tuneloop.errors import TuneloopError
from tuneloop.storage import NotFound, Storage, open_storage

EVERY_SECONDS = 20.0  # between two looks at a running step's curve
_TRAINING = ("sft_warmup", "lora_rl")
_CURVES = ("validation/accuracy", "reward/mean", "loss/validation", "loss/train")
_RESULTS = {  # step -> (value of its summary, how it is shown)
    "check": (("parameters", "{:,} parameters"),),
    "data_prep": (("rows_train", "{:,} training rows"), ("rows_test", "{:,} test rows")),
    "sft_warmup": (("validation_loss_last", "loss/validation {:.4g}"),),
    "lora_rl": (("validation_accuracy_last", "validation/accuracy {:.3g}"),),
    "merge_adapter": (("top1_agreement", "top-1 agreement {:.4g}"),),
    "evaluate": (("accuracy_candidate", "accuracy {:.3g}"), ("gate_p_value", "p = {:.2g}")),
    "promote": (("version", "version {}"),),
}


class LastMetrics:
    """Reads them; a store that cannot be read from here shows none.

    Args:
        run_uri: the run folder.
    """

    def __init__(self, run_uri: str):
        self._run_uri = run_uri
        self._storage: Storage | None = None
        self._known: dict[str, tuple[float, str]] = {}  # step -> when it was read, and what

    def of(self, run: RunView) -> dict[str, str]:
        """Step -> its last metric as text."""
        if not self._run_uri:
            return {}
        try:
            self._storage = self._storage or open_storage(self._run_uri)
            found = {name: self._of_step(name, step.state) for name, step in run.steps.items() if name in _RESULTS}
        except (TuneloopError, ValueError):
            self._run_uri = ""  # asking again at every look would only slow the table down
            return {}
        return {name: text for name, text in found.items() if text}

    def _of_step(self, name: str, state: str) -> str:
        read_at, text = self._known.get(name, (float("-inf"), ""))
        if read_at == float("inf") or (time.monotonic() - read_at < EVERY_SECONDS and state != SUCCEEDED):
            return text
        text = self._result(name) if state == SUCCEEDED else self._curve(name) if name in _TRAINING else ""
        self._known[name] = (float("inf") if state in ENDED and text else time.monotonic(), text)
        return text

    def _result(self, name: str) -> str:
        summary = json.loads(self._read(f"{name}/step.json") or '{"summary": {}}')["summary"]
        shown = [(summary.get(key), text) for key, text in _RESULTS[name]]
        return ", ".join(text.format(value) for value, text in shown if isinstance(value, int | float))

    def _curve(self, name: str) -> str:
        lines = self._read(f"{name}.partial/metrics.jsonl").decode().splitlines()
        rows: list[dict[str, Any]] = [json.loads(line) for line in lines if line.strip()]
        if not rows:
            return ""
        shown = [f"update {rows[-1].get('update')}"]
        for metric in _CURVES:
            if (value := next((row[metric] for row in reversed(rows) if metric in row), None)) is not None:
                shown.append(f"{metric} {value:.4g}")
        return ", ".join(shown)

    def _read(self, key: str) -> bytes:
        """A file of the run folder; nothing when there is none."""
        assert self._storage
        try:
            return self._storage.read_bytes(key)
        except NotFound:
            return b""
