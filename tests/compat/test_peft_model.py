"""``PeftModel``: names of parameters, PEFT's warnings, memory and dtypes of factors, and the base model's state."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_mlp import mlp, wrapped
from torch import nn

from qlora_kit import quantize_
from qlora_kit.compat.peft import (
    LoraConfig,
    LoraLayer,
    PeftModel,
    PeftWarning,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from qlora_kit.errors import AdapterError, StorageError, TargetError


def config(**fields: object) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["0"], "init_lora_weights": False, **fields})


# -- names ---------------------------------------------------------------------------------------------------------


def test_names_of_parameters_begin_as_in_peft() -> None:
    model = wrapped()
    name = "base_model.model.0.lora_A.default.weight"
    assert all(key.startswith("base_model.model.") for key, _ in model.named_parameters())
    assert all(key.startswith("base_model.model.") for key in model.state_dict())
    assert model.get_parameter(name) is dict(model.named_parameters())[name] is model.model[0].lora_A["default"].weight
    assert model.get_submodule("base_model.model.0") is model.base_model.model[0]


def test_a_whole_state_loads_back_and_so_does_one_of_adapters_alone() -> None:
    model, other = wrapped(init_lora_weights=False), wrapped()
    x = torch.randn(2, 6)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    trained = {key: tensor + 1 for key, tensor in model.state_dict().items() if "lora_" in key}
    other.load_state_dict(trained, strict=False)
    torch.testing.assert_close({k: v for k, v in other.state_dict().items() if "lora_" in k}, trained)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "else"'):
        other.load_state_dict({**model.state_dict(), "else": torch.zeros(1)})
    state = get_peft_model_state_dict(other, other.state_dict())
    torch.testing.assert_close(state, get_peft_model_state_dict(other), rtol=0, atol=0)


def test_copies_and_the_models_own_attribute() -> None:
    model = copy.deepcopy(wrapped())
    base = mlp()
    model.model = base
    assert model.model is base is model.get_base_model()
    assert [name for name, _ in model.named_children()] == ["base_model.model"]


def test_what_a_model_says_of_its_adapters() -> None:
    model = wrapped()
    assert model.prefix == "lora_"
    assert (model.targeted_module_names, model.targeted_parameter_names) == (["0", "2"], [])
    assert model.supports_lora_conversion()
    assert model.has_active_enabled_adapter
    with model.disable_adapter():
        assert not model.has_active_enabled_adapter
    assert model.base_model_torch_dtype is None


def test_inputs_require_gradients_for_checkpointing() -> None:
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
        )
    )
    model = get_peft_model(llama, LoraConfig(target_modules=["q_proj"]))
    ids = torch.tensor([[1, 2]])
    assert not model.get_input_embeddings()(ids).requires_grad
    model.prepare_model_for_gradient_checkpointing(llama)
    assert model.get_input_embeddings()(ids).requires_grad


# -- warnings ------------------------------------------------------------------------------------------------------


def test_merged_twice_is_said() -> None:
    model = wrapped(init_lora_weights=False)
    model.add_adapter("other", config())
    model.merge_adapter()
    merged = model.model[0].base_layer.weight.clone()
    with pytest.warns(UserWarning, match=r"\['default'\] are merged already; there is nothing more to merge"):
        model.merge_adapter()
    assert torch.equal(model.model[0].base_layer.weight, merged)
    with pytest.warns(UserWarning, match=r"\['other'\] are merged beside them"):
        model.merge_adapter(["default", "other"])
    model.unmerge_adapter()
    with pytest.warns(PeftWarning, match="nothing is merged"):
        model.unmerge_adapter()


def test_the_deletion_of_the_active_adapter_is_said() -> None:
    model = wrapped()
    model.add_adapter("other", config())
    with pytest.warns(PeftWarning, match=r"'default' was the active adapter; \['other'\] are active now"):
        model.delete_adapter("default")
    with pytest.warns(PeftWarning, match="no adapter is left"):
        model.delete_adapter("other")


def test_layers_switched_by_hand() -> None:
    model = wrapped(init_lora_weights=False)
    model.model[0].enable_adapters(False)
    with pytest.warns(PeftWarning, match="some layers are switched off"), model.disable_adapter():
        pass
    assert not model.model[0].disable_adapters


def test_what_layers_were_given_by_hand_is_merged() -> None:
    model = wrapped(init_lora_weights=False)
    model.add_adapter("other", config(target_modules=["0", "2"]))
    x = torch.randn(2, 6)
    for layer in model.adapter_layers().values():
        layer.set_adapter(["default", "other"])
    both = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), both)
    model.unmerge_adapter()
    model.model[0].set_adapter("other")
    with pytest.raises(AdapterError, match=r"layers that apply the same adapters, found .*\('other',\)"):
        model.merge_and_unload()
    model.model[0].set_adapter(["default", "other"])
    torch.testing.assert_close(model.merge_and_unload()(x), both)


def test_another_name_or_revision_of_the_base_is_said() -> None:
    model = mlp()
    model.name_or_path = "this/base"  # type: ignore[assignment]
    with pytest.warns(PeftWarning, match=r"is 'that/base', and the model, which is recorded, 'this/base'"):
        wrapped_model = get_peft_model(model, config(base_model_name_or_path="that/base"))
    assert wrapped_model.peft_config["default"].base_model_name_or_path == "this/base"
    with pytest.warns(PeftWarning, match="revision 'a' of the configuration gives way to 'b'"):
        assert get_peft_model(mlp(), config(revision="a"), revision="b").peft_config["default"].revision == "b"


def test_an_unknown_keyword_of_saving_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"unexpected keyword 'select_adapters'; closest: \['selected_adapters'\]"):
        wrapped().save_pretrained(tmp_path, select_adapters=["default"])
    assert list(tmp_path.iterdir()) == []
    wrapped().save_pretrained(tmp_path, max_shard_size="5GB")


# -- memory, dtypes, sizes -------------------------------------------------------------------------------------------


def test_factors_without_memory_are_filled_by_a_load() -> None:
    state = {key.removeprefix("base_model.model."): t for key, t in get_peft_model_state_dict(wrapped()).items()}
    model = inject_adapter_in_model(config(target_modules=["0", "2"]), mlp(), low_cpu_mem_usage=True)
    parameters = [p for name, p in model.named_parameters() if "lora_" in name]
    assert {p.device.type for p in parameters} == {"meta"}
    assert {t.device.type for t in get_peft_model_state_dict(model).values()} == {"meta"}
    with pytest.raises(StorageError, match="meta device"):
        set_peft_model_state_dict(model, state)
    with pytest.raises(StorageError, match="missing"):
        set_peft_model_state_dict(model, {}, low_cpu_mem_usage=True)
    assert {p.device.type for p in parameters} == {"meta"}
    set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
    torch.testing.assert_close(get_peft_model_state_dict(model), state, rtol=0, atol=0)
    now = [p for name, p in model.named_parameters() if "lora_" in name]
    assert all(one is other for one, other in zip(parameters, now, strict=True))


def test_low_memory_is_for_each_adapter_and_ends_with_a_load(tmp_path: Path) -> None:
    model = get_peft_model(mlp(), config(), low_cpu_mem_usage=True)
    model.add_adapter("other", config())
    model.add_adapter("third", config(), low_cpu_mem_usage=True)
    kinds = {name: factor.weight.device.type for name, factor in model.model[0].lora_A.items()}
    assert kinds == {"default": "meta", "other": "cpu", "third": "meta"}
    wrapped().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path, low_cpu_mem_usage=True)
    loaded.load_adapter(tmp_path, "again", low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in loaded.parameters())


def test_the_dtype_of_factors_is_each_adapters_own(tmp_path: Path) -> None:
    model = get_peft_model(mlp().bfloat16(), config())
    model.add_adapter("kept", config(), autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "loaded", autocast_adapter_dtype=False)
    model.load_adapter(tmp_path, "cast")
    dtypes = {name: factor.weight.dtype for name, factor in model.model[0].lora_A.items()}
    assert dtypes == {
        "default": torch.float32,
        "kept": torch.bfloat16,
        "loaded": torch.bfloat16,
        "cast": torch.float32,
    }


def test_tensors_of_another_size_are_left_out_when_asked(tmp_path: Path) -> None:
    wrapped(init_lora_weights=False).save_pretrained(tmp_path)
    larger = nn.Sequential(nn.Linear(7, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(StorageError, match="1 mis-shaped"):
        PeftModel.from_pretrained(copy.deepcopy(larger), tmp_path)
    with pytest.warns(UserWarning, match=r"left out.*0\.lora_A\.weight \(\(2, 6\) for \(2, 7\)\)"):
        model = PeftModel.from_pretrained(larger, tmp_path, ignore_mismatched_sizes=True)
    stored = get_peft_model_state_dict(PeftModel.from_pretrained(mlp(), tmp_path))
    torch.testing.assert_close(
        get_peft_model_state_dict(model)["base_model.model.2.lora_A.weight"],
        stored["base_model.model.2.lora_A.weight"],
    )


# -- by keys, and the base's state -----------------------------------------------------------------------------------


def test_layers_are_injected_where_keys_say() -> None:
    state = {"0.lora_A.weight": torch.zeros(2, 6), "0.lora_B.weight": torch.zeros(8, 2)}
    model = inject_adapter_in_model(config(target_modules=["0"]), mlp(), state_dict=state)
    assert get_peft_model_state_dict(model).keys() == state.keys()
    with pytest.warns(RuntimeWarning, match=r"disagree about 2 modules \(\['0', '2'\]\); the state_dict is followed"):
        model = inject_adapter_in_model(config(target_modules=["2"]), mlp(), state_dict=state)
    assert get_peft_model_state_dict(model).keys() == state.keys()
    with pytest.raises(TargetError, match="expected keys of an adapter for this model"):
        inject_adapter_in_model(config(), mlp(), state_dict={"9.lora_A.weight": torch.zeros(2, 6)})


def test_the_bases_state_has_its_own_keys() -> None:
    base = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Sequential(nn.Linear(8, 3)))
    before = copy.deepcopy(base.state_dict())
    model = get_peft_model(base, config(modules_to_save=["2"]))
    torch.testing.assert_close(get_base_model_state_dict(model), dict(before), rtol=0, atol=0)
    changed = {key: tensor + 1 for key, tensor in before.items()}
    result = set_base_model_state_dict(model, changed)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    torch.testing.assert_close(get_base_model_state_dict(model), changed, rtol=0, atol=0)
    part = {"0.bias": before["0.bias"], "nowhere": before["0.bias"]}
    with pytest.raises(StorageError, match=r"6 missing|7 missing|1 unexpected"):
        set_base_model_state_dict(model, part)
    assert set_base_model_state_dict(model, part, strict=False).unexpected_keys == ["nowhere"]
    with pytest.raises(StorageError, match=r"1 of another shape \(\['0\.bias'\]\)"):
        set_base_model_state_dict(model, {"0.bias": torch.zeros(9)}, strict=False)


def test_the_state_of_a_packed_base_comes_back_too() -> None:
    def packed() -> nn.Module:
        net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 3))
        quantize_(net, 2, target_modules=["0"])
        return net

    model, other = get_peft_model(packed(), config()), get_peft_model(packed(), config())
    state = get_base_model_state_dict(model)
    set_base_model_state_dict(other, state)
    torch.testing.assert_close(other.model[0].get_base_weight(), model.model[0].get_base_weight(), rtol=0, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_whole_state_brings_the_scales_of_few_bits(bits: int) -> None:
    """What a k-bit layer keeps beside its codes is restored under PEFT's names too."""

    def adapted(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        base = quantize_(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), bits)
        return get_peft_model(base, LoraConfig(target_modules=["0", "1"], init_lora_weights=False)).eval()

    one, other, x = adapted(1), adapted(2), torch.randn(3, 64)
    with torch.no_grad():
        expected = one(x)
        assert not torch.equal(other(x), expected)
        other.load_state_dict({key: value.clone() for key, value in one.state_dict().items()})
        assert torch.equal(other(x), expected)


