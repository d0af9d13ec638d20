"""FlowRL and GRPO on a reward with three peaks: one matches the distribution, the other finds a single peak.

    python benchmarks/flowrl_toy.py      # trains both in seconds, prints the figures, writes docs/images/flowrl_toy.svg

The states are 0 … 100, the target p three Gaussians at 20, 50 and 80 of weights 1 : 2 : 1, the reward of a state log p,
the policy a table of logits, a completion one token. Both are trained by the losses of `tuneloop.algorithms`. The
reference is uniform, and FlowRL's beta 1, so that its optimum is p itself. (FlowRL normalises rewards within a group,
which in training sets the temperature by the group's spread; here the reward is taken as it is.)

Legend: V states, S samples of an update.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from tuneloop.algorithms.advantages import grpo_advantages
from tuneloop.algorithms.settings import AlgorithmSettings
from tuneloop.algorithms.table import ALGORITHMS
from tuneloop.algorithms.types import LossInputs

STATES = 101
PEAKS, WEIGHTS, SIGMA = (20, 50, 80), (0.25, 0.5, 0.25), 2.13
SAMPLES = 512
UPDATES = 2000
RATE = 0.05
FIGURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "flowrl_toy.svg"


@dataclass(frozen=True)
class Outcome:
    """What a policy became: its distribution, KL(policy || target) in nats, and its mass around each peak."""

    policy_V: torch.Tensor
    reverse_kl: float
    masses: tuple[float, ...]


def target() -> torch.Tensor:
    """The distribution that rewards are the logarithm of, shape (V,), float64."""
    states_V = torch.arange(STATES, dtype=torch.float64)
    density_V = torch.zeros(STATES, dtype=torch.float64)
    for peak, weight in zip(PEAKS, WEIGHTS, strict=True):
        density_V += weight * torch.exp(-0.5 * ((states_V - peak) / SIGMA) ** 2)
    return density_V / density_V.sum()


def train(name: str, *, updates: int = UPDATES, seed: int = 0) -> Outcome:
    """A uniform policy after `updates` of the named algorithm; "flowrl" or "grpo"."""
    settings = AlgorithmSettings(name=name, flow_beta=1.0) if name == "flowrl" else AlgorithmSettings(name=name)
    reward_V = target().log()
    logits_V = torch.zeros(STATES, dtype=torch.float64, requires_grad=True)
    log_z = torch.zeros((), dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([logits_V, log_z], lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    for update in range(updates):
        adam.param_groups[0]["lr"] = RATE * (1.0 - update / updates)
        loss = _loss(name, settings, logits_V, log_z, reward_V, generator)
        adam.zero_grad()
        loss.backward()
        adam.step()
    return outcome(logits_V.detach().softmax(0))


def _loss(name, settings, logits_V, log_z, reward_V, generator) -> torch.Tensor:
    logprobs_V = logits_V.log_softmax(0)
    state_S = torch.multinomial(logprobs_V.detach().exp(), SAMPLES, replacement=True, generator=generator)
    rewards_S = reward_V[state_S]
    old_S = logprobs_V.detach()[state_S]
    inputs = LossInputs(
        logprobs_S=logprobs_V[state_S],
        old_logprobs_S=old_S,
        behaviour_logprobs_S=old_S,
        reference_logprobs_S=torch.full_like(old_S, -math.log(STATES)),
        advantages_S=rewards_S if name == "flowrl" else grpo_advantages(rewards_S[None])[0],
        completion_of_S=torch.arange(SAMPLES),
        lengths_B=torch.ones(SAMPLES, dtype=torch.long),
        token_total=SAMPLES,
        completion_total=SAMPLES,
        log_z_B=log_z.expand(SAMPLES),
    )
    return ALGORITHMS[name].loss(inputs, settings).loss


def outcome(policy_V: torch.Tensor) -> Outcome:
    """Compare a policy with the target."""
    kl_V = torch.where(policy_V > 0, policy_V * (policy_V.clamp_min(1e-300).log() - target().log()), 0.0)
    masses = tuple(float(policy_V[peak - 15 : peak + 15].sum()) for peak in PEAKS)
    return Outcome(policy_V, float(kl_V.sum()), masses)


WIDTH, HEIGHT, MARGIN, FLOOR = 420, 210, 24, 180  # of a panel, in SVG units


def figure(outcomes: dict[str, Outcome]) -> str:
    """The policies side by side over the target, as SVG; each panel has a scale of its own."""
    panels = "".join(_panel(place, label, result) for place, (label, result) in enumerate(outcomes.items()))
    width = WIDTH * len(outcomes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}" '
        f'font-family="sans-serif" font-size="12" fill="#24292f">\n'
        f'<rect width="{width}" height="{HEIGHT}" fill="#ffffff"/>\n{panels}</svg>\n'
    )


def _panel(place: int, label: str, result: Outcome) -> str:
    target_V, policy_V = target().tolist(), result.policy_V.tolist()
    top = max(*target_V, *policy_V)
    step = (WIDTH - 2 * MARGIN) / STATES
    left = place * WIDTH + MARGIN

    def y(value: float) -> float:
        return FLOOR - (FLOOR - 50) * value / top

    bars = "".join(
        f'<rect x="{left + state * step:.1f}" y="{y(value):.1f}" width="{step - 0.6:.1f}" '
        f'height="{FLOOR - y(value):.1f}"/>'
        for state, value in enumerate(policy_V)
        if FLOOR - y(value) >= 0.05
    )
    line = " ".join(f"{left + (state + 0.5) * step:.1f},{y(value):.1f}" for state, value in enumerate(target_V))
    masses = " / ".join(f"{mass:.2f}" for mass in result.masses)
    ticks = "".join(
        f'<text x="{left + (state + 0.5) * step:.1f}" y="{FLOOR + 16}" text-anchor="middle">{state}</text>'
        for state in (0, *PEAKS, STATES - 1)
    )
    return (
        f'<text x="{left}" y="20" font-weight="bold">{label}</text>'
        f'<text x="{left}" y="37">KL to the target {result.reverse_kl:.3f} nats; masses {masses}</text>\n'
        f'<g fill="#4c8dd6">{bars}</g>\n'
        f'<polyline points="{line}" fill="none" stroke="#d1440c" stroke-width="1.4"/>\n'
        f'<line x1="{left}" y1="{FLOOR}" x2="{left + STATES * step:.1f}" y2="{FLOOR}" stroke="#8c959f"/>{ticks}\n'
    )


def main() -> None:
    """Train both, print, draw."""
    outcomes = {"FlowRL": train("flowrl"), "GRPO": train("grpo")}
    for label, result in outcomes.items():
        masses = ", ".join(f"{mass:.3f}" for mass in result.masses)
        print(f"{label:7} reverse KL {result.reverse_kl:.4f}   masses {masses}")
    FIGURE.parent.mkdir(exist_ok=True)
    FIGURE.write_text(figure(outcomes))
    print(f"drew {FIGURE.relative_to(FIGURE.parents[2])}")


if __name__ == "__main__":
    main()
