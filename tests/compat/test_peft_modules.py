"""PEFT's modules under ``qlora_kit.compat.peft``: every name that PEFT exports, and the refusal of what isn't LoRA."""

from __future__ import annotations

import importlib
import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_mlp import mlp, wrapped
from torch import nn

import qlora_kit
from qlora_kit import errors, quantize_
from qlora_kit.compat import peft as names
from qlora_kit.compat.peft import (
    AutoPeftModel,
    LoraConfig,
    PeftError,
    PeftModel,
    PeftType,
    PeftWarning,
    get_peft_model,
)
from qlora_kit.compat.peft.helpers import (
    check_if_peft_model,
    disable_input_dtype_casting,
    rescale_adapter_scale,
    update_signature,
)
from qlora_kit.compat.peft.tuners import lora
from qlora_kit.compat.peft.tuners.lora.layer import Embedding
from qlora_kit.compat.peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _find_minimal_target_modules,
    check_target_module_exists,
    inspect_matched_modules,
)
from qlora_kit.compat.peft.utils import (
    ModulesToSaveWrapper,
    _get_submodules,
    id_tensor_storage,
    infer_device,
    transpose,
)
from qlora_kit.compat.peft.utils.other import fsdp_auto_wrap_policy

# What scripts import, by PEFT's module; a name that PEFT has as well is compared with it by kind.
IMPORTED = {
    "": "get_peft_model LoraConfig PeftWarning PeftError AutoPeftModel PEFT_TYPE_TO_CONFIG_MAPPING LoraRuntimeConfig",
    "auto": "AutoPeftModelForCausalLM MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "config": "PeftConfig PeftType TaskType PeftConfigMixin PromptLearningConfig",
    "functional": "cast_adapter_dtype inject_adapter_in_model set_adapter delete_adapter get_peft_model_state_dict",
    "helpers": "rescale_adapter_scale check_if_peft_model update_forward_signature DoraCaching",
    "import_utils": "is_bnb_available is_bnb_4bit_available is_xpu_available is_transformers_ge_v5",
    "mapping": "PEFT_TYPE_TO_TUNER_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING inject_adapter_in_model get_peft_config",
    "mapping_func": "get_peft_model",
    "mixed_model": "PeftMixedModel",
    "peft_model": "PeftModel PeftModelForCausalLM get_layer_status TunerModelStatus get_peft_model_state_dict TaskType",
    "tuners": "LoraConfig LoraModel LoHaConfig EvaConfig",
    "tuners.lora": """GPTQLoraLinear LoraLayer Linear Embedding Conv2d Conv3d LoraModel LoraConfig Linear4bit
        LoftQConfig EvaConfig""",
    "tuners.lora.config": "LoraConfig LoftQConfig LoraRuntimeConfig EvaConfig",
    "tuners.lora.layer": "ParamWrapper LoraLayer Linear Embedding Conv1d Conv2d",
    "tuners.lora.model": "LoraModel TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "tuners.tuners_utils": "BaseTuner BaseTunerLayer check_target_module_exists inspect_matched_modules",
    "utils": """PeftType TaskType ModulesToSaveWrapper get_peft_model_state_dict infer_device PeftError CONFIG_NAME
        TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING SAFETENSORS_WEIGHTS_NAME load_peft_weights""",
    "utils.constants": "CONFIG_NAME WEIGHTS_NAME INCLUDE_LINEAR_LAYERS_SHORTHAND EMBEDDING_LAYER_NAMES",
    "utils.error": "PeftError NoMatchingPeftModuleError",
    "utils.hotswap": "hotswap_adapter prepare_model_for_compiled_hotswap",
    "utils.loftq_utils": "replace_lora_weights_loftq",
    "utils.other": """prepare_model_for_kbit_training ModulesToSaveWrapper AuxiliaryTrainingWrapper transpose
        fsdp_auto_wrap_policy""",
    "utils.peft_types": "PeftType TaskType",
    "utils.save_and_load": "get_peft_model_state_dict set_peft_model_state_dict get_base_model_state_dict",
    "utils.warning": "PeftWarning",
}


