"""The vLLM rollout engine: adapters handed over in memory, in a process that may die without the run.

vLLM samples with one random generator a request, so a completion is a function of its own seed and of the weights; how
far also of what else is in the batch is the matter of vLLM's kernels, see docs/engines.md.
"""

import shutil
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from tuneloop.errors import UserError
from tuneloop.memory import release_gpu_memory
from tuneloop.models.adapter_io import Adapter, save_adapter
from tuneloop.rng import philox
from tuneloop.rollout.engine import DEFAULT_ADAPTER, Completion, SampleStream
from tuneloop.rollout.settings import logprobs_mode
from tuneloop.rollout.shared_memory import PrivateFolder
from tuneloop.rollout.vllm_process import EngineDied, EngineProcess
from tuneloop.settings import SamplingSettings

T = TypeVar("T")
_SEED_COUNTER = 0xFFFFFFFE  # in place of a token's position: no other draw has it


@dataclass(frozen=True)
class VllmOptions:
    """What one vLLM is started with.

    Attributes:
        model: the base model's folder.
        max_length: longest prompt with its completion, in tokens.
        max_rank: of the adapters, one of `VLLM_RANKS`; 0: they are merged.
        max_adapters: of different names that are held at once.
        modules: last parts of the names of the modules that adapters change.
        kv_cache_bytes: 0: what `gpu_memory_utilization` leaves.
        end_ids: tokens that end a completion.
        logprobs_mode: vLLM's name of it; see `settings.logprobs_mode`.
    """

    model: str
    dtype: str
    max_length: int
    max_rank: int
    max_adapters: int
    modules: tuple[str, ...]
    max_sequences: int
    end_ids: tuple[int, ...]
    logprobs_mode: str = "raw_logprobs"
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.4
    kv_cache_bytes: int = 0
    enforce_eager: bool = False
    sleep: bool = True


