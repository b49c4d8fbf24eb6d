"""Merging into the original 16-bit base, the dequantized one, or the better; and roundings that look further."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_llama
import torch
from merge_nets import PATHS, adapted, assert_same_bits, bits, delta_of, stored_weight
from reference import agreement as reference
from reference import branches, starts
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from loftq.methods.metric import Metric
from loftq.methods.rounding import round_by_search, round_with_feedback
from qlora_kit import LoftQConfig, LoraConfig, LoraModel, MergeError, StorageError, apply_lora, merge
from qlora_kit.codecs import codec_for
from qlora_kit.codecs.quantized import Quantizer
from qlora_kit.training.preparation.quantize import quantize_

IDS = torch.randint(1, 128, (3, 10), generator=torch.Generator().manual_seed(2))
TARGETS = ["q_proj", "down_proj"]
FLOAT32 = 2e-7  # of weights of order 0.1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("original")
    model = tiny_llama.llama(num_hidden_layers=1, intermediate_size=128)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0)  # logits that tell the two bases apart
    model.bfloat16().save_pretrained(path)
    return path


def quantized(folder: Path, storage: str = "nf3") -> Any:
    return quantize_(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), quant_type=storage).eval()


def trained(folder: Path, storage: str = "nf3", **config: Any) -> LoraModel:
    settings = {"r": 4, "target_modules": TARGETS, "init_lora_weights": False, **config}
    return apply_lora(quantized(folder, storage), LoraConfig(**settings)).eval()


def originals(folder: Path) -> dict[str, np.ndarray]:
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return {key.removesuffix(".weight"): branches.array(value) for key, value in state.items()}


def deltas(lora: LoraModel) -> dict[str, np.ndarray]:
    return {path: branches.array(layer.delta("default")) for path, layer in lora.adapter_layers().items()}


@pytest.mark.parametrize("storage", ["nf3", "nf4", "int8"])
@pytest.mark.parametrize("into", ["float32", "same"])
@pytest.mark.slow
def test_the_original_plus_the_delta(folder: Path, storage: str, into: str) -> None:
    lora, full = trained(folder, storage), originals(folder)
    added = deltas(lora)
    before = {path: stored_weight(layer.base_layer) for path, layer in lora.adapter_layers().items()}
    report = merge(lora, into=into, base="original", force=True)  # the folder is where the model came from
    assert (report.base, report.base_losses) == ("original", {})
    assert str(report).splitlines()[-1] == "merged into the original base"
    for layer in report.layers:
        ideal = full[layer.path] + added[layer.path]
        stored = stored_weight(report.model.get_submodule(layer.path))
        size = np.linalg.norm(added[layer.path])
        assert layer.base_error == pytest.approx(np.linalg.norm(full[layer.path] - before[layer.path]) / size, rel=1e-5)
        assert layer.delta_ratio == pytest.approx(size / np.linalg.norm(full[layer.path]), rel=1e-5)
        if into == "float32":
            np.testing.assert_allclose(stored, ideal, rtol=0, atol=1e-6)
        else:
            quantizer = Quantizer(storage, None if storage == "int8" else 64)
            again = quantizer(torch.tensor(ideal).float()).dequantize()
            assert np.linalg.norm(stored - ideal) <= np.linalg.norm(branches.array(again) - ideal) * (1 + 1e-4)
    for path in ("model.layers.0.self_attn.k_proj", "model.layers.0.mlp.up_proj"):
        module = report.model.get_submodule(path)
        found = branches.array(codec_for(module).read(module))
        assert np.array_equal(found, full[path]) == (into == "float32"), "what isn't adapted comes from there too"


@pytest.mark.slow
@pytest.mark.parametrize("flip", [False, True])
def test_auto_takes_the_lower_loss(folder: Path, flip: bool) -> None:
    """Losses are those of the two models, computed from their logits in float64."""
    lora = trained(folder)
    layer = lora.adapter_layers()["model.layers.0.mlp.down_proj"]
    full = originals(folder)["model.layers.0.mlp.down_proj"]
    if flip:  # an adapter that makes up for the rounding, as after training on the dequantized base
        correction = torch.linalg.svd(torch.tensor(full - stored_weight(layer.base_layer)).float())
        with torch.no_grad():
            for other in lora.adapter_layers().values():
                other.factors("default")[1].zero_()
            U, S, V = (part[..., :4] for part in (correction.U, correction.S, correction.Vh.mT))
            layer.set_factors_("default", V.T, U * S / layer.scaling["default"])
    twin = trained(folder)
    twin.load_state_dict(lora.state_dict())
    losses = {}
    for base in ("dequantized", "original"):
        one = trained(folder)
        one.load_state_dict(lora.state_dict())
        model: Any = merge(one, into="float32", base=base).model
        with torch.no_grad():
            losses[base] = reference.next_token_loss([branches.array(model(IDS).logits)], [IDS.numpy()], [None])
    report = merge(twin, into="float32", base="auto", text=IDS)
    assert report.base_losses == pytest.approx(losses, rel=1e-5)
    assert report.base == min(losses, key=losses.__getitem__)
    assert str(report).splitlines()[-2].startswith(f"merged into the {report.base} base (loss on the text: ")
    assert report.agreement is not None
    assert report.agreement.loss_after == pytest.approx(losses[report.base], rel=1e-5)


def test_an_adapter_that_makes_up_for_its_base(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    loftq = LoftQConfig(loftq_bits=3, method="loftq")
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="loftq", loftq_config=loftq)
    lora = apply_lora(model, config)
    before = bits(lora)
    with pytest.raises(MergeError, match=r"base='original': expected adapters that don't make up for .*\['default'\]"):
        merge(lora, base="original", into="float32")
    assert_same_bits(lora, before)
    assert merge(lora, base="original", into="float32", force=True).base == "original"


def test_a_folder_that_is_not_the_models(folder: Path, tmp_path: Path) -> None:
    lora = trained(folder)
    other = tiny_llama.llama(num_hidden_layers=1, intermediate_size=128, hidden_size=32)
    other.save_pretrained(tmp_path / "smaller")
    torch.manual_seed(9)
    noise = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in noise.parameters():
            parameter.copy_(torch.randn_like(parameter))
    noise.save_pretrained(tmp_path / "noise")
    (tmp_path / "empty").mkdir()
    before = bits(lora)
    for where, error, match in (
        ("nowhere", MergeError, r"expected the folder with the 16-bit safetensors .*nowhere'; pass original=FOLDER"),
        ("empty", StorageError, r"empty"),
        ("smaller", StorageError, r"expected a weight of shape .*pass the folder of the model that was quantized"),
        ("noise", StorageError, r"to be the weight that the module was quantized from.*same model"),
    ):
        for base in ("original", "auto"):
            with pytest.raises(error, match=match):
                merge(lora, base=base, original=tmp_path / where, into="float32", text=IDS)
            assert_same_bits(lora, before)
    lora.model.config._name_or_path = ""
    with pytest.raises(MergeError, match=r"found ''; pass original=FOLDER"):
        merge(lora, base="original")
    with pytest.raises(MergeError, match=r"base='best': expected one of"):
        merge(lora, base="best")
    merge(lora, base="original", original=folder, into="float32")


def test_a_base_that_is_not_quantized_or_not_causal(folder: Path) -> None:
    dense = apply_lora(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=2, target_modules=TARGETS))
    with pytest.raises(MergeError, match=r"base='original': expected a quantized base, found none"):
        merge(dense, base="original")
    lora = apply_lora(quantized(folder).model, LoraConfig(r=2, target_modules=TARGETS))
    with pytest.raises(MergeError, match=r"base='auto': expected a causal language model"):
        merge(lora, base="auto", original=folder, text=IDS)


# -- roundings -----------------------------------------------------------------------------------------------------


def correlated(width: int, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return draw.standard_normal((800, 12)) @ draw.standard_normal((12, width)) + draw.standard_normal((800, width)) / 4


@pytest.mark.parametrize("storage", ["nf4-double", "int8", "packed-nf3"])
@pytest.mark.slow
def test_roundings_that_look_further(storage: str) -> None:
    """Scale search is never worse by its own measure, error feedback better for the outputs; codes are LoftQ's."""
    inputs = {path: correlated(width) for path, width in zip(PATHS, (64, 96, 64), strict=True)}
    full = {path: torch.tensor(x.T @ x / len(x)).float() for path, x in inputs.items()}
    diagonal = {path: moments.diagonal().clone() for path, moments in full.items()}
    found: dict[str, Any] = {}
    ways: list[tuple[str, str, Any]] = [
        ("nearest", "nearest", None),
        ("search", "scale-search", None),
        ("weighted", "scale-search", diagonal),
        ("feedback", "error-feedback", full),
    ]
    for name, way, statistics in ways:
        torch.manual_seed(0)
        lora = adapted(storage, size=0.3)
        ideal = {path: layer.merged_weight(["a"]) for path, layer in lora.adapter_layers().items()}
        exact = {p: stored_weight(lora.adapter_layers()[p].base_layer) + delta_of(lora, p, ("a",)) for p in PATHS}
        report = merge(lora, rounding=way, statistics=statistics, force=True)
        assert report.rounding == way
        found[name] = {path: stored_weight(report.model.get_submodule(path)) for path in PATHS}
        quantizer = codec_for(report.model.get_submodule("0")).quantizer(report.model.get_submodule("0"))
        by = round_with_feedback if way == "error-feedback" else round_by_search
        for path in PATHS if way != "nearest" else ():
            metric = Metric.of(None if statistics is None else statistics[path])
            assert quantizer is not None
            expected = branches.array(by(ideal[path], quantizer, metric).dequantize())
            np.testing.assert_allclose(found[name][path], expected, rtol=0, atol=FLOAT32)
    for path in PATHS:
        lost = {name: stored[path] - exact[path] for name, stored in found.items()}
        squares = np.sqrt(np.diag(starts.damped(branches.array(full[path]))))
        assert np.linalg.norm(lost["search"]) <= np.linalg.norm(lost["nearest"]) * (1 + 1e-6)
        assert np.linalg.norm(lost["weighted"] * squares) <= np.linalg.norm(lost["nearest"] * squares) * (1 + 1e-6)
        outputs = {name: np.linalg.norm(error @ inputs[path].T) for name, error in lost.items()}
        assert outputs["feedback"] < 0.9 * min(outputs["nearest"], outputs["search"])


