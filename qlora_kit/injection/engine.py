"""The shared engine: plan -> swap -> report.

``make_plan`` looks and changes nothing: its result can be printed. ``inject_`` builds every adapter layer off
the tree first, starts included, and only then swaps them in; whatever fails on the way leaves the model as it
was. ``Injection.undo`` puts the original module objects back, with all that hangs on them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..codecs import Codec, codec_for
from ..config.lora import LoraConfig
from ..errors import AdapterError
from ..layers import AdapterLayer, ModulesToSave, layer_family_for
from ..naming import Tree, base_of, canonical, module_at, slot
from .targets import resolve, resolve_saved

#: Values of ``init_lora_weights`` that only draw random numbers.
QUICK_STARTS = (True, False, "gaussian")


@dataclass(frozen=True)
class PlanEntry:
    """What one module will get. Bytes are those of the adapter (float32 factors) and of the base weight."""

    path: str
    aliases: tuple[str, ...]
    module_type: str
    codec: str
    family: str
    rank: int
    alpha: float
    trainable_parameters: int
    adapter_bytes: int
    base_bytes: int


@dataclass(frozen=True)
class Plan:
    """All that an injection will do. ``str(plan)`` is a table, ``to_dict()`` plain data."""

    entries: tuple[PlanEntry, ...]
    modules_to_save: tuple[str, ...] = ()

    @property
    def trainable_parameters(self) -> int:
        """Parameters in low-rank factors; copies for ``modules_to_save`` aren't counted."""
        return sum(entry.trainable_parameters for entry in self.entries)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        width = max([len(entry.path) for entry in self.entries] + [6])
        lines = [
            f"{'module':{width}}  {'type':14} {'codec':9} {'rank':>4} {'alpha':>6} {'trainable':>10} {'bytes':>11}"
        ]
        lines += [
            f"{e.path:{width}}  {e.module_type:14.14} {e.codec:9} {e.rank:>4} {e.alpha:>6g} "
            f"{e.trainable_parameters:>10,} {e.adapter_bytes:>11,}"
            for e in self.entries
        ]
        lines += [f"{path:{width}}  copied and trained whole" for path in self.modules_to_save]
        lines.append(f"{len(self.entries)} modules, {self.trainable_parameters:,} trainable parameters")
        return "\n".join(lines)


@dataclass(frozen=True)
class Request:
    """All that a start may look at: one base module and the adapter that goes on it.

    Attributes:
        path: the module's path in the model, for messages and for finding its weight in files.
        base: the module to adapt; not to be changed, a start that needs another returns one.
        codec: reads ``base``'s weight as float32 (out, in).
        rank, scaling: of the adapter; scaling is alpha / rank, or alpha / sqrt(rank) with rslora.
        config: the whole configuration; ``config.loftq_config`` is where "loftq" looks.
        dtype, device: of the adapter's parameters.
        family: "linear", "embedding" or "conv": how the branch is applied.
    """

    path: str
    base: nn.Module
    codec: Codec
    rank: int
    scaling: float
    config: LoraConfig
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    family: str = "linear"

    @property
    def shape(self) -> tuple[int, int]:
        """The base weight's logical (out, in)."""
        return self.codec.shape(self.base)


@dataclass
class Start:
    """A (rank, in), B (out, rank), the module that replaces the base, if the start made one, and what it measured."""

    A: Tensor
    B: Tensor
    base: nn.Module | None = None
    report: Any = None


class Injection:
    """What ``inject_`` did, and the way back."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def on_undo(self, step: Callable[[], object]) -> None:
        """Have ``undo`` call ``step``, before the steps noted earlier."""
        self._steps.append(step)

    def undo(self) -> None:
        """Put the model back as it was, the original module objects included."""
        while self._steps:
            self._steps.pop()()


def make_plan(model: nn.Module | Tree, config: LoraConfig) -> Plan:
    """What ``config`` would do to ``model``; changes nothing. Works on the meta device.

    Raises:
        TargetError, UnsupportedModuleError: see ``qlora_kit.injection.targets``.
    """
    entries, tree = [], Tree.of(model)
    for target in resolve(tree, config):
        module = base_of(tree.modules[target.path])
        codec, family = codec_for(module, target.path), layer_family_for(module, target.path)
        trainable = target.rank * sum(codec.shape(module))
        entries.append(
            PlanEntry(
                path=target.path,
                aliases=target.aliases,
                module_type=type(module).__name__,
                codec=codec.name,
                family=family.family,
                rank=target.rank,
                alpha=target.alpha,
                trainable_parameters=trainable,
                adapter_bytes=trainable * adapter_dtype(codec.compute_dtype(module)).itemsize,
                base_bytes=codec.nbytes(module),
            )
        )
    return Plan(tuple(entries), tuple(resolve_saved(tree, config.modules_to_save)))


def adapter_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """Adapters of half-precision and k-bit bases train in float32; others in the base's own dtype."""
    return torch.float32 if compute_dtype in (torch.float16, torch.bfloat16) else compute_dtype


