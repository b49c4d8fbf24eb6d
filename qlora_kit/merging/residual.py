"""The adapter that stays on a merged k-bit model and holds what rounding lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..adapter_files.backbone import fingerprint
from ..adapter_files.combined_config import rank_fields
from ..config.lora import LoraConfig
from ..injection.engine import Injection, Plan, Request, Start, inject_, make_plan
from ..injection.targets import shortest_names

if TYPE_CHECKING:
    from ..model.lora_model import LoraModel

RESIDUAL = "residual"


@dataclass(frozen=True)
class Residual:
    """An adapter that was injected and that its wrapper doesn't know of yet."""

    config: LoraConfig
    plan: Plan

    def adopt(self, model: LoraModel) -> None:
        """Make it ``model``'s only adapter, active and frozen; it belongs to this very base and says so."""
        model.peft_config[RESIDUAL] = self.config
        model.plan = self.plan
        layers = {entry.path: cast("Any", model.model.get_submodule(entry.path)) for entry in self.plan.entries}
        model.backbones[RESIDUAL] = fingerprint({path: layer.base_layer for path, layer in layers.items()})
        model.set_adapter(RESIDUAL, inference_mode=True)


def attach_residual_(
    model: LoraModel, factors: Mapping[str, tuple[Tensor, Tensor]], dtype: torch.dtype | None, undo: Injection
) -> Residual | None:
    """Inject branches with A (rank, in) and B (out, rank) by path, scaling 1, as parameters of ``dtype`` (None: as the
    model's adapters are); None where there are none."""
    if not factors:
        return None
    ranks = {path: A.shape[0] for path, (A, _) in factors.items()}
    places = {id(model.model.get_submodule(path)) for path in factors}
    aliases = [path for path, module in model.model.named_modules(remove_duplicate=False) if id(module) in places]
    first = next(iter(model.peft_config.values()))
    config = LoraConfig(
        target_modules=shortest_names(aliases, model.model),
        task_type=first.task_type,
        base_model_name_or_path=None,
        inference_mode=True,
        **rank_fields(ranks),
    )
    plan = make_plan(model.model, config)

    def start(request: Request) -> Start:
        return Start(*factors[request.path])

    done = inject_(model.model, plan, config, RESIDUAL, start, dtype=dtype or model.adapter_dtype)
    undo.on_undo(done.undo)
    for entry in plan.entries:
        cast("Any", model.model.get_submodule(entry.path)).active_adapters = [RESIDUAL]
    return Residual(config, plan)
