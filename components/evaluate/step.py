"""Evaluation: base, warm-up, candidate and incumbent answer the same held-out prompts, and the gate decides."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.config import RunConfig
from components.runner import Step, Summary
from tuneloop.errors import UserError
from tuneloop.evaluation.settings import COST_METRICS

if TYPE_CHECKING:
    from tuneloop.data.schema import Example
    from tuneloop.evaluation.accuracy import Comparison, ModelScores
    from tuneloop.evaluation.contenders import Contender
    from tuneloop.evaluation.harness import AnswerSettings, ModelAnswers
    from tuneloop.evaluation.lm_harness import Harness, Scores


@dataclass(frozen=True)
class Incumbent:
    """What the alias names while we evaluate; promote moves the alias only if it still names this."""

    version: int
    contender: "Contender"


def run(config: RunConfig, inputs: Mapping[str, Path], output: Path) -> Summary:
    """Compare base, warm-up, candidate and incumbent on held-out prompts, and decide whether to promote."""
    from tuneloop.evaluation.accuracy import compare, summarise
    from tuneloop.evaluation.contenders import answer_all
    from tuneloop.evaluation.gate import decide
    from tuneloop.evaluation.lm_harness import guard_metrics
    from tuneloop.evaluation.lm_harness import record as harness_record
    from tuneloop.rewards.base import build_scorer

    settings = config.evaluate
    examples = _held_out(inputs["data"] / "test.parquet", config)
    scorer = build_scorer(config.task.rewards)
    _require_measured_guards(config, scorer.names)
    contenders = _own_models(config, inputs["warmup"], inputs["training"])
    incumbent = _incumbent(config)
    if incumbent:
        contenders.append(incumbent.contender)
    harness = _harness(config, contenders)
    asked, visit = _asked(config, output), harness.visit if harness else None
    answers = answer_all(contenders, examples, scorer, asked, config.model.dtype, visit)
    scores = {name: summarise(made, settings.pass_k, settings.confidence) for name, made in answers.items()}
    comparisons = [
        compare(answers["candidate"], answers[name], name, metric, settings.confidence)
        for name in answers
        if name != "candidate"
        for metric in ("accuracy", "pass_at_1")
    ]
    measured = harness.scores() if harness else {}
    metrics = {name: one.metrics | guard_metrics(measured.get(name, {})) for name, one in scores.items()}
    _require_measured_guards(config, tuple(metrics["candidate"]), after=True)
    digests = {one.name: one.adapter.digest() for one in contenders if one.adapter}
    decision = decide(comparisons, metrics, digests, settings.gate)
    evaluation = {
        "prompts": len(examples),
        "samples": settings.samples,
        "seed": config.seed,
        "confidence": settings.confidence,
        "adapter_digest": digests["candidate"],
        "incumbent": {"version": incumbent.version, "adapter_digest": digests["incumbent"]} if incumbent else None,
        "models": {name: one.record() for name, one in scores.items()},
        "comparisons": [one.record() for one in comparisons],
        "gate": decision.record(),
    }
    if harness and settings.harness:
        evaluation["harness"] = harness_record(measured, settings.harness)
    (output / "evaluation.json").write_text(json.dumps(evaluation, indent=2, allow_nan=False) + "\n")
    _write_answers(answers, output / "answers.parquet")
    _print_scores(scores, comparisons)
    _print_harness(measured)
    print(f"gate: {'passed' if decision.passed else 'refused'}: {decision.reason}", flush=True)
    summary: Summary = {f"accuracy_{name}": one.accuracy.value for name, one in scores.items()}
    return summary | {"gate_passed": decision.passed, "gate_p_value": decision.p_value, "prompts": len(examples)}


def _asked(config: RunConfig, output: Path) -> "AnswerSettings":
    from tuneloop.evaluation.harness import AnswerSettings

    return AnswerSettings(
        samples=config.evaluate.samples,
        sampling=config.evaluate.sampling,
        max_new_tokens=config.task.max_new_tokens,
        seed=config.seed,
        at_once=config.evaluate.max_sequences,
        engine=config.evaluate.engine,
        max_length=config.model.max_length,
        log=output / "engine.log",
    )


def _require_measured_guards(config: RunConfig, measured: tuple[str, ...], after: bool = False) -> None:
    """Refuse guards on what is not measured; those of harness tasks are known once the tasks have run."""
    known = {*measured, *COST_METRICS}
    for guard in config.evaluate.gate.guards:
        of_harness = config.evaluate.harness and "/" in guard.metric
        if guard.metric not in known and (after or not of_harness):
            reason = "not measured by its task, or better when lower" if of_harness else "not measured"
            raise UserError(f"evaluate.gate.guards: {guard.metric!r} is {reason}; known: {', '.join(sorted(known))}")


def _harness(config: RunConfig, contenders: "list[Contender]") -> "Harness | None":
    from tuneloop.evaluation.lm_harness import Harness

    if config.evaluate.harness is None:
        return None
    return Harness(config.evaluate.harness, config.seed, [one for one in contenders if one.name != "sft"])


def _held_out(file: Path, config: RunConfig) -> "list[Example]":
    from tuneloop.data.reader import read_examples

    examples = read_examples(file)
    if len(examples) < config.evaluate.min_prompts:
        raise UserError(
            f"{file}: {len(examples)} held-out prompts, fewer than evaluate.min_prompts = "
            f"{config.evaluate.min_prompts}: raise data_prep.test_share, add rows, or lower evaluate.min_prompts"
        )
    return sorted(examples, key=lambda example: example.id)[: config.evaluate.prompts]


def _own_models(config: RunConfig, warmup: Path, training: Path) -> "list[Contender]":
    """Base, warm-up and candidate; after a full fine-tuning the last two stand on the warmed-up model."""
    from tuneloop.evaluation.contenders import Contender
    from tuneloop.models.adapter_io import load_adapter
    from tuneloop.models.sources import resolve_model

    base = resolve_model(config.model.uri)
    warmed = warmup / "model" if (warmup / "model").is_dir() else base
    candidate = load_adapter(training / "adapter")
    _require_digest(candidate.digest(), training / "rl.json")
    return [
        Contender("base", base),
        Contender("sft", warmed, load_adapter(warmup / "adapter")),
        Contender("candidate", warmed, candidate),
    ]


def _require_digest(digest: str, record: Path) -> None:
    """Refuse an adapter that is not the one that its step has recorded."""
    try:
        recorded = json.loads(record.read_text())["adapter_digest"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{record}: missing or damaged; name the output of a finished lora_rl step") from None
    if recorded != digest:
        raise UserError(f"{record.parent}: adapter/ is not the adapter that rl.json names; restore it or train again")


def _incumbent(config: RunConfig) -> Incumbent | None:
    """The version that the registry's alias names, with its base; None when it names nothing yet."""
    from tuneloop.evaluation.contenders import Contender
    from tuneloop.models.adapter_io import load_adapter
    from tuneloop.models.sources import resolve_model
    from tuneloop.registry import Registry

    place = config.promote
    found = Registry(place.registry).resolve(place.adapter_name, place.alias)
    if found is None:
        return None
    what = f"the incumbent ({place.adapter_name} version {found.version})"
    with tempfile.TemporaryDirectory(prefix="tuneloop-incumbent-") as folder:
        adapter = load_adapter(found.fetch_adapter(Path(folder) / "adapter"))
    if adapter.digest() != found.record["adapter_digest"]:
        raise UserError(f"{what}: its files are not the adapter that its record names; roll the alias back")
    base_uri = found.record.get("base_uri")
    if not isinstance(base_uri, str):
        raise UserError(f"{what}: its record names no base_uri; register it again or roll the alias back")
    try:
        base = resolve_model(base_uri)
    except UserError as error:
        raise UserError(f"{what} stands on {base_uri}, which cannot be loaded, so nothing can be compared with it: "
                        f"{error}") from None  # fmt: skip
    return Incumbent(found.version, Contender("incumbent", base, adapter))


