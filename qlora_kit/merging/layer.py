"""One layer at a time: its float32 weight, the deltas added to it, and the result in the storage that is asked for.

Every change leaves its undoing behind: what was stored goes to the disk first, and the memory of what has been replaced
is freed at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.spill import Spill, set_data_
from ..codecs import Codec, codec_for, find_codec
from ..codecs.dense import dense_linear
from ..codecs.quantized import Quantizer
from ..errors import CodecError, ConfigError, MergeError
from ..injection.engine import Injection, swap_, with_hooks_of
from ..layers import AdapterLayer, sharding_of
from ..layers.sharded.together import all_or_none
from ..lowrank import add_product_
from ..naming import Tree, every_module
from ..training.preparation.quantize import linear_holding
from .base_choice import base_weight, grid_of
from .fidelity import LayerFidelity, check_finite, checked_cast, compare, norms_of
from .requantize import Grid, Rounded, rounded
from .task import MergeTask

Factors = tuple[Tensor, Tensor]


class Merger:
    """Merges the layers of one model as a task says.

    Args:
        root: the model, adapter layers inside.
        paths: of its tree, without the modules in that, whose memory is to be freed one by one.
        original: the folder of the weights to add to; None adds to the dequantized ones.
        moments: second moments of inputs, by path.
        dense: paths of modules that few bits would break, as their weights are read past them; these aren't quantized.

    Attributes:
        rounded: paths of the modules that were rounded to few bits.
        residuals: A and B of what stays beside them, by path.
    """

    def __init__(
        self,
        root: nn.Module,
        paths: Mapping[int, list[str]],
        task: MergeTask,
        original: Path | None,
        moments: Mapping[str, Tensor],
        spill: Spill,
        undo: Injection,
        dense: Set[str] = frozenset(),
    ) -> None:
        self.root, self.task, self.original, self.moments = root, task, original, moments
        self.spill, self.undo, self.dense = spill, undo, dense
        self.rounded: set[str] = set()
        self.residuals: dict[str, Factors] = {}
        self._paths = paths
        self._holders: dict[int, int] = {}
        for module in every_module(root):
            for parameter in module._parameters.values():
                self._holders[id(parameter)] = self._holders.get(id(parameter), 0) + 1

    @torch.no_grad()
    def adapted(self, path: str, layer: AdapterLayer) -> list[LayerFidelity]:
        """Merge into ``layer``'s base and put that in its place; the account, if there was anything to merge."""
        base, codec = layer.base_layer, layer.codec
        if not any(name in layer.r for name in self.task.parts):
            self._put(layer, base)
            return []
        self._separate(codec, base)
        delta, sharding = layer.stacked(self.task.parts), sharding_of(base)
        measured = self._measured(path, layer)
        try:
            with nullcontext() if sharding is None else all_or_none(base):
                if self.task.dtype is None and self.original is None and not measured:
                    self._keep(codec, base)
                    codec.add_(base, *delta)
                    self._put(layer, base)
                    return []
                weight, base_error, norms = self._ideal(path, codec, base, delta, measured)
                module, residual = self._stored(path, codec, base, weight, delta, linear=layer.family == "linear")
        except (CodecError, ConfigError) as error:
            raise MergeError(f"{path}: {error} (no layer was changed)") from error
        if norms is None:
            self._put(layer, module)
            return []
        kept_by = codec_for(module, path)
        account = compare(
            path,
            kept_by.name,
            weight,
            delta,
            norms,
            kept_by.pieces(module),
            residual,
            base_error,
            self.moments.get(path),
            sharding,
        )
        self._put(layer, module)
        return [account]

    def _ideal(
        self, path: str, codec: Codec, base: nn.Module, delta: Factors, measured: bool
    ) -> tuple[Tensor, float | None, dict[str, float] | None]:
        """The ideal merged weight, float32 (out, in); how far the base was from the original; and the norms of both
        parts, if ``measured``. Whether the sum is finite is asked where it is stored, once."""
        if self.original is None and not measured:
            return codec.plus(base, *delta), None, None
        weight, base_error = base_weight(path, codec, base, self.original)
        norms = norms_of(weight, *delta) if measured else None
        return add_product_(weight, *delta), base_error, norms

    def _measured(self, path: str, layer: AdapterLayer) -> bool:
        return self.task.account or self.task.rounds(layer, stays_dense=path in self.dense)

    @torch.no_grad()
    def others(self) -> None:
        """Bring the modules that nothing was merged into to the storage asked for, once no adapter layer is left."""
        if self.task.into == "same":
            return
        tree = Tree(self.root)
        self._paths = tree.paths
        for path, module in tree.firsts():
            codec = find_codec(module)
            if codec is None or path in self.rounded:
                continue
            own = codec.quantizer(module)
            if self.task.dtype is not None:
                if own is not None and self.original is not None:
                    weight, _ = base_weight(path, codec, module, self.original)
                    dense: nn.Module = dense_linear(module, weight, self.task.dtype)  # type: ignore[arg-type]
                else:
                    dense = codec.dense_like(module, self.task.dtype)
                if dense is not module:
                    check_finite(path, dense.weight)  # type: ignore[arg-type]
                    self._release(codec, module)
                    self._put(module, with_hooks_of(module, dense))
            elif own is not None and own != self.task.target(own, linear=True):
                weight, _ = base_weight(path, codec, module, self.original)
                self._put(module, self._stored(path, codec, module, weight, None, linear=True)[0])

    def _stored(
        self, path: str, codec: Codec, base: nn.Module, ideal: Tensor, delta: Factors | None, *, linear: bool
    ) -> tuple[nn.Module, Factors | None]:
        """A module that holds float32 (out, in) ``ideal`` in the storage asked for, and the branch beside it; ``delta``
        is what was added to the base."""
        own = codec.quantizer(base)
        target = self.task.target(own, linear=linear and (own is not None or path not in self.dense))
        if target is None:
            return self._dense(codec, base, ideal), None
        self.rounded.add(path)
        if target == own and self.task.rounding == "nearest" and not self.task.residual_rank:
            self._exchange(codec, base, ideal)
            return base, None
        grid = grid_of(codec, base, target, delta, self.original)
        if target != own:
            self._release(codec, base)
        found = self._rounded(path, ideal, target, grid)
        residual = None if found.residual is None else self._beside(path, found.residual)
        if target == own:
            self._keep(codec, base)
            codec.take_(base, found.quantized)
            return base, residual
        return with_hooks_of(base, linear_holding(base, found.quantized)), residual

    def _beside(self, path: str, factors: Factors) -> Factors:
        """Note that ``factors`` stay beside the module at ``path``; what they are in the dtype they are kept in."""
        dtype = self.task.residual_dtype or torch.float32
        A, B = (checked_cast(f"{path}: a residual factor", factor, dtype) for factor in factors)
        self.residuals[path] = A, B
        return A.float(), B.float()

    def _rounded(self, path: str, ideal: Tensor, target: Quantizer, grid: Grid | None) -> Rounded:
        task = self.task
        check_finite(path, ideal)
        try:
            return rounded(ideal, target, task.rounding, self.moments.get(path), task.residual_rank, grid)
        except ConfigError as error:
            raise MergeError(f"{path}: {error} (no layer was changed)") from error

    def _dense(self, codec: Codec, base: nn.Module, ideal: Tensor) -> nn.Module:
        dtype = self.task.dtype
        if dtype is None or type(codec).dense_like is Codec.dense_like:
            if dtype is None:
                self._exchange(codec, base, ideal)
            else:
                self._recast(base, dtype)
                codec.write_(base, ideal)
            return base
        if codec.quantizer(base) is not None and isinstance(base, nn.Linear):
            self._release(codec, base)
            dense: nn.Module = dense_linear(base, torch.empty_like(ideal, dtype=dtype), dtype)
        else:
            dense = codec.dense_like(base, dtype)
            self._release(codec, base)
        codec_for(dense).write_(dense, ideal)
        return with_hooks_of(base, dense)

    def _recast(self, base: nn.Module, dtype: torch.dtype) -> None:
        """Give a dense module tensors of ``dtype``, the weight's to be filled."""
        for name, tensor in base.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor) and tensor.is_floating_point():  # some keep other things in their state
                before = self.spill.keep(tensor.data)
                self.undo.on_undo(partial(set_data_, tensor, before))
                if name != "weight":
                    tensor.data = checked_cast(name, tensor, dtype)
                elif tensor.dtype != dtype:
                    like = tensor.data.to("meta")  # its strides; the memory is freed before it is taken again
                    tensor.data = tensor.data.new_empty(0)
                    tensor.data = torch.empty_like(like, dtype=dtype, device=tensor.device)

    def _separate(self, codec: Codec, base: nn.Module) -> None:
        """Give ``base`` a weight of its own where another module holds it too: the deltas are for ``base`` alone."""
        shared: Any = base._parameters.get("weight")
        if shared is not None and self._holders[id(shared)] > 1 and codec.quantizer(base) is None:
            own = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
            self.undo.on_undo(partial(setattr, base, "weight", shared))
            base.weight = own
            self._holders[id(shared)] -= 1
            self._holders[id(own)] = 1

    def _keep(self, codec: Codec, base: nn.Module) -> None:
        """Note what ``base`` stores, to be put back on an error."""
        before = self.spill.keep(codec.contents(base))
        self.undo.on_undo(lambda: codec.restore_(base, before()))

    def _exchange(self, codec: Codec, base: nn.Module, weight: Tensor) -> None:
        """Have ``base`` store ``weight``; what it stored is put back on an error."""
        self._keep(codec, base)
        codec.write_(base, weight)

    def _release(self, codec: Codec, base: nn.Module) -> None:
        """Free the memory of a module that is being replaced, unless its weight is another module's too."""
        if self._holders.get(id(base.weight), 0) != 1:
            return
        if codec.quantizer(base) is not None:
            self._keep(codec, base)
            codec.release_(base)
        elif type(codec).dense_like is Codec.dense_like:
            weight: Any = base.weight
            before = self.spill.keep(weight.data)
            self.undo.on_undo(partial(set_data_, weight, before))
            weight.data = weight.data.new_empty(0)

    def _put(self, old: nn.Module, new: nn.Module) -> None:
        for path in self._paths[id(old)]:
            swap_(self.root, path, new, self.undo, of=old)
