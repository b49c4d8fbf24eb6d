"""Checkpoints of adapters and optimizer, and states without the base, as one process alone writes and takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from engine_models import adapted, batch, optimizer, trained
from torch import nn

from qlora_kit import LoraConfig, LoraModel, StorageError, apply_lora
from qlora_kit.distributed import leave_base_out_, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("case", ["copies", "tied embeddings", "biases"])
@pytest.mark.filterwarnings("ignore:.*tied to lm_head:UserWarning")
def test_the_base_left_out_of_a_state(case: str) -> None:
    lora, other = leave_base_out_(adapted("nf4", case)), leave_base_out_(adapted("nf4", case, seed=9))
    state = {key: value.clone() for key, value in lora.state_dict().items()}
    assert state.keys() == trained(lora).keys()
    other.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(other(input_ids=batch(0)).logits, lora(input_ids=batch(0)).logits)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(dict(list(state.items())[1:]))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict({**state, "model.nobody": torch.ones(1)})
    leave_base_out_(lora, out=False)
    assert lora.state_dict().keys() > state.keys()


def test_checkpoints_of_one_process(tmp_path: Path) -> None:
    lora = adapted("nf4", "two adapters")
    stepped = optimizer(list(trained(lora).values()))

    def step(lora: Any, stepped: Any, i: int) -> float:
        loss = lora(input_ids=batch(i), labels=batch(i)).loss
        loss.backward()
        stepped.step()
        stepped.zero_grad()
        return loss.item()

    step(lora, stepped, 0)
    stepped.param_groups[0]["lr"] = 5e-3
    save_checkpoint(tmp_path / "one", lora, stepped)
    expected = step(lora, stepped, 1), step(lora, stepped, 2)
    other = adapted("nf4", "two adapters", seed=9)
    resumed = optimizer(list(trained(other).values()))
    load_checkpoint(tmp_path / "one", other, resumed)
    assert (step(other, resumed, 1), step(other, resumed, 2)) == expected
    with pytest.raises(StorageError, match="expected a new folder, found one that is there"):
        save_checkpoint(tmp_path / "one", lora, stepped)
    with pytest.raises(StorageError, match=r"expected a checkpoint, with optimizer\.safetensors"):
        load_checkpoint(tmp_path, lora, stepped)
    other.set_adapter("second")
    with pytest.raises(StorageError, match=r"on one side only .*choose the adapters that were trained"):
        load_checkpoint(tmp_path / "one", other, optimizer(list(trained(other).values())))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]


class Apart(nn.Module):
    """Of its two layers a batch comes to the first alone, unless ``both``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.both = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)) if self.both else self.first(x)


def apart(seed: int) -> LoraModel:
    torch.manual_seed(0)
    model = Apart()
    torch.manual_seed(seed)
    return apply_lora(model, LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False))


MAKERS = {
    "fused": lambda trained: torch.optim.AdamW(trained, fused=True),
    "in 8 bits": lambda trained: bitsandbytes.optim.AdamW8bit(trained, lr=1e-3, min_8bit_size=0),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_checkpoints_of_other_optimizers(kind: str, tmp_path: Path) -> None:
    models = [apart(seed) for seed in (3, 9)]
    stepped = [MAKERS[kind](list(trained(lora).values())) for lora in models]

    def step(one: int, i: int, both: bool) -> float:
        models[one].model.both = both
        loss = models[one](torch.randn(4, 64, generator=torch.Generator().manual_seed(i))).square().mean()
        loss.backward()
        stepped[one].step()
        stepped[one].zero_grad()
        return float(loss.item())

    step(0, 0, False)
    step(1, 9, True)  # a state that has to go
    save_checkpoint(tmp_path / "one", models[0], stepped[0])
    load_checkpoint(tmp_path / "one", models[1], stepped[1])
    assert [step(0, i, True) for i in (1, 2, 3)] == [step(1, i, True) for i in (1, 2, 3)]
    of_one = optimizer(list(trained(models[0]).values())[:1])
    with pytest.raises(StorageError, match="expected one that has all 4 parameters that train, found 3 that it hasn't"):
        save_checkpoint(tmp_path / "two", models[0], of_one)


def test_a_state_with_pieces_is_refused(tmp_path: Path) -> None:
    lora = adapted("float32")
    state = dict(lora.state_dict())
    name = next(key for key in state if "lora_A" in key)
    for piece, shape in ((state[name][:2], r"\(2, 64\), not \(4, 64\)"), (state[name][:0], r"\(0, 64\), not")):
        with pytest.raises(StorageError, match=rf"1 of 28 missing or empty or in part .*{shape}.*gather the shards"):
            lora.save_pretrained(tmp_path / "pieces", state_dict={**state, name: piece})
    factor: Any = lora.model.model.layers[0].self_attn.q_proj.lora_A["default"]
    factor.weight.data = factor.weight.data.flatten()[:128]  # as FSDP1 leaves it
    with pytest.raises(StorageError, match="expected whole factors, found 1 of 28 that are empty or flat pieces"):
        lora.save_pretrained(tmp_path / "pieces")
    assert not (tmp_path / "pieces").exists()