def _write_answers(answers: "Mapping[str, ModelAnswers]", file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("model", pa.string()),
            ("prompt_id", pa.string()),
            ("sample", pa.int32()),
            ("completion", pa.string()),
            ("tokens", pa.int32()),
            ("truncated", pa.bool_()),
            ("correct", pa.bool_()),
            ("reward", pa.float64()),
        ]
    )
    rows: list[dict[str, Any]] = [
        {"model": name} | {column: getattr(answer, column) for column in schema.names[1:]}
        for name, made in answers.items()
        for answer in made
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema), file)


def _print_scores(scores: "Mapping[str, ModelScores]", comparisons: "list[Comparison]") -> None:
    against = {one.reference: one for one in comparisons if one.metric == "accuracy"}
    for name, one in scores.items():
        line = f"{name:<10} accuracy {one.accuracy.value:6.1%}   pass@1 {one.pass_at[1].value:6.1%}"
        if name in against:
            line += f"   candidate {100 * against[name].difference:+.1f} points, p = {against[name].p_value:.2g}"
        print(line, flush=True)


def _print_harness(measured: "Mapping[str, Scores]") -> None:
    for task, metrics in measured.get("candidate", {}).items():
        for metric in metrics:
            values = "   ".join(f"{name} {tasks[task][metric].value:.4g}" for name, tasks in measured.items())
            print(f"{task} {metric}: {values}", flush=True)


STEP = Step(
    "evaluate",
    ("data", "warmup", "training"),
    run,
    # promote: it names the incumbent, which is an input too
    sections=("model", "task", "evaluate", "promote"),
)