def test_statistics_from_a_text_and_ones_that_are_missing(folder: Path) -> None:
    lora = trained(folder, "nf4")
    torch.manual_seed(1)
    paths = list(lora.adapter_layers())
    before = bits(lora)
    some = {paths[0]: torch.eye(64)}
    with pytest.raises(MergeError, match=rf"{paths[1]}: expected second moments .*\(1 of 2 modules\)"):
        merge(lora, rounding="error-feedback", statistics=some)
    for wrong in (torch.eye(7), torch.ones(64), "text"):  # feedback needs more than the diagonal
        with pytest.raises(MergeError, match=rf"{paths[0]}: expected second moments .*shape \(64, 64\) for"):
            merge(lora, rounding="error-feedback", statistics=dict.fromkeys(paths, wrong))
    with pytest.raises(MergeError, match=rf"{paths[0]}: .*shape \(64, 64\) or \(64,\) for rounding='nearest'"):
        merge(lora, residual_rank=2, statistics=dict.fromkeys(paths, torch.ones(7)))
    dense = apply_lora(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=1, target_modules=["0"]))
    with pytest.raises(MergeError, match=r"rounding='error-feedback'.*adapted modules of few bits, found none"):
        merge(dense, rounding="error-feedback")
    assert_same_bits(lora, before)

    x: dict[str, list[Tensor]] = {path: [] for path in paths}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, path=path: x[path].append(args[0].flatten(0, 1)))
        for path, layer in lora.adapter_layers().items()
    ]
    with torch.no_grad():
        lora(IDS)
    for handle in handles:
        handle.remove()
    moments = {path: (parts[0].T @ parts[0]) / len(parts[0]) for path, parts in x.items()}
    twin = copy.deepcopy(lora)
    one = merge(lora, rounding="error-feedback", statistics=IDS, force=True).model
    other = merge(twin, rounding="error-feedback", statistics=moments, force=True).model
    for path in paths:
        same = stored_weight(one.get_submodule(path)) == stored_weight(other.get_submodule(path))
        assert same.mean() > 0.99, "float32 sums in another order move few codes"


def test_the_output_of_a_merge_into_the_original(folder: Path) -> None:
    """A dense merge into the original is the original model with the adapter on it."""
    lora = trained(folder)
    plain = apply_lora(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False),
    ).eval()
    for path, layer in plain.adapter_layers().items():
        layer.set_factors_("default", *lora.adapter_layers()[path].factors("default"))
    model: Any = merge(lora, base="original", into="float32").model
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-4)
