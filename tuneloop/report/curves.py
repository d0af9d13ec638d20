"""The training curves: which metrics share a chart, what each is called, and what is left for "more"."""

from dataclasses import dataclass, field

from tuneloop.report.curve_chart import SMOOTH_FROM, ChartBook, Line
from tuneloop.report.html import Html, tag
from tuneloop.report.number import count, plain
from tuneloop.report.run_record import RunRecord, dig
from tuneloop.report.series import Series, read_series

MORE_LIMIT = 40  # charts of metrics that this page knows nothing about
TABLE_ROWS = 24


@dataclass(frozen=True)
class Curve:
    """A chart: its title, what it says, and the metrics on it as (name, label, colour, marked)."""

    title: str
    note: str
    lines: tuple[tuple[str, str, str, bool], ...]
    unit: str = "number"
    zero: bool = False
    size: str = ""
    metrics: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "metrics", tuple(line[0] for line in self.lines))


def _one(metric: str, title: str, note: str, unit: str = "number", zero: bool = True) -> Curve:
    return Curve(title, note, ((metric, title.lower(), "candidate", False),), unit, zero)


RL_CURVES = (
    Curve("Validation accuracy", "Share of validation prompts answered correctly, most likely answer.",
          (("validation/accuracy", "validation", "candidate", True),), "share", size="half"),
    Curve("Reward", "Mean over the sampled completions; on validation prompts, of the most likely answer.",
          (("reward/mean", "training", "candidate", False), ("validation/reward", "validation", "second", True)),
          size="half"),
    _one("kl/reference", "KL to the reference", "How far the policy has moved from the warm-up adapter, nats a token."),
    _one("entropy", "Entropy", "Nats a token; near zero, sampling explores no more."),
    _one("completion/tokens_mean", "Completion length", "Tokens, mean over the sampled completions."),
    _one("completion/truncated_share", "Truncated completions", "Share cut off at the token limit.", "share"),
    _one("divergence/kl", "Trainer against engine", "KL between their log-probs on the sampled tokens, nats a token."),
    _one("divergence/max", "Largest gap to the engine", "Of one token's log-probs, nats."),
    _one("gradient/norm", "Gradient norm", "Before clipping."),
    _one("groups/zero_spread_share", "Groups without spread", "Share whose rewards are all equal: nothing to learn.",
         "share"),
    _one("clip/share", "Clipped tokens", "Share of tokens whose ratio met the clip.", "share"),
)  # fmt: skip
RL_MORE = (
    _one("reward/std", "Reward spread", "Standard deviation over the sampled completions."),
    _one("canary/gap", "Canary", "Largest log-prob gap of trainer and engine on fixed tokens after the sync, nats."),
    _one("importance/mean", "Importance weight", "Trainer over engine, mean over the tokens, truncated.", zero=False),
    _one("loss/policy", "Policy loss", "", zero=False),
    _one("learning_rate", "Learning rate", ""),
    Curve("Speed", "Tokens a second in each phase.", (
        ("tokens_per_second/rollout", "rollout", "candidate", False),
        ("tokens_per_second/score", "score", "second", False),
        ("tokens_per_second/update", "update", "third", False)), "count", True),
    Curve("Time of an update", "Seconds in each phase.", (
        ("seconds/collect", "collect", "candidate", False), ("seconds/score", "score", "second", False),
        ("seconds/update", "update", "third", False), ("seconds/sync", "sync", "fourth", False),
        ("seconds/save", "save", "neutral", False)), "seconds", True),
    _one("memory/peak_rss_bytes", "Peak memory", "Of the process.", "bytes"),
)  # fmt: skip
SFT_CURVES = (
    Curve("Loss", "Nats a token of the imitated completions.",
          (("loss/train", "training", "sft", False), ("loss/validation", "validation", "neutral", True)), size="wide"),
)  # fmt: skip
SFT_MORE = (
    Curve("Gradient norm", "Before clipping.", (("gradient/norm", "gradient norm", "sft", False),), zero=True),
    Curve("Learning rate", "", (("learning_rate", "learning rate", "sft", False),), zero=True),
    Curve("Speed", "Tokens a second.", (("tokens_per_second/update", "update", "sft", False),), "count", True),
)
COLOURS = ("candidate", "second", "third", "fourth", "neutral")


def training(run: RunRecord, book: ChartBook) -> Html | None:
    """The sections of reinforcement learning and of the warm-up; None when neither logged anything."""
    sections = [
        _section(run, book, "lora_rl", "Reinforcement learning", "rl", RL_CURVES, RL_MORE),
        _section(run, book, "sft_warmup", "SFT warm-up", "sft", SFT_CURVES, SFT_MORE),
    ]
    return tag("div", sections, id="training") if any(sections) else None


