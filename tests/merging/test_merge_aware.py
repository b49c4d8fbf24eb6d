"""Adapters that are trained for a merge: trained, merged every way that they can be, and equal bit for bit."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merge_nets import PATHS, STORAGES, adapted, net, output, stored_weight
from tiny_llama import llama
from torch import Tensor, nn

from qlora_kit import ConfigError, LoraConfig, LoraModel, MergeError, TargetError, apply_lora, merge, quantize_
from qlora_kit.codecs.codebooks import STORED_TYPES

DENSE = ("float32", "bfloat16", "float16")


def weights(lora: LoraModel) -> dict[str, np.ndarray]:
    """What each layer computes with, by path."""
    found = {}
    for path, layer in lora.adapter_layers().items():
        held = layer.as_merged(layer.active_adapters)
        assert held is not None
        found[path] = stored_weight(held.module)
    return found


def assert_holds(model: nn.Module, expected: dict[str, np.ndarray]) -> None:
    for path, weight in expected.items():
        assert np.array_equal(stored_weight(model.get_submodule(path)), weight), path


@pytest.mark.parametrize("storage", [storage for storage in STORAGES if storage not in DENSE])
@pytest.mark.parametrize("way", ["merge", "merge_and_unload", "with an account of nothing"])
def test_into_its_own_storage(storage: str, way: str) -> None:
    lora = adapted(storage, ("a", "b"), merge_aware="same")
    before, expected = output(lora), weights(lora)
    if way == "merge":
        report = merge(lora)
        assert report.trained
        assert "the adapters are trained for this merge" in str(report)
        merged = report.model
    else:
        merged = lora.merge_and_unload() if way == "merge_and_unload" else merge(lora, account=False).model
    assert_holds(merged, expected)
    assert torch.equal(output(merged), before)


@pytest.mark.parametrize("into", STORED_TYPES)
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "nf4-double", "packed-nf3"])
def test_into_every_type(into: str, storage: str) -> None:
    lora = adapted(storage, use_rslora=True, merge_aware=into)
    before, expected = output(lora), weights(lora)
    report = merge(lora)
    assert (report.into, report.trained) == (into, True)
    assert_holds(report.model, expected)
    assert torch.equal(output(report.model), before)


@pytest.mark.parametrize("blocksize", [32, "row"])
def test_blocks_and_scales_as_trained(blocksize: Any) -> None:
    trained = {"into": "signed2", "blocksize": blocksize, "double_quant": True}
    lora = adapted("float32", merge_aware=trained)
    expected = weights(lora)
    report = merge(lora)
    assert report.trained
    assert_holds(report.model, expected)
    module: Any = report.model.get_submodule(PATHS[0])
    assert (module.blocksize, module.double_quant) == (64 if blocksize == "row" else blocksize, True)


def test_a_small_delta_isnt_refused() -> None:
    """Rounding shows next to nothing of it, and training has seen that."""
    lora = adapted("packed-signed2-double", size=1e-3, merge_aware="same")
    plain = adapted("packed-signed2-double", size=1e-3)
    with pytest.raises(MergeError, match="expected at least 50%"):
        merge(plain)
    report = merge(lora)
    assert report.trained
    assert report.retained < 0.5


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "16 bits": ({"into": "bfloat16"}, r"3 layers stored otherwise, 0 for one"),
    "another type": ({"into": "nf4"}, "3 layers stored otherwise"),
    "another blocksize": ({"into": "nf3", "blocksize": 128}, "3 layers stored otherwise"),
    "scale search": ({"rounding": "scale-search"}, "rounding='scale-search'"),
    "a residual": ({"residual_rank": 2}, "residual_rank=2"),
    "weighted": ({"weights": [0.5]}, r"weights=\[0.5\]"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_merge_warns(case: str) -> None:
    options, said = OTHERS[case]
    lora = adapted("packed-nf3", merge_aware="nf3")
    with pytest.warns(UserWarning, match=f"trained to be merged into 'nf3' .*{said}"):
        report = merge(lora, force=True, **options)
    assert not report.trained


def test_the_same_storage_by_another_name_is_the_same_merge() -> None:
    for trained, asked in (("same", "nf3"), ("nf3", "same")):
        lora = adapted("packed-nf3", merge_aware=trained)
        expected = weights(lora)
        assert_holds(merge(lora, into=asked).model, expected)


def test_modules_beside_that_would_be_stored_anew() -> None:
    """Two bits for what is adapted, and then also for what isn't: not what training computed with."""
    lora = adapted("nf4", target_modules=["0"], merge_aware="nf2")
    with pytest.warns(UserWarning, match="2 modules without the adapter stored anew, 2 for one"):
        merge(lora)


