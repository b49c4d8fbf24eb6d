"""Is the tensor that a module keeps as ``weight`` the matrix it multiplies by?

Codecs are registered by type and found along the method resolution order, so the codec of ``nn.Linear`` is asked about
every subclass of it, and about instances that others have changed. Read as a matrix, the codes of an FP8 layer are off
by a hundred times its norm; a delta merged into what ``weight_norm`` computes is gone at the next access. So what a
module looks like is checked, in two parts.

*The tensor* (``reason_against_weight``): a plain one, in floating point of 16 bits or more, that nothing computes and
nothing scales. It is looked at each time, since an instance can change. Where ``weight`` isn't a parameter, parameters
called ``weight_...`` (weight_g, weight_orig) are what it is computed from; without any it is a view, as FSDP puts it
there. A subclass of ``Tensor`` is plain as long as it leaves what arithmetic does to PyTorch; PyTorch's own (DTensor,
fake tensors) are known.

*The forward* (``reason_against_forward``): the registered type's own, or one that gives the same. Falcon's linear
writes x W^T + b out and is as good as ``nn.Linear``; Llama 4's router returns a tuple, BitNet's linear rounds its
weight on the way. No list of names tells them apart, and reading their source would take a reader of Python. So a
forward that overrides is tried: both forwards run on a stand-in, an object of the same type with the same settings but
a float32 weight of a few rows on the CPU, and must agree to float32's rounding. The stand-in is what makes this
robust: it costs the same for a layer of any size, in any dtype, on any device and on none (meta), and nothing of the
module is touched. Tried once for a type and its settings. A forward that can't run on the stand-in (it needs other
arguments, children, or its real sizes) isn't known to be the same and is refused. A ``forward`` set on an instance is
a hook's (accelerate, bitsandbytes) and calls the type's.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Scales beside a weight: weight_scale, weight_scale_inv, scales, input_scale; not the factor of a table of words, which
# multiplies what the module gives.
_SCALES = re.compile(r"weight_.+|(?!embed_)(.+_)?scales?(_.+)?")
_OWN = frozenset({"weight", "bias"})
# What float32 sums in another order differ by, relative to their size.
_ROUNDING = 1e-5

_plain_types: dict[type, bool] = {Tensor: True, nn.Parameter: True}
_tried: dict[tuple[Any, ...], str | None] = {}


def reason_against_computed(module: nn.Module) -> str | None:
    """Why ``module.weight`` is computed at each access or forward, and lost what is written to it; None if it isn't."""
    parameters = module._parameters
    if parameters.get("weight") is not None:
        return None
    parametrizations: Any = module._modules.get("parametrizations")
    if parametrizations is not None and "weight" in parametrizations:
        return (
            "its weight is computed by parametrizations; make it a plain one first, with "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
    if origins := [name for name in parameters if name.startswith("weight_")]:
        return (
            f"its weight is computed from {' and '.join(origins)}; make it a plain one first, with remove_weight_norm, "
            "remove_spectral_norm or prune.remove of torch.nn.utils"
        )
    return None


def reason_against_weight(module: nn.Module) -> str | None:
    """Why ``module.weight`` isn't the matrix itself; None if it is."""
    weight = module._parameters.get("weight")
    if weight is None:
        if (reason := reason_against_computed(module)) is not None:
            return reason
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            return "it keeps no tensor as its weight"
    kind = type(weight)
    if kind not in _plain_types:
        _plain_types[kind] = _is_plain(kind)
    if not _plain_types[kind] or getattr(weight, "quant_state", None) is not None:
        return f"its weight is a {_name(kind)}, which only that class can read"
    if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        return f"its weight is stored in {weight.dtype}, and not as a floating-point weight of 16 bits or more"
    for names in (module._parameters, module._buffers):
        for name in names:
            if name not in _OWN and _SCALES.fullmatch(name):
                return f"its weight is stored beside {name}, which it is to be multiplied by"
    return None


@dataclass(frozen=True)
class Trial:
    """What forwards are tried on.

    Attributes:
        sample: a small module on the CPU, whose tensors and sizes the stand-in takes over.
        inputs: of the forward; the first that it takes is enough.
        factor: what the registered type's output is multiplied by, as the layer family knows.
    """

    sample: nn.Module
    inputs: Sequence[Tensor]
    factor: float = 1.0


def reason_against_forward(
    module: nn.Module, own: type[nn.Module] | None, trial: Callable[[nn.Module], Trial]
) -> str | None:
    """Why ``module`` computes something else than modules of type ``own``, a base of its type; None if it doesn't.

    Args:
        trial: makes what to try ``module``'s forward on, where it isn't ``own``'s.
    """
    kind: Any = type(module)
    if own is None or kind.forward is own.forward:
        return None
    settings = (item for item in vars(module).items() if type(item[1]) in (bool, int, float, str))
    key = (kind, kind.forward, own, *module._parameters, *module._buffers, *module._modules, *settings)
    if key not in _tried:
        _tried[key] = _difference(module, own, trial)
    return _tried[key]


def filled(*shape: int) -> Tensor:
    """float32 ``shape`` on the CPU with values that differ, without a draw from the random generator."""
    return torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float32, device="cpu").sin_().view(shape)


