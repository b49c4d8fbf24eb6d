"""Adapters on parts of fused linears as adapters on these, for a merge: what is stored, rounded and accounted for is
the fused weight.

Adapters s_i B_i A_i on rows of one matrix are one adapter on it: A is theirs on top of each other, and B has each B_i
in its part's rows and its own columns, zeros elsewhere. Nothing is lost, and the rank is that of all of them together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..injection.adapted import Adapted
from ..layers import layer_family_for
from ..layers.sharded.megatron.linear import MegatronLinear
from ..layers.sharded.megatron.parts import FusedLinear
from ..layers.sharded.parts import gathered
from ..naming import canonical, every_module


@contextmanager
def folded_parts(adapted: Adapted) -> Iterator[None]:
    """In the block, and after it, adapters on parts of fused linears are on these; on an error they are as before."""
    undo: list[Callable[[], None]] = []
    aside = dict(adapted.set_aside)
    undo.append(lambda: setattr(adapted, "set_aside", aside))
    try:
        opened = any(type(module) is FusedLinear for module in every_module(adapted.root))
        for path, parent in list(adapted.root.named_modules()) if opened else ():
            for child, module in list(parent._modules.items()):
                if isinstance(module, FusedLinear) and any(True for _ in module.adapters()):
                    undo.append(_fold_(adapted, canonical(f"{path}.{child}".lstrip(".")), parent, child, module))
        yield
    except BaseException:
        for step in reversed(undo):
            step()
        raise


def _fold_(adapted: Adapted, path: str, parent: nn.Module, child: str, fused: FusedLinear) -> Callable[[], None]:
    """Put one layer in the place of ``fused``; the way back."""
    parts = list(fused.adapters())
    merged = [(part, list(part.merged_adapters)) for part in parts]
    for part, _ in reversed(merged):
        part.unmerge_()
    layer = folded(fused)
    parent._modules[child] = layer
    again = list(dict.fromkeys(name for _, names in merged for name in names))
    if again:
        layer.merge_(again)
    own = {name for part in fused.parts for name in adapted.set_aside.pop(f"{path}.{part}", ())}
    if own:
        adapted.set_aside[path] = sorted(own)

    def back() -> None:
        layer.unmerge_()
        parent._modules[child] = fused
        for part, names in merged:
            part.merge_(names)

    return back


@torch.no_grad()
def folded(fused: FusedLinear) -> MegatronLinear:
    """One layer over the whole of ``fused`` with all that its parts' adapters add."""
    base, parts = fused.base_layer, list(fused.adapters())
    layer = layer_family_for(base)(base)
    assert isinstance(layer, MegatronLinear)
    first = parts[0]
    for name in dict.fromkeys(name for part in parts for name in part.r):
        A, B = factors_of_parts([part for part in parts if name in part.r], name, layer.codec.shape(base)[0])
        whole = gathered(layer.sharding, B, 0, layer.sharding.shape[0])
        layer.add_adapter(name, A, whole.clone(), alpha=float(len(A)))
        layer.set_requires_grad([name], any(p.requires_grad for p in first.parameters()))
    layer.active_adapters, layer.disable_adapters = list(first.active_adapters), first.disable_adapters
    return layer


def factors_of_parts(parts: list[MegatronLinear], name: str, rows: int) -> tuple[Tensor, Tensor]:
    """A (sum of ranks, in) and this process's B (rows, sum of ranks): B A is what ``name`` adds in all of ``parts``."""
    pairs = [part.factors(name) for part in parts]
    A = torch.cat([A.detach() for A, _ in pairs])
    B = A.new_zeros(rows, len(A))
    begin = 0
    for part, (own, factor) in zip(parts, pairs, strict=True):
        columns = torch.arange(begin, begin + len(own), device=B.device)
        B[part.base_layer.rows.to(B.device)[:, None], columns] = factor.detach() * part.scaling[name]
        begin += len(own)
    return A, B
