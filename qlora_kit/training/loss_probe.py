"""Whether a model's chunked loss is its own: both are computed on a batch of a few tokens, and compared.

Which classes compute their loss in which way is nowhere listed; what counts is what comes out. The loss, its gradient
by what the head is given, and those of what is trained in the head have to agree, and the logits have to go into the
loss without being computed. Random numbers, buffers, modes and gradients are as before afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..codecs import find_codec
from ..errors import UnsupportedModuleError
from ..injection.buffers import buffers_kept
from ..injection.ties import end_tables
from ..naming import base_of
from .cross_entropy import trained_in
from .deferred_logits import DeferredLogits, Source

_ROWS, _TOKENS = 2, 7
#: Relative difference of loss and gradients, by the dtype that the head is given. A half's gradients are rounded anew
#: in every product, and models in float64 compute their loss in float32; a wrong shift or scaling is far above these.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.05}


def probe(module: nn.Module, use_: Callable[[], object], batch: Mapping[str, Any] | None) -> None:
    """Compute the loss of ``module`` on ``batch`` as it is, then after ``use_()``, and compare.

    Raises:
        UnsupportedModuleError: they differ, or the second one computed all logits too.
    """
    name, head = type(module).__name__, end_tables(module)[1]
    assert head is not None
    with _undisturbed(module):
        given = _batch(module, head) if batch is None else dict(batch)
        expected, _ = _measured(module, head, given)
        use_()
        found, sources = _measured(module, head, given)
    scored = [source for source in sources if source.losses]
    if not scored:
        by = sorted({name for source in sources for name in source.computed_for})
        reason = (
            f"its logits go through {', '.join(by)}" if sources else f"its head, {type(head).__name__}, isn't called"
        )
        raise UnsupportedModuleError(
            f"{name}: expected a loss that is the cross_entropy of its head's logits, found that {reason}; use "
            "chunked_cross_entropy(hidden, head, target) in a loss of your own"
        )
    dtype = scored[0].hidden.dtype if not _is_quantized(head) else torch.bfloat16
    _compare(name, found, expected, _TOLERANCE.get(dtype, 0.05))


def _batch(module: nn.Module, head: nn.Module) -> dict[str, Any]:
    table = end_tables(module)[0]
    parameter = next((table or module).parameters())
    words = getattr(None if table is None else base_of(table), "num_embeddings", None) or 32
    ids = torch.randint(1, words, (_ROWS, _TOKENS), generator=torch.Generator().manual_seed(0)).to(parameter.device)
    labels = ids.clone()
    labels[0, :3] = -100
    return {"input_ids": ids, "labels": labels}


def _measured(module: nn.Module, head: nn.Module, batch: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[Source]]:
    """The loss of ``batch`` and its gradients by name; what the head was called with, where it defers."""
    leaves: list[Tensor] = []
    sources: list[Source] = []

    def own_leaf(_: nn.Module, args: tuple[Any, ...]) -> Any:
        if not args or not isinstance(args[0], Tensor):
            return None
        leaves.append(args[0].detach().requires_grad_())
        return (leaves[-1], *args[1:])

    def note(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        sources.extend([output.source] if isinstance(output, DeferredLogits) else [])

    handles = [head.register_forward_pre_hook(own_leaf), head.register_forward_hook(note)]
    try:
        loss = module(**batch)["loss"]
    except Exception as error:
        raise UnsupportedModuleError(
            f"{type(module).__name__}: expected a loss for {', '.join(batch)}, found {type(error).__name__}: {error}; "
            "pass batch=, a small batch of yours with labels"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    trained = trained_in(head)
    wanted = [*leaves, *trained]
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True) if loss.requires_grad and wanted else ()
    names = [*("what the head is given" for _ in leaves), *(f"the head's parameter {i}" for i in range(len(trained)))]
    of = {f"gradient by {n}": g for n, g in zip(names, gradients, strict=False) if g is not None}
    return {"loss": loss.detach(), **of}, sources


def _compare(name: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> None:
    for what, value in expected.items():
        got = found.get(what, torch.zeros_like(value)).double()
        if value.is_meta:  # no values: that the logits weren't computed is all there is to see
            continue
        apart = float((got - value.double()).norm() / value.double().norm().clamp(min=1e-12))
        if not apart <= tolerance:
            raise UnsupportedModuleError(
                f"{name}: expected the chunked loss to be the model's own, found a {what} that is {apart:.1e} of its "
                f"norm apart (bound {tolerance:.0e}); the model computes more of its logits than it shows, so leave "
                "its loss as it is"
            )


def _is_quantized(head: nn.Module) -> bool:
    base = base_of(head)
    codec = find_codec(base)
    return codec is not None and codec.quantizer(base) is not None


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; modes, buffers and random state as before afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    devices = {p.device.index for p in module.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(sorted(d for d in devices if d is not None)), buffers_kept(module), torch.enable_grad():
        module.eval()
        try:
            yield
        finally:
            for part, training in modes:
                part.training = training