class VllmEngine:
    """A `RolloutEngine` on a vLLM of its own.

    Args:
        options: of vLLM.
        log: where vLLM's output goes.
        max_restarts: of a vLLM that dies, for one and the same call.
        timeout_seconds: of a start or a call; one that takes longer is dead.
        environment: variables for vLLM's process alone, such as CUDA_VISIBLE_DEVICES.

    Raises:
        UserError: vLLM refuses to start like this.
    """

    def __init__(
        self,
        options: VllmOptions,
        log: Path,
        *,
        max_restarts: int = 3,
        timeout_seconds: float = 1800,
        environment: Mapping[str, str] | None = None,
    ):
        self.options, self.log, self.max_restarts = options, log, max_restarts
        self._timeout, self._environment = timeout_seconds, dict(environment or {})
        self._folder = PrivateFolder()
        self._held: dict[str, Path | None] = {}  # name -> the adapter's folder; None: the bare base
        self._sent = 0
        self._process: EngineProcess | None = None
        self._finalizer = weakref.finalize(self, self._folder.close)  # also at the interpreter's exit
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int | None:
        """The id of vLLM's process."""
        return self._process.pid if self._process else None

    def sync(self, adapter: Adapter | None, name: str = DEFAULT_ADAPTER) -> str:
        """See `RolloutEngine.sync`; the digest is of the file that vLLM reads.

        Raises:
            UserError: vLLM cannot hold it: its rank or the number of names is over what was planned.
        """
        path = None
        if adapter is not None:
            self._sent += 1
            path = self._folder.path / str(self._sent)
            save_adapter(adapter, path)
        try:
            digest = self._lasting(lambda process: self._hand_over(process, name, path))
        except UserError:
            if path:
                shutil.rmtree(path)
            raise
        before = self._held.get(name)
        self._held[name] = path
        if before is not None:
            shutil.rmtree(before)
        return digest

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        samples: int,
        sampling: SamplingSettings,
        max_new_tokens: int,
        stream: SampleStream,
        adapter: str = DEFAULT_ADAPTER,
    ) -> list[list[Completion]]:
        """See `RolloutEngine.generate`.

        Raises:
            UserError: a prompt with its completion does not fit, or vLLM cannot report this sampling's log-probs.
            EngineDied: it died again and again.
        """
        self._refuse_sampling(sampling)
        self._refuse_length(max((len(prompt) for prompt in prompts), default=0) + max_new_tokens)
        groups = self._lasting(
            lambda process: process.ask(
                "generate",
                name=adapter,
                prompts=[list(prompt) for prompt in prompts],
                seeds=_seeds(stream, len(prompts), samples),
                max_new_tokens=max_new_tokens,
                **sampling.model_dump(),
            )
        )
        return [[Completion(*completion) for completion in group] for group in groups]

    def logprobs(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], adapter: str = DEFAULT_ADAPTER
    ) -> list[list[float]]:
        """See `RolloutEngine.logprobs`."""
        self._refuse_length(max((len(prompt) + len(completion) for prompt, completion in pairs), default=0))
        given = [[list(prompt), list(completion)] for prompt, completion in pairs]
        return self._lasting(lambda process: process.ask("logprobs", name=adapter, pairs=given))

    def sleep(self) -> None:
        """Move the weights to host memory and drop the KV cache; a dead engine sleeps anyhow."""
        if self._process and self.options.sleep:
            try:
                self._process.ask("sleep")
            except EngineDied:
                self._drop()

    def wake(self) -> None:
        """Bring the weights back."""
        if self.options.sleep:
            release_gpu_memory()  # torch keeps what the update has freed, and vLLM needs it
            self._lasting(lambda process: process.ask("wake"))

    def close(self) -> None:
        """End vLLM and remove the adapters from memory."""
        self._drop()
        self._finalizer()

    def _start(self) -> EngineProcess:
        self._process = EngineProcess(asdict(self.options), self.log, self._timeout, self._environment)
        return self._process

    def _start_again(self) -> EngineProcess:
        try:
            process = self._start()
        except UserError as error:  # it did start like this before: a driver may need a moment to free the memory
            raise EngineDied(str(error)) from None
        for name, path in self._held.items():
            self._hand_over(process, name, path)
        return process

    def _drop(self) -> None:
        if self._process:
            self._process.kill()
            self._process = None

    def _hand_over(self, process: EngineProcess, name: str, path: Path | None) -> str:
        # vLLM keeps adapters, and the KV cache of their prompts, by number: one that was used before would be stale.
        return process.ask("sync", name=name, folder=str(path) if path else "", number=int(path.name) if path else 0)

    def _lasting(self, action: Callable[[EngineProcess], T]) -> T:
        """Do it, if need be on a new vLLM that holds the same adapters."""
        for restarts in range(self.max_restarts + 1):
            try:
                return action(self._process or self._start_again())
            except EngineDied as died:
                self._drop()
                if restarts == self.max_restarts:
                    raise
                print(f"{died}; starting it again, {restarts + 1} of {self.max_restarts}", flush=True)
            except UserError:
                raise
            except BaseException:
                self._drop()  # a signal ended the wait for an answer: the next question would get it
                raise
        raise AssertionError("unreachable")

    def _refuse_sampling(self, sampling: SamplingSettings) -> None:
        try:
            wanted = logprobs_mode(sampling)
        except ValueError as error:
            raise UserError(str(error)) from None
        cut = sampling.temperature > 0 and (sampling.top_k or sampling.top_p < 1.0)
        if wanted != self.options.logprobs_mode and (wanted == "processed_logprobs" or cut):
            raise UserError(f"this vLLM was started to report {self.options.logprobs_mode}, which are not those of "
                            f"temperature {sampling.temperature}: start one for this sampling")  # fmt: skip

    def _refuse_length(self, tokens: int) -> None:
        if tokens > self.options.max_length:
            raise UserError(f"a prompt with its completion may have {tokens} tokens, but model.max_length = "
                            f"{self.options.max_length}: raise it or lower task.max_new_tokens")  # fmt: skip


def _seeds(stream: SampleStream, prompts: int, samples: int) -> list[list[int]]:
    """One seed a completion, a pure function of (seed, round, prompt, sample)."""
    names = np.asarray(stream.prompt_indices if stream.prompt_indices is not None else range(prompts), dtype=np.uint64)
    counters = np.empty((prompts * samples, 4), dtype=np.uint64)
    counters[:, 0], counters[:, 3] = stream.round, _SEED_COUNTER
    counters[:, 1], counters[:, 2] = np.repeat(names, samples), np.tile(np.arange(samples, dtype=np.uint64), prompts)
    words = philox(stream.seed, counters).astype(np.uint64)
    seeds = (words[:, 0] << np.uint64(31)) | (words[:, 1] >> np.uint64(1))  # 63 bits: vLLM's are signed
    return [[int(seed) for seed in row] for row in seeds.reshape(prompts, samples)]
