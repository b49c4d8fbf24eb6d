"""``loftq.allocate`` on models in memory: what it counts is what the model then has, and the model stays as it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated_runs import rows
from tiny_llama import batch
from tiny_llama import llama as two_layers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from loftq import Allocation, allocate, start_report
from qlora_kit import LoftQConfig, LoraConfig, LoraModel, apply_lora
from qlora_kit.errors import ConfigError, TargetError

EMBEDDING = ["embed_tokens", "q_proj", "down_proj"]


def asked(targets: Any = "all-linear", *, lora: dict[str, Any] | None = None, **loftq: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, **(lora or {})},
        target_modules=targets,
        init_lora_weights="loftq",
        loftq_config=LoftQConfig(**{"method": "loftq", "calibration": rows(), **loftq}),
    )


def llama(**settings: Any) -> nn.Module:
    return two_layers(num_hidden_layers=1, **settings)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in (*model.named_parameters(), *model.named_buffers())}


def bytes_held(model: nn.Module) -> int:
    """Of distinct storages, so that a tied weight counts once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in (*model.parameters(), *model.buffers())}
    return sum(storage.nbytes() for storage in storages.values())


def started(model: nn.Module, found: Allocation) -> LoraModel:
    return apply_lora(copy.deepcopy(model), found.config)


def unquantized_share(model: nn.Module, lora: LoraModel) -> float:
    """The largest share of a layer's own weight that its adapted function leaves out, float64."""
    shares = []
    for path, layer in lora.adapter_layers().items():
        A, B = (factor.detach().double() for factor in layer.factors("default"))
        full = model.get_submodule(path).weight.detach().double()
        merged = layer.codec.read(layer.base_layer).double() + layer.scaling["default"] * B @ A
        shares.append(float((full - merged).norm() / full.norm()))
    return max(shares)


MODELS = {
    "llama": (llama, "all-linear", {}),
    "rows": (llama, "all-linear", {"blocksize": "row"}),
    "double quantization": (llama, "all-linear", {"double_quant": True}),
    "tied": (lambda: llama(tied=True), "all-linear", {}),
    "embedding": (llama, EMBEDDING, {}),
    "bfloat16": (lambda: llama().bfloat16(), "all-linear", {}),
    "Conv1D": (gpt2, "all-linear", {"blocksize": 48}),
    "inputs": (llama, "all-linear", {"method": "qera"}),
    "inputs of an embedding": (llama, EMBEDDING, {"method": "cloq"}),
}


