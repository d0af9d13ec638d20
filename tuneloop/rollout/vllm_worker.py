"""What runs in vLLM's process: reads requests from a socket, answers them, ends when its parent does.

`python -m tuneloop.rollout.vllm_worker FD`, started by `vllm_process`. A request is {"call": <name>, <arguments>}; its
answer is {"value": …}, {"refused": why} when it can never be served, or {"failed": why} when the process is of no more
use.
"""

import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import LLM  # pyright: ignore[reportMissingImports]  not everywhere installed
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

MERGING = "tuneloop.rollout.vllm_merge.Merging"  # what vLLM's own worker processes learn
CPU_BLOCK_TOKENS = 32  # of the KV cache: what a group shares is whole blocks, and vLLM's default on a CPU is 128

CPU_STEP_TOKENS = 4096  # of all prompts that are prefilled together
CPU_STEP_TOKENS_WITH_ADAPTERS = 512  # vLLM copies the adapter's factors once a token there: 0.1 GB a module on 135M


class Refused(Exception):
    """The request cannot be served, and never will be."""


class Worker:
    """One vLLM and the adapters that it holds; its public methods are the calls."""

    def __init__(self) -> None:
        self.llm: LLM
        self._adapters: dict[str, tuple[int, str]] = {}  # name -> number and folder
        self._merged = ""  # the folder of the adapter that is merged
        self._end_ids: list[int] = []
        self._options: dict[str, Any] = {}

    def start(self, **options: Any) -> None:
        """Start vLLM with `VllmOptions`."""
        self._options, self._end_ids = options, list(options["end_ids"])
        _set_environment(options["enforce_eager"])
        try:
            self.llm = _start_vllm(options)
            self.generate("", [[0, 0]], [[0]], 1, 0.0, 0, 1.0)  # what a CPU has no kernel for is found here
        except Exception as error:
            traceback.print_exc()
            lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            raise Refused(f"vLLM does not start like this: {lines[-1]}") from None

    def sync(self, name: str, folder: str, number: int) -> str:
        """Hold the adapter of `folder` ("": the bare base) under `name`; returns the digest of what was read."""
        from tuneloop.models.adapter_io import load_adapter

        digest = load_adapter(Path(folder)).digest() if folder else ""
        before = self._adapters.pop(name, None)
        if before and self._options["max_rank"]:
            self.llm.llm_engine.remove_lora(before[0])
        if folder:
            try:
                self._hold(name, number, folder)
            except Refused:
                if before:
                    self._hold(name, *before)
                raise
        if not self._options["max_rank"]:
            self._merge(name)
        return digest

    def _hold(self, name: str, number: int, folder: str) -> None:
        if not self._options["max_rank"]:
            self._adapters[name] = (number, folder)
            return
        if len(self._adapters) >= self._options["max_adapters"]:
            raise Refused(f"adapter {name!r} is one more than the {self._options['max_adapters']} that the engine was "
                          "started for")  # fmt: skip
        try:
            self.llm.llm_engine.add_lora(_lora_request(name, number, folder))
        except ValueError as error:
            raise Refused(f"vLLM cannot hold the adapter: {error}") from None
        if number not in self.llm.llm_engine.list_loras():
            raise RuntimeError(f"vLLM does not list adapter {name!r} after it was added")
        self._adapters[name] = (number, folder)

    def _merge(self, name: str) -> None:
        folder = self._adapters.get(name, (0, ""))[1]
        self.llm.collective_rpc("merge", args=(folder,))
        self.llm.reset_prefix_cache()  # its keys and values are of the weights before
        self._merged = folder

    def _use(self, name: str) -> "LoRARequest | None":
        """What a request with this adapter carries; merged, it carries nothing."""
        number, folder = self._adapters.get(name, (0, ""))
        if self._options["max_rank"]:
            return _lora_request(name, number, folder) if folder else None
        if folder != self._merged:
            self._merge(name)
        return None

    def generate(
        self,
        name: str,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
    ) -> list[list[tuple[list[int], list[float], bool]]]:
        """Token ids, log-probs and whether it ended, of one completion a seed."""
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        requests: list[Any] = []
        parameters = []
        for prompt, group in zip(prompts, seeds, strict=True):
            for seed in group:
                requests.append({"prompt_token_ids": prompt})
                parameters.append(
                    SamplingParams(
                        temperature=temperature,
                        top_k=top_k,
                        top_p=top_p,
                        seed=seed,
                        max_tokens=max_new_tokens,
                        stop_token_ids=self._end_ids,
                        logprobs=0,
                        flat_logprobs=True,
                        detokenize=False,
                    )
                )
        adapter = self._use(name)
        # What a prompt finds in the cache decides how much of it is computed at once, and so its last bits: a call must
        # not depend on the calls before it.
        self.llm.reset_prefix_cache()
        outputs = self.llm.generate(requests, parameters, use_tqdm=False, lora_request=adapter)
        made = iter([_completion(output.outputs[0]) for output in outputs])
        return [[next(made) for _ in group] for group in seeds]

    def logprobs(self, name: str, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        """Log-probs (temperature 1) of every completion's tokens."""
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        requests: list[Any] = [{"prompt_token_ids": [*prompt, *completion]} for prompt, completion in pairs]
        # The token that vLLM cannot help sampling costs a forward pass of one token.
        parameters = SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False
        )
        outputs = self.llm.generate(requests, parameters, use_tqdm=False, lora_request=self._use(name))
        scores = []
        for (prompt, completion), output in zip(pairs, outputs, strict=True):
            reported: Any = output.prompt_logprobs
            first = len(prompt)
            tokens = [reported.token_ids[reported.start_indices[first + i]] for i in range(len(completion))]
            assert tokens == list(completion), "vLLM scored other tokens than it was given"
            scores.append([reported.logprobs[reported.start_indices[first + i]] for i in range(len(completion))])
        return scores

    def sleep(self) -> None:
        """Weights to host memory; level 2 would drop them, and the adapters' buffers with them."""
        if _has_sleep_mode():
            self.llm.sleep(level=1)

    def wake(self) -> None:
        """Weights back to the accelerator."""
        if _has_sleep_mode():
            self.llm.wake_up()


