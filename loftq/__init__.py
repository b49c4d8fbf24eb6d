"""LoftQ: quantize a weight and start its low-rank adapter together, so that the sum is close to the original."""

from qlora_kit.codecs.quantized import Quantized

from .alternate import factorize
from .methods import LoftQResult, Problem, register_method

__all__ = ["LoftQResult", "Problem", "Quantized", "factorize", "register_method"]
