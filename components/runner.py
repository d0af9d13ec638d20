"""How every step is run: alone (`python -m components.<step>`) or from the pipeline, with the same guarantees.

A step writes into `<output>.partial` and the whole folder is renamed to `<output>` when it is complete, so an output
either exists and is complete, or does not exist. A resumable step finds its partial folder again after a kill; any
other step starts from an empty one. `step.json` in the output records what went in, how long it took and how much
memory it needed. Inputs and outputs may lie in an object store: `components.places`.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from components.config import RunConfig
from components.mirror import CHECKPOINTS, FINGERPRINT
from components.places import Input, Place, open_place
from components.result import StepResult, Summary
from tuneloop.config import config_digest, resolved_json
from tuneloop.errors import TryAgain, UserError
from tuneloop.process import peak_rss_bytes
from tuneloop.tracking import tracked

Maker = Callable[[RunConfig, Mapping[str, str], str, str], None]


@dataclass(frozen=True)
class Step:
    """One node of the DAG.

    Attributes:
        name: the folder under `components/`, and the folder of its output in a run.
        inputs: names of the input URIs, in the order of the DAG's arrows.
        run: `run(config, inputs, output) -> summary`; `inputs` are local paths, `output` is the folder to fill.
        sections: the config sections that decide the result; others may change without a re-run.
        optional_inputs: inputs that may be missing.
        resumable: the step continues from what it finds under `checkpoints/` in `output` after a kill.
        maker: for a config whose output other machines make, what has them make it:
            `make(config, inputs, output, fingerprint)`, with URIs. They run the step themselves, output and all.
        indifferent: settings, as `section.key`, that say where and how it runs but not what it computes: they may
            change between two runs of a resumable step.
    """

    name: str
    inputs: tuple[str, ...]
    run: Callable[[RunConfig, Mapping[str, Path], Path], Summary]
    sections: tuple[str, ...]
    optional_inputs: tuple[str, ...] = ()
    resumable: bool = False
    indifferent: tuple[str, ...] = ()
    maker: Callable[[RunConfig], Maker | None] | None = None


def execute(step: Step, config: RunConfig, inputs: Mapping[str, str], output: str) -> StepResult:
    """Run a step, or find that this very step has already been run into `output`.

    Raises:
        UserError: an input is missing, the output holds something else, or another process is writing it.
        TryAgain: the step was told to stop and has saved its state, or an object store is unavailable.
    """
    place = open_place(output)
    given = {name: _input(step, name, inputs[name]) for name in step.inputs if inputs.get(name)}
    upstream = {name: found for name, source in given.items() if (found := source.fingerprint())}
    fingerprint = fingerprint_from(step, config, upstream)
    with place.claimed():
        done = place.finished()
        if done is None:
            if step.maker and (make := step.maker(config)):
                done = _made_elsewhere(make, config, given, place, fingerprint)
            else:
                if not place.made(fingerprint):
                    _make(step, config, given, place, fingerprint)
                done = place.publish()
            if done.fingerprint == fingerprint:
                memory = done.peak_rss_bytes / 1e6
                print(f"{step.name}: done in {done.seconds:.1f} s, peak memory {memory:,.0f} MB", flush=True)
                return done
    if done.fingerprint != fingerprint:
        what = f"already holds a {done.step} output made from other settings or inputs"
        raise UserError(f"{place.name}: {what}; choose another --output or remove it")
    print(f"{step.name}: already done, reusing {place.name}", flush=True)
    return done


def _made_elsewhere(
    make: Maker, config: RunConfig, given: Mapping[str, Input], place: Place, fingerprint: str
) -> StepResult:
    make(config, {name: source.name for name, source in given.items()}, place.name, fingerprint)
    done = place.finished()
    if done is None:
        raise TryAgain(f"{place.name}: is not there, though those that were to make it are done; give it again")
    return done


def _make(step: Step, config: RunConfig, given: Mapping[str, Input], place: Place, fingerprint: str) -> None:
    """Run the step into the place's folder."""
    paths = {name: source.fetch() for name, source in given.items()}
    partial = place.partial
    if not step.resumable or not _continues(partial, fingerprint):
        if step.resumable and partial.exists():
            print(f"{step.name}: {partial} was made from other settings or inputs; starting over", flush=True)
        shutil.rmtree(partial, ignore_errors=True)
    if step.resumable:
        place.begin(fingerprint)
    partial.mkdir(parents=True, exist_ok=True)
    (partial / FINGERPRINT).write_text(fingerprint)
    started = time.perf_counter()
    try:
        with _tracked(step, config, partial, place.folder), _mirrored(step, place):
            summary = step.run(config, paths, partial)
    except BaseException:
        if not step.resumable or not (partial / CHECKPOINTS).is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        raise
    result = StepResult(
        step=step.name,
        fingerprint=fingerprint,
        seconds=round(time.perf_counter() - started, 3),
        peak_rss_bytes=peak_rss_bytes(),
        summary=summary,
        config_digest=config_digest(config),
        inputs={name: source.name for name, source in given.items()},
        finished_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    (partial / "config.json").write_text(resolved_json(config))
    result.write(partial)
    (partial / FINGERPRINT).unlink()
    os.replace(partial, place.folder)
    shutil.rmtree(place.folder / CHECKPOINTS, ignore_errors=True)  # they served to get here, and are large


def _input(step: Step, name: str, uri: str) -> Input:
    return Input(f"--{name.replace('_', '-')}", uri, step.name)


def _mirrored(step: Step, place: Place) -> contextlib.AbstractContextManager[None]:
    return place.mirrored() if step.resumable else contextlib.nullcontext()


def _tracked(step: Step, config: RunConfig, partial: Path, target: Path) -> contextlib.AbstractContextManager[None]:
    if not step.resumable:  # only training logs metrics
        return contextlib.nullcontext()
    group = target.resolve().parent.name or config.name
    return tracked(config.tracking, partial, group=group, step=step.name, resolved=config.model_dump(mode="json"))


def step_fingerprint(step: Step, config: RunConfig, inputs: Mapping[str, Path]) -> str:
    """`fingerprint_from` the finished outputs in local folders."""
    upstream = {}
    for name, path in inputs.items():
        with contextlib.suppress(UserError):
            upstream[name] = StepResult.read(path).fingerprint
    return fingerprint_from(step, config, upstream)


def fingerprint_from(step: Step, config: RunConfig, upstream: Mapping[str, str]) -> str:
    """sha256 over the step's config sections, the seed and the fingerprints of the steps that made its inputs."""
    values = config.model_dump(mode="json", include={*step.sections, "seed"})
    for setting in step.indifferent:
        section, _, key = setting.partition(".")
        del values[section][key]
    text = json.dumps([step.name, values, dict(upstream)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _continues(partial: Path, fingerprint: str) -> bool:
    mark = partial / FINGERPRINT
    return mark.exists() and mark.read_text() == fingerprint
