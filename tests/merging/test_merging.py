"""``merge``: the weight it writes, in every storage, and the account it gives."""

from __future__ import annotations

import copy
import json
from collections import Counter
from typing import Any

import numpy as np
import peft
import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from merge_nets import DENSE, FOUR_BIT, KBIT, PATHS, STORAGES, adapted, delta_of, inputs, output, stored_weight
from reference import merging as reference
from tiny_net import CASES, TinyNet, randomize_trainable_
from torch import nn

from qlora_kit import LoraConfig, MergeReport, apply_lora, merge
from qlora_kit.adapter_files.tensors import load_adapter_state_
from qlora_kit.codecs import Codec, codec_for
from qlora_kit.codecs.bnb import Codec4bit, CodecInt8
from qlora_kit.codecs.dense import DenseCodec
from qlora_kit.codecs.packed import PackedCodec

# The report's sums are float32 over some 6,000 entries; what is measured relative to a delta of a third of
# the weight loses another half digit when the weight is subtracted.
REPORT = 2e-5
FLOAT32 = 1e-6  # the order of float32 sums

# Two roundings to a dtype of weight and output in each of three layers, relative to the outputs' largest.
CAST = {"float32": 1e-6, "bfloat16": 2e-2, "float16": 2e-3}


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each module was written to, by the module's id."""
    count: Counter[int] = Counter()

    def counting(write: Any) -> Any:
        def counted(self: Any, module: nn.Module, weight: torch.Tensor) -> None:
            count[id(module)] += 1
            write(self, module, weight)

        return counted

    for kind in (DenseCodec, Codec4bit, CodecInt8, PackedCodec):
        monkeypatch.setattr(kind, "write_", counting(kind.write_))
        monkeypatch.setattr(kind, "take_over_", Codec.take_over_)  # so that all is written
    return count


# -- the weight that is written --------------------------------------------------------------------------------


@pytest.mark.parametrize("into", ["same", *DENSE])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.slow
def test_weights_and_report_are_the_references(storage: str, into: str) -> None:
    lora = adapted(storage, ("a", "b"))
    before = {path: stored_weight(lora.adapter_layers()[path].base_layer) for path in PATHS}
    deltas = {path: delta_of(lora, path, ("a", "b")) for path in PATHS}
    kind = storage if into == "same" else into
    report = merge(lora, into=into)
    assert isinstance(report, MergeReport)
    assert [layer.path for layer in report.layers] == list(PATHS)
    assert (report.into, report.adapters) == (into, ["a", "b"])
    for layer in report.layers:
        base, delta = before[layer.path], deltas[layer.path]
        module = report.model.get_submodule(layer.path)
        stored = stored_weight(module)
        if "double" not in kind and "rotated" not in kind:
            # (Doubly quantized scales are rounded too, and rotated rows in another basis; what that does is read back.)
            # The stored weight is the best that the storage has, whatever codes it chose among equals.
            expected = reference.rounding_norm(base + delta, kind)
            assert np.linalg.norm(stored - base - delta) == pytest.approx(expected, rel=1e-3, abs=1e-6)
        for name, value in reference.fidelity(base, delta, stored).items():
            assert getattr(layer, name) == pytest.approx(value, rel=REPORT, abs=REPORT), (layer.path, name)
        assert layer.codec == codec_for(module).name
        if into != "same":
            assert type(module) is nn.Linear
            assert module.weight.dtype == module.bias.dtype == DENSE[into]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("into", ["same", "float32", "bfloat16"])
@pytest.mark.slow
def test_one_write_a_layer_however_many_adapters(writes: Counter[int], storage: str, into: str) -> None:
    lora = adapted(storage, ("a", "b", "c"))
    merge(lora, into=into)
    assert sorted(writes.values()) == [1, 1, 1]


@pytest.mark.parametrize("storage", list(FOUR_BIT))
def test_adapters_are_summed_before_they_are_quantized(storage: str) -> None:
    """The codes are those of base + all deltas; merged one by one they'd be quantized in between."""
    lora = adapted(storage, ("a", "b"), size=0.1)
    layer = lora.adapter_layers()["0"]
    base, both = stored_weight(layer.base_layer), delta_of(lora, "0", ("a", "b"))
    second = delta_of(lora, "0", ("b",))
    state = layer.base_layer.weight.quant_state
    how = {"blocksize": 64, "quant_type": state.quant_type, "compress_statistics": state.nested}
    expected, fresh = quantize_4bit(torch.as_tensor(base + both, dtype=torch.float32), **how)
    one_by_one = merge(copy.deepcopy(lora), adapters=["a"]).model.get_submodule("0")
    twice, _ = quantize_4bit(torch.as_tensor(stored_weight(one_by_one) + second, dtype=torch.float32), **how)
    assert (twice != expected).sum() > 100, "the two ways must differ for this test to tell them apart"

    merged = merge(lora).model.get_submodule("0")
    codes = merged.weight.data.view(torch.uint8).reshape(-1)
    # A value within float32's rounding of the middle between two levels may go either way.
    assert (codes != expected.reshape(-1)).sum() <= 2
    torch.testing.assert_close(merged.weight.quant_state.absmax, fresh.absmax, rtol=1e-6, atol=0)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("into", list(DENSE))
