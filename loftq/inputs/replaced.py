"""Modules of a block that have become something else: they answer with D added to their weight, each input once.

The model itself isn't touched. A block is run again for each group of its modules, and what those before have become
answers the same each time: up to the first that hasn't answered as it is now, after which all is computed anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from qlora_kit.naming import base_of, module_at

from .forwards import forward_exchanged_
from .walk import Run, Walk

# A module's path, and the number of its call in the forward.
_Call = tuple[str, int]


class Replaced:
    """Modules of the block that ``walk`` stands at, and their answers as far as it has room for them.

    Attributes:
        changes: D = Q + sBA - W, float32 (out, in), by path; grows as modules are done.
        nbytes: of the answers that are kept.
    """

    def __init__(self, walk: Walk) -> None:
        self.walk, self.nbytes = walk, 0
        self.changes: dict[str, Tensor] = {}
        # By run, with their versions: what comes after may work in place.
        self._answers: dict[int, dict[_Call, tuple[Tensor, int]]] = {}

    @contextmanager
    def answering(self, run: Run) -> Iterator[None]:
        """Inside the block, where ``run`` goes through its module once, those of ``changes`` answer as what they are
        now."""
        forward = _Forward(self, run)
        with ExitStack() as stack:
            for path, change in self.changes.items():
                module = module_at(self.walk.model, path)
                stack.callback(forward_exchanged_(module, forward.sparing(path)))
                hook = forward.answering(path, change)
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    def get(self, run: Run, call: _Call) -> Tensor | None:
        """The answer of ``call``, if it was kept and is as it was."""
        answer, version = self._answers.get(run.index, {}).get(call, (None, 0))
        return answer if answer is not None and answer._version == version else None

    def put(self, run: Run, call: _Call, answer: Tensor) -> None:
        """Keep ``answer`` in the place of an earlier one, if there is room."""
        answers = self._answers.setdefault(run.index, {})
        if call in answers:
            self.nbytes -= answers.pop(call)[0].nbytes
        if self.walk.has_room(answer, beside=self.nbytes):
            answers[call] = answer, answer._version
            self.nbytes += answer.nbytes

    def drop(self, run: Run) -> None:
        """Forget the answers in ``run``, which goes on."""
        self.nbytes -= sum(answer.nbytes for answer, _ in self._answers.pop(run.index, {}).values())


class _Forward:
    """One forward of ``run``, in which nothing is computed whose answer is known."""

    def __init__(self, modules: Replaced, run: Run) -> None:
        self.modules, self.run = modules, run
        self.calls: Counter[str] = Counter()
        self.known: Tensor | None = None
        self.anew = False

    def sparing(self, path: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Makes a forward that is the module's own where the answer isn't known."""

        def make(own: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                self.known = None if self.anew else self.modules.get(self.run, (path, self.calls[path]))
                self.anew = self.known is None
                return own(*args, **kwargs) if self.known is None else self.known

            return forward

        return make

    def answering(self, path: str, change: Tensor) -> Callable[..., Tensor]:
        """A hook that makes of the module's output its answer."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            answer, self.known = self.known, None
            if answer is None:
                x = args[0] if args else next(iter(kwargs.values()))
                answer = output + _added(module, x, change).to(output.dtype)
                self.modules.put(self.run, (path, self.calls[path]), answer)
            self.calls[path] += 1
            return answer

        return hook


def _added(module: nn.Module, x: Tensor, change: Tensor) -> Tensor:
    if x.is_floating_point():
        return F.linear(x.float(), change)
    rows = F.embedding(x, change.T)
    scale = getattr(base_of(module), "embed_scale", None)  # Gemma's multiply what they look up
    return rows if scale is None else rows * scale
