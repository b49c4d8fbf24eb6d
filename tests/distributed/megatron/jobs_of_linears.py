"""What the ranks do in the tests of Megatron's linears, each by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron_gpt import begin
from torch import Tensor, nn

from qlora_kit import LoraConfig, apply_lora, quantize_
from qlora_kit.codecs import codec_for
from qlora_kit.layers.sharded.parts import gathered


class Holder(nn.Module):
    """A model of one module."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.linear(*args, **kwargs)


#: By name: the kind of module, options of its own, and of the call.
LINEARS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "column": ("Column", {"gather_output": False}, {}),
    "column, gathered": ("Column", {"gather_output": True}, {}),
    "column, gathered by the call": ("Column", {"gather_output": False}, {"runtime_gather_output": True}),
    "column, not gathered by the call": ("Column", {"gather_output": True}, {"runtime_gather_output": False}),
    "column, bias left to others": ("Column", {"gather_output": False, "skip_bias_add": True}, {}),
    "column of two blocks": ("Column", {"gather_output": False, "stride": 2}, {}),
    "column by sequence": ("Column", {"gather_output": False, "sequence_parallel": True}, {}),
    "row": ("Row", {"input_is_parallel": True, "skip_bias_add": False}, {}),
    "row of whole inputs": ("Row", {"input_is_parallel": False, "skip_bias_add": False}, {}),
    "row, bias left to others": ("Row", {"input_is_parallel": True, "skip_bias_add": True}, {}),
    "row by sequence": ("Row", {"input_is_parallel": True, "skip_bias_add": False, "sequence_parallel": True}, {}),
}
IN, OUT, RANK, ALPHA = 8, 12, 3, 6.0


def tensors() -> dict[str, Tensor]:
    """Inputs (sequence, batch, in), weight, bias, factors and a gradient of outputs, float64, the same everywhere."""
    shapes = {"x": (4, 2, IN), "W": (OUT, IN), "b": (OUT,), "A": (RANK, IN), "B": (OUT, RANK), "G": (4, 2, OUT)}
    generator = torch.Generator().manual_seed(11)
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


def linears() -> dict[str, dict[str, Tensor]]:
    """Of every kind in ``LINEARS``: output, bias, and gradients, of all ranks together."""
    config = begin(params_dtype=torch.float64)
    return {name: _linear(config, *case) for name, case in LINEARS.items()}


def _linear(config: Any, kind: str, options: dict[str, Any], call: dict[str, Any]) -> dict[str, Tensor]:
    from megatron.core import tensor_parallel

    options = dict(options)
    by_sequence = options.pop("sequence_parallel", False) and dist.get_world_size() > 1
    config = replace(config, sequence_parallel=by_sequence)
    made = getattr(tensor_parallel, f"{kind}ParallelLinear")
    own: dict[str, Any] = {"config": config, "init_method": nn.init.normal_, "bias": True, "skip_bias_add": False}
    module = made(IN, OUT, **{**own, **options})
    lora = apply_lora(Holder(module), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["linear"]))
    (layer,) = lora.adapter_layers().values()
    how, given = layer.sharding, tensors()
    rows, columns = (how.kind == "column"), (how.kind == "row")
    with torch.no_grad():
        module.weight.copy_(_own(given["W"], 0 if rows else 1, how.pieces))
        module.bias.copy_(_own(given["b"], 0, how.pieces) if rows else given["b"])
    layer.set_factors_("default", given["A"], given["B"])
    x = given["x"]
    x = _own(x, 0) if how.takes == "sequence" else _own(x, -1) if how.takes == "features" else x
    x = x.clone().requires_grad_()
    out, bias = lora(x, **call)
    gives = {True: "whole", False: "features"}.get(call.get("runtime_gather_output"), how.gives)  # type: ignore[call-overload]
    G = given["G"]
    if gives == "features":
        G = _own(G, -1, how.pieces)
    elif gives == "sequence":
        G = _own(G, 0)
    out.backward(G)
    ends = {"whole": None, "features": -1, "sequence": 0}
    pairs = zip(layer.adapter_tensors("default").values(), how.factor_dims, strict=True)
    A, B = (gathered(how, parameter.grad, dim) for parameter, dim in pairs)
    found = {
        "y": _all(out.detach(), ends[gives], how.pieces),
        "x.grad": _all(x.grad, ends[how.takes]),
        "A.grad": A,
        "B.grad": B,
    }
    if bias is not None:
        found["bias"] = _all(bias.detach(), None if columns else 0, how.pieces)
    return found


def _own(whole: Tensor, dim: int, pieces: int = 1) -> Tensor:
    size, rank = dist.get_world_size(), dist.get_rank()
    return torch.cat([block.chunk(size, dim)[rank] for block in whole.chunk(pieces, dim)], dim)


def _all(part: Tensor, dim: int | None, pieces: int = 1) -> Tensor:
    if dim is None or dist.get_world_size() == 1:
        return part
    found = []
    for block in part.chunk(pieces, dim):
        every = [torch.empty_like(block.contiguous()) for _ in range(dist.get_world_size())]
        dist.all_gather(every, block.contiguous())
        found.append(torch.cat(every, dim))
    return torch.cat(found, dim)


def quantized_linears() -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Of linears with a bias: what a quantized one gives, and what one does that has its weight in float32."""
    from megatron.core import tensor_parallel

    config, found = begin(), {}
    for name in ("column", "column, bias left to others", "row", "row, bias left to others"):
        kind, options, _ = LINEARS[name]
        made = getattr(tensor_parallel, f"{kind}ParallelLinear")
        own: dict[str, Any] = {"config": config, "init_method": nn.init.normal_, "bias": True, "skip_bias_add": False}
        dense = made(64, 64, **{**own, **options}).requires_grad_(False)
        nn.init.normal_(dense.bias)
        quantized = quantize_(Holder(dense), quant_type="nf4", blocksize=32, target_modules=["linear"]).linear
        dense.weight.copy_(codec_for(quantized).read(quantized))
        x = torch.randn(4, 2, 64 if kind == "Column" else 64 // dist.get_world_size())
        found[name] = _of_call(quantized, x), _of_call(dense, x)
    return found


def _of_call(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    out, bias = module(x)
    out.sin().sum().backward()
    assert x.grad is not None
    return {"out": out.detach(), "x.grad": x.grad} | ({} if bias is None else {"bias": bias.detach()})
