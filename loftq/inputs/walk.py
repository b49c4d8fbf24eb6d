"""A model's forward, stopped at chosen modules: the means to go through a model block by block, whatever the model.

Calibration wants to stay at one block with all batches, look, perhaps exchange weights, and only then go on. Models
differ in what they do between their blocks, and only their own forward knows it. So the forward is not imitated: it
runs, once per batch, each run in a thread of its own that stands still whenever it enters one of the chosen modules.
Exactly one thread runs at a time, so nothing is concurrent and results don't depend on timing. A module at which a
run stands can be computed any number of times, with the arguments that the run has for it; the run then goes on
with the output that it is given, and with what the module's last whole call has done to its arguments, which takes
place once however often it was computed. Hooks that hang on it run once, in the run's own call. A computation can end
where what was looked for has been seen: ``Enough``.

While runs stand still, their activations lie in memory, or, over a bound, in files: a tensor's storage is emptied
and filled again before it is used. What the caller or the model holds too is left alone.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qlora_kit.naming import Tree, module_at

from .arguments import Changes, Copies
from .caches import configs_of
from .forwards import forward_exchanged_
from .holdings import Holdings

Batch = Mapping[str, Any]
# Where a module keeps its hooks, and bytes that are copied to or from a file at a time.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_PIECE = 1 << 24


class _Abandoned(BaseException):
    """Unwinds a run that isn't needed any more; no handler of ordinary errors stops it."""


class Enough(BaseException):
    """Raised by a hook: the rest of the module's forward needn't be computed."""


