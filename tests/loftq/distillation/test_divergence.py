"""The divergence from the likeliest words: against the definition in float64, and what holds of any."""

from __future__ import annotations

import pytest
import torch
from live_bytes import LiveBytes
from reference import distillation as reference
from torch import Tensor, nn

import loftq.distillation.divergence as module
from loftq.distillation.divergence import Likeliest, divergence, likeliest

WORDS = 11


def logits(rows: int = 6, seed: int = 0, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(rows, WORDS, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [1, 4, WORDS - 1, WORDS, 3 * WORDS])
def test_value_and_gradient_are_the_definition_s(count: int) -> None:
    known, z = likeliest(logits(seed=1), count), logits().requires_grad_()
    found = divergence(z, known)
    (3 * found).backward()
    told = z.detach().numpy(), known.ids.numpy(), known.logs.numpy()
    assert float(found.detach()) == pytest.approx(reference.divergence(*told), rel=1e-5, abs=1e-6)
    assert z.grad is not None
    torch.testing.assert_close(z.grad, 3 * torch.from_numpy(reference.slope(*told)).float(), rtol=1e-4, atol=1e-5)


def test_of_all_words_it_is_the_plain_divergence_and_of_some_no_more() -> None:
    p, q = logits(seed=1).double().log_softmax(-1), logits().double().log_softmax(-1)
    plain = float((p.exp() * (p - q)).sum())
    found = [float(divergence(logits(), likeliest(logits(seed=1), count))) for count in range(1, WORDS + 1)]
    assert found[-1] == pytest.approx(plain, rel=1e-5)
    assert found == sorted(found), "who tells more words apart sees more"


def test_a_model_is_nowhere_away_from_itself() -> None:
    for spread in (0.0, 2.0, 80.0):
        z = logits(spread=spread).requires_grad_()
        found = divergence(z, likeliest(z.detach(), 4))
        found.backward()
        assert float(found.detach()) == pytest.approx(0, abs=1e-5)
        assert z.grad is not None
        assert float(z.grad.abs().max()) < 1e-5


def test_words_that_can_t_come_and_large_logits_stay_finite() -> None:
    p, z = logits(seed=1), 1e4 * logits()
    p[:, 3] = float("-inf")
    z.requires_grad_()
    found = divergence(z, likeliest(p, 4))
    found.backward()
    assert found.isfinite()
    assert z.grad is not None
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_logits_and_gradient_once(dtype: torch.dtype) -> None:
    known, z = likeliest(logits(seed=1), 4), logits().to(dtype).requires_grad_()
    wide = z.detach().float().requires_grad_()
    found, expected = divergence(z, known), divergence(wide, known)
    found.backward()
    expected.backward()
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert z.grad is not None
    assert wide.grad is not None
    assert torch.equal(z.grad, wide.grad.to(dtype))


@pytest.mark.parametrize("size", [1e-5, 1e-3, 1.0])
def test_a_small_divergence_keeps_its_digits_and_none_is_negative(size: float) -> None:
    p, z = logits(rows=40, seed=1), logits(rows=40, seed=1) + size * logits(rows=40, seed=2)
    known = likeliest(p, 4)
    # float32 tells logits to 1e-7 of themselves, and a divergence goes as the square of what they moved by.
    expected = reference.divergence(z.numpy(), known.ids.numpy(), known.logs.numpy())
    assert float(divergence(z, known)) == pytest.approx(expected, rel=1e-3, abs=1e-9)
    of_each = [divergence(z[row, None], Likeliest(known.ids[row, None], known.logs[row, None])) for row in range(40)]
    assert min(map(float, of_each)) >= 0


def test_rows_at_a_time_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def both() -> tuple[Likeliest, Tensor, Tensor]:
        z = logits(rows=9).requires_grad_()
        known = likeliest(logits(rows=9, seed=1), 4)
        found = divergence(z, known)
        found.backward()
        assert z.grad is not None
        return known, found.detach(), z.grad

    whole = both()
    monkeypatch.setattr(module, "_NUMBERS", 2 * WORDS)
    parts = both()
    assert torch.equal(parts[0].ids, whole[0].ids)
    assert torch.equal(parts[0].logs, whole[0].logs)
    assert float(parts[1]) == pytest.approx(float(whole[1]), rel=1e-6)
    assert torch.equal(parts[2], whole[2])


@pytest.mark.parametrize(("rows", "words"), [(64, 100), (2, 3200)])
def test_what_it_takes_beside_the_gradient_doesn_t_grow_with_the_words(
    monkeypatch: pytest.MonkeyPatch, rows: int, words: int
) -> None:
    monkeypatch.setattr(module, "_NUMBERS", 3200)
    z = torch.randn(rows, words).bfloat16().requires_grad_()
    known = likeliest(z.detach().flip(0), 4)
    with LiveBytes(nn.Module()) as memory:
        found = divergence(z, known)
    assert memory.peak < 2 * z.nbytes + 3.5 * 4 * 3200, "logits, gradient, three times what is worked on"
    with LiveBytes(nn.Module()) as memory:
        likeliest(z.detach(), 4)
    assert memory.peak < 2 * z.nbytes + 2.5 * 4 * 3200
    assert found.isfinite()