@pytest.fixture(scope="module")
def peft() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("peft", reason="the peer whose names these are isn't installed")


@pytest.mark.parametrize("module", IMPORTED)
def test_scripts_find_what_they_import_where_peft_has_it(module: str, peft: Any) -> None:
    ours, theirs = (
        importlib.import_module(".".join(filter(None, (root, module)))) for root in (names.__name__, "peft")
    )
    for name in IMPORTED[module].split():
        found = getattr(ours, name)
        if hasattr(theirs, name):  # what a newer release has
            assert isinstance(found, type) == isinstance(getattr(theirs, name), type), name


def test_every_name_that_peft_exports_can_be_imported(peft: Any) -> None:
    tables_of_other_methods = {"TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING"}
    assert [name for name in peft.__all__ if not hasattr(names, name)] == sorted(tables_of_other_methods)


def test_peft_type_has_every_kind(peft: Any) -> None:
    assert {kind.value for kind in peft.PeftType} <= {kind.value for kind in PeftType}
    assert PeftType.LORA.value == PeftType.LORA == "LORA"


@pytest.mark.parametrize("name", ["LoHaConfig", "IA3Config", "PrefixTuningConfig", "AdaLoraModel"])
def test_a_class_of_another_method_says_what_there_is(name: str) -> None:
    found = getattr(names, name)
    assert not isinstance(LoraConfig(), found)
    assert issubclass(found, object)
    with pytest.raises(errors.ConfigError, match=rf"{name}: expected LoRA, the one method .* isn't implemented here"):
        found(r=4)
    with pytest.raises(errors.ConfigError, match=name):
        found.from_pretrained("somewhere")


def test_a_function_of_another_method_says_so_when_called() -> None:
    with pytest.raises(errors.ConfigError, match="get_eva_state_dict: expected LoRA"):
        names.get_eva_state_dict(mlp(), None)
    with pytest.raises(AttributeError, match=r"no attribute 'LoHaConfg'; closest: \['LoHaConfig'"):
        names.LoHaConfg  # noqa: B018


def test_tables_of_methods() -> None:
    assert {PeftType.LORA: LoraConfig} == names.PEFT_TYPE_TO_CONFIG_MAPPING
    assert names.PEFT_TYPE_TO_TUNER_MAPPING["LORA"] is qlora_kit.LoraModel is BaseTuner
    assert importlib.import_module(f"{names.__name__}.mapping").PEFT_TYPE_TO_PREFIX_MAPPING["LORA"] == "lora_"


def test_errors_and_warnings_are_the_toolkits() -> None:
    assert PeftError is errors.QLoRAKitError
    assert issubclass(names.NoMatchingPeftModuleError, (PeftError, ValueError))
    assert issubclass(PeftWarning, UserWarning)
    with pytest.raises(names.NoMatchingPeftModuleError):
        get_peft_model(mlp(), LoraConfig(target_modules=["nowhere"]))


# -- layers ----------------------------------------------------------------------------------------------------


class EveryKind(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 64)
        self.conv1, self.conv2, self.conv3 = nn.Conv1d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv3d(4, 4, 3)
        self.line, self.packed = nn.Linear(64, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, 3)


def test_layers_are_told_apart_as_in_peft() -> None:
    net = EveryKind()
    quantize_(net, 2, target_modules=["packed"])
    targets = ["table", "conv1", "conv2", "conv3", "line", "packed"]
    model = get_peft_model(net, LoraConfig(r=2, target_modules=targets, modules_to_save=["head"]))
    kinds = {"table": "Embedding", "conv1": "Conv1d", "conv2": "Conv2d", "conv3": "Conv3d", "line": "Linear"}
    for path, kind in {**kinds, "packed": "Linear"}.items():
        layer = getattr(model.model, path)
        own = {
            name
            for name in ("Embedding", "Conv1d", "Conv2d", "Conv3d", "Linear")
            if isinstance(layer, getattr(lora, name))
        }
        assert own == {kind}
        assert isinstance(layer, (BaseTunerLayer, lora.LoraLayer))
    assert isinstance(model.model.head, ModulesToSaveWrapper)
    assert not isinstance(model.model.head, BaseTunerLayer)
    status = {layer.name: layer.module_type for layer in model.get_layer_status()}
    assert status == {
        **{f"model.{path}": f"lora.{kind}" for path, kind in {**kinds, "packed": "Linear"}.items()},
        "model.head": "ModulesToSaveWrapper",
    }
    with pytest.raises(TypeError, match="use get_peft_model"):
        Embedding(net.table)


