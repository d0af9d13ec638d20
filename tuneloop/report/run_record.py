"""What a run folder holds, read without demanding that any part of it exists."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tuneloop.errors import EXIT_GATE_REFUSED, EXIT_TRY_AGAIN, UserError

STEPS = ("check", "data_prep", "sft_warmup", "lora_rl", "merge_adapter", "evaluate", "promote")
MODELS = ("base", "sft", "candidate", "incumbent")
MESSAGE_LENGTH = 2000  # characters; longer ones are cut
State = Literal["done", "failed", "refused", "skipped", "unfinished", "not reached"]


@dataclass(frozen=True)
class StepRecord:
    """One step as the run left it.

    Attributes:
        folder: the finished folder, or the partial one of a step that was stopped; None when there is neither.
        result: the content of `step.json`; empty unless the step is done.
        told: the content of `<step>.failed.json`; empty unless the step left one and is not done.
    """

    name: str
    state: State
    folder: Path | None
    result: dict[str, Any] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float | None:
        return self.result.get("seconds")

    @property
    def peak_rss_bytes(self) -> int | None:
        return self.result.get("peak_rss_bytes")


@dataclass(frozen=True)
class Failure:
    """Why the run ended early: the step, one line, and the step's exit code where it is known."""

    step: str | None
    message: str
    exit_code: int | None = None


@dataclass(frozen=True)
class RunRecord:
    """Everything that the report is made of; the mappings are empty when the run did not get there."""

    folder: Path
    config: dict[str, Any]
    steps: dict[str, StepRecord]
    plan: dict[str, Any]
    data_card: dict[str, Any]
    warmup: dict[str, Any]
    rl: dict[str, Any]
    merge: dict[str, Any]
    evaluation: dict[str, Any]
    promotion: dict[str, Any]
    failure: Failure | None
    unreadable: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def status(self) -> Literal["promoted", "kept", "skipped", "failed"]:
        """promoted; kept (the incumbent, or nothing, stays in production); skipped (the data is what the incumbent was
        trained on); failed (anything else)."""
        if self.failure:
            return "failed"
        if any(step.state == "skipped" for step in self.steps.values()):
            return "skipped"
        return "promoted" if self.promotion.get("promoted") else "kept"

    @property
    def config_digest(self) -> str | None:
        """sha256 of the resolved config, as `tuneloop.config.config_digest` computes it."""
        if not self.config:
            return None
        canonical = json.dumps(self.config, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def code_version(self) -> str | None:
        versions = [step.result.get("code_version") for step in self.steps.values() if step.result]
        return versions[-1] if versions else None

    @property
    def finished_at(self) -> str | None:
        return max((str(step.result.get("finished_at") or "") for step in self.steps.values()), default="") or None


def dig(value: Any, *keys: str | int) -> Any:
    """The value at a path through mappings and lists, or None where the path ends early."""
    for key in keys:
        if isinstance(value, dict):
            value = value.get(key)
        elif isinstance(value, list | tuple) and isinstance(key, int) and -len(value) <= key < len(value):
            value = value[key]
        else:
            return None
    return value


def read_run(folder: Path, error: str = "") -> RunRecord:
    """Read a run folder.

    Args:
        folder: `<output>/<run>`; only the folder itself must exist.
        error: why the run ended, when the caller knows; otherwise `<step>.failed.json` is read.

    Raises:
        UserError: there is no such folder.
    """
    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder; name the folder that holds check/, data_prep/, …")
    unreadable: list[str] = []
    steps = {name: _read_step(folder, name, unreadable) for name in STEPS}

    def part(step: str, file: str) -> dict[str, Any]:
        record = steps[step]
        return _read_json(record.folder / file, unreadable) if record.folder else {}

    promotion = part("promote", "promotion.json")
    evaluation = part("evaluate", "evaluation.json")
    if dig(evaluation, "gate", "passed") is False and steps["promote"].state == "not reached":
        steps["promote"] = replace(steps["promote"], state="refused")
    if dig(steps["data_prep"].result, "summary", "changed") is False and steps["sft_warmup"].state == "not reached":
        steps |= {name: replace(step, state="skipped") for name, step in steps.items() if step.state == "not reached"}
    config = _read_json(folder / "config.json", unreadable)
    for record in reversed(steps.values()):
        if not config and record.folder:
            config = _read_json(record.folder / "config.json", unreadable)
    return RunRecord(
        folder=folder,
        config=config,
        steps=steps,
        plan=part("check", "plan.json"),
        data_card=part("data_prep", "data_card.json"),
        warmup=part("sft_warmup", "warmup.json"),
        rl=part("lora_rl", "rl.json"),
        merge=part("merge_adapter", "merge.json"),
        evaluation=evaluation,
        promotion=promotion,
        failure=_failure(steps, error),
        unreadable=tuple(unreadable),
    )


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; a line cut off by a kill, or damaged, is passed over."""
    try:
        lines = path.open(encoding="utf-8", errors="replace")
    except OSError:
        return
    with lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def _read_step(folder: Path, name: str, unreadable: list[str]) -> StepRecord:
    done, partial = folder / name, folder / f"{name}.partial"
    result = _read_json(done / "step.json", unreadable)
    if done.is_dir():
        return StepRecord(name, "done", done, result)
    existing = partial if partial.is_dir() else None
    told = _read_json(folder / f"{name}.failed.json", unreadable)
    if told:
        states: dict[Any, State] = {EXIT_GATE_REFUSED: "refused", EXIT_TRY_AGAIN: "unfinished"}
        return StepRecord(name, states.get(told.get("exit_code"), "failed"), existing, told=told)
    return StepRecord(name, "unfinished" if existing else "not reached", existing)


def _read_json(path: Path, unreadable: list[str]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        unreadable.append(f"{path.parent.name}/{path.name}: {error}")
        return {}
    return value if isinstance(value, dict) else {}


def _failure(steps: dict[str, StepRecord], error: str) -> Failure | None:
    """The first step that is neither done nor refused by the gate, and why; None when the run came to its end."""
    line = _one_line(error)
    stopped = next((record for record in steps.values() if record.state not in ("done", "refused", "skipped")), None)
    if stopped is None:
        return Failure(None, line) if line else None
    told = _one_line(stopped.told.get("message") or "")
    verbs = {"failed": "failed without a message", "unfinished": "was stopped before it finished"}
    default = f"{stopped.name} {verbs.get(stopped.state, 'was not run')}; the same command continues there"
    return Failure(stopped.name, told or line or default, stopped.told.get("exit_code"))


def _one_line(message: object) -> str:
    line = " ".join(str(message).split())
    return line if len(line) <= MESSAGE_LENGTH else f"{line[:MESSAGE_LENGTH]}…"
