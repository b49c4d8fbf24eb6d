"""Second moments E[x x^T] of the inputs of chosen modules, from forward hooks while a model reads text.

Sums are float32 on the inputs' device, one (in, in) matrix per distinct input: modules that are given the same
tensor, as q, k and v are, share one. Padding that an attention mask shows doesn't count. Embeddings, whose inputs
are token ids, have the tokens' frequencies as the diagonal of theirs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qlora_kit.distributed.team import ALONE, Growing, Team
from qlora_kit.errors import ConfigError
from qlora_kit.merging.agreement import evaluating
from qlora_kit.naming import base_of, module_at

from .caches import cacheless, uncached

# Gets a module's path and what it is called with.
Receiver = Callable[[str, Any], None]
G = TypeVar("G", bound=Growing)


class Moments:
    """A growing mean of x y^T over rows; ``matrix()`` is (in, in), or (in,) of the diagonal alone.

    Args:
        apart: don't add up: another will ``take`` the summands, to add them to what came before.

    Attributes:
        count: rows so far.
    """

    def __init__(self, *, diagonal: bool = False, apart: bool = False) -> None:
        self.diagonal, self.count = diagonal, 0
        self._sum: Tensor | None = None
        self._summands: list[tuple[Tensor, int]] | None = [] if apart else None

    def take(self, part: Moments) -> None:
        """Take in the summands of ``part`` one after the other: the sum is the one of all rows given to this."""
        for new, count in part._summands or ():
            self._take(new.clone() if self._sum is None else new.to(self._sum.device), count)

    def add(self, rows: Tensor, others: Tensor | None = None, *, part: Moments | None = None) -> None:
        """Take in ``rows`` (n, in) as x, and ``others`` as y (default: the same); and ``part`` takes them in too."""
        rows = rows.float()
        others = rows if others is None else others.float()
        new = (rows * others).sum(0) if self.diagonal else rows.T @ others
        if part is not None:
            part._take(new.clone() if part._sum is None and part._summands is None else new, len(rows))
        self._take(new, len(rows))

    def add_tokens(self, ids: Tensor, vocabulary: int) -> None:
        """Take in token ids (n,) as one-hot rows; for a diagonal."""
        self._take(torch.bincount(ids, minlength=vocabulary).float(), len(ids))

    def _take(self, new: Tensor, count: int) -> None:
        if self._summands is not None:
            self._summands.append((new, count))
            return
        self._sum = new if self._sum is None else self._sum.add_(new)
        self.count += count

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
def watchable(model: nn.Module) -> Iterator[None]:
    """Inside the block ``model`` is in evaluation mode and makes no caches, and what of it is compiled runs uncompiled:
    hooks come and go, for which compiled code doesn't look once it is there."""
    compiling = "torch._dynamo" in sys.modules  # else nothing is compiled, and importing it takes a second
    eager = torch.compiler.set_stance("force_eager") if compiling else nullcontext()
    with evaluating(model), cacheless(model), eager:
        yield


@contextmanager
def inputs_of(model: nn.Module, paths: Iterable[str], receive: Receiver) -> Iterator[None]:
    """Inside the block, each call of a module of ``paths`` first hands its input to ``receive``."""
    with ExitStack() as stack:
        for path in paths:

            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
                receive(path, args[0] if args else next(iter(kwargs.values()), None))

            handle = module_at(model, path).register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def rows_of(value: Tensor, mask: Tensor | None) -> Tensor:
    """An input (..., in) as rows (n, in), or token ids (n,), without those that ``mask`` (batch, tokens) hides.

    Routers and some feed-forward layers are given all tokens in one row of them, which the mask fits as well.
    """
    lead = value.shape if not value.is_floating_point() else value.shape[:-1]
    rows = value.detach().reshape(-1, *value.shape[len(lead) :])
    if mask is not None and tuple(lead) in (tuple(mask.shape), (mask.numel(),)):
        rows = rows[mask.reshape(-1).to(rows.device) != 0]
    return rows