def _lora_request(name: str, number: int, folder: str) -> "LoRARequest":
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

    return LoRARequest(f"{name}-{number}", number, folder)


def _set_environment(enforce_eager: bool) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # this process is vLLM's own already
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"  # scoring's one token more is sampled, and never computed with
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the trainer computes on the same cores in turn
    if enforce_eager or not _has_accelerator():
        # vLLM compiles a helper of the sampler even so, which needs a C++ compiler and half a minute.
        os.environ["TORCHDYNAMO_DISABLE"] = "1"


def _has_accelerator() -> bool:
    import torch

    return torch.cuda.is_available()


def _has_sleep_mode() -> bool:
    return _has_accelerator()


def _start_vllm(options: dict[str, Any]) -> "LLM":
    from vllm import LLM  # pyright: ignore[reportMissingImports]

    on_cpu = not _has_accelerator()
    given: dict[str, Any] = {}
    if on_cpu:
        given["block_size"] = CPU_BLOCK_TOKENS
        # A prompt that is prefilled in two steps has its generator set back, which vLLM cannot do on a CPU.
        given["enable_chunked_prefill"] = False
        step = CPU_STEP_TOKENS_WITH_ADAPTERS if options["max_rank"] else CPU_STEP_TOKENS
        given["max_num_batched_tokens"] = max(step, options["max_sequences"], options["max_length"] + 1)
    if options["kv_cache_bytes"]:
        given["kv_cache_memory_bytes"] = options["kv_cache_bytes"]
    if options["max_rank"]:
        given |= {"enable_lora": True, "max_lora_rank": options["max_rank"], "max_loras": options["max_adapters"]}
        given["lora_target_modules"] = options["modules"]
    else:
        given["worker_extension_cls"] = MERGING
    return LLM(
        options["model"],
        skip_tokenizer_init=True,  # prompts are tokens, and so are completions
        generation_config="vllm",  # not the model's: sampling is what the config of the run says
        dtype=options["dtype"],
        max_model_len=options["max_length"] + 1,  # scoring samples one more token than it was given
        max_num_seqs=options["max_sequences"],
        logprobs_mode=options["logprobs_mode"],
        tensor_parallel_size=options["tensor_parallel_size"],
        gpu_memory_utilization=options["gpu_memory_utilization"],
        enforce_eager=options["enforce_eager"] or on_cpu,
        enable_sleep_mode=options["sleep"] and _has_sleep_mode(),
        enable_prefix_caching=True,  # a group's prompt is prefilled once
        **given,
    )


def _completion(output: Any) -> tuple[list[int], list[float], bool]:
    tokens, reported = list(output.token_ids), output.logprobs
    assert [reported.token_ids[start] for start in reported.start_indices] == tokens
    return tokens, [reported.logprobs[start] for start in reported.start_indices], output.finish_reason == "stop"


def _read(connection: Connection, requests: "queue.SimpleQueue[dict]") -> None:
    """Pass requests on; when the parent is gone, so are its folder's reader and whatever this process started."""
    try:
        while True:
            requests.put(json.loads(connection.recv_bytes()))
    except (EOFError, OSError):
        os.killpg(os.getpgid(0), signal.SIGKILL)


def main() -> None:
    """Serve requests until the parent is gone."""
    connection = Connection(int(sys.argv[1]))
    requests: queue.SimpleQueue[dict] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(connection, requests), name="requests", daemon=True).start()
    worker = Worker()
    while True:
        request = requests.get()
        try:
            answer = {"value": getattr(worker, request.pop("call"))(**request)}
        except Refused as refusal:
            answer = {"refused": str(refusal)}
        except Exception as error:
            traceback.print_exc()
            answer = {"failed": f"{type(error).__name__}: {error}"}
        connection.send_bytes(json.dumps(answer).encode())


if __name__ == "__main__":
    main()
