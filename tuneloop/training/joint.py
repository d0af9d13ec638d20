"""Several adapters trained in turns over one copy of the base and one engine, each as if it were alone.

An update of one member is a whole update of `RlTrainer`, with that member's layers in the model and that member's name
in the engine, so nothing that one member computes depends on the others.
"""

from collections.abc import Mapping

from tuneloop.errors import TryAgain, TuneloopError
from tuneloop.progress import Progress
from tuneloop.training.rl import RlResult, RlTrainer
from tuneloop.training.stopping import Abandoned, StopRequest


def train_in_turns(trainers: Mapping[str, RlTrainer], stopping: StopRequest) -> dict[str, RlResult]:
    """All updates that are left of every member, an update of each in turn.

    Args:
        trainers: name -> trainer; all share the model, the engine and `stopping`.

    Raises:
        TryAgain: asked to stop; what every member had finished is saved.
        TuneloopError: what made a member fail, named; what the others had finished is saved.
    """
    total = sum(trainer.settings.updates for trainer in trainers.values())
    done = sum(trainer.state.update for trainer in trainers.values())
    with stopping, Progress("lora_rl", total, done=done) as progress:
        running = ""
        try:
            for name, trainer in trainers.items():
                running = name
                trainer.policy.install()
                trainer.start()
            while not all(trainer.done for trainer in trainers.values()):
                for name, trainer in trainers.items():
                    if trainer.done:
                        continue
                    if stopping.requested:
                        _stop(trainers, "")
                    running = name
                    trainer.policy.install()
                    values = trainer.advance()
                    progress.advance(note=f"{name}: reward {values['reward/mean']:.3f}")
        except Abandoned:
            stopping.settle()
            _stop(trainers, running)
        except TuneloopError as error:
            if isinstance(error, TryAgain):
                raise
            for trainer in trainers.values():
                trainer.state.save_abandoned()
            raise type(error)(f"{running}: {error}") from error
    results = {}
    for name, trainer in trainers.items():
        trainer.policy.install()
        results[name] = trainer.finish()
    return results


def _stop(trainers: Mapping[str, RlTrainer], abandoned: str) -> None:
    """Save what every member has finished, and raise."""
    saved = [f"{name} after update {trainer.state.save_abandoned()}" for name, trainer in trainers.items()]
    given_up = f"; the running update of {abandoned} outlasted the grace and was abandoned" if abandoned else ""
    raise TryAgain(f"stopped{given_up}; run again to continue {', '.join(saved)}")
