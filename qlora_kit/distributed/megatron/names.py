"""Where a Megatron model's adapters go in the Hugging Face model of the same weights: paths, and a fused linear's rows.

Of models that are written as Llama is (Llama, Mistral, Qwen 2 and 3, Gemma): separate q, k, v, gate and up, no bias to
speak of, rotary positions by halves. Of ``linear_qkv`` every group of queries is a block of rows: its heads of q, one
of k, one of v; there q_proj holds all heads in order, k_proj and v_proj one head a group. One A is then that of all
three. ``linear_fc1`` holds gate, then up.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ...errors import TargetError

_LAYER = re.compile(r"(?:.*\.)?decoder\.layers\.(\d+)\.(.+)")
# What is in a layer under one name, here and there; the last two names of a path are enough.
_ALIKE = {
    "self_attention.linear_proj": "self_attn.o_proj",
    "mlp.linear_fc2": "mlp.down_proj",
    "linear_qkv.linear_q": "self_attn.q_proj",
    "linear_qkv.linear_k": "self_attn.k_proj",
    "linear_qkv.linear_v": "self_attn.v_proj",
    "linear_fc1.linear_fc1_gate": "mlp.gate_proj",
    "linear_fc1.linear_fc1_up": "mlp.up_proj",
}
_ENDS = {"embedding.word_embeddings": "model.embed_tokens", "output_layer": "lm_head"}


def destinations(path: str, B: Tensor, config: Any, numbers: dict[int, int]) -> Iterator[tuple[str, Tensor]]:
    """(path there, B there) for an adapter at ``path`` with the whole B (out, r); A is the same for all.

    Args:
        config: the model's TransformerConfig.
        numbers: from the index of a layer here to its index in the whole model.

    Raises:
        TargetError: there is no place for it.
    """
    for end, there in _ENDS.items():
        if path == end or path.endswith(f".{end}"):
            yield there, B
            return
    found = _LAYER.fullmatch(path)
    if found is None:
        raise _no_place(path)
    layer, within = f"model.layers.{numbers[int(found[1])]}", found[2]
    if (alike := _ALIKE.get(".".join(within.split(".")[-2:]))) is not None:
        yield f"{layer}.{alike}", B
    elif within == "self_attention.linear_qkv" and not getattr(config, "attention_output_gate", False):
        for name, rows in zip("qkv", split_groups(B, config), strict=True):
            yield f"{layer}.self_attn.{name}_proj", rows
    elif within == "mlp.linear_fc1" and config.gated_linear_unit:
        for name, rows in zip(("gate", "up"), B.chunk(2), strict=True):
            yield f"{layer}.mlp.{name}_proj", rows
    else:
        raise _no_place(path)


def split_groups(rows: Tensor, config: Any) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of (out, ...) ``rows`` of a whole ``linear_qkv``."""
    groups = config.num_query_groups
    heads = config.num_attention_heads // groups
    blocks = rows.view(groups, heads + 2, config.kv_channels, *rows.shape[1:])
    q, k, v = blocks.split([heads, 1, 1], dim=1)
    return q.flatten(0, 2), k.flatten(0, 2), v.flatten(0, 2)


def _no_place(path: str) -> TargetError:
    return TargetError(
        f"{path}: expected a module of a decoder that is written as Llama is there (linear_qkv, linear_proj, gated "
        "linear_fc1, linear_fc2, word_embeddings, output_layer), found another; leave it out of the adapter"
    )
