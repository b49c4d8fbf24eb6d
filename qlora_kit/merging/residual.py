"""The adapter that stays on a merged k-bit model and holds what rounding lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapter_files.backbone import fingerprint
from ..adapter_files.combined_config import rank_fields
from ..config.lora import LoraConfig
from ..injection.adapted import Adapted
from ..injection.engine import Injection, Plan, Request, Start, inject_, make_plan
from ..injection.heads import fitting_task
from ..injection.targets import shortest_names
from ..naming import Tree

RESIDUAL = "residual"


@dataclass(frozen=True)
class Residual:
    """An adapter that was injected and that its wrapper doesn't know of yet."""

    config: LoraConfig
    plan: Plan

    def adopt_(self, adapted: Adapted) -> None:
        """Make it the model's only adapter, active and frozen; it belongs to this very base and says so."""
        adapted.configs[RESIDUAL], adapted.plan = self.config, self.plan
        adapted.backbones[RESIDUAL] = fingerprint(adapted.bases_of(RESIDUAL))
        adapted.freeze_()
        adapted.choose_([RESIDUAL], trainable=False)


def attach_residual_(
    adapted: Adapted, factors: Mapping[str, tuple[Tensor, Tensor]], dtype: torch.dtype | None, undo: Injection
) -> Residual | None:
    """Inject branches with A (rank, in) and B (out, rank) by path, scaling 1, as parameters of ``dtype`` (None: as the
    model's adapters are); None where there are none."""
    if not factors:
        return None
    ranks = {path: A.shape[0] for path, (A, _) in factors.items()}
    tree = Tree(adapted.root)
    aliases = [alias for path in factors for alias in tree.paths_of(tree.modules[path])]
    first = next(iter(adapted.configs.values()))
    config = LoraConfig(
        target_modules=shortest_names(aliases, tree),
        task_type=fitting_task(tree, first.task_type, []),  # it holds no head, which went into the base
        base_model_name_or_path=None,
        inference_mode=True,
        **rank_fields(ranks),
    )
    plan = make_plan(tree, config)

    def start(request: Request) -> Start:
        return Start(*factors[request.path])

    done = inject_(adapted.root, plan, config, RESIDUAL, start, dtype=dtype or adapted.adapter_dtype)
    undo.on_undo(done.undo)
    for layer in adapted.layers().values():
        layer.active_adapters = [RESIDUAL]
    return Residual(config, plan)
