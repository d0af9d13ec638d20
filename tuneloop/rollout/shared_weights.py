"""The sync of full fine-tuning: the engine samples the trained weights themselves, and the canary proves it."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from tuneloop.errors import UserError
from tuneloop.models.digest import weights_digest
from tuneloop.rollout.engine import RolloutEngine
from tuneloop.rollout.torch_engine import TorchEngine
from tuneloop.rollout.weight_sync import Canary, CanaryFailed, WeightSync


class SharedWeights(WeightSync):
    """A `WeightSync` that sends nothing: `digest` is that of the weights, which trainer and engine share.

    Raises:
        UserError: the engine does not share the trainer's model.
    """

    def __init__(self, engine: RolloutEngine, model: PreTrainedModel, canaries: Sequence[Canary], tolerance: float):
        super().__init__(engine, model, {}, {}, canaries, tolerance)
        if not isinstance(engine, TorchEngine) or engine.model is not model:
            raise UserError('lora_rl.mode = "full" trains the weights that the engine samples from, which only the '
                            'built-in engine shares: set lora_rl.engine.kind = "torch"')  # fmt: skip

    def __call__(self) -> float:
        """Check that the engine computes with the weights as they are now; see `WeightSync.__call__`."""
        if self.engine.sync(None, self.name):
            raise CanaryFailed("the engine holds an adapter, but the weights themselves are trained")
        digest = weights_digest(self.model)
        self.changed, self.digest = digest != self.digest, digest
        gap = self._gap()
        self.refuse_gap(gap, "canary")
        return gap
