"""One call of a model with an adapter for each row: what is checked before anything runs, and how its layers are told.

``model(..., adapter_names=[...])`` computes each row as it is computed with its adapter active, and those of
``"__base__"`` as with all switched off, without a change of the model: what is chosen ends with the call, whatever
happens in it. It is for inference, as in PEFT: a step of training would train several adapters at once, where
``set_adapter`` says which train.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import AdapterError, closest
from ..injection.adapted import Adapted, adapted_of
from ..layers import AdapterLayer, ModulesToSave
from ..layers.row_choice import in_rows, left_to_python
from ..layers.rows import BASE, KEYWORD, Rows, checked, words_of
from ..naming import Tree, chain

_FIX = "call set_adapter(name) and run the rows of each adapter by themselves"


@left_to_python
def call_with_rows(
    wrapper: Any,
    names: Any,
    call: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    function: Callable[..., Any],
) -> Any:
    """``call(*args, **kwargs)`` with an adapter for each row of the batch.

    Args:
        wrapper: the model with its adapters, or a replica of it.
        names: of adapters, one for each row.
        function: the model's forward or generate, which ``call`` calls.

    Raises:
        AdapterError: ``names`` aren't that, or the model's state doesn't allow it.
    """
    model, names = wrapper.model, checked(names)
    parts = _checked_parts(adapted_of(wrapper), model, names)
    inputs = list(_tensors(_by_name(function, args, kwargs)))
    _check_length(names, inputs, model)
    copies = _copies(model, kwargs) if getattr(function, "__name__", "") == "generate" else 1
    lengths = {length for _, x in inputs if x.shape[0] == len(names) for length in words_of(x)}
    path_of = functools.partial(_path_of, model)
    with in_rows(Rows(names, parts, copies=frozenset({1, copies}), lengths=lengths, path_of=path_of)):
        return call(*args, **kwargs)


def _checked_parts(adapted: Adapted, model: nn.Module, names: Sequence[str]) -> frozenset[int]:
    """The ids of all that has something of adapters in ``model``, once rows may go through the adapters ``names``."""
    _check_known(adapted, names)
    parts = list(_parts(model))
    _check_state(adapted, model, names, parts)
    return frozenset(map(id, parts))


def _parts(model: nn.Module) -> Iterator[AdapterLayer | ModulesToSave]:
    """What has something of adapters in ``model``; adapter layers aren't entered, as there are thousands of modules in
    them, and this is asked at every call."""
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if isinstance(module, (AdapterLayer, ModulesToSave)):
            yield module
        if not isinstance(module, AdapterLayer):
            waiting += [child for child in reversed(module._modules.values()) if child is not None]


def _check_known(adapted: Adapted, names: Sequence[str]) -> None:
    for name in dict.fromkeys(names):
        if name != BASE and name not in adapted.configs:
            known = [BASE, *sorted(adapted.configs)]
            raise AdapterError(
                f"{KEYWORD}: unknown adapter {name!r}; closest: {closest(name, known, count=1)}, of {known}"
            )
    if BASE in names and BASE in adapted.configs:
        raise AdapterError(f"{KEYWORD}: {BASE!r} is for rows without an adapter, and the name of one here; rename that")


def _check_state(adapted: Adapted, model: nn.Module, names: Sequence[str], parts: Sequence[nn.Module]) -> None:
    """Raise an AdapterError where rows can't have adapters of their own as the model is."""
    merged = [part for part in parts if isinstance(part, AdapterLayer) and part.merged_adapters]
    if model.training:
        found, fix = "one in training mode, where set_adapter says what trains", "call eval() first"
    elif adapted.disabled:
        found, fix = "adapters switched off", "call enable_adapter_layers() first, or leave disable_adapter()"
    elif merged:
        found = f"{merged[0].merged_adapters} merged into {_path_of(model, merged[0])}"
        fix = "call unmerge_adapter() first"
    elif BASE in names and adapted.kept_biases.values:
        trained = next(name for name, config in adapted.configs.items() if config.bias != "none")
        found, fix = f"biases that {trained!r} has trained, which rows of {BASE!r} would have too", _FIX
    elif moved := _moved(adapted, names):
        found, fix = f"buffers that adapters have moved ({moved}), which all rows would share", _FIX
    else:
        return
    raise AdapterError(f"{KEYWORD}: expected a model whose rows can each have an adapter, found {found}; {fix}")


def _moved(adapted: Adapted, names: Sequence[str]) -> str:
    """A buffer that rows would have another value of than with their adapters active, or nothing."""
    buffers = adapted.buffers
    if not buffers.base or list(dict.fromkeys(names)) == buffers.shown:
        return ""
    adapters = {*buffers.shown, *names} - {BASE}
    return next((name for adapter in sorted(adapters) for name in buffers.of(adapted.root, adapter)), "")


# -- the batch -----------------------------------------------------------------------------------------------


def _by_name(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    names = [name for name, p in inspect.signature(function).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    names += [f"argument {i}" for i in range(len(names), len(args))]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _tensors(inputs: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors with rows among ``inputs`` and the mappings in there, by name."""
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.ndim:
            yield name, value
        elif isinstance(value, Mapping):
            yield from _tensors(value)


def _check_length(names: Sequence[str], inputs: Sequence[tuple[str, Tensor]], model: nn.Module) -> None:
    """Raise an AdapterError unless there is a name for each row of the first of ``inputs``, what the model is about
    before all others."""
    if not inputs:
        return
    main = getattr(model, "main_input_name", None)
    first = min(inputs, key=lambda named: named[0] not in (main, "inputs", "input_ids", "inputs_embeds"))
    if first[1].shape[0] != len(names):
        raise AdapterError(
            f"{KEYWORD}: expected a name for each of the {first[1].shape[0]} rows of {first[0]}, found {len(names)} "
            f"names; name each, {BASE!r} for none"
        )


def _copies(model: nn.Module, kwargs: Mapping[str, Any]) -> int:
    """How many sequences transformers' ``generate`` works on for each row, one after the other."""
    configs = kwargs.get("generation_config"), getattr(model, "generation_config", None)

    def setting(name: str) -> int:
        found = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in found if isinstance(value, int)), 1)

    return max(setting("num_beams"), setting("num_return_sequences"))


def _path_of(model: nn.Module, layer: Any) -> str:
    paths = (path for path, module in Tree(model).firsts() if any(part is layer for part in chain(module)))
    return next(paths, type(layer).__name__)