def test_four_and_eight_bits_have_classes_of_their_own(llama_dir: Any) -> None:
    from tiny_llama import load

    config = LoraConfig(r=2, target_modules=["q_proj"])
    for storage, kind in (("4-bit", lora.Linear4bit), ("8-bit", lora.Linear8bitLt)):
        layers = get_peft_model(load(llama_dir, storage, torch.float32), config).adapter_layers().values()
        assert all(isinstance(layer, kind) and not isinstance(layer, lora.Linear) for layer in layers)


# -- small functions --------------------------------------------------------------------------------------------


def test_branches_are_rescaled_for_a_block() -> None:
    model = wrapped(init_lora_weights=False)
    x = torch.randn(2, 6)
    with model.disable_adapter():
        base = model(x)
    full = model(x)
    with rescale_adapter_scale(model, 0.0):
        torch.testing.assert_close(model(x), base, rtol=0, atol=0)
    torch.testing.assert_close(model(x), full, rtol=0, atol=0)
    with (
        pytest.raises(TypeError, match="multiplier: expected a number, found True"),
        rescale_adapter_scale(model, True),
    ):
        pass
    with pytest.raises(ValueError, match="expected a model with adapters"), rescale_adapter_scale(mlp(), 2):
        pass


def test_inputs_are_taken_as_they_come_for_a_block() -> None:
    model = get_peft_model(mlp().bfloat16(), LoraConfig(r=2, target_modules=["0"]))
    x = torch.randn(2, 6, dtype=torch.bfloat16)
    model(x)
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
        model(x)
    with disable_input_dtype_casting(model, active=False):
        model(x)


def test_whether_a_folder_holds_an_adapter(tmp_path: Any) -> None:
    assert not check_if_peft_model(tmp_path)
    wrapped().save_pretrained(tmp_path)
    assert check_if_peft_model(tmp_path)


def test_signatures_need_no_update() -> None:
    update_signature(wrapped(), "forward")
    with pytest.raises(errors.ConfigError, match="'forward', 'generate' or 'all', found 'backward'"):
        update_signature(wrapped(), "backward")


def test_functions_of_a_bare_model() -> None:
    functional = importlib.import_module(f"{names.__name__}.functional")
    model = functional.inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), mlp(), "one")
    functional.inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), model, "two")
    functional.set_adapter(model, "one")
    assert model[0].active_adapters == ["one"]
    functional.set_requires_grad(model, "one", False)
    assert not model[0].lora_A["one"].weight.requires_grad
    with pytest.raises(errors.AdapterError, match=r"prefix.*'lora_'.*'ia3_'"):
        functional.delete_adapter(model, "two", "ia3_")
    with pytest.raises(errors.AdapterError, match=r"layer_cls.*found Linear"):
        functional.set_adapter(model, "two", layer_cls=nn.Linear)
    assert functional.delete_adapter(model, "two", prefix="lora_", layer_cls=BaseTunerLayer) == ["one"]
    assert list(model[0].r) == ["one"]


def test_an_adapters_tensors_are_brought_to_float32_on_request() -> None:
    model = wrapped().to(torch.bfloat16)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0"]), autocast_adapter_dtype=False)
    factors = {name: model.model[0].adapter_tensors(name) for name in ("default", "other")}
    before = {key: value.clone() for key, value in factors["default"].items()}
    functional = importlib.import_module(f"{names.__name__}.functional")
    functional.cast_adapter_dtype(model, "default", False)
    assert {value.dtype for value in factors["default"].values()} == {torch.bfloat16}
    functional.cast_adapter_dtype(model, "default")
    for key, value in model.model[0].adapter_tensors("default").items():
        assert value.dtype == torch.float32
        assert value.requires_grad
        torch.testing.assert_close(value.detach(), before[key].float(), rtol=0, atol=0)
    assert {value.dtype for value in factors["other"].values()} == {torch.bfloat16}
    assert model.model[0].base_layer.weight.dtype == torch.bfloat16


