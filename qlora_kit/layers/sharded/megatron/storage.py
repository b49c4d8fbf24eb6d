"""How Megatron's sharded linears keep this rank's part of a weight: dense, or in few bits.

Nobody quantizes these, since a 4-bit linear in their place would know nothing of the other ranks. Here a sharded linear
stays one: ``QuantizedShard`` is a class between an instance and its own, with the forward, collectives, bias and return
values of that. Only the product with the weight, which megatron-core keeps in a method of its own (``_forward_impl``),
is that of a quantized linear over this rank's part. So the model is sharded first and quantized then, each rank its own
part, and codes never cross ranks.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from ....codecs import Codec, codec_for
from ....codecs.dense import DenseCodec, EmbeddingCodec
from ....codecs.plain_weight import reason_against_weight
from ....codecs.registry import registered_type
from ....errors import CodecError
from ....naming import Closed
from ..collectives import copy_to_group, gather_for_parts
from .shardings import stride_of


class PartCodec(DenseCodec):
    """This rank's part of a column- or row-sharded linear, as a floating-point matrix (out, in) of its own."""

    name = "dense"

    def reason_against(self, module: nn.Module) -> str | None:
        return reason_against_weight(module) or _reason_against_forward(module)

    def shape(self, module: Any) -> tuple[int, int]:
        return tuple(module.weight.shape)

    def linear_dtypes(self, module: nn.Module, x: Tensor) -> None:
        return None  # only its own forward knows of the other ranks

    def housed(self, module: nn.Module, linear: nn.Module) -> nn.Module:
        return QuantizedShard.of(module, linear)


class TableCodec(EmbeddingCodec):
    """This rank's words of a table that is sharded by them; (dim, words) is the matrix."""

    def reason_against(self, module: nn.Module) -> str | None:
        return reason_against_weight(module) or _reason_against_forward(module)

    def shape(self, module: Any) -> tuple[int, int]:
        words, dim = module.weight.shape
        return dim, words


def _reason_against_forward(module: nn.Module) -> str | None:
    own: Any = registered_type(type(module))
    return None if type(module).forward is own.forward else f"its forward isn't that of {own.__name__}"


class QuantizedShard(Closed):
    """Of sharded linears: the weight is that of ``quantized``, a linear layer of this rank's part."""

    quantized: nn.Module
    #: The class of the module that this one was.
    dense_type: type[nn.Module]

    @staticmethod
    def of(module: nn.Module, linear: nn.Module) -> nn.Module:
        """``module``, with the weight that ``linear`` holds and otherwise as it is.

        Raises:
            CodecError: its products aren't in a method that can be replaced.
        """
        if not hasattr(type(module), "_forward_impl"):
            raise CodecError(
                f"{type(module).__name__}: expected a sharded linear whose product is a method of its own, found one "
                "that computes all in one kernel; build the model with megatron-core's local specification "
                "(get_gpt_layer_local_spec) to quantize it"
            )
        new, kind = _copy_of(module), cast("Any", type(module))
        new.partition_stride = stride_of(module)  # which the weight of another storage doesn't say
        new._parameters.pop("weight", None)
        new.__class__ = type(module) if isinstance(module, QuantizedShard) else _quantized_type(kind)
        linear.register_parameter("bias", None)  # which the sharded linear keeps, and adds or returns
        new._modules["quantized"] = linear
        return new

    @property
    def weight(self) -> Any:
        return self.quantized.weight

    def _forward_impl(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, *, allreduce_dgrad: bool, **options: Any
    ) -> Tensor:
        group = options["tp_group"]
        if options["sequence_parallel"]:
            input = gather_for_parts(input, 0, group)
        elif allreduce_dgrad:
            input = copy_to_group(input, group)
        out = codec_for(self.quantized).forward(self.quantized, input)
        return out if bias is None else out + bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        raise CodecError(
            f"{prefix}weight: expected a dense weight for Megatron's checkpoints, found a "
            f"{type(self.quantized).__name__}; save the adapters with save_pretrained, and quantize the base again "
            "when it is loaded"
        )


@cache
def _quantized_type(kind: Any) -> type[nn.Module]:
    return type(f"Quantized{kind.__name__}", (QuantizedShard, kind), {"__module__": __name__, "dense_type": kind})


def _copy_of(module: nn.Module) -> Any:
    """``module`` again, over the same tensors and children, with tables of its own."""
    new = copy.copy(module)
    for table in ("_parameters", "_buffers", "_modules"):
        vars(new)[table] = dict(vars(module)[table])
    return new


def _of_the_inner(name: str) -> Any:
    def ask(self: Codec, module: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(codec_for(module.quantized), name)(module.quantized, *args, **kwargs)

    ask.__name__ = name
    return ask


class QuantizedShardCodec(Codec):
    """``QuantizedShard``: all that is stored is asked of the quantized linear inside."""

    name = "quantized shard"
    shape = _of_the_inner("shape")
    read = _of_the_inner("read")
    plus = _of_the_inner("plus")
    write_ = _of_the_inner("write_")
    pieces = _of_the_inner("pieces")
    quantizer = _of_the_inner("quantizer")
    quantized = _of_the_inner("quantized")
    take_ = _of_the_inner("take_")
    release_ = _of_the_inner("release_")
    stored = _of_the_inner("stored")
    nbytes = _of_the_inner("nbytes")
    compute_dtype = _of_the_inner("compute_dtype")
    device = _of_the_inner("device")
    contents = _of_the_inner("contents")
    snapshot = _of_the_inner("snapshot")
    restore_ = _of_the_inner("restore_")
    protect_ = _of_the_inner("protect_")
    multiplier = _of_the_inner("multiplier")

    def dense_like(self, module: Any, dtype: torch.dtype) -> nn.Module:
        new = _copy_of(module)
        new.__class__ = type(module).dense_type
        del new._modules["quantized"]
        new._parameters["weight"] = nn.Parameter(self.read(module).to(dtype), requires_grad=False)
        if (bias := module.bias) is not None:
            own = nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=bias.requires_grad)
            vars(own).update(vars(bias))
            new._parameters["bias"] = own
        return new

    def housed(self, module: nn.Module, linear: nn.Module) -> nn.Module:
        return QuantizedShard.of(module, linear)
