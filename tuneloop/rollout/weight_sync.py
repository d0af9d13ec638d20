"""Sending the adapter to the rollout engine, and proving that it arrived.

After each sync a canary looks whether the engine holds the adapter that was sent, and whether engine and trainer agree
on the log-probs of a few fixed tokens. An adapter that silently
never reaches the engine is the most frequent complaint about LoRA RL.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from tuneloop.errors import TuneloopError
from tuneloop.models.forward import score
from tuneloop.models.lora import extract
from tuneloop.models.lora_linear import LoraLinear
from tuneloop.models.packed import pack
from tuneloop.models.sharding import METER
from tuneloop.rollout.engine import DEFAULT_ADAPTER, RolloutEngine


class CanaryFailed(TuneloopError):
    """The engine does not sample from the policy that is being trained; going on would train on the wrong samples."""


@dataclass(frozen=True)
class Canary:
    """Fixed tokens whose log-probs trainer and engine must agree on: token ids of a prompt and of what follows."""

    prompt: Sequence[int]
    completion: Sequence[int]


class WeightSync:
    """Sends the adapter of `layers` to `engine`.

    Args:
        model: the trainer's model, with its adapter enabled.
        adapter_config: PEFT's config of the adapter.
        tolerance: largest mean absolute gap (nats) of the trainer's and the engine's log-probs of the canary tokens.
            In bfloat16 two right computations differ by about 0.04, and by much more on single, improbable tokens.
        layered: put spread factors together a module at a time, not all at once.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        model: PreTrainedModel,
        layers: dict[str, LoraLinear],
        adapter_config: dict,
        canaries: Sequence[Canary],
        tolerance: float,
        name: str = DEFAULT_ADAPTER,
        layered: bool = True,
    ):
        self.engine, self.model, self.layers = engine, model, layers
        self.adapter_config, self.canaries, self.tolerance = adapter_config, canaries, tolerance
        self.name = name  # of the adapter in the engine
        self.digest = ""  # of the adapter that was sent last
        self.changed = False  # whether it was another one than before
        self.layered = layered
        self.peak_bytes = 0  # of spread factors put together at once for the last sync, over the adapter that was sent

    def __call__(self) -> float:
        """Send the adapter as it is now and check that it arrived.

        Returns:
            The mean absolute gap (nats) of the trainer's and the engine's log-probs of the canary tokens.

        Raises:
            CanaryFailed: the engine holds another adapter, or computes something else with it.
        """
        METER.reset()
        adapter = extract(self.layers, self.adapter_config, layered=self.layered)
        self.peak_bytes = METER.peak
        held, sent = self.engine.sync(adapter, self.name), adapter.digest()
        if held != sent:
            raise CanaryFailed(f"the engine holds adapter {held[:12] or 'none'} after {sent[:12]} was sent to it")
        self.changed = sent != self.digest
        self.digest = sent
        gap = self._gap()
        self.refuse_gap(gap, "canary")
        return gap

    def refuse_gap(self, gap: float, what: str) -> None:
        """Refuse to go on when log-probs of trainer and engine are further apart than the tolerance.

        Raises:
            CanaryFailed: they are.
        """
        if not gap <= self.tolerance:
            raise CanaryFailed(f"trainer and engine differ by {gap:.3g} nats a token on the {what}'s tokens "
                               f"(lora_rl.engine.canary_tolerance = {self.tolerance})")  # fmt: skip

    @torch.no_grad()
    def _gap(self) -> float:
        if not self.canaries:
            return 0.0
        was_training = self.model.training
        self.model.eval()
        batch = pack([(canary.prompt, [canary.completion]) for canary in self.canaries], self.model.device)
        trainer_S = score(self.model, batch).logprobs_S.cpu()
        self.model.train(was_training)
        pairs = [(canary.prompt, canary.completion) for canary in self.canaries]
        reported = self.engine.logprobs(pairs, self.name)
        engine_S = torch.tensor([value for values in reported for value in values])
        return float((trainer_S - engine_S).abs().mean())
