"""``add_weighted_adapter`` on models: storages, families, starts, files, state, and errors that change nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import merge_nets
import numpy as np
import pytest
import torch
from golden_nets import base_net, ids
from lowrank.algebra.adapters import DENSITY_TYPES
from lowrank.algebra.pairs import assert_close, deltas, fill_, in_peft, ours, peft_deltas, peft_talks
from torch import nn

from qlora_kit import AdapterError, ConfigError, LoftQConfig, LoraConfig, LoraModel, apply_lora
from qlora_kit.adapter_files.backbone import fingerprint
from qlora_kit.compat.peft import get_peft_model
from qlora_kit.lowrank.algebra import CombineReport, combination_types
from qlora_kit.model import combining as combining_module

FLOAT32 = 1e-5


def summed(lora: LoraModel, weights: dict[str, float]) -> dict[str, np.ndarray]:
    total: dict[str, np.ndarray] = {}
    for name, weight in weights.items():
        for path, delta in deltas(lora, name).items():
            total[path] = total.get(path, 0) + weight * delta
    return total


def density(kind: str) -> float | None:
    return 0.5 if kind in DENSITY_TYPES else None


# -- what it gives ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["exact", "cat"])
def test_the_weighted_sum_on_every_family_with_any_ranks_and_scalings(kind: str) -> None:
    lora = ours({"r": 1, "lora_alpha": 5}, {"r": 3, "use_rslora": True}, {"target_modules": ["fc"], "r": 4})
    expected = summed(lora, {"a0": 0.5, "a1": -1.5, "a2": 2.0})
    report = lora.add_weighted_adapter(["a0", "a1", "a2"], [0.5, -1.5, 2.0], "new", kind)
    assert_close(deltas(lora, "new"), expected, FLOAT32)
    assert isinstance(report, CombineReport)
    assert all(line.distance < 1e-6 for line in report.layers)
    lora.set_adapter(["a0", "a1", "a2"])
    together = ours({"r": 1, "lora_alpha": 5}, {"r": 3, "use_rslora": True}, {"target_modules": ["fc"], "r": 4})
    together.add_weighted_adapter(["a0", "a1", "a2"], [1, 1, 1], "sum", kind)
    together.set_adapter("sum")
    with torch.no_grad():  # logits of order 100: adapters of order 1 on every layer
        torch.testing.assert_close(together(ids()), lora(ids()), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("storage", merge_nets.STORAGES)
@pytest.mark.slow
def test_the_base_plays_no_part_whatever_its_storage(storage: str) -> None:
    lora = merge_nets.adapted(storage, ("a", "b"))
    before = {path: merge_nets.stored_weight(layer.base_layer) for path, layer in lora.adapter_layers().items()}
    expected = summed(lora, {"a": 0.3, "b": 0.9})
    lora.add_weighted_adapter(["a", "b"], [0.3, 0.9], "new", "exact")
    assert_close(deltas(lora, "new"), expected, FLOAT32)
    for path, layer in lora.adapter_layers().items():
        np.testing.assert_array_equal(merge_nets.stored_weight(layer.base_layer), before[path])
    kinds = {p.dtype for n, p in lora.named_parameters() if ".lora_A.new" in n}
    assert kinds == {torch.float32}


def test_weights_by_path_reach_their_modules() -> None:
    lora = ours({}, {}, paths=("fc", "head"))
    first, second = deltas(lora, "a0"), deltas(lora, "a1")
    expected = {"fc": first["fc"] - second["fc"], "head": 3 * second["head"]}
    lora.add_weighted_adapter(["a0", "a1"], {"fc": [1, -1], ".*": [0, 3]}, "new", "exact")
    assert_close(deltas(lora, "new"), expected, FLOAT32)
    lora.add_weighted_adapter(["a0", "a1"], lambda path: [1, -1] if path == "fc" else [0, 3], "too", "exact")
    assert_close(deltas(lora, "too"), expected, FLOAT32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_factors_have_the_models_adapter_dtype(dtype: torch.dtype) -> None:
    lora = apply_lora(base_net(), LoraConfig(r=3, target_modules=["fc", "conv"]), "a", adapter_dtype=dtype)
    lora.add_adapter("b", LoraConfig(r=2, target_modules=["fc"]))
    fill_(lora)
    expected = summed(lora, {"a": 0.5, "b": 0.25})
    lora.add_weighted_adapter(["a", "b"], [0.5, 0.25], "new", "exact")
    assert {p.dtype for n, p in lora.named_parameters() if ".new." in n} == {dtype}
    assert_close(deltas(lora, "new"), expected, 4 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-12)


def test_an_overflow_of_the_adapter_dtype_is_refused() -> None:
    lora = apply_lora(base_net(), LoraConfig(r=2, target_modules=["fc"]), "a", adapter_dtype=torch.float16)
    fill_(lora)
    before = merge_nets.bits(lora)
    with pytest.raises(AdapterError, match=r"fc: expected the combined delta from the new adapter's torch.float16"):
        lora.add_weighted_adapter(["a"], [1e12], "new", "cat")
    merge_nets.assert_same_bits(lora, before)


# -- what it leaves alone --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", combination_types())
def test_it_is_frozen_and_not_active_and_all_else_is_as_it_was(kind: str) -> None:
    lora = ours({}, {})
    lora.set_adapter("a1")
    before = merge_nets.bits(lora)
    random = torch.random.get_rng_state()
    with torch.no_grad():
        logits = lora(ids())
    lora.add_weighted_adapter(["a0", "a1"], [0.5, 0.5], "new", kind, density=density(kind))
    assert (lora.active_adapters, list(lora.peft_config)) == (["a1"], ["a0", "a1", "new"])
    assert not any(p.requires_grad for n, p in lora.named_parameters() if ".new" in n)
    assert torch.equal(torch.random.get_rng_state(), random)
    with torch.no_grad():
        assert torch.equal(lora(ids()), logits)
    lora.delete_adapter("new")
    merge_nets.assert_same_bits(lora, before)


def test_it_lives_like_any_adapter() -> None:
    lora = ours({}, {})
    lora.add_weighted_adapter(["a0", "a1"], [0.5, 0.5], "new", "exact")
    lora.delete_adapter("a0")
    lora.delete_adapter("a1")
    lora.set_adapter("new")
    assert {n for n, p in lora.named_parameters() if p.requires_grad} == {
        n for n, _ in lora.named_parameters() if ".new" in n
    }
    lora(ids()).sum().backward()
    assert all(p.grad is not None for n, p in lora.named_parameters() if ".new" in n)
    with torch.no_grad():
        expected = lora(ids())
        merged = copy.deepcopy(lora).merge_and_unload()(ids())
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-3)
    lora.add_weighted_adapter(["new"], [2.0], "twice", "exact")
    assert_close(deltas(lora, "twice"), summed(lora, {"new": 2.0}), FLOAT32)


@pytest.mark.parametrize("bits", [2, 4])
def test_sources_that_loftq_started_do_not_quantize_the_base_again(bits: int, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))
    config = LoraConfig(
        r=4, target_modules=["0", "2"], init_lora_weights="loftq", loftq_config=LoftQConfig(bits, method="loftq")
    )
    lora = apply_lora(net, config, "a")
    lora.add_adapter("b", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    bases = {path: layer.base_layer for path, layer in lora.adapter_layers().items()}
    print_before = fingerprint(bases)
    expected = summed(lora, {"a": 1.0, "b": 0.5})
    lora.add_weighted_adapter(["a", "b"], [1.0, 0.5], "new", "exact")
    assert_close(deltas(lora, "new"), expected, FLOAT32)
    assert all(layer.base_layer is bases[path] for path, layer in lora.adapter_layers().items())
    assert fingerprint(bases) == print_before
    assert lora.peft_config["new"].init_lora_weights is True
    assert lora.peft_config["new"].loftq_config is None
    assert lora.backbones["new"] == print_before
    lora.save_pretrained(tmp_path)
    lora.load_adapter(tmp_path / "new", "again")  # checks the backbone
    assert_close(deltas(lora, "again"), deltas(lora, "new"), 0)


def test_sources_of_another_backbone_are_refused_unless_told() -> None:
    lora = merge_nets.adapted("nf4", ("a", "b"))
    lora.backbones["a"] = "0" * 32
    before = merge_nets.bits(lora)
    with pytest.raises(AdapterError, match=r"adapter 'a': expected the quantized base .*check_backbone=False"):
        lora.add_weighted_adapter(["a", "b"], [1, 1], "new")
    merge_nets.assert_same_bits(lora, before)
    lora.add_weighted_adapter(["a", "b"], [1, 1], "new", check_backbone=False)
    assert "new" not in lora.backbones


# -- files -----------------------------------------------------------------------------------------------


@peft_talks
@pytest.mark.parametrize("kind", ["exact", "svd", "linear", "knots"])
def test_it_is_saved_and_loaded_as_any_adapter_here_and_in_peft(kind: str, tmp_path: Path) -> None:
    lora = ours({"lora_alpha": 5}, {"use_rslora": True})
    lora.add_weighted_adapter(["a0", "a1"], [0.5, -1.5], "new", kind, density=density(kind))
    lora.save_pretrained(tmp_path)
    again = LoraModel.from_pretrained(base_net(), tmp_path / "new", "new")
    assert_close(deltas(again, "new"), deltas(lora, "new"), 0)
    assert_close(peft_deltas(in_peft(lora, tmp_path / "peft"), "new"), deltas(lora, "new"), 1e-12)


def test_paths_that_end_alike_keep_their_own_ranks_in_files(tmp_path: Path) -> None:
    def net() -> nn.Module:
        inner = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        return nn.ModuleDict(
            {"0": nn.Linear(6, 6), "x": inner, "1": nn.Linear(6, 6), "0.1".replace(".", "_"): inner[1]}
        )

    lora = apply_lora(net(), LoraConfig(r=4, target_modules=r"0|x\.0|x\.1"), "a")
    lora.add_adapter("b", LoraConfig(r=1, target_modules=r"0|1"))
    lora.add_adapter("c", LoraConfig(r=1, target_modules=["x.0"]))
    fill_(lora)
    lora.add_weighted_adapter(
        ["a", "b", "c"], {"^0$": [0, 1, 0], r"x\.0": [1, 0, 1], ".*": [1, 1, 1]}, "new", "exact", own_ranks=True
    )
    ranks = {path: layer.r["new"] for path, layer in lora.adapter_layers().items()}
    assert ranks == {"0": 1, "x.0": 5, "x.1": 4, "1": 1}
    lora.save_pretrained(tmp_path)
    again = LoraModel.from_pretrained(net(), tmp_path / "new", "new")
    assert_close(deltas(again, "new"), deltas(lora, "new"), 0)


@pytest.mark.parametrize(
    ("configs", "expected"),
    [
        ([{"target_modules": ["fc", "head"]}, {"target_modules": ["conv", "fc"]}], ["conv", "fc", "head"]),
        ([{"target_modules": "f.|head"}, {"target_modules": "c.*"}], "(f.|head)|(c.*)"),
        ([{"target_modules": "f.|head"}, {"target_modules": "f.|head"}], "f.|head"),
        ([{"target_modules": "f."}, {"target_modules": ["conv"]}], "fc|conv"),
        ([{"target_modules": ["fc", "conv"], "exclude_modules": ["conv"]}, {"target_modules": ["head"]}], "fc|head"),
    ],
)
def test_the_configuration_selects_the_union(configs: list[dict[str, Any]], expected: list[str] | str) -> None:
    lora = ours(*configs)
    lora.add_weighted_adapter(["a0", "a1"], [1, 1], "new")
    config = lora.peft_config["new"]
    assert config.target_modules == expected
    assert config.exclude_modules is None
    assert (config.use_rslora, config.lora_alpha) == (False, config.r)


def test_a_module_at_two_paths_is_combined_once() -> None:
    shared = nn.Linear(5, 5)
    lora = apply_lora(nn.ModuleDict({"p": shared, "q": shared}), LoraConfig(r=2, target_modules=["p", "q"]), "a")
    lora.add_adapter("b", LoraConfig(r=2, target_modules=["p", "q"]))
    fill_(lora)
    report = lora.add_weighted_adapter(["a", "b"], [1, 1], "new", "cat")
    assert [line.path for line in report.layers] == ["p"]
    assert lora.model["p"] is lora.model["q"]


def test_the_trained_copy_of_one_source_comes_along(tmp_path: Path) -> None:
    lora = ours({"target_modules": ["fc"], "modules_to_save": ["head"]}, {"target_modules": ["fc", "conv"]})
    report = lora.add_weighted_adapter(["a1", "a0"], [0.5, 0.5], "new", "svd")
    assert report.copied == {"head": "a0"}
    assert "copied whole from a0" in str(report)
    copies = lora.saved_modules()["head"].modules_to_save
    assert torch.equal(copies["new"].weight, copies["a0"].weight)
    assert copies["new"].weight is not copies["a0"].weight
    lora.save_pretrained(tmp_path)
    again = LoraModel.from_pretrained(base_net(), tmp_path / "new", "new")
    lora.set_adapter("new")
    with torch.no_grad():
        assert torch.equal(again(ids()), lora.eval()(ids()))


def test_pefts_names_have_it() -> None:
    from qlora_kit.compat.peft import LoraConfig as PeftConfig

    model = get_peft_model(base_net(), PeftConfig(r=2, target_modules=["fc"]), "a")
    model.add_adapter("b", PeftConfig(r=3, target_modules=["head"]))
    fill_(model)
    expected = summed(model, {"a": 1, "b": 2})
    model.base_model.add_weighted_adapter(["a", "b"], [1, 2], "new", "svd", svd_rank=3)
    assert_close(deltas(model, "new"), expected, FLOAT32)


# -- errors ----------------------------------------------------------------------------------------------

REFUSALS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"adapters": ["a0", "nobody"]}, AdapterError, r"unknown adapter 'nobody'; the model has \['a0', 'a1', 'a2'\]"),
    ({"adapters": []}, AdapterError, r"adapters: expected a list with at least one adapter's name, found \[\]"),
    ({"adapters": "a0"}, AdapterError, "adapters: expected a list with at least one adapter's name, found 'a0'"),
    ({"adapter_name": "a1"}, AdapterError, "adapter 'a1' exists already"),
    ({"adapter_name": "a.b"}, AdapterError, "adapter name 'a.b': expected a non-empty string without dots"),
    ({"weights": [1.0]}, AdapterError, r"expected 2 weights, one for each adapter, found 1"),
    ({"weights": [1.0, float("nan")]}, AdapterError, "expected finite numbers as weights, found nan"),
    ({"weights": {"nope": [1, 1]}}, AdapterError, "weights: expected paths, .* found 'nope', which matches none"),
    ({"combination_type": "ties"}, ConfigError, "density: expected a share of entries to keep"),
    ({"combination_type": "ties", "density": 0.0}, ConfigError, r"density: expected a share in \(0, 1\]"),
    ({"combination_type": "tie"}, ConfigError, r"combination_type: expected one of .*did you mean 'ties'\?"),
    ({"svd_driver": "gesdd"}, ConfigError, "svd_driver: expected one of .*found 'gesdd'"),
    ({"svd_full_matrices": 1}, ConfigError, "svd_full_matrices: expected True or False, found 1"),
    ({"combination_type": "linear", "adapters": ["a0", "a2"]}, AdapterError, r"fc: expected adapters of one rank"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), REFUSALS)
def test_errors_come_before_anything_changes(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    lora = ours({}, {}, {"r": 3}, paths=("fc", "head"))
    before, plan = merge_nets.bits(lora), lora.plan
    with pytest.raises(kind, match=message):
        lora.add_weighted_adapter(**{"adapters": ["a0", "a1"], "weights": [1, 1], "adapter_name": "new", **changes})
    merge_nets.assert_same_bits(lora, before)
    assert (list(lora.peft_config), lora.plan) == (["a0", "a1", "a2"], plan)


def test_state_that_cannot_be_combined() -> None:
    lora = ours({}, {}, paths=("fc", "head"))
    lora.merge_adapter(["a0"])
    with pytest.raises(AdapterError, match=r"fc: expected no adapter merged .*found \['a0'\]; unmerge_adapter"):
        lora.add_weighted_adapter(["a0", "a1"], [1, 1], "new")
    lora.disable_adapter_layers()
    with pytest.raises(AdapterError, match=r"fc: expected no adapter merged"):
        lora.add_weighted_adapter(["a0", "a1"], [1, 1], "new")
    lora.enable_adapter_layers()
    lora.unmerge_adapter()
    with torch.no_grad():
        lora.adapter_layers()["head"].factors("a1")[1][0, 0] = float("nan")
    before = merge_nets.bits(lora)
    with pytest.raises(AdapterError, match="head: adapter 'a1': expected finite factors and scaling, found 1 NaN"):
        lora.add_weighted_adapter(["a0", "a1"], [1, 1], "new")
    merge_nets.assert_same_bits(lora, before)
    lora.add_weighted_adapter(["a0"], [1], "new")


def test_whole_modules_and_biases_that_cannot_be_combined() -> None:
    lora = ours(*[{"target_modules": ["fc"], "modules_to_save": ["head"]}] * 2)
    with pytest.raises(AdapterError, match=r"head: expected at most one .*modules_to_save\), found \['a0', 'a1'\]"):
        lora.add_weighted_adapter(["a0", "a1"], [1, 1], "new")
    lora = ours({"target_modules": ["fc", "head"]}, {"target_modules": ["fc"], "modules_to_save": ["head"]})
    with pytest.raises(AdapterError, match=r"head: expected a module that one adapter trains .*'a1'.*found both"):
        lora.add_weighted_adapter(["a0", "a1"], [1, 1], "new")
    lora = ours({"target_modules": ["fc"], "bias": "all"}, {"target_modules": ["fc"]})
    with pytest.raises(AdapterError, match=r"adapter 'a0': expected bias='none', found 'all'"):
        lora.add_weighted_adapter(["a0", "a1"], [1, 1], "new")


@pytest.mark.parametrize("failing", ["_check_registered", "_check_plan"])
def test_a_late_failure_leaves_nothing_behind(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = ours({"target_modules": ["fc"], "modules_to_save": ["norm"]}, {"target_modules": ["fc", "emb"]})
    before = merge_nets.bits(lora)

    def fail(*_: object) -> None:
        raise AdapterError("too late")

    monkeypatch.setattr(combining_module, failing, fail)
    with pytest.raises(AdapterError, match="too late"):
        lora.add_weighted_adapter(["a0", "a1"], [1, 1], "new")
    merge_nets.assert_same_bits(lora, before)
    assert "new" not in lora.peft_config
    monkeypatch.undo()
    lora.add_weighted_adapter(["a0", "a1"], [1, 1], "new")


def test_it_can_be_added_while_adapters_are_switched_off() -> None:
    lora = ours({}, {})
    with lora.disable_adapter(), torch.no_grad():
        base = lora(ids())
        lora.add_weighted_adapter(["a0", "a1"], [1, 1], "new", "exact")
        assert torch.equal(lora(ids()), base)
    assert_close(deltas(lora, "new"), summed(lora, {"a0": 1, "a1": 1}), FLOAT32)
