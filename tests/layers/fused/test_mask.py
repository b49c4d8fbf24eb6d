"""Dropout from a seed: the share dropped, no pattern, the mean kept, the same again, other seeds other masks."""

from __future__ import annotations

import pytest
import torch

from qlora_kit.layers.fused.mask import Mask


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_the_share_and_the_mean(p: float) -> None:
    mask = Mask.draw(p)
    assert mask is not None
    kept = mask.kept(torch.empty(1000, 1000))
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    four_deviations = 4 * (p * (1 - p) / 1e6) ** 0.5
    assert abs(1 - float(kept.mean()) - p) < four_deviations
    assert abs(mask.dropped / 65536 - p) <= 2**-17
    assert mask.scale * (1 - mask.dropped / 65536) == pytest.approx(1, rel=1e-12)


def test_neighbours_are_independent() -> None:
    mask = Mask.draw(0.5)
    assert mask is not None
    kept = mask.kept(torch.empty(1 << 20)) - 0.5
    for step in (1, 2, 3, 4, 1024):
        assert abs(float((kept[step:] * kept[:-step]).mean())) < 4 * 0.25 / 1024


def test_the_same_again_in_any_dtype_and_shape() -> None:
    mask = Mask.draw(0.3)
    assert mask is not None
    first = mask.kept(torch.empty(7, 3, 5))
    assert first.shape == (7, 3, 5)
    assert torch.equal(mask.kept(torch.empty(21, 5, dtype=torch.bfloat16)).float(), first.view(21, 5))


def test_the_seed_is_torchs() -> None:
    torch.manual_seed(3)
    first, second = Mask.draw(0.1), Mask.draw(0.1)
    torch.manual_seed(3)
    assert Mask.draw(0.1) == first != second


def test_the_ends() -> None:
    assert Mask.draw(0.0) is None
    everything = Mask.draw(1.0)
    assert everything is not None
    assert everything.scale == 0.0
    assert not everything.kept(torch.empty(99)).any()


def test_without_values_there_is_a_shape() -> None:
    mask = Mask.draw(0.3)
    assert mask is not None
    kept = mask.kept(torch.empty(7, 3, device="meta", dtype=torch.bfloat16))
    assert (kept.shape, kept.dtype, kept.device.type) == ((7, 3), torch.bfloat16, "meta")
