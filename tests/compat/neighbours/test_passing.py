"""Objects that pass for peft's, where peft is imported, and are as they were where it isn't."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from typing import Any

import peft
import pytest
from fresh import printed_by
from tiny_llama import llama
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel

from qlora_kit import LoraConfig, LoraModel, apply_lora
from qlora_kit.compat import peft as names
from qlora_kit.compat.neighbours.passing import standing_for
from qlora_kit.errors import ConfigError

CONFIG = LoraConfig(r=4, target_modules=["q_proj"])


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        return self.q_proj(x)


def test_a_wrapper_passes_for_its_model_and_for_pefts() -> None:
    lora = apply_lora(llama(), CONFIG)
    assert isinstance(lora, LlamaForCausalLM)
    assert isinstance(lora, PreTrainedModel)
    assert isinstance(lora, peft.PeftModel)
    assert not isinstance(lora, peft.PeftMixedModel)
    assert isinstance(lora, LoraModel)
    assert type(lora) is LoraModel
    assert lora.__class__.__name__ == "LlamaForCausalLM"
    assert inspect.signature(lora.__class__.forward) == inspect.signature(LlamaForCausalLM.forward)
    for twin in (copy.deepcopy(lora), pickle.loads(pickle.dumps(lora))):
        assert type(twin) is LoraModel
    plain = apply_lora(Plain(), CONFIG)
    assert isinstance(plain, peft.PeftModel)
    assert not isinstance(plain, Plain)
    assert plain.__class__.__name__ == "LoraModel"


@pytest.mark.parametrize("kind", [LoraConfig, names.LoraConfig])
def test_a_configuration_passes_for_pefts(kind: type[LoraConfig]) -> None:
    config = kind(r=4, target_modules=["q_proj"])
    assert isinstance(config, peft.LoraConfig)
    assert isinstance(config, peft.PeftConfig)
    assert not isinstance(config, peft.PromptTuningConfig)
    assert isinstance(config, LoraConfig)
    for twin in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(twin) is kind
        assert twin == config
    changed = dataclasses.replace(config, r=8)
    assert type(changed) is kind
    assert (changed.r, config.r) == (8, 4)
    assert repr(config).startswith("LoraConfig(")
    assert "r=4" in repr(config)


def test_peft_makes_our_model_of_our_configuration_and_its_own_of_its_own() -> None:
    ours = peft.get_peft_model(Plain(), CONFIG)
    assert type(ours) is names.PeftModel
    mixed = peft.get_peft_model(Plain(), CONFIG, mixed=True)
    assert type(mixed) is names.PeftMixedModel
    theirs = peft.get_peft_model(Plain(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    assert type(theirs) is peft.PeftModel
    assert type(copy.deepcopy(theirs)) is peft.PeftModel
    assert type(pickle.loads(pickle.dumps(theirs))) is peft.PeftModel


def test_where_pefts_layers_would_be_put_on_our_configuration_is_refused() -> None:
    """transformers would save such a model without our layers' tensors."""
    model = llama()
    with pytest.raises(ConfigError, match=r"peft's own LoraConfig.*pass it to get_peft_model\(model, config\)"):
        model.add_adapter(CONFIG)
    with pytest.raises(ConfigError, match="without a wrapper to inject_adapter_in_model there"):
        peft.inject_adapter_in_model(CONFIG, Plain())
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["q_proj"]), Plain())
    assert isinstance(theirs.q_proj, peft.tuners.lora.LoraLayer)


def test_a_class_that_stands_for_two_makes_the_first() -> None:
    kind = standing_for(Plain, LoraConfig)
    assert kind is standing_for(Plain, LoraConfig)
    assert issubclass(kind, Plain)
    assert issubclass(kind, LoraConfig)
    assert type(kind()) is Plain


ASK = (
    "import peft; print(isinstance(c, peft.PeftConfig), 'qlora_kit.compat.in_peft' in sys.modules, "
    "type(peft.__spec__.loader).__name__)"
)
MAKE = "c = qlora_kit.LoraConfig(target_modules=['q_proj'])"
ORDERS = [
    (f"import peft, qlora_kit; {MAKE}; {ASK}", "True True SourceFileLoader"),
    # Looking for a module, to see whether it is installed, isn't importing it.
    (f"import qlora_kit, importlib.util as u; u.find_spec('peft'); {MAKE}; {ASK}", "True True SourceFileLoader"),
    (f"import qlora_kit; {MAKE}; print(c.__class__ is qlora_kit.LoraConfig, 'peft' in sys.modules)", "True False"),
]


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    preloaded = ["torch", "accelerate", "transformers.modeling_utils"]
    return printed_by([f"import sys; {script}" for script, _ in ORDERS], preloaded)


@pytest.mark.slow
@pytest.mark.parametrize(("script", "expected"), ORDERS)
def test_whichever_is_imported_first(script: str, expected: str, printed: dict[str, str]) -> None:
    assert printed[f"import sys; {script}"].splitlines()[-1] == expected