class Run:
    """One batch on its way through the model.

    Attributes:
        index: the batch's number.
        at: path of the module that it stands at, None once it is through.
        kept: that module's output, if it was to be kept until the run goes on.
    """

    def __init__(self, walk: Walk, batch: Batch, index: int) -> None:
        self.walk, self.batch, self.index = walk, batch, index
        self.at: str | None = None
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.kept: Any = None
        self.spilled: list[tuple[Tensor, Path]] = []
        self._output: Any = None
        self._changes = Changes()
        self._error: BaseException | None = None
        self._leave = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        # Both are kept per thread, and a sum may depend on how many threads it is split over.
        self._threads = torch.get_num_threads()
        self.thread = threading.Thread(target=self._work, daemon=True)

    @property
    def mask(self) -> Tensor | None:
        return self.batch.get("attention_mask")

    def start(self) -> None:
        """Run to the first stop."""
        self.thread.start()
        self._go_on()

    def forward(self, *, keep: bool = False) -> Any:
        """The output of the module that the run stands at, for its arguments; can be repeated.

        Args:
            keep: keep the output, within the walk's bound, as ``kept``.

        Raises:
            Enough: a hook did; nothing is kept of that call.
        """
        assert self.at is not None
        self.fill()
        module = module_at(self.walk.model, self.at)
        # Copies, since a module may work in place, and the next call is to see the same.
        copies = Copies((self.args, self.kwargs), self.walk.shared)
        args, kwargs = copies.arguments
        try:
            with self.walk.without_hooks(self.at):
                output = module(*args, **kwargs)
            self._changes = copies.changes()
            if keep:
                self.keep(output)
        finally:
            self.walk.keep_bound()
        return output

    def keep(self, output: Any) -> None:
        """Keep the ``output`` of the module that it stands at, to go on with."""
        self.kept = output
        self._note()

    def resume(self, output: Any) -> None:
        """Go on to the next stop, with ``output`` of the module that the run stands at: of its last whole call."""
        self.fill()
        self._output, self._changes = self._changes.settle(output), Changes()
        self.at, self.args, self.kwargs, self.kept = None, (), {}, None
        self._note()
        self._go_on()

    def abandon(self) -> None:
        """Leave the forward where it stands."""
        if self.thread.is_alive():
            self._leave = True
            self._go.release()
            self.thread.join()
        self._drop_files()

    def spill(self, folder: Path) -> None:
        """Move the activations that it holds to files in ``folder``."""
        stored = {t.untyped_storage().data_ptr(): t for t in self.tensors() if t.untyped_storage().resizable()}
        foreign = self.walk.foreign(self, stored)
        own = [tensor for pointer, tensor in stored.items() if pointer and pointer not in foreign]
        for number, tensor in enumerate(own):
            path = folder / f"run-{self.walk.number}-{self.index}-{number}.bin"
            storage = tensor.untyped_storage()
            flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            with path.open("wb") as file:
                for part in flat.split(_PIECE):
                    # A copy: a storage that numpy has seen can't be emptied.
                    file.write(part.clone().cpu().numpy())
            self.spilled.append((flat, path))
            storage.resize_(0)
        self._note(counts=False)  # what is left is others' too

    def fill(self) -> None:
        """Bring back what ``spill`` took away."""
        if not self.spilled:
            return
        for flat, path in self.spilled:
            flat.untyped_storage().resize_(flat.numel())
            with path.open("rb") as file:
                for part in flat.split(_PIECE):
                    part.copy_(torch.frombuffer(bytearray(file.read(part.numel())), dtype=torch.uint8))
        self._drop_files()
        self._note()

    def tensors(self) -> list[Tensor]:
        """The floating-point tensors among the arguments and in what is kept."""
        return floats((self.args, self.kwargs, self.kept))

    def stand(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called in the run's own thread by a chosen module: wait for the output."""
        if self._leave:
            raise _Abandoned
        self.at, self.args, self.kwargs = path, args, kwargs
        self._note()
        self._stopped.release()
        self._go.acquire()
        if self._leave:
            raise _Abandoned
        output, self._output = self._output, None
        return output

    def _note(self, *, counts: bool = True) -> None:
        self.walk.holdings.note(self.index, self.tensors(), counts=counts)

    def _go_on(self) -> None:
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        self._go.acquire()
        torch.set_num_threads(self._threads)
        try:
            with torch.no_grad():
                self.walk.model(**self.batch)
        except _Abandoned:
            return
        except BaseException as error:
            self._error = error
        self.at = None
        self._stopped.release()

    def _drop_files(self) -> None:
        for _, path in self.spilled:
            path.unlink(missing_ok=True)
        self.spilled = []


class Walk:
    """Runs of ``batches`` through ``model``, each stopped at the modules ``stops``; a context manager.

    Args:
        model: in evaluation mode; called as ``model(**batch)``.
        stops: paths of modules of which none contains another.
        limit: bytes of activations that stay in memory while runs stand still; the rest goes to ``folder``.
        numbers: of the batches that are walked with, the runs' ``index``; None for all.
    """

    _count = 0

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        stops: Iterable[str],
        *,
        limit: int,
        folder: Path,
        numbers: Iterable[int] | None = None,
    ) -> None:
        Walk._count += 1
        self.number = Walk._count
        self.model, self.stops, self.limit, self.folder = model, list(stops), limit, folder
        wanted = None if numbers is None else set(numbers)
        self.runs = [Run(self, b, index) for index, b in enumerate(batches) if wanted is None or index in wanted]
        # What calls have in common, by id, see ``Copies``.
        kept = [*model.modules(), *model.parameters(), *configs_of(model)]
        self.shared = {id(value): value for value in kept}
        self._undo: dict[str, Callable[[], None]] = {}
        self.passed: set[str] = set()
        self.holdings = Holdings()
        self._callers = {t.untyped_storage().data_ptr() for run in self.runs for t in floats(dict(run.batch))}
        self._hooks: dict[str, set[int]] = {}

    def __enter__(self) -> Walk:
        try:
            for path in self.stops:
                self._undo[path] = self._stop_at(path)
            for run in self.runs:
                run.start()
                self.keep_bound()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for run in self.runs:
            run.abandon()
        while self._undo:
            self._undo.popitem()[1]()

    def here(self) -> tuple[str, list[Run]] | None:
        """The module where the first of the unfinished runs stands, and all runs that stand there."""
        path = next((run.at for run in self.runs if run.at is not None), None)
        return None if path is None else (path, self.runs_at(path))

    def runs_at(self, path: str) -> list[Run]:
        """All runs that stand at that module."""
        return [run for run in self.runs if run.at == path]

    def go_on(self, run: Run, output: Any) -> None:
        """Resume one run; it stops at the next module that hasn't been passed."""
        run.resume(output)
        self.keep_bound()

    def arrive(self, path: str) -> None:
        """Give the module at ``path``, where runs stand, its own forward back: it may be copied or looked at now."""
        self.passed.add(path)
        self._undo.pop(path)()

    def foreign(self, own: Run, addresses: Iterable[int]) -> set[int]:
        """Those of ``addresses`` that don't belong to the run ``own`` alone: the model's, the caller's, other runs'."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        tensors += [v for module in self.model.modules() for v in vars(module).values() if isinstance(v, Tensor)]
        held = self._callers.union(tensor.untyped_storage().data_ptr() for tensor in tensors)
        return {address for address in addresses if address in held or self.holdings.shared(own.index, address)}

    @contextmanager
    def without_hooks(self, path: str) -> Iterator[None]:
        """Inside the block, the hooks that the module at ``path`` had before the walk don't run."""
        module = module_at(self.model, path)
        before = {name: getattr(module, name) for name in _HOOKS}
        for name, hooks in before.items():
            setattr(module, name, OrderedDict((k, v) for k, v in hooks.items() if k not in self._hooks[path]))
        try:
            yield
        finally:
            for name, hooks in before.items():
                setattr(module, name, hooks)

    def has_room(self, output: Any, *, beside: int = 0) -> bool:
        """Whether ``output`` can lie in memory besides what does, and ``beside`` bytes more."""
        return self.holdings.nbytes + beside + sum(tensor.nbytes for tensor in floats(output)) <= self.limit

    def keep_bound(self) -> None:
        """Move to files what is more than ``limit``."""
        held = 0
        for run in self.runs if self.holdings.nbytes > self.limit else ():
            if run.at is not None and not run.spilled:
                held += (own := self.holdings.of(run.index))
                if held > self.limit:
                    held -= own
                    run.spill(self.folder)

    def _stop_at(self, path: str) -> Callable[[], None]:
        module = module_at(self.model, path)
        self._hooks[path] = {number for name in _HOOKS for number in getattr(module, name)}

        def stopping(forward: Callable[..., Any]) -> Callable[..., Any]:
            def stop(*args: Any, **kwargs: Any) -> Any:
                run = next((run for run in self.runs if run.thread is threading.current_thread()), None)
                if run is None or path in self.passed:  # computed on behalf of a run, or once more in one forward
                    return forward(*args, **kwargs)
                return run.stand(path, args, kwargs)

            return stop

        return forward_exchanged_(module, stopping)


def floats(tree: Any) -> list[Tensor]:
    """The floating-point tensors in ``tree``."""
    return [v for v in tree_leaves(tree) if isinstance(v, Tensor) and v.is_floating_point()]


def stops_for(model: nn.Module, paths: Iterable[str]) -> dict[str, list[str]]:
    """Where to stop for the modules at ``paths``: the outermost blocks (members of a ``ModuleList`` that aren't mere
    containers themselves) that hold them, each with those that it holds; a module outside of blocks is its own."""
    modules = Tree(model).modules
    lists = {path for path, module in modules.items() if isinstance(module, nn.ModuleList)}
    containers = {path for path, module in modules.items() if isinstance(module, (nn.ModuleList, nn.ModuleDict))}
    stops: dict[str, list[str]] = {}
    for path in paths:
        parts = path.split(".")
        heads = [".".join(parts[:k]) for k in range(1, len(parts) + 1)]
        blocks = (head for at, head in pairwise(heads) if at in lists and head not in containers)
        stops.setdefault(next(blocks, path), []).append(path)
    return stops
