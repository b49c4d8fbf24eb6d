"""The rotation against its explicit matrix in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import trellis as ref
from torch._subclasses.fake_tensor import FakeTensorMode

from qlora_kit.codecs.trellis import rotation
from qlora_kit.codecs.trellis.rotation import rotate, unrotate

# Width 1, odd, prime, powers of two around a factor of 64, and products.
WIDTHS = [1, 2, 3, 7, 9, 12, 43, 47, 64, 96, 100, 128, 192, 256]
SIGNS_OF_16 = "+--++--++---++++"
every_width = pytest.mark.parametrize("width", WIDTHS)


@every_width
def test_it_is_the_explicit_matrix(width: int) -> None:
    matrix = ref.rotation(width)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(width), atol=1e-13)
    x = torch.randn(2, 3, width, dtype=torch.float64)
    np.testing.assert_allclose(rotate(x).numpy(), x.numpy() @ matrix.T, atol=1e-12)
    np.testing.assert_allclose(unrotate(x).numpy(), x.numpy() @ matrix, atol=1e-12)


def test_many_rows_are_rotated_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 7, 96)
    whole = rotate(x), unrotate(x)
    monkeypatch.setattr(rotation, "_CHUNK", 4 * 96)
    for found, expected in zip((rotate(x), unrotate(x)), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # sums in another order
    halves = rotate(x.bfloat16())
    assert (halves.dtype, halves.shape) == (torch.bfloat16, x.shape)


@pytest.mark.parametrize("width", [5, 47, 64, 96, 100, 576, 4096])
def test_a_row_is_rotated_the_same_among_any_others(width: int) -> None:
    """Bit for bit: a weight is read whole or in pieces, in memory and on disk."""
    x = torch.randn(100, width)
    for turn in (rotate, unrotate):
        whole = turn(x)
        assert all(torch.equal(torch.cat([turn(part) for part in x.split(n)]), whole) for n in (1, 3, 16, 33))


@pytest.mark.parametrize("width", [4096, 8192, 576, 1536, 11008])
def test_wide_rows_keep_lengths_and_angles_and_come_back(width: int) -> None:
    x = torch.randn(3, width, dtype=torch.float64)
    turned = rotate(x)
    torch.testing.assert_close(turned @ turned.T, x @ x.T, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(unrotate(turned), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("width", [64, 96, 4096])
def test_an_outlier_is_spread_over_its_row(width: int) -> None:
    x = torch.zeros(width)
    x[5] = 1
    # cas is at most sqrt(2).
    assert rotate(x).abs().max() <= (2 / width) ** 0.5 * (1 + 1e-6)


@pytest.mark.parametrize(("dtype", "ulp"), [(torch.float32, 2**-23), (torch.float16, 2**-10), (torch.bfloat16, 2**-7)])
@every_width
def test_it_computes_in_float32_at_least(width: int, dtype: torch.dtype, ulp: float) -> None:
    x = torch.randn(5, width).to(dtype)
    found, exact = rotate(x), x.double().numpy() @ ref.rotation(width).T
    assert found.dtype == dtype
    # Half an ulp of the result, beside float32's sums.
    assert np.abs(found.double().numpy() - exact).max() <= (ulp / 2 + 3e-6) * np.abs(exact).max()
    assert np.abs(unrotate(found).double().numpy() - x.double().numpy()).max() <= (2 * ulp + 6e-6) * 5


def test_autocast_rounds_nothing() -> None:
    x = torch.randn(5, 96)
    with torch.autocast("cpu", torch.bfloat16):
        inside = rotate(x), unrotate(x)
    assert torch.equal(inside[0], rotate(x))
    assert torch.equal(inside[1], unrotate(x))


def test_gradients_are_the_inverse() -> None:
    x, grad = torch.randn(5, 96, dtype=torch.float64, requires_grad=True), torch.randn(5, 96, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(rotate(x), x, grad)[0], unrotate(grad))


def test_rows_of_no_number_are_rotated_too() -> None:
    assert rotate(torch.empty(0, 12)).shape == (0, 12)
    assert unrotate(torch.empty(2, 0, 12)).shape == (2, 0, 12)
    assert rotate(torch.empty(3, 96, device="meta")).is_meta


def test_fake_tensors_have_shapes_and_leave_nothing_behind() -> None:
    with FakeTensorMode() as mode:
        assert rotate(mode.from_tensor(torch.empty(3, 132))).shape == (3, 132)
    x = torch.randn(3, 132, dtype=torch.float32)
    np.testing.assert_allclose(rotate(x).numpy(), x.numpy() @ ref.rotation(132).T, atol=1e-5)
    assert torch.equal(rotate(torch.nn.Parameter(x)), rotate(x))


def test_rows_of_no_columns() -> None:
    assert rotate(torch.empty(3, 0)).shape == (3, 0)


def test_what_is_kept_for_a_width_can_be_used_in_any_mode() -> None:
    with torch.inference_mode():
        rotate(torch.randn(2, 130))
    x = torch.randn(2, 130, requires_grad=True)
    assert torch.autograd.grad(rotate(x).sum(), x)[0].shape == (2, 130)


def test_stored_models_depend_on_these_signs() -> None:
    """Another way to draw them would read every stored weight as noise."""
    signs = "".join("-" if sign < 0 else "+" for sign in ref.signs(16))
    assert signs == SIGNS_OF_16
    one = torch.eye(16)
    first = rotate(one)[:, 0]  # the constant row of the Hadamard matrix, so the signs themselves
    assert "".join("-" if sign < 0 else "+" for sign in first.tolist()) == SIGNS_OF_16
