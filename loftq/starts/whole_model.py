"""``init_lora_weights="loftq"`` on a whole model in memory. Methods that look at the inputs have text run through the
model once, and find each module's start when its turn comes; the modules are exchanged when all are there."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qlora_kit.config.loftq import LoftQConfig
from qlora_kit.errors import ConfigError, TargetError
from qlora_kit.initializers import Initializer, register_initializer
from qlora_kit.injection.engine import Request

from ..inputs.groups import stages
from ..inputs.text import calibration_batches
from ..methods.registry import needs_of
from .default_text import with_text
from .kept_dense import kept_dense, plain_start, reason_of
from .one_module import loftq_start, start_of
from .report import not_reached, short_calibration
from .startable import checked

# Bytes of activations in memory between blocks, before they go to files.
_LIMIT = 4 << 30


@torch.no_grad()
def prepare(model: nn.Module, requests: Sequence[Request]) -> Initializer:
    """The starts of ``requests``, found in the order of the model's forward; see ``kept_dense`` for what stays dense.

    Raises:
        ConfigError, StorageError, TargetError: see ``loftq.starts.one_module`` and ``loftq.inputs.text``.
    """
    options = requests[0].config.loftq_config or LoftQConfig()
    needs, kept = needs_of(options.chosen_method), kept_dense(model, options)
    starts = {
        request.path: plain_start(request, options, reason)
        for request in requests
        if (reason := reason_of(request, kept)) is not None
    }
    by_path = {checked(request).path: request for request in requests if request.path not in starts}
    if not by_path:
        raise TargetError(
            f"{requests[0].path}: expected a module that few bits can hold, found none among the targets "
            f"({next(iter(starts.values())).report.reason}); target others too, or use init_lora_weights=True"
        )
    if needs.statistics is None:
        return lambda request: starts.pop(request.path, None) or start_of(request, options)
    if shared := [request.path for request in by_path.values() if request.sharding is not None]:
        raise ConfigError(
            f"{shared[0]}: expected a layer that this process holds whole for method {options.chosen_method!r}, which "
            "looks at inputs, found one that is sharded; make the start in one process (loftq init) and load its "
            "folder, or take method 'loftq'"
        )
    batches = calibration_batches(options, model)
    walk = stages(
        model,
        batches,
        by_path,
        diagonal=needs.statistics == "diagonal",
        sequential=needs.sequential,
        limit=_LIMIT,
    )
    for stage in walk:
        for path in stage.paths:
            changes: list[Tensor] | None = [] if needs.sequential else None
            starts[path] = start_of(by_path[path], options, stage.seen().get(path), changes)
            if changes:
                stage.replaced[path] = changes[0]
    unseen = [path for path in by_path if path not in starts or starts[path].report.tokens is None]
    starts |= {path: start_of(by_path[path], options) for path in unseen if path not in starts}
    if unseen:
        warnings.warn(not_reached(unseen, len(by_path)), stacklevel=2)
    if message := short_calibration([starts[path].report for path in by_path]):
        warnings.warn(message, stacklevel=2)
    return lambda request: starts.pop(request.path)


register_initializer("loftq", prepare=prepare, settle=with_text, bounded=True)(loftq_start)
