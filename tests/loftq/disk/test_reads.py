"""What calibrating from disk reads and computes: counts, and the same bytes whatever is kept in between."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils.offload import OffloadedWeightsLoader
from calibrated_runs import rows
from disk_models import assert_same, config, streamed, tensors
from tiny_llama import llama
from torch import Tensor

from loftq.disk.kept_weights import KeptWeights
from loftq.disk.writers import ADAPTER_FOLDER
from qlora_kit import apply_lora
from qlora_kit.codecs.bnb.four_bit import Codec4bit

BATCHES = 4
# By what comes first in a block: the rows that go ahead; then of each batch once whole and once whole as the model
# becomes, and for each later group twice as far as there.
TIMES = {"q_proj": 8, "o_proj": 6, "gate_proj": 4, "down_proj": 2}
READ_ANEW = {name: 1 + times * BATCHES for name, times in TIMES.items()}
GROUPS = 4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reads") / "source"
    llama(vocab_size=128, hidden_size=64, intermediate_size=96).save_pretrained(folder)
    return folder


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Of weights read while calibrating, by name, and of decompositions."""
    found: Counter[str] = Counter()
    read = OffloadedWeightsLoader.__getitem__

    def reading(self: OffloadedWeightsLoader, name: str) -> Tensor:
        found[name] += 1
        return read(self, name)

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", reading)
    for name in ("cholesky_ex", "eigh"):
        own = getattr(torch.linalg, name)

        def counting(*args: Any, name: str = name, own: Any = own, **options: Any) -> Any:
            found[name] += 1
            return own(*args, **options)

        monkeypatch.setattr(torch.linalg, name, counting)
    return found


def written(source: Path, out: Path, method: str, **options: Any) -> dict[str, Tensor]:
    streamed(source, out, config(2, method=method, calibration=rows(8 * BATCHES), loftq_iter=2), **options)
    return {**tensors(out), **{f"adapter {name}": value for name, value in tensors(out / ADAPTER_FOLDER).items()}}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["aligned", "cloq"])
def test_a_block_is_read_once_for_all_batches(method: str, source: Path, counts: Counter[str], tmp_path: Path) -> None:
    found = written(source, tmp_path / "kept", method)
    of_blocks = {name: count for name, count in counts.items() if "layers." in name}
    assert len(of_blocks) == 2 * 9
    assert set(of_blocks.values()) == {2}, "once for the rows that go ahead, once for all that comes then"
    # "aligned" has two metrics, and two halves of the inputs.
    metrics, halves = (2, 2) if method == "aligned" else (1, 0)
    assert counts["cholesky_ex"] == metrics * 2 * GROUPS, "q, k and v share one, and so do gate and up"
    assert counts["eigh"] == halves * 2 * GROUPS
    counts.clear()
    assert_same(found, written(source, tmp_path / "anew", method, activation_bytes=0))
    if method == "aligned":
        # Without memory for outputs either, each batch's is computed again to go on from; the last block has no need.
        for name, count in READ_ANEW.items():
            [path] = [path for path in counts if path.startswith("model.layers.0.") and f".{name}." in path]
            assert counts[path] == count + BATCHES, path
            [path] = [path for path in counts if path.startswith("model.layers.1.") and f".{name}." in path]
            assert counts[path] == count - BATCHES, path
    assert counts["cholesky_ex"] == metrics * 2 * GROUPS


class Stored(dict[str, Tensor]):
    def __init__(self, names: str) -> None:
        super().__init__({name: torch.zeros(4) for name in names.split()})
        self.reads: list[str] = []

    def __getitem__(self, name: str) -> Tensor:
        self.reads.append(name)
        return super().__getitem__(name)


def test_what_is_kept_and_for_how_long() -> None:
    stored = Stored("a.0.x a.0.y a.0.z a.01.x b.x")
    kept = KeptWeights(stored, 2 * 16)
    assert (list(kept), len(kept)) == (list(stored), 5)
    with kept.staying("a.0"):
        for _ in range(3):
            for name in stored:
                assert kept[name] is dict.__getitem__(stored, name)
    assert Counter(stored.reads) == {"a.0.x": 1, "a.0.y": 1, "a.0.z": 3, "a.01.x": 3, "b.x": 3}
    stored.reads.clear()
    with pytest.raises(KeyError), kept.staying("a.0"):
        kept["a.0.none"]
    for _ in range(2):
        kept["a.0.x"]
    assert Counter(stored.reads) == {"a.0.none": 1, "a.0.x": 2}


@pytest.mark.slow
def test_a_base_that_was_quantized_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: Counter[int] = Counter()
    read = Codec4bit.read

    def reading(self: Codec4bit, module: Any) -> Tensor:
        reads[id(module)] += 1
        return read(self, module)

    monkeypatch.setattr(Codec4bit, "read", reading)
    model = llama(vocab_size=128, hidden_size=64, intermediate_size=128)
    lora = apply_lora(model, config(4, method="aligned", calibration=rows(), loftq_iter=2))
    assert [reads[id(layer.base_layer)] for layer in lora.adapter_layers().values()] == [1] * 14