@pytest.mark.parametrize(
    ("fields", "idle", "kind", "adapted"),
    [
        ({"exclude_modules": ["9", "2"]}, ["9"], PeftWarning, "0"),
        ({"exclude_modules": ["9"]}, ["9"], PeftWarning, "02"),
        ({"exclude_modules": "nothing"}, ["nothing"], PeftWarning, "02"),
        ({"rank_pattern": {"2": 3, "7": 4}}, ["7"], RuntimeWarning, "02"),
        ({"alpha_pattern": {"7": 4, "8": 2}}, ["7", "8"], RuntimeWarning, "02"),
    ],
)
def test_exclusions_and_patterns_for_what_is_not_there_are_warned_of(
    fields: dict[str, Any], idle: list[str], kind: type[Warning], adapted: str
) -> None:
    asked = LoraConfig(r=2, target_modules=["0", "2"], **fields)
    said = re.escape(f"{next(iter(fields))}: nothing that is targeted is meant by {idle}")
    with pytest.warns(kind, match=said):
        model = get_peft_model(mlp(), asked)
    with pytest.warns(kind, match=said):
        bare = inject_adapter_in_model(asked, mlp())
    with pytest.warns(kind, match=said):
        model.add_adapter("other", asked)
    for layers in (model.model, bare):
        assert "".join(name for name in "02" if isinstance(layers[int(name)], LoraLayer)) == adapted
        if adapted.endswith("2"):
            assert layers[2].r["default"] == fields.get("rank_pattern", {}).get("2", 2)


def test_a_second_wrapping_says_once_what_is_not_there() -> None:
    model = get_peft_model(mlp(), config())
    with pytest.warns() as said:
        get_peft_model(model, config(exclude_modules=["9"]))
    assert len([w for w in said if "exclude_modules" in str(w.message)]) == 1


def test_what_pefts_layers_keep_under_private_names_can_be_set() -> None:
    model, x = wrapped(init_lora_weights=False), torch.randn(3, 6)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
    layer = model.model[0]
    layer._active_adapter = "other"
    assert (layer.active_adapters, layer._active_adapter) == (["other"], ["other"])
    assert model.get_model_status().active_adapters == "irregular"
    layer._disable_adapters = True
    assert layer.disable_adapters
    torch.testing.assert_close(layer(x), layer.base_layer(x), rtol=0, atol=0)
    layer._disable_adapters = False
    assert not torch.equal(layer(x), layer.base_layer(x))
