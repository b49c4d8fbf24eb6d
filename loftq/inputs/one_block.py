"""A block that a walk stands at: which of its modules share an input, what each is given, and what some have become.

What a module has become is given as D and added to its output by a hook, so the model itself isn't touched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from qlora_kit.distributed.team import Team
from qlora_kit.naming import base_of, module_at

from .kept_inputs import KeptInputs
from .moments import Collector, inputs_of, rows_of
from .pairs import Given
from .walk import Enough, Run, Walk


@dataclass(frozen=True)
class Here:
    """Where the walk stands.

    Attributes:
        count: of all batches, whoever's.
        first: the number of the first that stands here.
        runs: of this process that stand here, by number.
        paths: of the modules to be looked at.
        streams: by those whose output is added to a stream, the module that is given it before, see ``additions``.
        last: no run has to go on from here.
    """

    team: Team
    count: int
    first: int
    walk: Walk
    runs: dict[int, Run]
    paths: list[str]
    streams: Mapping[str, str]
    widths: Mapping[str, int]
    last: bool


@dataclass(frozen=True)
class Source:
    """Where a group's input is looked at.

    Attributes:
        path: of its first module.
        once: that is called no more than once, so that what comes after needn't be computed.
        stream: path of the module that is given the stream which the output is added to, None where none is known.
    """

    path: str
    once: bool
    stream: str | None

    @property
    def paths(self) -> list[str]:
        return [self.path] if self.stream is None else [self.stream, self.path]


def given(walk: Walk, run: Run, source: Source, replaced: Mapping[str, Tensor]) -> Given:
    """What comes to ``source`` when ``run`` goes through its block whose modules have become what ``replaced`` says."""
    found = Given()

    def receive(path: str, value: Tensor) -> None:
        rows = rows_of(value, run.mask)
        last = source.once and path == source.path
        own = found.rows if path == source.path else found.stream
        own.append(rows if last else rows.clone())  # what comes after may work in place
        if last:
            raise Enough

    with changed(walk.model, replaced), inputs_of(walk.model, source.paths, receive), suppress(Enough):
        run.forward()
    return found


def given_originally(walk: Walk, run: Run, source: Source, inputs: KeptInputs) -> Given:
    """The same in the original model, as it was kept or computed again."""
    kept = [inputs.take(run, path) for path in source.paths]
    if any(rows is None for rows in kept):
        return given(walk, run, source, {})
    *stream, rows = (rows or [] for rows in kept)
    return Given(rows, stream[0] if stream else [])


def groups_of(here: Here) -> tuple[dict[Source, list[str]], KeptInputs]:
    """The modules by where their common input is looked at, in the order of the forward, and the inputs. The outputs
    are kept, where they fit, if the runs are to go on from them."""
    walk, paths = here.walk, here.paths
    targets, collector = set(paths), Collector(paths, diagonal=True, widths=here.widths)
    once, watched = targets, {*targets, *(here.streams[path] for path in paths if path in here.streams)}
    inputs = KeptInputs(walk)
    for run in here.runs.values():
        calls: Counter[str] = Counter()

        def receive(path: str, value: Any, run: Run = run, calls: Counter[str] = calls) -> None:
            calls[path] += 1
            inputs.add(run, path, value)
            if run.index == here.first and path in targets:
                collector(path, value)

        collector.begin(run.mask)
        with inputs_of(walk.model, watched, receive):
            output = run.forward()
        run.kept = output if not here.last and walk.has_room(output, beside=inputs.nbytes) else None
        collector.end()
        once = once - {path for path, count in calls.items() if count > 1}
    once = set.intersection(*here.team.gathered(once))
    leaders = here.team.from_rank(collector.leaders, here.first % here.team.size)
    sharing: dict[str, list[str]] = {}
    for path, leader in leaders.items():
        sharing.setdefault(leader, []).append(path)
    # A module that the first batch doesn't reach, an expert say, comes last and alone.
    sharing.update({path: [path] for path in paths if path not in leaders})
    groups = {}
    for path, group in sharing.items():
        # What is missing in a stream is one module's to make up for.
        stream = here.streams.get(path) if path in once and len(group) == 1 else None
        groups[Source(path, path in once, stream)] = group
    inputs.keep_only({path for source in groups for path in source.paths})
    return groups, inputs


@contextmanager
def changed(model: nn.Module, replaced: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block, modules answer with D added to their weight."""
    with ExitStack() as stack:
        for path, change in replaced.items():

            def hook(
                module: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                output: Tensor,
                change: Tensor = change,
            ) -> Tensor:
                x = args[0] if args else next(iter(kwargs.values()))
                if x.is_floating_point():
                    return output + F.linear(x.float(), change).to(output.dtype)
                rows = F.embedding(x, change.T)
                scale = getattr(base_of(module), "embed_scale", None)  # Gemma's multiply what they look up
                return output + (rows if scale is None else rows * scale).to(output.dtype)

            stack.callback(module_at(model, path).register_forward_hook(hook, with_kwargs=True).remove)
        yield
