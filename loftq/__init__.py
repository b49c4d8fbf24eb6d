"""LoftQ: quantize a weight and start its low-rank adapter together, so that the sum is close to the original.

- ``methods/``: one weight: which quantized weight and which branch
- ``inputs/``: what the layers of a model are given
- ``starts/``: the adapters of a model, each module by a method
- ``bits/``: how many bits each layer gets under a budget
- ``distillation/``: adapters that learn from the original, as a whole, once they are started
- ``disk/``: all of it from folder to folder, a tensor at a time
- ``for_merging``: what ``qlora_kit.merging`` asks of this package
- ``cli``: the command line
"""

from qlora_kit.codecs.quantized import Quantized

from .bits.allocation import Allocation, allocate
from .distillation.soft_labels import SoftLabels, soft_labels
from .distillation.training import Distillation, distill
from .inputs.moments import collect_statistics
from .methods.factorization import factorize
from .methods.registry import LoftQResult, Problem, register_method
from .starts.report import LayerReport, Report, start_report

__all__ = [
    "Allocation",
    "Distillation",
    "LayerReport",
    "LoftQResult",
    "Problem",
    "Quantized",
    "Report",
    "SoftLabels",
    "allocate",
    "collect_statistics",
    "distill",
    "factorize",
    "register_method",
    "soft_labels",
    "start_report",
]
