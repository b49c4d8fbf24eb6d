"""What a ``LoftQConfig`` says of one module: the type that it is stored in, and how its weight is factorized."""

from __future__ import annotations

from torch import Tensor

from qlora_kit.checkpoints.quantized_tensors import weight_bytes
from qlora_kit.config.loftq import DEFAULT_TYPES, LoftQConfig
from qlora_kit.lowrank import check_matrix
from qlora_kit.naming import pattern_value

from ..inputs.groups import Seen
from ..methods.alignment import damping_for
from ..methods.checks import checked_statistics
from ..methods.factorization import checked_once, factorize
from ..methods.quantizers import quantizer_for
from ..methods.registry import LoftQResult, Problem, needs_of


def storage_of(path: str, options: LoftQConfig) -> tuple[str, bool]:
    """The type that the module at ``path`` is stored in, and whether it is packed by us whatever the type."""
    if options.bits_pattern:
        return options.mixed_type(pattern_value(path, options.bits_pattern, options.loftq_bits)), True
    return options.quant_type or DEFAULT_TYPES[options.loftq_bits], False


def module_bytes(shape: tuple[int, ...], kind: str, options: LoftQConfig) -> int:
    """Bytes of a weight (out, in) in the type ``kind``; see ``weight_bytes``."""
    blocksize = None if options.blocksize == "row" else int(options.blocksize)
    return weight_bytes(shape, kind, blocksize, options.double_quant)


def foretold_as(options: LoftQConfig, weight: Tensor, rank: int, kind: str, *, seen: Seen) -> float | None:
    """The output error, as a share of the output, that ``factorize_as`` is foretold to leave of ``weight``; None
    where the method has no way to foretell, or says that it can't be told."""
    if (foretell := needs_of(options.chosen_method).foretell) is None:
        return None
    check_matrix(weight, rank, "weight")
    statistics = checked_once(seen.factors, seen.statistics, weight, checked_statistics)
    quantizer = quantizer_for(quant_type=kind, blocksize=options.blocksize, double_quant=options.double_quant)
    damping = damping_for(options.damping, statistics, seen.cross, seen.half, seen.factors)
    problem = Problem(
        weight,
        rank,
        1.0,
        quantizer,
        1,
        statistics,
        seed=options.seed,
        damping=damping,
        scale_search=options.scale_search,
        factors=seen.factors,
    )
    return foretell(problem)


def factorize_as(
    options: LoftQConfig, weight: Tensor, rank: int, kind: str, *, scaling: float = 1.0, seen: Seen | None = None
) -> LoftQResult:
    """``factorize`` ``weight`` (out, in) in the type ``kind`` as ``options`` say.

    Args:
        seen: what is known of the inputs; without it, methods that look at them do what "loftq" does.

    Raises:
        ConfigError: see ``factorize``.
    """
    looks = needs_of(options.chosen_method).statistics is not None
    return factorize(
        weight,
        rank,
        quant_type=kind,
        steps=options.loftq_iter,
        scaling=scaling,
        statistics=None if seen is None else seen.statistics,
        blocksize=options.blocksize,
        double_quant=options.double_quant,
        method="loftq" if looks and seen is None else options.chosen_method,
        seed=options.seed,
        cross=None if seen is None else seen.cross,
        damping=options.damping,
        scale_search=options.scale_search,
        factors=None if seen is None else seen.factors,
        half=None if seen is None else seen.half,
        adapter_aware=options.adapter_aware,
        shortfall=None if seen is None else seen.shortfall,
    )
