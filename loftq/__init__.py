"""LoftQ: quantize a weight and start its low-rank adapter together, so that the sum is close to the original."""

from qlora_kit.codecs.quantized import Quantized

from .bits.allocation import Allocation, allocate
from .inputs.moments import collect_statistics
from .methods.factorization import factorize
from .methods.registry import LoftQResult, Problem, register_method
from .starts.report import LayerReport, Report, start_report

__all__ = [
    "Allocation",
    "LayerReport",
    "LoftQResult",
    "Problem",
    "Quantized",
    "Report",
    "allocate",
    "collect_statistics",
    "factorize",
    "register_method",
    "start_report",
]