@pytest.mark.parametrize(("make", "targets", "loftq"), MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("budget", ["bits", "memory"])
@pytest.mark.slow
def test_counts_are_those_of_the_model_that_it_makes(
    make: Any, targets: Any, loftq: dict[str, Any], budget: str
) -> None:
    model = make()
    before = state(model)
    config = asked(targets, **loftq)
    found = allocate(model, config, bits=2.6)
    if budget == "memory":
        memory = found.nbytes + 600
        found = allocate(model, config, memory=memory)
        assert memory - 600 <= found.nbytes <= memory
    after = state(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(layer for layer in model.modules() if "Packed" in type(layer).__name__)
    lora = started(model, found)
    assert bytes_held(lora) == found.nbytes
    bits, weights = 0, 0
    for path, layer in lora.adapter_layers().items():
        assert found.choices[path].bits == found.config.loftq_config.bits_pattern[path]  # type: ignore[union-attr]
        kind = getattr(layer.base_layer, "quant_type", None)
        assert kind is None or int(kind[-1]) == found.choices[path].bits
        count = before[f"{path}.weight"].numel()
        bits, weights = bits + count * found.choices[path].bits, weights + count
    assert found.bits == bits / weights
    assert lora.adapter_layers().keys() == found.choices.keys()
    assert budget == "memory" or found.bits <= 2.6
    assert len({choice.bits for choice in found.choices.values()}) > 1


@pytest.mark.parametrize("method", ["loftq", "qera"])
def test_errors_are_those_of_a_start_in_one_step(method: str) -> None:
    """Each choice's error is that which the start then reports, of the output where there are inputs."""
    model, config = llama(), asked(method=method)
    found = allocate(model, config, bits=3)
    report = start_report(started(model, found))
    for row in report.layers:
        error = row.error if method == "loftq" else row.output_error
        assert error == pytest.approx(found.choices[row.path].error ** 0.5, rel=1e-4)  # float32 sums
    assert found.error == pytest.approx(sum(choice.cost for choice in found.choices.values()))


def test_inputs_change_what_is_chosen() -> None:
    """A layer whose inputs make its error large gets more bits than by its weight alone."""
    model = llama()
    by_weight, by_inputs = (allocate(model, asked(method=method), bits=2.5).choices for method in ("loftq", "qera"))
    assert {p: c.bits for p, c in by_weight.items()} != {p: c.bits for p, c in by_inputs.items()}


@pytest.mark.parametrize("method", ["qera", "aligned"])
def test_layers_that_the_model_makes_little_of_get_few_bits(method: str) -> None:
    """What leaves v_proj alike as a share of its output is next to nothing where o_proj all but forgets it."""
    model = two_layers()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.mul_(1e-2)
    found = allocate(model, asked(method=method, loftq_bits=2), bits=2.4)
    first, last = (found.choices[f"model.layers.{k}.self_attn.v_proj"] for k in (0, 1))
    assert 0 < last.importance < 1e-2 * first.importance  # type: ignore[operator]
    assert last.bits == 2
    assert "nats a token more" in str(found)
    assert found.error == pytest.approx(sum(c.error * c.importance for c in found.choices.values()))  # type: ignore[operator]


def test_choices_are_made_by_a_part_of_a_long_text(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = allocate(llama(), asked(method="qera"), bits=3).choices
    part = allocate(llama(), asked(method="qera", calibration=rows()[:5]), bits=3).choices
    monkeypatch.setattr("loftq.bits.allocation.TOKENS", rows()[:5].numel())
    found = allocate(llama(), asked(method="qera"), bits=3).choices
    for path, choice in found.items():
        if choice.bits == part[path].bits:
            assert choice.error == pytest.approx(part[path].error, rel=1e-4)
        assert choice.error != whole[path].error


def test_without_gradients_shares_are_summed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no gradient")

    model, config = llama(), asked(method="qera")
    monkeypatch.setattr("loftq.bits.allocation.loss_weights", none)
    with pytest.warns(UserWarning, match=r"no gradient of the model's could be taken \(no gradient\); .*count alike"):
        found = allocate(model, config, bits=3)
    assert all(choice.importance is None for choice in found.choices.values())
    assert found.error == pytest.approx(sum(choice.error for choice in found.choices.values()))
    assert "nats" not in str(found)


LORAS: dict[str, dict[str, Any]] = {
    "alpha": {},
    "rslora": {"use_rslora": True},
    "patterns": {"alpha_pattern": {"q_proj": 3}, "rank_pattern": {"up_proj": 2}},
    "rslora patterns": {"use_rslora": True, "alpha_pattern": {"q_proj": 3}, "rank_pattern": {"up_proj": 2}},
}


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
@pytest.mark.slow
def test_chosen_ranks_keep_every_scaling(lora: dict[str, Any]) -> None:
    model, config = llama(), asked(lora=lora)
    zero = apply_lora(
        copy.deepcopy(model), LoraConfig(**{"r": 4, "lora_alpha": 8, **lora}, target_modules="all-linear")
    )
    expected = {path: layer.scaling["default"] for path, layer in zero.adapter_layers().items()}
    found = allocate(model, config, bits=3, ranks=(2, 3, 8))
    assert {choice.rank for choice in found.choices.values()} > {2}
    assert {choice.rank for choice in found.choices.values()} <= {2, 3, 8}
    made = started(model, found)
    for path, layer in made.adapter_layers().items():
        assert layer.scaling["default"] == pytest.approx(expected[path], rel=1e-12)
        assert layer.factors("default")[0].shape[0] == found.choices[path].rank
    factors = [sum(p.numel() for n, p in m.named_parameters() if "lora_" in n) for m in (made, zero)]
    assert factors[0] <= factors[1], "no more adapter parameters than the configuration's own ranks take"
    assert bytes_held(made) == found.nbytes


def test_memory_pays_for_ranks_too() -> None:
    model, config = llama(), asked()
    least = allocate(model, config, bits=2, ranks=(2,)).nbytes
    found = allocate(model, config, memory=least + 60_000, ranks=(2, 32))
    lora = started(model, found)
    assert {choice.rank for choice in found.choices.values()} == {2, 32}
    assert least < bytes_held(lora) == found.nbytes <= least + 60_000


def test_modules_that_are_copied_count() -> None:
    model = llama()
    found = allocate(model, asked(["q_proj"], lora={"modules_to_save": ["lm_head"]}), bits=2.5)
    assert bytes_held(started(model, found)) == found.nbytes


def test_the_start_is_closer_with_more_bits() -> None:
    model, config = llama(), asked(loftq_iter=2)
    few, many = (unquantized_share(model, started(model, allocate(model, config, bits=bits))) for bits in (2, 8))
    assert many < 0.01 < 0.1 < few


def test_what_was_allocated_comes_back_from_its_files(tmp_path: Path) -> None:
    model = llama()
    found = allocate(model, asked(lora={"use_rslora": True}), bits=3, ranks=(2, 8))
    lora = started(model, found)
    found.config.save_pretrained(tmp_path / "config")
    again = LoraConfig.from_pretrained(tmp_path / "config")
    assert again.rank_pattern == found.config.rank_pattern
    assert again.alpha_pattern == found.config.alpha_pattern
    assert again.loftq_config.bits_pattern == found.config.loftq_config.bits_pattern  # type: ignore[union-attr]
    lora.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = lora.eval()(**batch()).logits
        loaded = LoraModel.from_pretrained(lora.unload(), tmp_path / "adapter")
        assert torch.equal(loaded.eval()(**batch()).logits, expected)


def test_paths_that_end_alike_get_their_own_bits() -> None:
    """Patterns match the ends of paths: ``0`` is the end of ``inner.0``."""

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("0", nn.Linear(64, 16, bias=False))
            self.inner = nn.Sequential(nn.Linear(64, 128, bias=False))

    model = Nested()
    loftq = LoftQConfig(method="loftq")
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="loftq", loftq_config=loftq)
    found = allocate(model, config, bits=2 + 6 / 9, ranks=(1, 2))
    assert {path: choice.bits for path, choice in found.choices.items()} == {"0": 8, "inner.0": 2}
    layers = started(model, found).adapter_layers()
    assert {path: layer.base_layer.quant_type for path, layer in layers.items()} == {
        "0": "uniform8",
        "inner.0": "signed2",
    }


def test_the_table_names_every_layer() -> None:
    found = allocate(llama(), asked(["q_proj"]), bits=3)
    lines = str(found).splitlines()
    assert [line.split()[:3] for line in lines[1:-1]] == [
        [path, str(choice.bits), str(choice.rank)] for path, choice in found.choices.items()
    ]
    assert lines[-1] == f"{found.bits:.3f} bits a code, {found.nbytes:,} bytes in all"


# -- refusals --------------------------------------------------------------------------------------------------


def test_the_least_memory_that_is_named_is_then_enough() -> None:
    model, config = llama(), asked()
    with pytest.raises(ConfigError, match=r"memory: expected at least [0-9]+ bytes") as caught:
        allocate(model, config, memory=1000)
    said = int(str(caught.value).split("at least ")[1].split()[0])
    with pytest.raises(ConfigError, match=f"expected at least {said} bytes"):
        allocate(model, config, memory=said - 1)
    assert bytes_held(started(model, allocate(model, config, memory=said))) == said


def test_an_impossible_budget_is_seen_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loftq.bits.allocation.factorize_as", None)
    with pytest.raises(ConfigError, match="memory: expected at least"):
        allocate(llama(), asked(method="qera"), memory=1000)


def test_bits_beside_a_budget_are_refused() -> None:
    with pytest.raises(ConfigError, match="bits_pattern: expected none with a budget"):
        allocate(llama(), asked(bits_pattern={"q_proj": 4}), bits=3)


def test_a_type_beside_a_budget_is_its_family() -> None:
    found = allocate(llama(), asked(quant_type="affine4"), bits=2.5)
    bits = {path: choice.bits for path, choice in found.choices.items()}
    assert len(set(bits.values())) > 1
    layers = started(llama(), found).adapted.layers()
    assert {path: layers[path].base_layer.quant_type for path in bits} == {p: f"affine{b}" for p, b in bits.items()}


@pytest.mark.parametrize(
    ("family", "bits", "kind"), [("nf2", 3, "nf3"), ("signed2", 4, "nf4"), ("int8", 8, "uniform8")]
)
def test_a_family_without_so_many_bits_is_the_default(family: str, bits: int, kind: str) -> None:
    assert LoftQConfig(loftq_bits=int(family[-1]), quant_type=family).mixed_type(bits) == kind


def test_a_quantized_model_is_refused() -> None:
    model = started(llama(), allocate(llama(), asked(["q_proj"]), bits=2)).unload()
    with pytest.raises(TargetError, match=r"q_proj: expected a weight in 16 or 32 bits .*already \(packed\)"):
        allocate(model, asked(["q_proj"]), bits=3)


@pytest.mark.parametrize("method", ["loftq", "qera"])
def test_a_weight_that_is_not_finite_is_named(method: str) -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 5] = float("nan")
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp\.down_proj: weight: expected finite"):
        allocate(model, asked(["down_proj"], method=method), bits=3)
