"""Errors of a start whose aim isn't the weight."""

from __future__ import annotations

import pytest
import torch
from test_every_method import inputs, moments, weight

from loftq import factorize


def test_output_errors_are_to_the_size_of_what_is_aimed_at() -> None:
    """A layer that gives little beside the stream, and has much to make up for there: V is 21 W here."""
    W, R = weight(), moments(inputs())
    pull = 0.01 * R.diagonal().mean()
    made_up_for = W * 20 @ (R + pull * torch.eye(len(R)))
    large = factorize(W, 5, bits=2, method="aligned", statistics=R, cross=R, damping=0.01, shortfall=made_up_for)
    plain = factorize(W * 21, 5, bits=2, method="aligned", statistics=R, cross=R, damping=0.01)
    assert large.goal is not None
    assert torch.linalg.norm(large.goal - 21 * W) < 1e-3 * torch.linalg.norm(W)
    assert large.output_error == pytest.approx(plain.output_error, rel=1e-3)
    assert large.zero_output_error == pytest.approx(plain.zero_output_error, rel=1e-3)