def inject_(
    model: nn.Module,
    plan: Plan,
    config: LoraConfig,
    adapter_name: str,
    start: Callable[[Request], Start],
    *,
    dtype: torch.dtype | None = None,
) -> Injection:
    """Carry out ``plan`` for adapter ``adapter_name``; all of it, or on any error nothing.

    ``start`` gives each adapter its first factors (``qlora_kit.initializers.start_for`` for those that
    ``config`` names). ``dtype`` is the dtype of the factors and saved copies (default: see ``adapter_dtype``).
    """
    _check_free(model, plan, adapter_name)
    injection = Injection()
    try:
        built: list[tuple[PlanEntry, AdapterLayer]] = []
        slow = config.init_lora_weights not in QUICK_STARTS
        with nullcontext() if slow else uncollected():
            for entry in tqdm(plan.entries, desc=f"{config.init_lora_weights} start", disable=not slow, leave=False):
                built.append((entry, _build(model, entry, config, adapter_name, start, dtype, injection)))
        for entry, layer in built:
            for path in (entry.path, *entry.aliases):
                swap_(model, path, layer, injection)
        for path in plan.modules_to_save:
            module = module_at(model, path)
            wrapper = module if isinstance(module, ModulesToSave) else ModulesToSave(module)
            wrapper.add_adapter(adapter_name, dtype or torch.float32, path)
            injection.on_undo(partial(wrapper.delete_adapter, adapter_name))
            swap_(model, path, wrapper, injection)
    except BaseException:
        injection.undo()
        raise
    return injection


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside the block Python looks for no garbage in cycles: where thousands of modules are made and all stay, looking
    through them again and again takes as long as making them."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def swap_(
    model: nn.Module,
    path: str,
    module: nn.Module,
    injection: Injection | None = None,
    *,
    of: nn.Module | None = None,
) -> None:
    """Make ``module`` the submodule of ``model`` at ``path``, inside wrappers that stand there; where stand-ins stand
    for one another, in the place of the one ``of``."""
    holder, name = slot(model, path, of)
    before: Any = holder._modules[name]
    if before is not module:
        if injection is not None:
            injection.on_undo(partial(_put_, holder, name, before))
        _put_(holder, name, module)


def _put_(holder: nn.Module, name: str, module: nn.Module) -> None:
    setattr(holder, name, module)
    if name == "_orig_mod":  # torch.compile's wrapper calls what it was made for, until it is told
        holder._initialize()  # type: ignore[operator]


def _check_free(model: nn.Module, plan: Plan, name: str) -> None:
    """Refuse to write over an adapter that is there already, of this name or trained whole."""
    for entry in plan.entries:
        if isinstance(saved := module_at(model, entry.path), ModulesToSave):
            raise AdapterError(
                f"{entry.path}: expected a module that is free to be adapted by {name!r}, found one that is trained "
                f"whole (modules_to_save) by {saved.adapter_names()}; leave it out of one of the configurations"
            )
    for path in plan.modules_to_save:
        for inner, part in base_of(module_at(model, path)).named_modules():
            if isinstance(part, (AdapterLayer, ModulesToSave)):
                raise AdapterError(
                    f"{path}: expected a module without adapters inside, to be copied and trained whole by {name!r}, "
                    f"found {part.adapter_names()} at {path}.{canonical(inner)}; name in modules_to_save the parts of "
                    "it that no adapter has, or delete those adapters first"
                )
    for path in (*(entry.path for entry in plan.entries), *plan.modules_to_save):
        module = module_at(model, path)
        if isinstance(module, (AdapterLayer, ModulesToSave)) and name in module.adapter_names():
            raise AdapterError(
                f"{path}: expected no adapter {name!r} yet, found one that an earlier wrapper of this model put "
                "there; go on with that wrapper, unload() it first, or choose another name"
            )


def request_for(model: nn.Module, entry: PlanEntry, config: LoraConfig, dtype: torch.dtype | None = None) -> Request:
    """What a start is told of ``entry``; ``dtype`` as in ``inject_``."""
    base = base_of(module_at(model, entry.path))
    codec = codec_for(base, entry.path)
    return Request(
        path=entry.path,
        base=base,
        codec=codec,
        family=entry.family,
        rank=entry.rank,
        scaling=config.scaling_of(entry.rank, entry.alpha),
        config=config,
        dtype=dtype or adapter_dtype(codec.compute_dtype(base)),
        device=_device(codec.device(base), base),
    )


def _build(
    model: nn.Module,
    entry: PlanEntry,
    config: LoraConfig,
    name: str,
    start: Callable[[Request], Start],
    dtype: torch.dtype | None,
    injection: Injection,
) -> AdapterLayer:
    existing = module_at(model, entry.path)
    request = request_for(model, entry, config, dtype)
    begun = start(request)
    if begun.base is not None and isinstance(existing, AdapterLayer) and existing.adapter_names():
        raise AdapterError(
            f"{entry.path}: init_lora_weights={config.init_lora_weights!r} would requantize the weight under the "
            f"adapter(s) {existing.adapter_names()}; start this adapter first, on a model without others"
        )
    if isinstance(existing, AdapterLayer):
        layer = existing
        injection.on_undo(lambda: layer.delete_adapter(name))
    else:
        module = request.base if begun.base is None else with_hooks_of(request.base, begun.base)
        layer = layer_family_for(module, entry.path)(module)
    layer.add_adapter(
        name,
        begun.A.to(request.dtype),
        begun.B.to(request.dtype),
        alpha=entry.alpha,
        dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
    )
    if begun.report is not None:
        layer.start_reports[name] = begun.report
    return layer


def _device(storage: torch.device, base: nn.Module) -> torch.device:
    """Where the base computes: an offloaded weight lies on the meta device until accelerate's hook brings it."""
    execution = getattr(getattr(base, "_hf_hook", None), "execution_device", None)
    if storage.type == "meta" and execution is not None:
        return torch.device(execution)
    return storage


def with_hooks_of(old: nn.Module, new: nn.Module) -> nn.Module:
    """``new`` with ``old``'s forward and backward hooks: it stands in for ``old`` in another storage.

    Hooks on the state dict stay behind; they are about how the old storage is saved.
    """
    for attribute, value in vars(old).items():
        if "_hook" in attribute and ("forward" in attribute or "backward" in attribute):
            setattr(new, attribute, value)
    return new
