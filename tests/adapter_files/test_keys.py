"""Keys of tensors: a model's own modules may be called as factors are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qlora_kit import LoraConfig, LoraModel, apply_lora
from qlora_kit.adapter_files.folder import WEIGHTS_NAME
from qlora_kit.adapter_files.keys import Factor, factor, is_factor_in_model
from qlora_kit.folders.stored_adapter import read_stored_adapter


class Block(nn.Module):
    """Modules with the names of LoRA's own."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_in = nn.Linear(4, 6)
        self.lora_A = nn.Linear(6, 5)
        self.lora_head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lora_head(self.lora_A(torch.tanh(self.lora_in(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def config(bias: str = "none") -> LoraConfig:
    return LoraConfig(
        r=2, target_modules=["lora_in", "lora_A"], modules_to_save=["lora_head"], bias=bias, init_lora_weights=False
    )


def trained(bias: str = "none") -> LoraModel:
    lora = apply_lora(Net(), config(bias))
    with torch.no_grad():
        for parameter in lora.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return lora.eval()


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_modules_called_as_factors_are_come_back_from_a_file(bias: str, tmp_path: Path) -> None:
    lora, x = trained(bias), torch.randn(7, 4)
    lora.save_pretrained(tmp_path)
    torch.testing.assert_close(LoraModel.from_pretrained(Net(), tmp_path)(x), lora(x), rtol=0, atol=0)
    other = apply_lora(Net(), config())
    other.load_adapter(tmp_path, "second")
    other.set_adapter("second")
    torch.testing.assert_close(other.eval()(x), lora(x), rtol=0, atol=0)


def test_commands_on_folders_read_their_factors_and_no_others(tmp_path: Path) -> None:
    lora = trained()
    lora.save_pretrained(tmp_path)
    stored = read_stored_adapter(tmp_path)
    assert set(stored.branches) == {"block.lora_in", "block.lora_A"}
    assert {key.rpartition("lora_head.")[2] for key in stored.rest} == {"weight", "bias"}
    for path, branch in stored.branches.items():
        A, B = lora.adapter_layers()[path].factors("default")
        torch.testing.assert_close(
            branch.scaling * branch.B @ branch.A, (lora.adapter_layers()[path].scaling["default"] * B @ A)
        )


@pytest.mark.slow
def test_the_keys_are_pefts(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="files are exchanged with the installed peft")
    lora, x = trained(), torch.randn(7, 4)
    lora.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(Net(), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(theirs(x), lora(x))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours, back = (load_file(tmp_path / who / WEIGHTS_NAME) for who in ("ours", "theirs"))
    assert ours.keys() == back.keys()


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("a.b.lora_A.weight", Factor("a.b", "A")),
        ("a.lora_B.weight", Factor("a", "B")),
        ("a.lora_embedding_A", Factor("a", "A")),
        ("a.lora_A.lora_B.weight", Factor("a.lora_A", "B")),
        ("a.lora_head.weight", None),
        ("a.lora_A", None),
        ("a.lora_embedding_B.weight", None),
        ("lora_A.weight", None),
    ],
)
def test_the_end_of_a_key_tells(key: str, expected: Factor | None) -> None:
    assert factor(key) == expected


def test_in_a_model_the_adapters_name_follows() -> None:
    assert is_factor_in_model("0.lora_A.default.weight")
    assert is_factor_in_model("0.lora_embedding_B.bias")
    assert not is_factor_in_model("block.lora_head.bias")
