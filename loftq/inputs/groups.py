"""Statistics for one group of modules after the other, in the order of the model's forward.

Two ways. Plainly, every module's inputs are those of the original model, and one forward per batch gives all of a
block's statistics. Sequentially, two copies of each batch go through the model, x as before and x^ with what the
modules so far have become; within a block too, the modules are done in turns, each group that shares an input after
the groups before it. What a group is given is looked at in a forward of the block that ends where that is seen.

What a module has become is given as D = Q + sBA - W, and the model itself isn't touched, and may lie in memory or be
read from files while it runs.

Two rows of text go ahead, to see which blocks a forward enters and what modules add their outputs to. What is called
more than once there, as in models that share layers, comes last, with the original model's inputs of all calls: at a
first call nothing is known of the later ones.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.distributed.team import ALONE, Team
from qlora_kit.naming import Tree, module_at

from ..methods.factors import Factors
from ..methods.halves import Half
from .additions import additions_in
from .batches import in_parts
from .caches import uncached
from .moments import (
    Collector,
    counted_statistics,
    gather,
    in_turn,
    inputs_of,
    vocabularies,
    watchable,
)
from .one_block import Here, Source, given, given_originally, groups_of
from .pairs import Pairs
from .replaced import Replaced
from .walk import Walk, stops_for

# Rows that go ahead: it takes two to tell how inputs are ordered, see ``additions``.
_AHEAD = 2


@dataclass(frozen=True)
class Seen:
    """What is known of a module's inputs.

    Attributes:
        statistics: float32 E[x x^T] (in, in) or its diagonal (in,), of the quantized model's inputs if sequential.
        cross: E[x x^^T] if sequential.
        tokens: how many inputs there were.
        factors: made of these moments, for all modules that are given the same inputs; None where it is one module.
        half: the same moments of the first half of the batches, with ``cross``, where these and the others had inputs.
        shortfall: float32 (out, in) E[(h - h^) x^^T], with what the output is added to, h in the original model, if
            sequential; None where there is no such stream, or none is known.
    """

    statistics: Tensor
    cross: Tensor | None
    tokens: int
    factors: Factors | None = field(default=None, repr=False, compare=False)
    half: Half | None = field(default=None, repr=False, compare=False)
    shortfall: Tensor | None = field(default=None, repr=False, compare=False)


@dataclass
class Stage:
    """Modules whose turn it is.

    Attributes:
        paths: of them.
        replaced: to be filled in, where sequential: D = Q + sBA - W, float32 (out, in), by path.
    """

    paths: list[str]
    replaced: dict[str, Tensor] = field(default_factory=dict)
    _collect: Any = None
    _seen: dict[str, Seen] | None = None

    @torch.no_grad()
    def seen(self) -> dict[str, Seen]:
        """By path; a module that no token reached is absent. Collected when first asked for, shared among paths.

        Raises:
            RuntimeError: not asked for before the next stage was.
        """
        if self._seen is None:
            if self._collect is None:
                raise RuntimeError(
                    f"stage of {self.paths[0]}: the model has gone on; call seen() before the next stage"
                )
            self._seen = self._collect()
        return self._seen


@torch.no_grad()
def stages(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    paths: Iterable[str],
    *,
    diagonal: bool = False,
    sequential: bool = False,
    limit: int = 1 << 30,
    folder: Path | None = None,
    staying: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    team: Team = ALONE,
) -> Generator[Stage]:
    """The modules at ``paths`` in the order in which a forward comes to them; those that it never does don't come.

    Args:
        model: called as ``model(**batch)``, in evaluation mode meanwhile; computed on wherever its hooks say.
        diagonal: the diagonals are enough; not for ``sequential``.
        sequential: see the module's text.
        limit: bytes of activations between blocks that stay in memory; more goes to files.
        folder: for those files; None is the system's folder for temporary ones.
        staying: a context in which the module at that path is computed many times, and nothing else is.
        team: shares the batches: each process has the model and walks with its own, and all come to the same stages at
            the same time, to ask for what is seen there, or not to, and to fill in the same replacements.

    Raises:
        ConfigError: an input isn't finite; names the module. A batch brings a cache along.
    """
    paths, batches = list(paths), [uncached(model, batch) for batch in batches]
    widths = vocabularies(model, paths)
    with watchable(model), ExitStack() as stack:
        stops, repeated, streams = _scouted(model, batches, paths, sequential)
        room = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        share = limit // (2 if sequential else 1)
        own: dict[str, Any] = {"limit": share, "folder": room, "numbers": team.numbers(len(batches))}
        walk = stack.enter_context(Walk(model, batches, stops, **own))
        other = stack.enter_context(Walk(model, batches, stops, **own)) if sequential else None
        done: set[str] = set()
        while len(done) < len(stops) and (place := _first(walk, team)) is not None:
            first, stop = place
            runs = {run.index: run for run in walk.runs_at(stop)}
            done.add(stop)
            for each in (other, walk):  # the later wrapped the module's forward around the earlier's
                if each is not None:
                    each.arrive(stop)
            last = len(done) == len(stops)
            with staying(stop):
                here = Here(team, len(batches), first, walk, runs, stops[stop], streams, widths, last)
                yield from _plainly(here, diagonal) if other is None else _in_turns(here, other)
    if repeated:

        def collect() -> dict[str, Seen]:
            return _all_seen(counted_statistics(model, batches, repeated, diagonal=diagonal, team=team))

        yield from _turn(Stage(repeated, _collect=collect))


def _turn(stage: Stage) -> Iterator[Stage]:
    """``stage``, which can't be asked afterwards."""
    yield stage
    stage._collect = None


