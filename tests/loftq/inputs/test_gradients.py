"""What the loss makes of errors in outputs: against the divergence that such errors really make."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from reference.gradients import nats_of_noise
from tiny_llama import VOCABULARY, llama
from torch import Tensor, nn

from loftq.inputs.gradients import loss_weights

PATHS = [
    "model.embed_tokens",
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.v_proj",
    "model.layers.0.mlp.down_proj",
    "model.layers.1.mlp.gate_proj",
    "model.layers.1.self_attn.o_proj",
    "lm_head",
]


def rows(count: int, length: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def lively(**settings: Any) -> nn.Module:
    """A model that foretells more than that all tokens are alike."""
    model = llama(**settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model.eval()


def nats(model: nn.Module, path: str, ids: Tensor, size: float = 3e-3, draws: int = 40) -> float:
    model, module = model.double(), None
    module = model.get_submodule(path)

    def logits_with(noise: Tensor) -> Tensor:
        handle = module.register_forward_hook(lambda _, __, output: output + noise.view_as(output))
        with torch.no_grad():
            found = model(input_ids=ids).logits
        handle.remove()
        return found.reshape(-1, found.shape[-1])

    width = module.embedding_dim if isinstance(module, nn.Embedding) else module.out_features
    return nats_of_noise(logits_with, (ids.numel(), int(width)), size, draws)


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_it_is_what_small_errors_cost(path: str) -> None:
    model, ids = lively(), rows(8)
    found = loss_weights(model, [{"input_ids": rows(160)}], [path], tokens=10**6)[path]
    assert found == pytest.approx(nats(model, path, ids), rel=0.25)


def test_in_any_batches_and_for_any_team_it_is_the_same() -> None:
    class Half:
        """One of two processes that each take every other row, the other's part being known."""

        def __init__(self, rank: int, other: Any = None) -> None:
            self.rank, self.other, self.own = rank, other, None

        def numbers(self, count: int) -> range:
            return range(self.rank, count, 2)

        def gathered(self, value: Any) -> list[Any]:
            self.own = value
            return [value, self.other.own] if self.other else [value, {k: ({}, 1) for k in range(8)} | value]

    model, ids = lively(), rows(8)
    whole = loss_weights(model, [{"input_ids": ids}], PATHS)
    parted = loss_weights(model, [{"input_ids": part} for part in ids.split(3)], PATHS)
    assert parted == whole
    first = Half(1)
    loss_weights(model, [{"input_ids": ids}], PATHS, team=first)  # type: ignore[arg-type]
    assert loss_weights(model, [{"input_ids": ids}], PATHS, team=Half(0, first)) == whole  # type: ignore[arg-type]


def test_a_token_whose_embedding_is_zero_does_not_decide() -> None:
    """Norms are a thousand times as steep there, where real errors aren't small."""
    model, ids = lively(), rows(8)
    without = loss_weights(model, [{"input_ids": ids}], PATHS)
    assert not model.model.embed_tokens.weight[0].any()
    ids[::2, 10] = 0
    found = loss_weights(model, [{"input_ids": ids}], PATHS)
    assert all(0.3 < found[path] / without[path] < 6 for path in PATHS), (found, without)


def test_nothing_of_the_model_is_changed_and_padding_says_nothing() -> None:
    model, ids = lively(), rows(2)
    model.lm_head.weight.requires_grad_(False)
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.train().modules()]
    forwards = [vars(module).get("forward") for module in model.modules()]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    plain = loss_weights(model, [{"input_ids": ids}], PATHS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [module.training for module in model.modules()] == modes
    assert [vars(module).get("forward") for module in model.modules()] == forwards
    assert not any(module._forward_hooks for module in model.modules())
    padded = torch.cat([ids, torch.zeros(2, 6, dtype=ids.dtype)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(2, 6, dtype=ids.dtype)], 1)
    found = loss_weights(model, [{"input_ids": padded, "attention_mask": mask}], PATHS)
    assert found == {path: pytest.approx(value, rel=1e-3) for path, value in plain.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_is_about_the_same(dtype: torch.dtype) -> None:
    model, ids = lively(), rows(4)
    expected = loss_weights(model, [{"input_ids": ids}], PATHS)
    found = loss_weights(model.to(dtype), [{"input_ids": ids}], PATHS)
    assert found == {path: pytest.approx(value, rel=0.5) for path, value in expected.items()}


def test_few_rows_are_taken_evenly() -> None:
    model = lively()
    asked: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: asked.append(int(kwargs["input_ids"][0, 0])), with_kwargs=True
    )
    ids = torch.arange(8)[:, None].repeat(1, 16)
    loss_weights(model, [{"input_ids": ids}], ["lm_head"], tokens=70)
    assert asked == [0, 2, 4, 6]


class Encoder(nn.Module):
    """No logits, a tuple for its output, and a part that no row comes to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.idle = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x, None


def test_a_model_that_foretells_nothing_and_a_module_that_nothing_comes_to() -> None:
    model = Encoder()
    found = loss_weights(model, [{"x": torch.randn(5, 7, 6)}], ["layers.0", "layers.1", "idle"])
    assert found["idle"] == 0
    assert found["layers.0"] > 0
    assert found["layers.1"] > 0


def test_what_has_no_gradient_is_said_and_what_is_not_finite_is_left_to_others() -> None:
    class Cut(Encoder):
        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return super().forward(x)[0].detach(), None

    with pytest.raises(RuntimeError, match="does not require grad"):
        loss_weights(Cut(), [{"x": torch.randn(2, 3, 6)}], ["layers.0"])
    model = lively()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    assert loss_weights(model, [{"input_ids": rows(1)}], PATHS) == {}
