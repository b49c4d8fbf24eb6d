"""Where the tests of this folder run: on a GPU, or rehearsed on the CPU by who writes them.

``CUDA_TESTS_ON=cpu pytest -m cuda tests/cuda`` runs what doesn't need the GPU's own kernels.
"""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = os.environ.get("CUDA_TESTS_ON", "cuda")
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]


def need_dtype(dtype: torch.dtype) -> None:
    """Skip where the GPU has no instructions for ``dtype``."""
    if DEVICE == "cuda" and dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bfloat16")


def need_cuda(why: str) -> None:
    """Skip in a rehearsal."""
    if DEVICE != "cuda":
        pytest.skip(f"a rehearsal on the CPU has no {why}")
