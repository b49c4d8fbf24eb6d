from __future__ import annotations

from pathlib import Path

import pytest
from disk_merges import STORAGES, gpt2, llama, save_adapter, save_base


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama in every storage, by its name."""
    folder = tmp_path_factory.mktemp("bases")
    return {storage: save_base(llama(), folder / storage, storage) for storage in STORAGES}


@pytest.fixture(scope="session")
def adapter(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On all linears of the Llama, whatever its storage."""
    return save_adapter(bases["float32"], tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="session")
def second(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On some of the linears, with other scaling."""
    options = {"seed": 2, "use_rslora": True}
    return save_adapter(bases["float32"], tmp_path_factory.mktemp("second"), ["q_proj", "lm_head"], **options)


@pytest.fixture(scope="session")
def gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(gpt2(), tmp_path_factory.mktemp("gpt2"))
