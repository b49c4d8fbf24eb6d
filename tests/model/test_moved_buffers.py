"""Buffers that training moves belong to the adapter that was active: shown, set aside, stored, merged with it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from qlora_kit import LoraConfig, LoraModel, MergeError, apply_lora, check_gradients, merge
from qlora_kit.adapter_files.tensors import adapter_state, load_adapter_state_, load_resume_state_

X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
MEAN = "base_model.model.bn.running_mean"
# Sums in another order, and a float32 weight that a delta was added to.
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


class Averaging(nn.Module):
    """Counts and averages in buffers, of its own kind; one of them is replaced rather than written into."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(8))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.average.mul_(0.9).add_(0.1 * x.detach().mean(0))
            self.seen += 1
            self.last = x.detach().mean(0)
        return x - self.average


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.averaging = Averaging()
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 4))
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.averaging(self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3)))))


def net() -> Net:
    torch.manual_seed(0)
    made = Net()
    made(X)
    return made.eval()


def settings(**more: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["conv", "fc"], **more)


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(X)


def train(lora: LoraModel, scale: float) -> Tensor:
    """Two steps; the output in evaluation afterwards."""
    lora.train()
    optimizer = torch.optim.SGD([p for p in lora.parameters() if p.requires_grad], 0.01)
    for _ in range(2):
        lora(X * scale).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return outputs(lora)


@pytest.fixture
def two() -> tuple[LoraModel, Tensor, Tensor]:
    """Two trained adapters on one model, and what it computes with each."""
    lora = apply_lora(net(), settings(), "one")
    one = train(lora, 3.0)
    lora.add_adapter("two", settings())
    lora.set_adapter("two")
    return lora, one, train(lora, -2.0)


def test_switching_off_and_between(two: tuple[LoraModel, Tensor, Tensor]) -> None:
    lora, one, second = two
    base = outputs(net())
    assert not torch.equal(one, base)
    lora.set_adapter("one")
    assert torch.equal(outputs(lora), one)
    with lora.disable_adapter():
        assert torch.equal(outputs(lora), base)
        lora.train()
        lora(X)  # moves what is shown, which is nobody's
        assert not torch.equal(outputs(lora), base)
    with lora.disable_adapter():
        assert torch.equal(outputs(lora), base)
    assert torch.equal(outputs(lora), one)
    lora.set_adapter("two")
    assert torch.equal(outputs(lora), second)
    lora.delete_adapter("two")
    assert torch.equal(outputs(lora), one)
    unloaded = lora.unload()
    state = net().state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in unloaded.state_dict().items())


def test_a_new_adapter_begins_with_the_bases(two: tuple[LoraModel, Tensor, Tensor]) -> None:
    lora, *_ = two
    lora.add_adapter("fresh", settings())
    lora.set_adapter("fresh")
    assert torch.equal(outputs(lora), outputs(net()))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_their_own(two: tuple[LoraModel, Tensor, Tensor], how: Any) -> None:
    lora, one, second = two
    twin = how(lora)
    assert torch.equal(outputs(twin), second)
    twin.set_adapter("one")
    assert torch.equal(outputs(twin), one)
    assert torch.equal(outputs(lora), second)


def test_files_hold_them_and_peft_reads_them(two: tuple[LoraModel, Tensor, Tensor], tmp_path: Path) -> None:
    lora, one, second = two
    lora.save_pretrained(tmp_path)
    for name, expected in (("one", one), ("two", second)):
        assert MEAN in adapter_state(lora, name)
        again = LoraModel.from_pretrained(net(), tmp_path / name)
        assert torch.equal(outputs(again), expected)
        theirs = peft.PeftModel.from_pretrained(net(), tmp_path / name)
        torch.testing.assert_close(outputs(theirs), expected, **CLOSE)
    both = LoraModel.from_pretrained(net(), tmp_path / "one", "one")
    both.load_adapter(tmp_path / "two", "two")
    assert torch.equal(outputs(both), one)
    both.set_adapter("two")
    assert torch.equal(outputs(both), second)


