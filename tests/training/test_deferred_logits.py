"""Logits that note what is done to them: the same loss and gradients as logits, for all that a model may do to them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_kit.training.deferred_logits import DeferredLogits, deferred_call

WORDS, WIDTH = 12, 6
Loss = Callable[[Tensor], Tensor]
TARGET = torch.tensor([[1, 2, -100, 3, 4], [5, -100, 6, 11, 0]])


def flat(logits: Tensor, **settings: object) -> Tensor:
    return F.cross_entropy(logits.view(-1, WORDS), TARGET.flatten(), **settings)  # type: ignore[arg-type]


def shifted(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits[..., :-1, :].contiguous().view(-1, WORDS), TARGET[..., 1:].reshape(-1))


def in_place(logits: Tensor) -> Tensor:
    logits *= 0.5
    logits.div_(3).tanh_()
    return flat(logits)


def masked_words(logits: Tensor) -> Tensor:
    logits[:, :, 7] = -1e4
    return flat(logits)


#: Losses without logits of all tokens.
CHUNKED: dict[str, Loss] = {
    "flat": flat,
    "shifted": shifted,
    "scaled and capped": lambda z: flat(torch.tanh(2.5 * z / 4.0) * 4.0),
    "negated, offset": lambda z: flat(1.0 - (-z) + 2),
    "in place": in_place,
    "cast": lambda z: flat(z.double().to(torch.float32)),
    "a bias for each word": lambda z: flat(z + torch.linspace(-1, 1, WORDS)[None]),
    "a tensor of one number": lambda z: flat(z * torch.tensor(3.0)),
    "chosen by a mask": lambda z: F.cross_entropy(z[TARGET >= 0], TARGET[TARGET >= 0]),
    "the last rows": lambda z: F.cross_entropy(z[:, -2:].reshape(-1, WORDS), TARGET[:, -2:].flatten()),
    "flattened": lambda z: F.cross_entropy(z.flatten(0, 1), TARGET.view(-1)),
    "a module": lambda z: nn.CrossEntropyLoss(ignore_index=3)(z.view(-1, WORDS), TARGET.flatten().clamp(min=0)),
    "smoothed": lambda z: flat(z, label_smoothing=0.3),
    "summed": lambda z: flat(z, reduction="sum") / 7,
    "twice": lambda z: flat(z) + shifted(z),
}
#: Those that need them.
COMPUTED: dict[str, Loss] = {
    "log_softmax": lambda z: F.nll_loss(F.log_softmax(z, -1).view(-1, WORDS), TARGET.flatten()),
    "words are masked": masked_words,
    "some words": lambda z: F.cross_entropy(z[..., :7].reshape(-1, 7), TARGET.flatten().clamp(max=6)),
    "words before tokens": lambda z: F.cross_entropy(z.transpose(1, 2), TARGET),
    "a number for each token": lambda z: flat(z * torch.arange(1.0, 6.0)[:, None]),
    "each token's": lambda z: flat(z, reduction="none").square().mean(),
    "weights": lambda z: flat(z, weight=torch.linspace(0, 1, WORDS)),
    "probabilities": lambda z: F.cross_entropy(z.view(-1, WORDS), torch.full((10, WORDS), 1 / WORDS)),
    "logits by logits": lambda z: flat(z * z),
    "all in one row": lambda z: z.flatten().square().mean(),
}


def both(loss: Loss) -> tuple[list[Tensor], list[Tensor], DeferredLogits]:
    """Loss and gradients of plain logits, of deferred ones, and the latter."""
    head, hidden = nn.Linear(WIDTH, WORDS), torch.randn(2, 5, WIDTH, requires_grad=True)
    wanted = [hidden, *head.parameters()]

    def of(logits: Tensor) -> list[Tensor]:
        value = loss(logits)
        return [value.detach(), *torch.autograd.grad(value, wanted)]

    logits = deferred_call(head, head.forward, hidden, chunk=3)
    return of(head(hidden).clone()), of(logits), logits


@pytest.mark.parametrize("name", CHUNKED)
def test_chunked(name: str) -> None:
    expected, found, logits = both(CHUNKED[name])
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)
    assert logits.source.computed_for == []
    assert logits.source.losses == (2 if name == "twice" else 1)


@pytest.mark.parametrize("name", COMPUTED)
def test_computed(name: str) -> None:
    expected, found, logits = both(COMPUTED[name])
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)
    assert logits.source.computed_for
    assert logits.source.losses == 0


def test_a_trained_scale_gets_its_gradient() -> None:
    head, hidden = nn.Linear(WIDTH, WORDS), torch.randn(2, 5, WIDTH)
    scale = nn.Parameter(torch.tensor([2.0]))
    (expected,) = torch.autograd.grad(flat(head(hidden) * scale), scale)
    logits = deferred_call(head, head.forward, hidden, chunk=3) * scale
    (found,) = torch.autograd.grad(flat(logits), scale)
    assert logits.source.computed_for == []
    assert torch.allclose(found, expected, rtol=1e-5)


def test_what_it_says_of_itself_costs_nothing() -> None:
    head = nn.Linear(WIDTH, WORDS, dtype=torch.bfloat16)
    logits = deferred_call(head, head.forward, torch.randn(2, 5, WIDTH, dtype=torch.bfloat16), chunk=3)
    assert (logits.shape, logits.size(dim=1), logits.dim(), len(logits)) == ((2, 5, WORDS), 5, 3, 2)
    assert (logits.dtype, logits.float().dtype) == (torch.bfloat16, torch.float32)
    assert (logits.device, logits.is_cuda, logits.requires_grad) == (torch.device("cpu"), False, True)
    with torch._C.DisableTorchFunctionSubclass():
        assert logits.untyped_storage().nbytes() == 2  # one element
    assert logits.source.computed_for == []