class Collector:
    """Receives inputs and keeps moments per distinct input.

    Args:
        paths: of the modules that statistics are wanted of, in any order.
        diagonal: keep the diagonals alone.
        shared: modules given the same tensor share one matrix; turned off where sharing was seen to break.
        widths: vocabulary sizes of those that are embeddings.
        apart: of one batch alone, for another to ``take``.
    """

    def __init__(
        self,
        paths: Iterable[str],
        *,
        diagonal: bool = False,
        shared: bool = True,
        widths: Mapping[str, int] | None = None,
        apart: bool = False,
    ) -> None:
        self.paths, self.diagonal, self.shared, self.apart = list(paths), diagonal, shared, apart
        self.widths = dict(widths or {})
        self.leaders: dict[str, str] = {}
        self.moments: dict[str, Moments] = {}
        self.mask: Tensor | None = None
        self._seen: list[tuple[Tensor, int, int | None, str]] = []
        # By path, the distinct inputs that it was given, as numbers.
        self._given: dict[str, list[int]] = {}
        self._moved, self._distinct = False, 0

    def begin(self, mask: Tensor | None) -> None:
        """A forward of another batch comes; ``mask`` (batch, tokens) is 0 where padding is."""
        self.mask = mask

    def end(self) -> None:
        """The forward is over."""
        self._distinct += len(self._seen)
        self._seen = []

    def take(self, part: Collector) -> None:
        """Take in the batch of ``part``, as if it had been given to this."""
        for path, given in part._given.items():
            self._given.setdefault(path, []).extend(self._distinct + number for number in given)
        for path, leader in part.leaders.items():
            self._moved |= self.leaders.setdefault(path, leader) != leader
        for path, moments in part.moments.items():
            self.moments.setdefault(path, Moments(diagonal=moments.diagonal)).take(moments)
        self._moved |= part._moved
        self._distinct += part._distinct

    @property
    def broken(self) -> bool:
        """Whether modules that were to share a matrix had different inputs: one was called without the other, say."""
        return self._moved or any(self._given[path] != self._given[leader] for path, leader in self.leaders.items())

    def __call__(self, path: str, value: Tensor) -> None:
        # In-place changes between two calls would make one tensor two inputs; they show in the version. Token ids
        # are as many inputs as there are vocabularies.
        width = self.widths.get(path)
        same = (k for k, (t, *rest, _) in enumerate(self._seen) if t is value and rest == [value._version, width])
        number = next(same, len(self._seen))
        if number == len(self._seen):
            self._seen.append((value, value._version, width, path))
        leader = self._seen[number][-1] if self.shared else path
        self._given.setdefault(path, []).append(self._distinct + number)
        if self.leaders.setdefault(path, leader) != leader:
            self._moved = True
        if leader == path:
            diagonal = self.diagonal or path in self.widths
            moments = self.moments.setdefault(path, Moments(diagonal=diagonal, apart=self.apart))
            rows = rows_of(value, self.mask)
            if path in self.widths:
                moments.add_tokens(rows, self.widths[path])
            else:
                moments.add(rows)

    def means(self) -> dict[str, tuple[Tensor, int]]:
        """The mean, and of how many inputs, for every module that got any; shared ones as the same tensor.

        Raises:
            ConfigError: an input isn't finite; names the module.
        """
        own = {path: (moments.matrix(path), moments.count) for path, moments in self.moments.items()}
        found = {path: own[leader] for path, leader in self.leaders.items()}
        return {path: (mean, count) for path, (mean, count) in found.items() if mean is not None}


def in_turn(team: Team, count: int, through: Callable[[int, G], None], make: Callable[[bool], G]) -> G:
    """What ``through(i, it)`` has given to one that ``make`` makes, for each batch i in their order.

    In a team each process does its own batches, and the sums go from one to the next: they are those of one process.

    Args:
        make: told whether it is of a single batch, for another to take.
    """
    if team.size == 1:
        whole = make(False)
        for number in range(count):
            through(number, whole)
        return whole

    def part(number: int) -> G:
        through(number, one := make(True))
        return one

    return team.summed(count, part, make(False))


def gather(
    through: Callable[[int, Collector], None], count: int, paths: Iterable[str], *, team: Team = ALONE, **options: Any
) -> Collector:
    """A collector of ``paths`` to which ``through`` has handed the inputs; a second time where sharing broke.

    Args:
        through: hands the inputs of one of the ``count`` batches over, and may be called again.
        options: of the ``Collector``.
    """
    paths = list(paths)
    for shared in (True, False):

        def make(apart: bool, shared: bool = shared) -> Collector:
            return Collector(paths, shared=shared, apart=apart, **options)

        collector = in_turn(team, count, through, make)
        if not collector.broken:
            break
    return collector


@torch.no_grad()
def collect_statistics(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], paths: Iterable[str], *, diagonal: bool = False
) -> dict[str, Tensor]:
    """E[x x^T] of the inputs of the modules at ``paths``, in one pass.

    Args:
        model: called as ``model(**batch)``, in evaluation mode meanwhile.
        batches: dictionaries of tensors on the model's device; ``attention_mask`` tells padding. Each is a text on its
            own: no cache is made, whatever they say of it.
        diagonal: only the mean squares, (in,).

    Returns:
        float32 (in, in) or (in,) by path, the same tensor for modules with one input; modules that were never called
        are absent. All stay in memory: ``loftq.inputs.groups`` walks through a large model block by block instead.

    Raises:
        ConfigError: an input isn't finite; names the module. A batch brings a cache along.
    """
    found = counted_statistics(model, batches, paths, diagonal=diagonal)
    return {path: mean for path, (mean, _) in found.items()}


def counted_statistics(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    paths: Iterable[str],
    *,
    diagonal: bool = False,
    team: Team = ALONE,
) -> dict[str, tuple[Tensor, int]]:
    """``collect_statistics``, and of how many inputs each mean is; on every process of a ``team``, which shares the
    batches."""
    paths, batches = list(paths), [uncached(model, batch) for batch in batches]
    widths = vocabularies(model, paths)

    def through(number: int, collector: Collector) -> None:
        with inputs_of(model, paths, collector):
            collector.begin(batches[number].get("attention_mask"))
            model(**batches[number])
            collector.end()

    with watchable(model):
        return gather(through, len(batches), paths, team=team, diagonal=diagonal, widths=widths).means()


def vocabularies(model: nn.Module, paths: Iterable[str]) -> dict[str, int]:
    """The number of rows of those modules at ``paths`` that are embeddings."""
    found = {path: base_of(module_at(model, path)) for path in paths}
    return {path: module.num_embeddings for path, module in found.items() if isinstance(module, nn.Embedding)}
