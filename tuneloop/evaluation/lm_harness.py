"""Tasks of lm-evaluation-harness (Gao et al., EleutherAI), by name, on the models that are compared.

`lm_eval` is imported when it is needed: it brings torch, and is an extra.
"""

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneloop.errors import TryAgain, UserError
from tuneloop.evaluation.settings import HarnessSettings

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerBase

    from tuneloop.evaluation.contenders import Contender
    from tuneloop.rollout.torch_engine import TorchEngine

BOOTSTRAPS = 1000  # of the standard error of metrics that have no formula for it


@dataclass(frozen=True)
class HarnessScore:
    """One metric of one task.

    Attributes:
        value: as lm-eval computes it.
        stderr: its standard error; None where lm-eval has none.
        n: documents; None for a group of tasks.
        higher_is_better: None where the task does not say.
    """

    value: float
    stderr: float | None
    n: int | None
    higher_is_better: bool | None


Scores = dict[str, dict[str, HarnessScore]]  # task -> metric -> score


def task_manager(settings: HarnessSettings) -> "TaskManager":
    """Knows every task by name; reads no data.

    Raises:
        UserError: lm-eval is not installed, a name is unknown, or `include_path` is no folder.
    """
    if settings.include_path and not Path(settings.include_path).is_dir():
        raise UserError(f"evaluate.harness.include_path {settings.include_path}: no such folder")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"evaluate.harness needs lm-eval, but {error.name or 'lm_eval'} is not installed: "
            "pip install 'tuneloop[harness]', or remove evaluate.harness"
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if settings.include_path:
        own = TaskManager(include_path=settings.include_path, include_defaults=False)
        if set(settings.tasks) <= set(own.all_subtasks):  # a group may name lm-eval's tasks
            return own
    manager = _all_tasks(settings.include_path)
    for name in settings.tasks:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {', '.join(close)}?" if close else "lm-eval ls tasks lists all"
            raise UserError(f"evaluate.harness.tasks: lm-eval has no task {name!r}; {hint}")
    return manager


@lru_cache(maxsize=1)
def _all_tasks(include_path: str) -> "TaskManager":
    """lm-eval's own tasks and those of a folder; reading its thousands of files takes long."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path or None)


class Harness:
    """Runs the configured tasks on one model after another.

    Args:
        contenders: those that are measured.

    Raises:
        UserError: see `task_manager`; or a task's data cannot be had, or it would run code that a model wrote.
        TryAgain: the host of a task's data cannot be reached.
    """

    def __init__(self, settings: HarnessSettings, seed: int, contenders: "Sequence[Contender]"):
        self._settings, self._seed, self._manager = settings, seed, task_manager(settings)
        self._contenders = contenders
        self._scores: dict[tuple[Path, str], Scores] = {}
        for name, task in self._load()["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise UserError(f"evaluate.harness.tasks: {name} runs code that the model writes; leave it out")

    def _load(self) -> Any:
        try:
            return self._manager.load(list(self._settings.tasks))
        except (ConnectionError, TimeoutError) as error:
            raise TryAgain(f"evaluate.harness: a task's data cannot be fetched now ({error})") from None
        except Exception as error:  # data sets, their scripts and their hosts fail in many ways; all are the task's
            line = " ".join(f"{type(error).__name__}: {error}".split())[:400]
            raise UserError(f"evaluate.harness.tasks: a task or its data cannot be loaded ({line})") from error

    def visit(self, contender: "Contender", engine: "TorchEngine", tokenizer: "PreTrainedTokenizerBase") -> None:
        """Measure the model that the engine holds, if it or one that computes the same is to be measured."""
        wanted = {one.key for one in self._contenders}
        if contender.key in wanted and contender.key not in self._scores:
            self._scores[contender.key] = self._run(contender.name, engine, tokenizer)

    def scores(self) -> dict[str, Scores]:
        """What was found, by the models' names."""
        return {one.name: self._scores[one.key] for one in self._contenders}

    def _run(self, name: str, engine: "TorchEngine", tokenizer: "PreTrainedTokenizerBase") -> Scores:
        import lm_eval

        from tuneloop.evaluation.harness_model import EngineLM

        settings = self._settings
        context = getattr(engine.model.config, "max_position_embeddings", None) or settings.max_length
        model = EngineLM(
            engine,
            tokenizer,
            max_length=min(settings.max_length, context),
            batch_tokens=settings.batch_tokens,
            seed=self._seed,
            label=f"harness {name}",
        )
        evaluate: Any = lm_eval.simple_evaluate  # a decorator hides its parameters
        results = evaluate(
            model=model,
            tasks=list(settings.tasks),
            task_manager=self._manager,
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            apply_chat_template=settings.chat_template,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=False,
            random_seed=self._seed,
            numpy_random_seed=self._seed % 2**32,
            torch_random_seed=self._seed,
            fewshot_random_seed=self._seed,
        )
        assert results is not None  # one process
        return read_scores(results)


def read_scores(results: Mapping[str, Any]) -> Scores:
    """Task -> metric -> score of lm-eval's results; a metric is `name`, or `name,filter` when a filter made it."""
    scores: Scores = {}
    counts = results.get("n-samples", {})
    for task, values in results["results"].items():
        better = results.get("higher_is_better", {}).get(task, {})
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            name = metric if filtered == "none" else key
            scores.setdefault(task, {})[name] = HarnessScore(
                value=float(value),
                stderr=float(error) if isinstance(error, int | float) else None,
                n=counts.get(task, {}).get("effective"),
                higher_is_better=better.get(metric),
            )
    return scores


def guard_metrics(scores: Scores) -> dict[str, float]:
    """`<task>/<metric>` -> value, of the metrics that are better when higher: what a guard may name."""
    return {
        f"{task}/{metric}": score.value
        for task, metrics in scores.items()
        for metric, score in metrics.items()
        if score.higher_is_better
    }


def record(scores: Mapping[str, Scores], settings: HarnessSettings) -> dict[str, Any]:
    """The `harness` entry of `evaluation.json`."""
    from importlib.metadata import version

    return {
        "lm_eval": version("lm-eval"),
        "num_fewshot": settings.num_fewshot,
        "limit": settings.limit,
        "chat_template": settings.chat_template,
        "models": {
            name: {
                task: {metric: asdict(score) for metric, score in metrics.items()} for task, metrics in tasks.items()
            }
            for name, tasks in scores.items()
        },
    }
