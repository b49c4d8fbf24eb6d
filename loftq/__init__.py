"""LoftQ: quantize a weight and start its low-rank adapter together, so that the sum is close to the original."""

from qlora_kit.codecs.quantized import Quantized

from . import calibrated as _calibrated  # noqa: F401  # registers its methods, as the next one does
from . import principal as _principal  # noqa: F401
from .allocate import Allocation, allocate
from .factorize import factorize
from .methods import LoftQResult, Problem, register_method
from .report import LayerReport, Report, start_report
from .statistics import collect_statistics

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
