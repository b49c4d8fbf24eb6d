"""LoftQ: quantize a weight and start its low-rank adapter together, so that the sum is close to the original."""

from .alternate import LoftQResult, factorize
from .quantizers import Quantized

__all__ = ["LoftQResult", "Quantized", "factorize"]
