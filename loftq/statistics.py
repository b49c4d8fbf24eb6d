"""Second moments E[x x^T] of the inputs of chosen modules, from forward hooks while a model reads text.

Sums are float32 on the inputs' device, one (in, in) matrix per distinct input: modules that are given the same
tensor, as q, k and v are, share one. Padding that an attention mask shows doesn't count. Embeddings, whose inputs
are token ids, have the tokens' frequencies as the diagonal of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.errors import ConfigError

# Gets a module's path and what it is called with.
Receiver = Callable[[str, Tensor], None]


class Moments:
    """A growing mean of x y^T over rows; ``matrix()`` is (in, in), or (in,) of the diagonal alone.

    Attributes:
        count: rows so far.
    """

    def __init__(self, *, diagonal: bool = False) -> None:
        self.diagonal, self.count = diagonal, 0
        self._sum: Tensor | None = None

    def add(self, rows: Tensor, others: Tensor | None = None) -> None:
        """Take in ``rows`` (n, in) as x, and ``others`` as y (default: the same)."""
        rows = rows.float()
        others = rows if others is None else others.float()
        new = (rows * others).sum(0) if self.diagonal else rows.T @ others
        self._sum = new if self._sum is None else self._sum.add_(new)
        self.count += len(rows)

    def add_tokens(self, ids: Tensor, vocabulary: int) -> None:
        """Take in token ids (n,) as one-hot rows; for a diagonal."""
        new = torch.bincount(ids, minlength=vocabulary).float()
        self._sum = new if self._sum is None else self._sum.add_(new)
        self.count += len(ids)

    def matrix(self, path: str = "statistics") -> Tensor | None:
        """The mean; None if no row came.

        Raises:
            ConfigError: an input held a NaN or infinity; names ``path``.
        """
        if self._sum is None or not self.count:
            return None
        if not self._sum.isfinite().all():
            raise ConfigError(
                f"{path}: expected finite inputs from the calibration text, found NaN, infinity or squares beyond "
                "float32; run the model in bfloat16 or float32, and check that its weights are whole"
            )
        return self._sum / self.count


@contextmanager
def inputs_of(model: nn.Module, paths: Iterable[str], receive: Receiver) -> Iterator[None]:
    """Inside the block, each call of a module of ``paths`` first hands its input to ``receive``."""
    with ExitStack() as stack:
        for path in paths:

            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
                receive(path, args[0] if args else next(iter(kwargs.values())))

            handle = model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def rows_of(value: Tensor, mask: Tensor | None) -> Tensor:
    """An input (..., in) as rows (n, in), or token ids (n,), without those that ``mask`` (batch, tokens) hides."""
    lead = value.shape if not value.is_floating_point() else value.shape[:-1]
    rows = value.detach().reshape(-1, *value.shape[len(lead) :])
    if mask is not None and tuple(mask.shape) == tuple(lead):
        rows = rows[mask.reshape(-1).to(rows.device) != 0]
    return rows


class Collector:
    """Receives inputs and keeps moments per distinct input.

    Args:
        paths: of the modules that statistics are wanted of, in any order.
        diagonal: keep the diagonals alone.
        shared: modules given the same tensor share one matrix; turned off where sharing was seen to break.
        widths: vocabulary sizes of those that are embeddings.
    """

    def __init__(
        self,
        paths: Iterable[str],
        *,
        diagonal: bool = False,
        shared: bool = True,
        widths: Mapping[str, int] | None = None,
    ) -> None:
        self.paths, self.diagonal, self.shared = list(paths), diagonal, shared
        self.widths = dict(widths or {})
        self.leaders: dict[str, str] = {}
        self.moments: dict[str, Moments] = {}
        self.broken = False
        self.mask: Tensor | None = None
        self._seen: list[tuple[Tensor, int, str]] = []

    def begin(self, mask: Tensor | None) -> None:
        """A forward of another batch comes; ``mask`` (batch, tokens) is 0 where padding is."""
        self.mask, self._seen = mask, []

    def end(self) -> None:
        """The forward is over."""
        self._seen = []

    def __call__(self, path: str, value: Tensor) -> None:
        # In-place changes between two calls would make one tensor two inputs; they show in the version.
        first = next((p for t, version, p in self._seen if t is value and version == value._version), None)
        if first is None:
            first = path
            self._seen.append((value, value._version, path))
        leader = first if self.shared else path
        if self.leaders.setdefault(path, leader) != leader:
            self.broken = True
        if leader == path:
            moments = self.moments.setdefault(path, Moments(diagonal=self.diagonal or path in self.widths))
            rows = rows_of(value, self.mask)
            if path in self.widths:
                moments.add_tokens(rows, self.widths[path])
            else:
                moments.add(rows)

    def found(self) -> dict[str, Moments]:
        """The moments of every module that was called, shared ones as the same object."""
        return {path: self.moments[leader] for path, leader in self.leaders.items() if leader in self.moments}


@torch.no_grad()
def collect_statistics(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], paths: Iterable[str], *, diagonal: bool = False
) -> dict[str, Tensor]:
    """E[x x^T] of the inputs of the modules at ``paths``, in one pass.

    Args:
        model: called as ``model(**batch)``, in evaluation mode meanwhile.
        batches: dictionaries of tensors on the model's device; ``attention_mask`` tells padding.
        diagonal: only the mean squares, (in,).

    Returns:
        float32 (in, in) or (in,) by path, the same tensor for modules with one input; modules that were never called
        are absent. All stay in memory: ``loftq.calibrate`` walks through a large model block by block instead.

    Raises:
        ConfigError: an input isn't finite; names the module.
    """
    paths, batches = list(paths), list(batches)
    widths = vocabularies(model, paths)
    was_training = model.training
    model.eval()
    try:
        for shared in (True, False):
            collector = Collector(paths, diagonal=diagonal, shared=shared, widths=widths)
            with inputs_of(model, paths, collector):
                for batch in batches:
                    collector.begin(batch.get("attention_mask"))
                    model(**batch)
                    collector.end()
            if not collector.broken:
                break
    finally:
        model.train(was_training)
    means: dict[int, Tensor | None] = {}
    result = {}
    for path, moments in collector.found().items():
        if id(moments) not in means:
            means[id(moments)] = moments.matrix(path)
        mean = means[id(moments)]
        if mean is not None:
            result[path] = mean
    return result


def vocabularies(model: nn.Module, paths: Iterable[str]) -> dict[str, int]:
    """The number of rows of those modules at ``paths`` that are embeddings."""
    from qlora_kit.targets import base_of

    found = {path: base_of(model.get_submodule(path)) for path in paths}
    return {path: module.num_embeddings for path, module in found.items() if isinstance(module, nn.Embedding)}
