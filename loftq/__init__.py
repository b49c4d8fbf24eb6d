"""LoftQ: quantize a weight and start its low-rank adapter together, so that the sum is close to the original."""

from qlora_kit.codecs.quantized import Quantized

from .bits.allocation import Allocation, allocate
from .inputs.moments import collect_statistics
from .methods import error_feedback as _calibrated  # noqa: F401  # registers its methods, as the next one does
from .methods import principal as _principal  # noqa: F401
from .methods.factorization import factorize
from .methods.registry import LoftQResult, Problem, register_method
from .report import LayerReport, Report, start_report

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
