"""The model card: what a Hugging Face repository of the adapter shows as its README."""

import json
import re

from tuneloop.report.comparison import comparisons, interval_name, interval_of, score
from tuneloop.report.number import count, p_value, percent, points
from tuneloop.report.run_record import MODELS, RunRecord, dig
from tuneloop.report.verdict import headline, lead

NAMES = {"base": "base", "sft": "SFT warm-up", "candidate": "this adapter", "incumbent": "incumbent"}


def model_card(run: RunRecord) -> str:
    """The card as Markdown with YAML front matter; what the run did not reach is said to be missing."""
    name = run.promotion.get("adapter_name") or dig(run.config, "promote", "adapter_name") or run.name
    version = dig(run.promotion, "version")
    title = f"{name}, version {version}" if version else f"{name} (run {run.name})"
    parts = [
        _front_matter(run, str(name)),
        f"# {_markdown(title)}",
        _what_it_is(run),
        _evaluation(run),
        _data(run),
        _training(run),
        _use(run, str(name)),
        _limits(run),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(run: RunRecord, name: str) -> str:
    """YAML; every value is written as JSON, which YAML contains."""
    hub_name = _hub_name(_base(run))
    algorithm = dig(run.config, "lora_rl", "algorithm", "name")
    tags = ["lora", "reinforcement-learning", "tuneloop", *([algorithm] if algorithm else [])]
    sources = dig(run.config, "data_prep", "sources") or []
    uris = [str(dig(source, "uri")) for source in sources if dig(source, "kind") == "huggingface"]
    datasets = [uri for uri in uris if re.fullmatch(r"\w[\w.-]*/[\w.-]+", uri)]
    lines = [f"base_model: {json.dumps(hub_name)}"] if hub_name else []
    lines += ["library_name: peft", "pipeline_tag: text-generation", f"tags: {json.dumps(tags)}"]
    lines += [f"datasets: {json.dumps(datasets)}"] if datasets else []
    value = score(run, "candidate").get("value")
    if value is not None:
        result = {
            "task": {"type": "text-generation"},
            "dataset": {"name": _sources(run) or "held-out prompts", "type": "held-out prompts"},
            "metrics": [{"type": "accuracy", "value": value}],
        }
        lines.append(f"model-index: {json.dumps([{'name': name, 'results': [result]}])}")
    return "\n".join(["---", *lines, "---"])


def _what_it_is(run: RunRecord) -> str:
    rank, alpha = dig(run.config, "lora", "rank"), dig(run.config, "lora", "alpha")
    shape = f" of rank {rank} and alpha {alpha:g}" if rank and alpha else ""
    lines = [
        f"A LoRA adapter{shape} for `{_code(_base(run))}`, warmed up on examples and then trained by reinforcement "
        "learning on rewards that a program verifies.",
        f"**{_markdown(headline(run))}.** {_markdown(lead(run, next(iter(comparisons(run)), None)))}".strip(),
    ]
    if run.failure:
        lines.append(f"The run did not finish: {_markdown(run.failure.message)}")
    return "\n\n".join(lines)


def _evaluation(run: RunRecord) -> str:
    present = [model for model in MODELS if score(run, model)]
    if not present:
        return "## Evaluation\n\nThis run was not evaluated."
    rows = [f"| model | accuracy | {interval_name(run)} | prompts |", "|---|---:|---:|---:|"]
    for model in present:
        held = score(run, model)
        interval = interval_of(held.get("ci95"))
        between = f"{percent(interval[0])} to {percent(interval[1])}" if interval else "—"
        rows.append(f"| {NAMES[model]} | {percent(held.get('value'))} | {between} | {count(held.get('n'))} |")
    told = [
        f"- against the {_markdown(one.reference)}, {_markdown(one.metric)}: {points(one.difference)} points, "
        f"p = {p_value(one.p_value)}, {count(one.wins)} prompts won and {count(one.losses)} lost"
        for one in comparisons(run)
    ]
    gate = dig(run.evaluation, "gate") or {}
    verdict = "passed" if gate.get("passed") else "refused"
    reason = f"The gate {verdict}: {_markdown(gate.get('reason') or 'no reason given')}" if gate else ""
    return "\n\n".join(part for part in ("## Evaluation", "\n".join(rows), "\n".join(told), reason) if part)


def _data(run: RunRecord) -> str:
    card = run.data_card
    if not card:
        return ""
    rows, splits = card.get("rows") or {}, card.get("splits") or {}
    dropped = sum(n for n in (rows.get("dropped") or {}).values() if isinstance(n, int))
    told = (
        f"{count(rows.get('read'))} rows were read from {_markdown(_sources(run)) or 'the sources'}; "
        f"{count(rows.get('kept'))} were kept, {count(dropped)} dropped and {count(rows.get('quarantined'))} "
        f"quarantined. {count(splits.get('train'))} rows were trained on, {count(splits.get('validation'))} drew the "
        f"curves, and {count(splits.get('test'))} were held out for the evaluation."
    )
    fingerprint = card.get("fingerprint")
    return f"## Training data\n\n{told}" + (f"\n\nFingerprint: `{_code(fingerprint)}`" if fingerprint else "")


def _training(run: RunRecord) -> str:
    facts = [
        ("warm-up updates", run.warmup.get("updates")),
        ("reinforcement-learning updates", run.rl.get("updates")),
        ("algorithm", dig(run.config, "lora_rl", "algorithm", "name")),
        ("prompts an update", dig(run.config, "lora_rl", "prompts_per_update")),
        ("completions a prompt", dig(run.config, "lora_rl", "group_size")),
        ("learning rate", dig(run.config, "lora_rl", "optimizer", "learning_rate")),
        ("seed", run.config.get("seed")),
        ("adapter digest", run.rl.get("adapter_digest")),
        ("config digest", run.config_digest),
        ("tuneloop", run.code_version),
    ]
    lines = [f"- {name}: {_markdown(value)}" for name, value in facts if value is not None]
    return "## Training\n\n" + "\n".join(lines) if lines else ""


def _use(run: RunRecord, name: str) -> str:
    base, hub_name = _base(run), _hub_name(_base(run))
    model = hub_name or "path/to/base-model"
    where = "" if hub_name else f"`{model}` stands for a local copy of `{_code(base)}`.\n\n"
    rank = dig(run.config, "lora", "rank")
    limit = next((allowed for allowed in (8, 16, 32, 64, 128, 256, 320, 512) if rank and rank <= allowed), None)
    option = f" --max-lora-rank {limit}" if limit else ""
    return f"""## Use

{where}With peft:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({json.dumps(model)})
model = AutoModelForCausalLM.from_pretrained({json.dumps(model)})
model = PeftModel.from_pretrained(model, "path/to/adapter")
```

With vLLM:

```sh
vllm serve {model} --enable-lora{option} --lora-modules {name}=path/to/adapter
```"""


def _limits(run: RunRecord) -> str:
    prompts = count(run.evaluation.get("prompts")) if run.evaluation else "no"
    return (
        "## Limits\n\n"
        f"- It was measured on {prompts} held-out prompts of the task it was trained on; nothing is known about other "
        "tasks.\n"
        "- It maximises a programmed reward: what the reward does not see was not optimised and may have become "
        "worse.\n"
        "- It works with the base model that it names, and with no other. The licences of the base model and of the "
        "data apply."
    )


def _base(run: RunRecord) -> str:
    return str(dig(run.config, "model", "uri") or run.rl.get("base_uri") or "unknown")


def _hub_name(uri: str) -> str | None:
    """`organisation/name` of a Hugging Face hub URI, or None for any other place."""
    found = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(@[\w./-]+)?", uri)
    return found[1] if found else None


def _sources(run: RunRecord) -> str:
    return ", ".join(str(dig(source, "source")) for source in run.data_card.get("sources") or [])


def _markdown(value: object) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, no table cell, one line."""
    line = " ".join(str(value).encode("utf-8", "replace").decode().split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", line)


def _code(value: object) -> str:
    return " ".join(str(value).encode("utf-8", "replace").decode().replace("`", "'").split())