def _section(
    run: RunRecord, book: ChartBook, step: str, title: str, axis: str, main: tuple[Curve, ...], more: tuple[Curve, ...]
) -> Html | None:
    record = run.steps[step]
    series = read_series(record.folder / "metrics.jsonl") if record.folder else {}
    if not series:
        return None
    planned = dig(run.config, step, "updates") or 0
    seen = [update for held in series.values() for update in (held.updates[0], held.updates[-1])]
    reach = (min(seen), max(*seen, planned if record.state != "done" else 0))
    main = (*main[:2], *_reward_parts(series), *main[2:])
    known = {metric for curve in (*main, *more) for metric in curve.metrics}
    unknown = [name for name in series if name not in known]
    extra = tuple(_one(name, name, "", "number", zero=False) for name in sorted(unknown)[:MORE_LIMIT])
    grids = [_charts(book, curves, series, reach, axis) for curves in (main, (*more, *extra))]
    return tag(
        "section",
        tag("h2", title),
        tag("p", _told(record.state, series, planned), cls="note"),
        tag("div", grids[0], cls="curves"),
        _details("More metrics", tag("div", grids[1], cls="curves"), _left_out(unknown)) if grids[1] else None,
        _details("Values as a table", _table(series, title)),
        id=f"training-{axis}",
    )


def _charts(
    book: ChartBook, curves: tuple[Curve, ...], series: dict[str, Series], reach: tuple[int, int], axis: str
) -> list[Html]:
    drawn = []
    for curve in curves:
        lines = [
            Line(label, series[metric], colour, marked)
            for metric, label, colour, marked in curve.lines
            if metric in series
        ]
        if lines:
            drawn.append(
                book.curve(curve.title, lines, unit=curve.unit, note=curve.note, zero=curve.zero, updates=reach,
                           axis=axis, size=curve.size)
            )  # fmt: skip
    return drawn


def _reward_parts(series: dict[str, Series]) -> tuple[Curve, ...]:
    """One chart of the rewards by name, when there is more than one to tell apart."""
    names = [name for name in series if name.startswith("reward/") and name.endswith("/mean") and name.count("/") == 2]
    lines = tuple(
        (name, name.split("/")[1].replace("_", " "), COLOURS[min(i, len(COLOURS) - 1)], False)
        for i, name in enumerate(names)
    )
    if len(names) < 2:
        return ()
    return (Curve("Rewards by name", "Mean over the sampled completions, before weighting.", lines),)


def _told(state: str, series: dict[str, Series], planned: int) -> str:
    last = max(held.updates[-1] for held in series.values())
    told = f"{count(last)} updates."
    if state != "done" and planned:
        told = f"Stopped after update {count(last)} of {count(planned)}; the empty part of each chart was not reached."
    if max(len(held.updates) for held in series.values()) >= SMOOTH_FROM:
        told += " Faint lines are single updates, bold ones their running mean."
    return told


def _left_out(unknown: list[str]) -> Html | None:
    rest = sorted(unknown)[MORE_LIMIT:]
    return tag("p", f"Not drawn: {', '.join(rest)}.", cls="note") if rest else None


def _details(title: str, *children: Html | None) -> Html:
    return tag("details", tag("summary", title), children)


def _table(series: dict[str, Series], title: str) -> Html:
    updates = sorted({update for held in series.values() for update in held.updates})
    stride = max(1, -(-len(updates) // TABLE_ROWS))
    validating = [u for name, held in series.items() if "validation" in name for u in held.updates]
    chosen: list[int] = sorted(
        {*updates[::stride], updates[-1], *(validating if len(validating) <= TABLE_ROWS * 2 else [])}
    )
    names = sorted(series)[:60]
    values = {name: dict(zip(series[name].updates, series[name].values, strict=True)) for name in names}
    rows = [
        tag("tr", tag("th", count(update), scope="row"),
            [tag("td", plain(values[name].get(update)), cls="number") for name in names])
        for update in chosen
    ]  # fmt: skip
    head = tag("tr", tag("th", "update", scope="col"), [tag("th", name, scope="col") for name in names])
    label = f"{title}: values at {count(len(chosen))} of {count(len(updates))} updates"
    table = tag("table", tag("caption", label), tag("thead", head), tag("tbody", rows), cls="compact")
    return tag("div", table, cls="scroll", tabindex=0, role="region", aria_label=label)
