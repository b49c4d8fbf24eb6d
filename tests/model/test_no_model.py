"""What is said of arguments that are no model, or stand in another order."""

from __future__ import annotations

import pytest
from torch import nn

from qlora_kit import ConfigError, LoraConfig, LoraModel, apply_lora


def test_what_is_no_model_is_refused_by_name() -> None:
    found = r"model: expected a model that is loaded \(torch.nn.Module\), found "
    with pytest.raises(ConfigError, match=found + r"a LoraConfig; call apply_lora\(model, config\)"):
        apply_lora(LoraConfig(), nn.Linear(2, 2))  # type: ignore[arg-type]
    for first, second in (("folder", nn.Linear(2, 2)), ("name", "folder")):
        with pytest.raises(ConfigError, match=found + rf"'{first}'; call LoraModel.from_pretrained\(model, folder\)"):
            LoraModel.from_pretrained(first, second)  # type: ignore[arg-type]
