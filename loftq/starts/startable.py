"""Which modules LoftQ can start."""

from __future__ import annotations

from qlora_kit.errors import TargetError
from qlora_kit.initializers import Request
from qlora_kit.training.preparation.quantize import DENSE_LINEARS

# Codecs of modules whose weight is not quantized yet.
DENSE = (*DENSE_LINEARS, "embedding")


def checked(request: Request) -> Request:
    """``request``, if there is a start for its module.

    Raises:
        TargetError: a convolution, or a module whose weight isn't in memory.
    """
    if request.family == "conv":
        raise TargetError(
            f"{request.path}: expected a linear layer or an embedding for init_lora_weights='loftq', found "
            f"{type(request.base).__name__}, of which there is no quantized module; take it out of target_modules "
            "or give it an adapter of its own with init_lora_weights=True"
        )
    # What others hold parts of is gathered when its turn comes.
    if request.sharding is None and request.codec.device(request.base).type == "meta":
        raise TargetError(
            f"{request.path}: expected a weight in memory for init_lora_weights='loftq', found one on the meta "
            "device; load the model's weights first, or use init_lora_weights=True"
        )
    return request
