"""How Megatron's and TransformerEngine's modules say what their part is of a whole."""

from __future__ import annotations

from typing import Any

from ....errors import AdapterError
from ..collectives import ALONE
from ..sharding import Form, Sharding


def stride_of(module: Any) -> int:
    """Of how many pieces this rank's rows are made, one of each of as many blocks of the whole: two where gate and up
    are in one linear, so that every rank has rows of both."""
    holder = module if hasattr(module, "partition_stride") else module.weight
    return int(getattr(holder, "partition_stride", 1))


def column(module: Any) -> Sharding:
    """``ColumnParallelLinear``: (sequence, batch, width) in, this rank's features out."""
    _refuse_experts(module)
    takes: Form = "sequence" if module.sequence_parallel else "whole"
    gives: Form = "whole" if module.gather_output else "features"
    shape = module.output_size, module.input_size
    return Sharding("column", shape, module.tp_group, takes, gives, sequence_dim=0, pieces=stride_of(module))


def row(module: Any) -> Sharding:
    """``RowParallelLinear``: this rank's features in, (sequence, batch, width) out."""
    _refuse_experts(module)
    several = module.tp_group.size() > 1
    takes: Form = "features" if module.input_is_parallel else "whole"
    gives: Form = "sequence" if module.sequence_parallel and several else "whole"
    shape = module.output_size, module.input_size
    return Sharding("row", shape, module.tp_group, takes, gives, sequence_dim=0)


def words(module: Any) -> Sharding:
    """``VocabParallelEmbedding``: words in, (batch, sequence, width) out, or by sequence, cut along that."""
    gives: Form = "sequence" if module.reduce_scatter_embeddings and module.tp_group.size() > 1 else "whole"
    shape = module.embedding_dim, module.num_embeddings
    return Sharding("row", shape, module.tp_group, "features", gives, sequence_dim=0)


def transformer_engine(module: Any) -> Sharding:
    """TransformerEngine's ``Linear`` and ``LayerNormLinear``, and megatron-core's classes over them."""
    rows, columns = module.weight.shape
    if module.tp_size == 1:
        _refuse_copies(module)
        return Sharding("row", (rows, columns), ALONE, "features", "whole", sequence_dim=0)
    group = getattr(module, "tp_group", None)
    group = getattr(module, "_tp_group", None) if group is None else group
    if module.parallel_mode == "column":
        shape, takes = (rows * module.tp_size, columns), "sequence" if module.sequence_parallel else "whole"
        return Sharding("column", shape, group, takes, "features", sequence_dim=0, pieces=stride_of(module))  # type: ignore[arg-type]
    gives: Form = "sequence" if module.sequence_parallel else "whole"
    return Sharding("row", (rows, columns * module.tp_size), group, "features", gives, sequence_dim=0)


def _refuse_copies(module: Any) -> None:
    """Of a weight that every rank has, but for some of the tokens."""
    config = getattr(module, "config", None)
    if getattr(config, "sequence_parallel", False) and getattr(config, "tensor_model_parallel_size", 1) > 1:
        raise AdapterError(
            f"{type(module).__name__}: expected a layer that is cut, or all tokens on each rank, found the same layer "
            "on all ranks with some of the tokens each; leave it out of the targets, or set sequence_parallel=False"
        )


def _refuse_experts(module: Any) -> None:
    if module.is_expert and module.tp_group.size() > 1:
        raise AdapterError(
            f"{type(module).__name__}: expected a layer that reduces its own results, found an expert's, which leaves "
            "that to the exchange of tokens; set expert_tensor_parallel_size=1, or leave the experts out of the targets"
        )
    if getattr(module, "disable_grad_reduce", False):
        raise AdapterError(
            f"{type(module).__name__}: expected a layer that sums its input's gradients over the ranks, found "
            "disable_grad_reduce=True; build it without, or leave it out of the targets"
        )
