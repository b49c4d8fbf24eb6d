"""``chunked_cross_entropy`` against a float64 reference, by head, dtype and chunk, and what it holds at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from live_bytes import LiveBytes
from reference.branches import array
from reference.cross_entropy import Scored, scored
from torch import Tensor, nn

from qlora_kit import ConfigError, LoraConfig, apply_lora, quantize_
from qlora_kit.training import chunked_cross_entropy

TOKENS, HIDDEN, WORDS = 13, 32, 64
#: Of a gradient's norm. float32: sums in another order. bfloat16: each product is rounded to 8 bits, most of it random.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, nn.Linear, Tensor]:
    """Hidden states, a head with a bias, and targets with some ignored."""
    hidden = torch.randn(TOKENS, HIDDEN, dtype=torch.float64).to(dtype).requires_grad_()
    head = nn.Linear(HIDDEN, WORDS, dtype=torch.float64).to(dtype)
    target = torch.randint(0, WORDS, (TOKENS,))
    target[[0, 4, 5]] = -100
    return hidden, head, target


def apart(found: Tensor | None, expected: Any) -> float:
    assert found is not None
    wanted = torch.as_tensor(expected, dtype=torch.float64)
    return float((found.double() - wanted).norm() / wanted.norm())


def assert_like(loss: Tensor, gradients: tuple[Tensor, Tensor, Tensor], expected: Scored, tolerance: float) -> None:
    assert loss.item() == pytest.approx(expected.loss, rel=max(min(tolerance, 1e-5), 1e-12))
    for found, value in zip(gradients, (expected.hidden, expected.weight, expected.bias), strict=True):
        assert apart(found, value) < tolerance


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("settings", [{}, {"reduction": "sum"}, {"label_smoothing": 0.2}])
def test_loss_and_gradients_are_the_references(dtype: torch.dtype, chunk: int, settings: dict[str, Any]) -> None:
    hidden, head, target = inputs(dtype)
    loss = chunked_cross_entropy(hidden, head, target, chunk=chunk, **settings)
    (loss * 3).backward()
    summed = settings.get("reduction") == "sum"
    expected = scored(
        array(hidden),
        array(head.weight),
        target.numpy(),
        bias=array(head.bias),
        smoothing=settings.get("label_smoothing", 0.0),
        divisor=1.0 if summed else None,
    )
    gradients = tuple(t.grad / 3 for t in (hidden, head.weight, head.bias))
    if dtype is torch.bfloat16:  # the reference's logits aren't rounded; the loss's are, to 8 bits
        assert loss.item() == pytest.approx(expected.loss, rel=1e-2)
        expected.loss = loss.item()
    assert_like(loss.detach(), gradients, expected, TOLERANCE[dtype])
    assert loss.dtype == (torch.float32 if dtype is torch.bfloat16 else dtype)


def test_half_precision_is_as_near_as_the_plain_loss() -> None:
    """Both round the same logits to bfloat16, so they are nearer to each other than to the reference."""
    hidden, head, target = inputs(torch.bfloat16)
    plain = F.cross_entropy(head(hidden).float(), target)
    expected = torch.autograd.grad(plain, [hidden, head.weight, head.bias])
    loss = chunked_cross_entropy(hidden, head, target, chunk=4)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    for found, value in zip(torch.autograd.grad(loss, [hidden, head.weight, head.bias]), expected, strict=True):
        assert apart(found, value) < 1e-2


def test_gradcheck() -> None:
    hidden = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1, -100, 6, 0, 6])
    assert torch.autograd.gradcheck(
        lambda hidden, weight: chunked_cross_entropy(hidden, weight, target, chunk=2, label_smoothing=0.1),
        (hidden, weight),
    )


def test_hidden_states_of_any_shape_and_a_head_that_is_a_weight() -> None:
    hidden, head, target = inputs()
    flat = chunked_cross_entropy(hidden[:12], head.weight, target[:12])
    folded = chunked_cross_entropy(hidden[:12].view(3, 4, HIDDEN), head.weight, target[:12].view(3, 4))
    assert torch.equal(flat, folded)


def test_nothing_counts() -> None:
    hidden, head, target = inputs()
    nothing = torch.full_like(target, -100)
    loss = chunked_cross_entropy(hidden, head, nothing, reduction="sum")
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()
    assert chunked_cross_entropy(hidden, head, nothing).isnan()  # as F.cross_entropy's
    assert F.cross_entropy(head(hidden), nothing).isnan()


# -- heads of every storage ------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(HIDDEN, WORDS)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(x)


@pytest.mark.parametrize("bits", [None, 2, 3, 4])
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_a_head_of_few_bits_with_an_adapter(bits: int | None, chunk: int) -> None:
    model = Net()
    if bits is not None:
        quantize_(model, bits, target_modules=["lm_head"])
    lora = apply_lora(model, LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False))
    head = lora.model.lm_head
    hidden, _, target = inputs(torch.float32)
    trained = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    assert len(trained) == 3
    expected = torch.autograd.grad(F.cross_entropy(head(hidden), target), trained)
    loss = chunked_cross_entropy(hidden, head, target, chunk=chunk)
    for found, value in zip(torch.autograd.grad(loss, trained), expected, strict=True):
        assert apart(found, value) < 1e-5


def test_an_adapter_that_takes_no_part_gets_no_gradient() -> None:
    lora = apply_lora(Net(), LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False))
    lora.add_adapter("other", LoraConfig(r=2, target_modules=["lm_head"]))
    lora.set_requires_grad(["default", "other"])
    hidden, _, target = inputs(torch.float32)
    chunked_cross_entropy(hidden, lora.model.lm_head, target, chunk=4).backward()
    reached = {name.split(".")[-2] for name, p in lora.named_parameters() if p.grad is not None}
    assert reached == {"default"}


def test_sums_over_chunks_lose_nothing_in_half_precision() -> None:
    """Of 512 equal parts in bfloat16 a running sum would stop at 256 of them."""
    hidden = torch.ones(512, 1, dtype=torch.bfloat16)
    head = nn.Linear(1, 2, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(head.weight)
    chunked_cross_entropy(hidden, head, torch.zeros(512, dtype=torch.long), chunk=1, reduction="sum").backward()
    assert head.weight.grad.flatten().tolist() == [-256.0, 256.0]


# -- what is held ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
def test_no_tensor_is_larger_than_a_chunks_logits(grad: bool) -> None:
    tokens, words, chunk = 256, 1024, 16
    hidden = nn.Parameter(torch.randn(tokens, HIDDEN), requires_grad=grad)
    head, target = nn.Linear(HIDDEN, words).requires_grad_(False), torch.randint(0, words, (tokens,))
    given = nn.ParameterList([hidden, *head.parameters()])
    with LiveBytes(given) as plain:
        F.cross_entropy(head(hidden), target)
    with LiveBytes(given) as found:
        loss = chunked_cross_entropy(hidden, head, target, chunk=chunk)
        if grad:
            loss.backward()
    logits = 4 * chunk * words
    assert plain.largest == 4 * tokens * words
    assert found.largest == max(logits, 4 * tokens * HIDDEN)
    assert found.extra < 3 * logits + 4 * 4 * tokens * HIDDEN  # a copy of a chunk's, and what logsumexp takes


def test_ignored_tokens_are_not_computed() -> None:
    hidden, head, target = inputs()
    seen: list[int] = []
    head.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    chunked_cross_entropy(hidden, head, target, chunk=4)
    assert seen == [4, 4, 2]


# -- refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [0, -1, True, 2.0])
def test_a_chunk_is_a_number_of_rows(chunk: Any) -> None:
    hidden, head, target = inputs()
    with pytest.raises(ConfigError, match="chunk: expected a number of rows, 1 or more, found"):
        chunked_cross_entropy(hidden, head, target, chunk=chunk)


def test_other_reductions_and_shapes_are_refused() -> None:
    hidden, head, target = inputs()
    with pytest.raises(ConfigError, match=r"reduction: expected 'mean' or 'sum', found 'none'"):
        chunked_cross_entropy(hidden, head, target, reduction="none")
    with pytest.raises(ConfigError, match=r"target: expected the shape \(13,\).*found \(12,\)"):
        chunked_cross_entropy(hidden, head, target[1:])