def _scouted(
    model: nn.Module, batches: list[Mapping[str, Any]], paths: list[str], sequential: bool
) -> tuple[dict[str, list[str]], list[str], dict[str, str]]:
    """Where to stop for which of ``paths``, those of them that are called more than once in a forward, and, if
    ``sequential``, the streams that outputs are added to.

    A block whose parts are called without itself is no place to stop; its modules are their own. Of a module that
    several blocks share, which calls it more than once, none sees all calls.
    """
    stops, tree = stops_for(model, paths), Tree(model)
    calls: Counter[str] = Counter()
    count = inputs_of(model, {*stops, *paths}, lambda path, _: calls.update([path]))
    with count, additions_in(model, stops if sequential else {}) as streams:
        for batch in batches[:1]:
            model(**in_parts(batch, _AHEAD)[0])
    entered = {stop: own for stop, own in stops.items() if calls[stop] or not any(calls[path] for path in own)}
    entered |= {path: [path] for stop, own in stops.items() if stop not in entered for path in own}
    several = {path: tree.paths_of(module_at(model, path)) for path in paths if calls[path] > 1}
    shared = {path for path, everywhere in several.items() if len(stops_for(model, everywhere)) > 1}
    again = [path for stop, own in entered.items() for path in own if calls[stop] > 1 or path in shared]
    once = {stop: [path for path in own if path not in again] for stop, own in entered.items()}
    return {stop: own for stop, own in once.items() if own}, again, streams


def _all_seen(means: Mapping[str, tuple[Tensor, int]]) -> dict[str, Seen]:
    """Of the original model's inputs; modules with the same tensor of moments share what is made of it."""
    groups = Counter(id(mean) for mean, _ in means.values())
    shared = {number: Factors() if count > 1 else None for number, count in groups.items()}
    return {path: Seen(mean, None, count, shared[id(mean)]) for path, (mean, count) in means.items()}


def _first(walk: Walk, team: Team) -> tuple[int, str] | None:
    """The first of all processes' unfinished runs, and where it stands."""
    here = walk.here()
    places = team.gathered(None if here is None else (here[1][0].index, here[0]))
    return min((place for place in places if place is not None), default=None)


def _plainly(here: Here, diagonal: bool) -> Iterator[Stage]:
    """One stage of all modules; the pass that collects is the one that the runs go on from."""
    walk, runs = here.walk, here.runs

    def through(number: int, collector: Collector) -> None:
        if (run := runs.get(number)) is not None:
            with inputs_of(walk.model, here.paths, collector):
                collector.begin(run.mask)
                run.forward(keep=not here.last)
                collector.end()

    def collect() -> dict[str, Seen]:
        found = gather(through, here.count, here.paths, team=here.team, diagonal=diagonal, widths=here.widths)
        return _all_seen(found.means())

    yield from _turn(Stage(here.paths, _collect=collect))
    for run in () if here.last else runs.values():
        walk.go_on(run, run.forward() if run.kept is None else run.kept)


def _in_turns(here: Here, other: Walk) -> Iterator[Stage]:
    """A stage for each group of modules that shares an input; ``other`` walks through the model as it becomes."""
    walk, runs = here.walk, here.runs
    twins = {run.index: run for run in other.runs}
    groups, inputs = groups_of(here)
    replaced = Replaced(other)
    for source, group in groups.items():

        def collect(source: Source = source, group: list[str] = group) -> dict[str, Seen]:
            def through(number: int, pairs: Pairs) -> None:
                if (run := runs.get(number)) is not None:
                    x = given_originally(walk, run, source, inputs)
                    pairs.add(number, given(other, twins[number], source, replaced), x)

            width = here.widths.get(source.path)
            pairs = in_turn(here.team, here.count, through, lambda apart: Pairs(width, here.count, apart=apart))
            seen = _seen_of(pairs, source.path, shared=len(group) > 1)
            return {} if seen is None else dict.fromkeys(group, seen)

        stage = Stage(group, _collect=collect)
        yield from _turn(stage)
        replaced.changes.update(stage.replaced)
    for run in () if here.last else runs.values():
        walk.go_on(run, run.forward() if run.kept is None else run.kept)
        twin = twins[run.index]
        with replaced.answering(twin):
            output = twin.forward()
        replaced.drop(twin)
        other.go_on(twin, output)


def _seen_of(pairs: Pairs, path: str, *, shared: bool) -> Seen | None:
    """What is known of the inputs of the module at ``path``, ``shared`` with others; None if no token came."""
    means = pairs.means(path)
    if means is None:
        return None
    own, cross, shortfall, half = means
    return Seen(own, cross, pairs.own.count, Factors() if shared else None, half, shortfall)
