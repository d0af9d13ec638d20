"""Promotion: the adapter becomes an immutable version, and the alias moves to it, only if the gate passed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.config import RunConfig
from components.promote.config import PromoteConfig
from components.runner import Step, Summary
from tuneloop import __version__
from tuneloop.config import config_digest
from tuneloop.errors import GateRefused, UserError

if TYPE_CHECKING:
    from tuneloop.registry import Alias


def run(config: RunConfig, inputs: Mapping[str, Path], output: Path) -> Summary:
    """Register the adapter as a new version and move the alias to it, if the gate passed.

    A retry finds the version and the alias that an earlier try has made, so a kill at any instant is harmless.

    Raises:
        GateRefused: the gate said no; nothing was written.
        AliasMoved: the alias no longer names the incumbent that evaluate compared with.
        UserError: the inputs do not belong together, or the registry cannot be used.
    """
    evaluation = _read(inputs["evaluation"] / "evaluation.json", "evaluate")
    gate = _field(evaluation, "gate", dict, inputs["evaluation"] / "evaluation.json", "evaluate")
    if gate.get("passed") is not True:
        raise GateRefused(f"the gate refused the candidate, nothing was promoted: {gate.get('reason')}")
    record = _record(config, inputs, evaluation)
    alias = _promote(config.promote, inputs["training"] / "adapter", record, evaluation["incumbent"])
    place = config.promote
    promotion = {
        "promoted": True,
        "adapter_name": place.adapter_name,
        "version": alias.version,
        "alias": place.alias,
        "previous_version": alias.previous,
        "reason": str(gate.get("reason", "")),
    }
    (output / "promotion.json").write_text(json.dumps(promotion, indent=2) + "\n")
    print(
        f"promoted: {place.adapter_name} version {alias.version} is now {place.alias} in {place.registry}", flush=True
    )
    return {"promoted": True, "version": alias.version, "previous_version": alias.previous}


def _record(config: RunConfig, inputs: Mapping[str, Path], evaluation: dict[str, Any]) -> dict[str, Any]:
    """What version.json says beside the version itself; see docs/formats.md."""
    from tuneloop.models.adapter_files import file_digest

    rl_file, merge_file = inputs["training"] / "rl.json", inputs["merge"] / "merge.json"
    card_file, evaluation_file = inputs["data"] / "data_card.json", inputs["evaluation"] / "evaluation.json"
    rl, merge = _read(rl_file, "lora_rl"), _read(merge_file, "merge_adapter")
    card = _read(card_file, "data_prep")
    models = _field(evaluation, "models", dict, evaluation_file, "evaluate")
    incumbent = _field(evaluation, "incumbent", dict | None, evaluation_file, "evaluate")
    digest = file_digest(inputs["training"] / "adapter")
    about = ((rl_file, rl, "lora_rl"), (merge_file, merge, "merge_adapter"), (evaluation_file, evaluation, "evaluate"))
    for file, values, step in about:
        if _field(values, "adapter_digest", str, file, step) != digest:
            raise UserError(f"{file}: is about another adapter than {inputs['training'] / 'adapter'}; name the outputs "
                            "of one run, or run again from the step that is older")  # fmt: skip
    return {
        "adapter_digest": digest,
        "base_uri": _field(rl, "base_uri", str, rl_file, "lora_rl"),
        "data_fingerprint": _field(card, "fingerprint", str, card_file, "data_prep"),
        "config_digest": config_digest(config),
        "evaluation": {
            "accuracy": {name: model.get("accuracy") for name, model in models.items()},
            "gate": evaluation["gate"],
        },
        "code_version": __version__,
        "parent": _field(incumbent, "version", int, evaluation_file, "evaluate") if incumbent else None,
    }


def _promote(
    place: PromoteConfig, adapter: Path, record: Mapping[str, Any], incumbent: Mapping[str, Any] | None
) -> "Alias":
    from tuneloop.registry import AliasMoved, Registry

    registry = Registry(place.registry)
    parent = record["parent"]
    if incumbent:
        known = registry.show(place.adapter_name, parent)
        if known.record["adapter_digest"] != incumbent.get("adapter_digest"):
            raise UserError(
                f"{place.registry}: {place.adapter_name} version {parent} is not the incumbent that evaluate compared "
                "with; name the registry that evaluate used, or run again from evaluate"
            )
    try:
        # Looked at before anything is stored: a version's record names its parent and its evaluation for good.
        current = registry.resolve(place.adapter_name, place.alias)
        if current is None or current.record["adapter_digest"] != record["adapter_digest"]:
            registry.expect(place.adapter_name, place.alias, parent)
        version = registry.register(place.adapter_name, adapter, record).version
        return registry.promote(place.adapter_name, version, place.alias, parent)
    except AliasMoved as error:
        raise AliasMoved(
            f"{error}; evaluate compared with {f'version {parent}' if parent else 'no incumbent'}: run again from "
            "evaluate, so that the candidate is compared with what is there now"
        ) from None


def _read(file: Path, step: str) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{file}: missing or damaged; name the output of a finished {step} step")
    return values


def _field(values: Mapping[str, Any], name: str, kind: Any, file: Path, step: str) -> Any:
    if name not in values or not isinstance(values[name], kind):
        raise UserError(f"{file}: says nothing usable about {name!r}; run {step} again")
    return values[name]


STEP = Step("promote", ("training", "evaluation", "data", "merge"), run, sections=("promote",))
