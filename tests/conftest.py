"""Every test starts from the same seed, offline, on one thread; tests that need a GPU skip without one.

One thread a process, because the processes are the parallelism (``pytest -n``): at these sizes a pool of threads
costs more than it brings, and pools beside each other wait for the same cores.
"""

from __future__ import annotations

import os

# The libraries read these when they are imported, here and in the processes that tests start.
for pool in ("OMP", "MKL", "OPENBLAS"):
    os.environ[f"{pool}_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import gc
import random
from pathlib import Path

import numpy as np
import pytest
import tiny_llama
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    # torch.manual_seed formats a stack for every kind of accelerator that isn't there: a third of a small test's time.
    (torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed)(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files with long tests first, so that no process is left with one of them at the end.
    long = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in long)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False here")
    for item in items:
        rehearsed = getattr(getattr(item, "module", None), "DEVICE", "cuda") == "cpu"  # see tests/cuda
        if "cuda" in item.keywords and not rehearsed:
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Libraries and tests are loaded now; trainers collect garbage often, and needn't look at all of that each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama.llama().save_pretrained(folder)
    return folder
