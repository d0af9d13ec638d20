"""Where the adapter comes from: base, data, warm-up, reinforcement learning, version; and that the links hold."""

from dataclasses import dataclass

from tuneloop.report.html import Html, tag
from tuneloop.report.number import count
from tuneloop.report.run_record import RunRecord, dig

SHORT = 12  # digits of a digest that are shown; the whole one is in its title


@dataclass(frozen=True)
class Link:
    """One link of the chain: what it is, its name, its digest."""

    kind: str
    name: str
    digest: str | None
    colour: str = "neutral"


def lineage(run: RunRecord) -> Html | None:
    """The section; None when nothing is known yet."""
    chain = links(run)
    if not chain:
        return None
    return tag(
        "section",
        tag("h2", "Lineage"),
        tag("ol", [_link(link) for link in chain], cls="lineage"),
        _checks(run),
        _facts(run),
        id="lineage",
    )


def links(run: RunRecord) -> list[Link]:
    """The chain as far as the run came."""
    base = dig(run.config, "model", "uri") or run.rl.get("base_uri")
    chain = [Link("Base model", str(base), None, "base")] if base else []
    if run.data_card.get("fingerprint"):
        chain.append(Link("Data", f"{count(dig(run.data_card, 'splits', 'train'))} rows trained on",
                          run.data_card["fingerprint"]))  # fmt: skip
    if run.warmup:
        told = f"{count(run.warmup.get('updates'))} updates, {run.warmup.get('mode', 'lora')}"
        chain.append(Link("SFT warm-up", told, run.warmup.get("adapter_digest"), "sft"))
    if run.rl:
        told = f"{count(run.rl.get('updates'))} updates"
        chain.append(Link("LoRA reinforcement learning", told, run.rl.get("adapter_digest"), "candidate"))
    if run.promotion.get("promoted"):
        told = f"{run.promotion.get('adapter_name')}, version {run.promotion.get('version')}"
        chain.append(Link(f"Registered as {run.promotion.get('alias')}", told, None, "candidate"))
    return chain


def _link(link: Link) -> Html:
    return tag(
        "li",
        tag("span", link.kind, cls="tag"),
        tag("span", link.name, cls="link-name"),
        _digest(link.digest),
        cls=f"link c-{link.colour}",
    )


def _digest(digest: object) -> Html | None:
    return tag("code", str(digest)[:SHORT], title=str(digest), cls="digest") if digest else None


def _checks(run: RunRecord) -> Html | None:
    """Digests that must agree between steps, compared."""
    held = [
        ("The KL reference is the warm-up's adapter", run.rl.get("reference_digest"), run.warmup.get("adapter_digest")),
        ("The merged adapter is the trained one", run.merge.get("adapter_digest"), run.rl.get("adapter_digest")),
        (
            "The evaluated adapter is the trained one",
            run.evaluation.get("adapter_digest"),
            run.rl.get("adapter_digest"),
        ),
    ]
    rows = [
        tag(
            "li",
            tag("span", "✓" if one == other else "✗", cls="mark", aria_hidden="true"),
            tag("span", told if one == other else f"{told}: no, {str(one)[:SHORT]} is not {str(other)[:SHORT]}"),
            cls="good" if one == other else "bad",
        )
        for told, one, other in held
        if one and other
    ]
    return tag("ul", rows, cls="checks") if rows else None


def _facts(run: RunRecord) -> Html:
    parent = dig(run.evaluation, "incumbent", "version") or run.promotion.get("previous_version")
    name = run.promotion.get("adapter_name") or dig(run.config, "promote", "adapter_name")
    facts = [
        ("Parent", f"{name}, version {parent}" if parent else ("none" if run.evaluation else None)),
        ("Adapter digest", run.rl.get("adapter_digest")),
        ("Config digest", run.config_digest),
        ("Data fingerprint", run.data_card.get("fingerprint")),
        ("Code version", run.code_version),
    ]
    rows = [tag("div", tag("dt", term), tag("dd", tag("code", value))) for term, value in facts if value]
    return tag("dl", rows, cls="facts stacked")
