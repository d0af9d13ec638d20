"""The gate: is the candidate proven better than what is there?"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tuneloop.evaluation.accuracy import Comparison
from tuneloop.evaluation.settings import COST_METRICS, GateSettings, GuardSettings

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Check:
    """One condition: what was asked, whether it holds, and the numbers."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class GateDecision:
    """The verdict.

    Attributes:
        passed: every check holds.
        reason: one sentence with the numbers.
        p_value: the largest of the required tests'.
        checks: every condition, in the order in which it was looked at.
    """

    passed: bool
    reason: str
    p_value: float
    checks: tuple[Check, ...]

    def record(self) -> dict[str, Any]:
        """The `gate` entry of `evaluation.json`."""
        return {
            "passed": self.passed,
            "reason": self.reason,
            "p_value": self.p_value,
            "checks": [asdict(check) for check in self.checks],
        }


def decide(
    comparisons: Sequence[Comparison],
    metrics: Mapping[str, Metrics],
    adapter_digests: Mapping[str, str],
    settings: GateSettings,
) -> GateDecision:
    """Decide whether the candidate may replace the incumbent.

    The candidate must beat the base and, where there is one, the incumbent: on the primary metric by more than the
    margin, with a one-sided exact p-value under the significance. Both must hold, so testing each at the full level
    keeps the chance of a wrong promotion under it (intersection-union test; Berger, 1982). Guards compare with the
    incumbent, and with the base while there is none.

    Args:
        comparisons: of the candidate with the other models; those on other metrics are not looked at.
        metrics: model name -> mean metrics.
        adapter_digests: model name -> digest of its adapter, at least of the candidate and of the incumbent if any.
        settings: the gate's.
    """
    required = {one.reference: one for one in comparisons if one.metric == settings.primary}
    has_incumbent = "incumbent" in metrics
    opponents = [required[name] for name in (("base", "incumbent") if has_incumbent else ("base",))]
    p_value = max(one.p_value for one in opponents)
    digest = adapter_digests["candidate"]
    if has_incumbent and digest == adapter_digests["incumbent"]:
        reason = f"the candidate is the incumbent: same adapter digest {digest[:12]}"
        return GateDecision(False, reason, p_value, (Check("is not the incumbent", False, reason),))
    checks = [_beats(one, settings) for one in opponents]
    reference = "incumbent" if has_incumbent else "base"
    checks += [_guard(one, metrics["candidate"], metrics[reference], reference) for one in settings.guards]
    failed = [check.detail for check in checks if not check.passed]
    reason = "; ".join(failed) if failed else _praise(opponents, settings)
    if not failed and not has_incumbent:
        reason += "; there is no incumbent yet"
    return GateDecision(not failed, reason, p_value, tuple(checks))


def _beats(one: Comparison, settings: GateSettings) -> Check:
    far_enough = one.difference > settings.margin
    proven = one.p_value < settings.significance
    lacking = []
    if not far_enough:
        lacking.append("no gain" if not settings.margin else f"not more than {100 * settings.margin:g} points")
    if not proven:
        lacking.append(f"p is not under {settings.significance:g}")
    detail = f"candidate {_percent(one.candidate_value)} " + (
        f"beats {_opponent(one)}" if not lacking else f"is not proven better than {_opponent(one, '; '.join(lacking))}"
    )
    return Check(f"beats {one.reference}", not lacking, detail)


def _praise(opponents: Sequence[Comparison], settings: GateSettings) -> str:
    beaten = " and ".join(_opponent(one) for one in opponents)
    metric = {"accuracy": "accuracy", "pass_at_1": "pass@1"}[settings.primary]
    return f"candidate {_percent(opponents[0].candidate_value)} {metric} beats {beaten}"


def _opponent(one: Comparison, remark: str = "") -> str:
    points = f"{100 * one.difference:+.1f} points, {_p(one.p_value)}"
    return f"{one.reference} {_percent(one.reference_value)} ({points}{': ' if remark else ''}{remark})"


def _guard(guard: GuardSettings, candidate: Metrics, other: Metrics, reference: str) -> Check:
    was, now = other[guard.metric], candidate[guard.metric]
    rise = now - was
    too_far = ""
    if guard.max_rise is not None and rise > guard.max_rise:
        too_far = f"a rise of more than {guard.max_rise:g}"
    elif guard.metric not in COST_METRICS and -rise > guard.max_drop:
        too_far = f"a fall of more than {guard.max_drop:g}"
    detail = f"guard {guard.metric}: {now:.4g} against the {reference}'s {was:.4g}"
    return Check(f"guard {guard.metric}", not too_far, f"{detail}, {too_far}" if too_far else detail)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _p(value: float) -> str:
    return f"p = {value:.2g}" if value >= 1e-300 else "p < 1e-300"