def test_a_file_without_them_means_the_bases(two: tuple[LoraModel, Tensor, Tensor]) -> None:
    lora, *_ = two
    fresh = apply_lora(net(), settings(init_lora_weights=False), "one")
    state = adapter_state(fresh, "one")
    assert MEAN not in state
    lora.set_adapter("one")
    load_adapter_state_(lora, "one", state)
    assert torch.equal(outputs(lora), outputs(fresh))


def test_a_checkpoint_brings_back_all_adapters(two: tuple[LoraModel, Tensor, Tensor], tmp_path: Path) -> None:
    lora, one, second = two
    lora.save_pretrained(tmp_path, is_main_process=True)
    other = apply_lora(net(), settings(), "one")
    other.add_adapter("two", settings())
    load_resume_state_(other, load_file(tmp_path / "model.safetensors"))
    assert torch.equal(outputs(other), one)
    other.set_adapter("two")
    assert torch.equal(outputs(other), second)


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_merge_takes_them_along(name: str, two: tuple[LoraModel, Tensor, Tensor]) -> None:
    lora, one, second = two
    merged = merge(lora, adapters=name).model
    torch.testing.assert_close(outputs(merged), one if name == "one" else second, **CLOSE)


def test_two_sets_of_statistics_cant_be_merged(two: tuple[LoraModel, Tensor, Tensor]) -> None:
    lora, one, second = two
    with pytest.raises(MergeError, match=r"bn.running_mean: expected at most one .* found 'one' and 'two'"):
        merge(lora, adapters=["one", "two"])
    assert torch.equal(outputs(lora), second)
    lora.set_adapter("one")
    assert torch.equal(outputs(lora), one)
    with pytest.warns(UserWarning, match=r"'both': \['one', 'two'\] were each trained with running statistics"):
        lora.add_weighted_adapter(["one", "two"], [0.5, 0.5], "both")
    lora.add_weighted_adapter(["one"], [1.0], "alone")
    lora.set_adapter("alone")
    torch.testing.assert_close(outputs(lora), one, **CLOSE)


def test_modules_trained_whole_keep_their_own(tmp_path: Path) -> None:
    lora = apply_lora(net(), settings(modules_to_save=["head"]))
    expected = train(lora, 3.0)
    state = adapter_state(lora)
    assert "base_model.model.head.0.running_mean" in state
    assert "base_model.model.averaging.seen" in state
    assert "base_model.model.averaging.last" not in state
    lora.save_pretrained(tmp_path)
    again = LoraModel.from_pretrained(net(), tmp_path)
    assert torch.equal(outputs(again), expected)
    with again.disable_adapter():
        assert torch.equal(outputs(again), outputs(net()))


def test_a_model_that_never_trained_stores_none(tmp_path: Path) -> None:
    lora = apply_lora(net(), settings())
    outputs(lora)
    assert all(".lora_" in key for key in adapter_state(lora))


def test_check_gradients_moves_none() -> None:
    lora = apply_lora(net(), settings())
    before = outputs(lora)
    last = lora.model.averaging.last
    check_gradients(lora, x=X)
    assert torch.equal(outputs(lora), before)
    assert lora.model.averaging.last is last


def test_the_saved_base_has_its_own_running_statistics(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=3))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    lora = apply_lora(net, LoraConfig(r=2, target_modules=["convolution"]))
    lora.train()(torch.randn(2, 3, 32, 32))
    lora.model.save_pretrained(tmp_path)
    stored = ResNetForImageClassification.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(stored[name], tensor) for name, tensor in before.items())


def test_being_active_beside_another_moves_nothing(two: tuple[LoraModel, Tensor, Tensor]) -> None:
    lora = two[0]
    first, *_ = lora.peft_config
    lora.add_adapter("fresh", settings())
    lora.set_adapter("fresh")
    expected = outputs(lora)
    lora.set_adapter([first, "fresh"])
    assert lora.adapted.buffers.of(lora.model, "fresh") == {}
    lora.set_adapter("fresh")
    assert torch.equal(outputs(lora), expected)