def holding_values(module: nn.Module) -> nn.Module:
    """``module``, made on the meta device, with such values as its parameters."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(filled(*parameter.shape), requires_grad=False)
    return module


@torch.no_grad()
def _difference(module: nn.Module, own: Any, make: Callable[[nn.Module], Trial]) -> str | None:
    found = f"its forward isn't that of {_name(own)}"
    if module._modules:
        return f"{found}: it has modules of its own, {', '.join(module._modules)}"
    kind, trial, said = type(module), make(module), ""
    stand_in = _stand_in(module, trial.sample)
    with torch.device("cpu"), torch.autocast("cpu", enabled=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for x in trial.inputs:
            try:
                given = kind.forward(stand_in, x)
            except Exception as error:  # whatever a forward may raise that isn't made for this
                said = said or f"{type(error).__name__}: {error}".partition("\n")[0]
                continue
            if not isinstance(given, Tensor):
                return f"{found}: it returns a {type(given).__name__}"
            expected = own.forward(stand_in, x) * trial.factor
            same = given.shape == expected.shape
            same = same and torch.allclose(given.float(), expected.float(), _ROUNDING, _ROUNDING)
            return None if same else f"{found}: it gives something else"
    return f"{found}: it can't be called with an input alone ({said})"


def _stand_in(module: nn.Module, sample: nn.Module) -> Any:
    """An object of ``module``'s type and settings with the tensors and sizes of ``sample``. Other buffers keep their
    shapes; their values would make what is found for a type depend on which module was met first."""
    stand_in: Any = object.__new__(type(module))
    vars(stand_in).update({**vars(module), **vars(sample)})
    for name in ("forward", "weight", "bias"):  # set on the instance: by a hook, by FSDP
        vars(stand_in).pop(name, None)
    parameters = {**module._parameters, **sample._parameters}
    if module._parameters.get("bias") is None:
        parameters["bias"] = None
    others = {name: b for name, b in module._buffers.items() if b is not None and name not in sample._buffers}
    buffers = {name: filled(*b.shape).to(b.dtype) for name, b in others.items()}
    vars(stand_in).update(_parameters=parameters, _buffers={**buffers, **sample._buffers}, training=False)
    return stand_in


def _is_plain(kind: type) -> bool:
    """Whether tensors of type ``kind`` are what they store: arithmetic on them is PyTorch's on that."""
    if kind.__module__.startswith(("torch.distributed.", "torch._subclasses.")):
        return True
    above = kind.__mro__[: kind.__mro__.index(Tensor)]
    return not any({"__torch_function__", "__torch_dispatch__"} & set(vars(c)) for c in above if c is not nn.Parameter)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