def test_the_first_fsdp_is_refused_with_what_to_write_for_the_second() -> None:
    with pytest.raises(errors.ConfigError, match=r"expected FSDP2.*Sequential.*fsdp_version=2"):
        fsdp_auto_wrap_policy(nn.Sequential(nn.Linear(2, 2)))


def test_the_readme_is_written_on_request_as_beside_a_saved_adapter(tmp_path: Path) -> None:
    model = wrapped()
    model.save_pretrained(tmp_path / "saved")
    model.create_or_update_model_card(tmp_path / "card" / "alone")
    assert [path.name for path in (tmp_path / "card" / "alone").iterdir()] == ["README.md"]
    assert (tmp_path / "card" / "alone" / "README.md").read_text() == (tmp_path / "saved" / "README.md").read_text()


def test_the_signature_of_a_stand_in_can_be_asked_for() -> None:
    assert "layers_to_transform" not in inspect.signature(names.AdaLoraConfig).parameters


def test_small_functions_of_utils() -> None:
    model = wrapped()
    parent, target, name = _get_submodules(model, "base_model.model.0")
    assert (parent, target, name) == (model.model, model.model[0], "0")
    weight = nn.Parameter(torch.randn(2, 3))
    assert transpose(weight, False) is weight
    assert isinstance(transpose(weight, True), nn.Parameter)
    assert transpose(weight.data, True).shape == (3, 2)
    assert id_tensor_storage(weight) == id_tensor_storage(weight[1:])
    assert infer_device() == ("cuda" if torch.cuda.is_available() else "cpu")
    assert importlib.import_module(f"{names.__name__}.import_utils").is_bnb_available()


@pytest.mark.parametrize(
    ("config", "key", "expected"),
    [
        ({"target_modules": ["q"]}, "a.q", True),
        ({"target_modules": ["q"]}, "a.qq", False),
        ({"target_modules": r".*\.q"}, "a.q", True),
        ({"target_modules": ["q"], "exclude_modules": ["a.q"]}, "a.q", False),
        ({"target_modules": ["q"], "modules_to_save": ["a"]}, "a.q", False),
        ({"target_modules": ["q"], "layers_to_transform": [1]}, "m.layers.1.q", True),
        ({"target_modules": ["q"], "layers_to_transform": 0}, "m.layers.1.q", False),
        ({"target_modules": ["q"], "layers_to_transform": [1]}, "m.layers.1.experts.0.q", True),
        (
            {"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": "experts"},
            "m.layers.1.experts.0.q",
            True,
        ),
        ({"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": "h"}, "m.layers.0.q", False),
    ],
)
def test_names_against_a_configuration(config: dict[str, Any], key: str, expected: bool, peft: Any) -> None:
    assert check_target_module_exists(LoraConfig(**config), key) is expected
    theirs = importlib.import_module("peft.tuners.tuners_utils").check_target_module_exists
    assert bool(theirs(peft.LoraConfig(**config), key)) is expected


def test_the_shortest_names_of_targets() -> None:
    targets = [f"model.layers.{i}.{name}" for i in range(3) for name in ("q", "v")]
    others = ["model.layers.0.k", "vision.v", ""]
    assert _find_minimal_target_modules(targets, others) == {"q", "0.v", "1.v", "2.v"}
    for wrong in ([], [""], ["vision.v"], "q"):
        with pytest.raises(ValueError, match="target_modules: expected"):
            _find_minimal_target_modules(wrong, others)


def test_matched_modules() -> None:
    assert inspect_matched_modules(wrapped()) == {"matched": ["0", "2"], "unmatched": ["1"]}


def test_the_automatic_class_is_never_made_itself() -> None:
    with pytest.raises(TypeError, match="from_pretrained"):
        AutoPeftModel()
    assert issubclass(PeftModel, qlora_kit.LoraModel)