@pytest.mark.slow
def test_a_dense_merge_is_the_adapted_function(storage: str, into: str) -> None:
    lora = adapted(storage, ("a", "b")).train(storage == "int8")  # its evaluation also rounds activations
    x = inputs(lora)
    with torch.no_grad():
        expected = lora(x).float()
        merged = merge(lora, into=into).model
        found = merged(x.to(DENSE[into])).float()
    tolerance = CAST[into] + CAST.get(storage, 0)
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("storage", KBIT)
def test_a_requantized_merge_is_closer_than_no_merge(storage: str) -> None:
    """A delta of the weight's size survives 4 bits: what is left is the storage's own rounding."""
    lora = adapted(storage, size=1.0)
    apart = output(lora)
    with lora.disable_adapter():
        base = output(lora)
    report = merge(lora)
    assert (output(report.model) - apart).norm() < 0.5 * (base - apart).norm()
    assert 0.8 < report.mean("retained") < 1.2


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set:UserWarning")
@pytest.mark.parametrize("several", [False, True])
def test_dense_merges_are_pefts(case: str, several: bool) -> None:
    """Linear, Embedding, Conv1D, Conv2d, rslora, patterns, biases and trained copies."""
    base = TinyNet().eval()
    names = ["default", "second"] if several else ["default"]
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**CASES[case]))
    ours = apply_lora(base, LoraConfig(**CASES[case]))
    if several:
        plain = {**CASES[case], "bias": "none", "modules_to_save": None}
        theirs.add_adapter("second", peft.LoraConfig(**plain))
        theirs.base_model.set_adapter(names)
        ours.add_adapter("second", LoraConfig(**plain))
    randomize_trainable_(theirs)
    for name in names:
        load_adapter_state_(ours, name, peft.get_peft_model_state_dict(theirs, adapter_name=name))
    expected = theirs.eval().merge_and_unload(adapter_names=names)
    report = merge(ours, adapters=names)
    assert type(report.model) is TinyNet
    assert report.model is base
    assert list(base.state_dict()) == list(expected.state_dict())
    torch.testing.assert_close(base.state_dict(), expected.state_dict(), rtol=0, atol=FLOAT32)
    ids = torch.randint(11, (3, 4))
    torch.testing.assert_close(base(ids), expected(ids), rtol=0, atol=1e-5)  # sums of 54 such differences


# -- the account -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["float32", "nf4"])
def test_the_report_reads_as_a_table_and_as_json(storage: str) -> None:
    report = merge(adapted(storage, ("a", "b")))
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "stored", "as", "|delta|/|W|", "retained", "error/|W|", "/|delta|"]
    assert [line.split()[0] for line in lines[1:-1]] == list(PATHS)
    assert lines[-1].startswith("3 layers merged into each module's own storage: ")
    assert f"{report.retained:.1%} of the delta retained" in lines[-1]
    assert len({len(line) for line in lines[:-1]}) == 1, "columns are aligned"
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain == report.to_dict()
    assert plain["adapters"] == ["a", "b"]
    assert set(plain["layers"][0]) >= {"path", "codec", "delta_ratio", "retained", "error", "delta_error"}


def test_a_fresh_adapter_loses_nothing_and_a_zero_weight_is_said_to_be_one() -> None:
    lora = apply_lora(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"]))
    (layer,) = merge(lora).layers
    assert (layer.delta_ratio, layer.retained, layer.error, layer.delta_error) == (0, 1, 0, 0)
    zero = nn.Sequential(nn.Linear(8, 8))
    nn.init.zeros_(zero[0].weight)
    lora = apply_lora(zero, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    (layer,) = merge(lora).layers
    assert layer.delta_ratio == float("inf")
    assert layer.retained == pytest.approx(1, abs=REPORT)


def test_the_progress_bar_counts_layers(capsys: pytest.CaptureFixture[str]) -> None:
    merge(adapted())
    assert capsys.readouterr().err == ""
    adapted().merge_and_unload(progressbar=True)
    assert "merging: 100%" in capsys.readouterr().err


def test_only_the_adapters_named_are_merged() -> None:
    lora = adapted("float32", ("a", "b"))
    lora.set_adapter("b")
    expected = output(lora)
    lora.set_adapter("a")
    assert merge(lora, adapters="b").adapters == ["b"]
    torch.testing.assert_close(output(lora), expected, rtol=0, atol=1e-5)


def test_a_layer_that_only_another_adapter_has_stays_the_base() -> None:
    lora = adapted("float32", ("a",), target_modules=["0", "2"])
    lora.add_adapter("b", LoraConfig(r=4, target_modules=["4"], init_lora_weights=False))
    lora.merge_adapter(["b"])
    original = lora.adapter_layers()["4"]._unmerged.clone()
    report = merge(lora, adapters=["a"])
    assert [layer.path for layer in report.layers] == ["0", "2"]
    assert torch.equal(report.model.get_submodule("4").weight, original)


def test_without_an_account_a_dense_merge_has_the_same_bits() -> None:
    one = adapted("float32")
    other = copy.deepcopy(one)
    report = merge(one, account=False)
    assert report.layers == []
    for key, tensor in merge(other).model.state_dict().items():
        assert torch.equal(tensor, report.model.state_dict()[key])
    rounded = merge(adapted("nf4"), force=True, account=False)
    assert rounded.layers, "what is rounded is measured all the same: it may be refused"