def test_adapters_for_different_merges() -> None:
    lora = adapted("float32", merge_aware="nf4")
    lora.add_adapter("b", LoraConfig(r=2, target_modules=list(PATHS), init_lora_weights=False, merge_aware="nf2"))
    with pytest.raises(MergeError, match=r"into: expected a storage .*'nf4' and 'nf2'.*found none"):
        merge(lora, adapters=["a", "b"])
    with pytest.warns(UserWarning, match="into 'nf4' and 'nf2'"):
        merge(lora, adapters=["a", "b"], into="float32")


def test_in_place_and_then_out() -> None:
    lora = adapted("nf4-double", merge_aware="same")
    before, expected = output(lora), weights(lora)
    lora.merge_adapter()
    assert_holds(lora.model, {f"{path}.base_layer": weight for path, weight in expected.items()})
    assert torch.equal(output(lora), before)
    assert_holds(lora.merge_and_unload(), expected)


def test_an_error_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    lora = adapted("packed-nf3", merge_aware="same")
    before = output(lora)
    with pytest.raises(MergeError):
        merge(lora, residual_rank=-1)
    assert torch.equal(output(lora), before)


# -- which layers ------------------------------------------------------------------------------------------------------


def test_only_what_the_merge_rounds_is_rounded() -> None:
    """An embedding and a convolution stay dense in the merge, and compute as ever."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"emb": nn.Embedding(8, 64), "conv": nn.Conv1d(4, 4, 3), "fc": nn.Linear(64, 64)})
    lora = apply_lora(model, LoraConfig(r=2, target_modules=["emb", "conv", "fc"], merge_aware="nf4"))
    aware = {path for path, layer in lora.adapter_layers().items() if layer.merge_aware}
    assert aware == {"fc"}
    merged = merge(lora)
    assert merged.trained
    assert type(model["emb"]) is nn.Embedding


@pytest.mark.parametrize(("storage", "into"), [("float32", "same"), ("bfloat16", "same")])
def test_nothing_to_round(storage: str, into: str) -> None:
    model = net(storage)
    kinds = [type(module) for module in model]
    with pytest.raises(TargetError, match=r"merge_aware='same': expected adapted linear layers .*quantize the model"):
        apply_lora(model, LoraConfig(target_modules=list(PATHS), merge_aware=into))
    assert [type(module) for module in model] == kinds


def test_a_second_adapter_that_rounds_nothing_leaves_the_first() -> None:
    lora = adapted("float32")
    before = output(lora)
    with pytest.raises(TargetError, match="merge_aware"):
        lora.add_adapter("b", LoraConfig(target_modules=list(PATHS), merge_aware="same"))
    assert list(lora.peft_config) == ["a"]
    assert lora.adapter_layers()["0"].adapter_names() == ["a"]
    assert torch.equal(output(lora), before)


# -- files and training ------------------------------------------------------------------------------------------------


def test_saved_and_loaded(tmp_path: Path) -> None:
    lora = adapted("packed-signed2-double", merge_aware="same")
    before = output(lora)
    lora.save_pretrained(tmp_path)
    base = lora.unload()
    again = LoraModel.from_pretrained(base, tmp_path / "a")
    assert again.peft_config["default"].merge_aware == "same"
    assert torch.equal(output(again), before)
    with again.set_merge_aware(False):
        beside = output(again)
    assert not torch.equal(beside, before)
    again.unload()
    plain = LoraModel.from_pretrained(
        base, tmp_path / "a", config=LoraConfig(r=4, lora_alpha=6, target_modules=list(PATHS))
    )
    assert torch.equal(output(plain), beside)


def test_peft_reads_it_without(tmp_path: Path) -> None:
    """Our field is passed over with PEFT's own warning, as of a later release's."""
    peft = pytest.importorskip("peft")
    lora = adapted("float32", merge_aware="nf4")
    lora.save_pretrained(tmp_path)
    with lora.set_merge_aware(False):
        beside = output(lora)
    base = lora.unload()
    with pytest.warns(UserWarning, match="merge_aware"):
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "a"))
    assert torch.allclose(output(theirs), beside, atol=1e-6)


def train(lora: LoraModel, steps: int, rate: float = 1e-2) -> list[float]:
    """Losses of fitting a fixed random function of the inputs."""
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        target = net("float32")(x)
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=rate, weight_decay=0)
    losses = []
    for _ in range(steps):
        loss = (lora.train()(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    lora.eval()
    return losses


@pytest.mark.parametrize("storage", ["float32", "nf4", "packed-nf3", "packed-signed2-double"])
def test_it_learns_what_is_merged(storage: str) -> None:
    torch.manual_seed(1)
    into = "nf2" if storage == "float32" else "same"
    config = LoraConfig(r=8, lora_alpha=16, target_modules=list(PATHS), merge_aware=into)
    lora = apply_lora(net(storage), config)
    losses = train(lora, 60)
    assert np.mean(losses[-5:]) < 0.8 * losses[0]
    before = output(lora)
    merged = merge(lora).model
    assert torch.equal(output(merged), before)


def test_a_language_model_with_checkpointing_and_autocast() -> None:
    """Gradients are those without either; the trained model is the merged one."""
    found: list[dict[str, Tensor]] = []
    ids = torch.randint(0, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = quantize_(llama(), 2)
        lora = apply_lora(
            model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", merge_aware="same")
        )
        with torch.no_grad():
            for name, parameter in lora.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        if checkpointing:
            model.activation_checkpointing_enable()
        lora.train()(input_ids=ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in lora.named_parameters() if p.grad is not None})
    assert found[0]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    with torch.autocast("cpu", torch.bfloat16):
        lora(input_ids=ids, labels=ids).loss.backward()
    lora.eval()
    with torch.no_grad():
        before = lora(input_ids=ids).logits
        assert torch.equal(merge(lora).model(input_ids=ids).logits, before)


# -- configuration -----------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Any, str]] = {
    "unknown": ("nf5", r"merge_aware: expected 'same' or one of .*found 'nf5'; did you mean 'nf\d'"),
    "dense": ("bfloat16", "merge_aware: expected 'same' or one of"),
    "a number": (4, "merge_aware: expected 'same' or one of"),
    "a mistyped key": ({"into": "nf4", "block_size": 64}, "did you mean 'blocksize'"),
    "no storage": ({"blocksize": 64}, "merge_aware: expected 'same'"),
    "no block": ({"into": "nf4", "blocksize": 0}, r"merge_aware\['blocksize'\]: expected a positive number or 'row'"),
    "no flag": ({"into": "nf4", "double_quant": 1}, r"merge_aware\['double_quant'\]: expected True or False"),
    "blocks of int8": ({"into": "int8", "blocksize": 64}, "leave blocksize and double_quant out"),
    "blocks of its own": ({"into": "same", "blocksize": 64}, "leave blocksize and double_quant out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_settings(case: str) -> None:
    value, said = REFUSED[case]
    with pytest.raises(ConfigError, match=said):
        LoraConfig(merge_aware=value)


def test_settings() -> None:
    assert LoraConfig(merge_aware="NF4").merge_aware == "nf4"
    assert LoraConfig(merge_aware={"into": "nf4", "blocksize": None}).merge_aware == "nf4"
    trained = {"into": "signed2", "blocksize": 32, "double_quant": True}
    config = LoraConfig(merge_aware=trained)
    assert LoraConfig.from_dict(config.to_dict()) == config
    assert config.as_stored().merge_aware == trained
    assert "merge_aware" not in LoraConfig().to_dict()
    with pytest.raises(
        ConfigError, match=r"lora_dropout: expected 0 with merge_aware, found 0\.1; .*a merge can't know"
    ):
        LoraConfig(merge_aware="same", lora_dropout=0.1)


def test_no_warning_where_nothing_is_trained_for() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = merge(adapted("nf4"), force=True)
    assert not report.trained
    assert "merge_aware" not in str(report)
