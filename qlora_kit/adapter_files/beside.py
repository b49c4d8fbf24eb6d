"""What goes beside an adapter's weights when a model saves it: its configuration, and what its README says."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from dataclasses import replace

from ..config.lora import LoraConfig
from ..injection.adapted import Adapted
from ..injection.stacks import taken_for_experts
from ..naming import canonical, unwrapped
from .card import About, about_start
from .slots import Slot

logger = logging.getLogger(__name__)


def about(adapted: Adapted, name: str) -> About:
    """What the README says: how the adapter was started, and what the base model is tagged with."""
    reports = [layer.start_reports[name] for layer in adapted.layers().values() if name in layer.start_reports]
    base = unwrapped(adapted.root)
    library = ["transformers"] if type(base).__module__.startswith("transformers.") else []
    tags = [*library, *(getattr(base, "model_tags", None) or ())]
    rows = about_start(adapted.configs[name], reports)
    if name in adapted.backbones and adapted.configs[name].init_lora_weights is True:  # loaded, and so started before
        rows["start"] = "together with its quantized base"
    return About(rows, tags, hub=hasattr(base, "config"))


def stored_config(adapted: Adapted, name: str) -> LoraConfig:
    """The config as it goes beside the weights. Without a task type it names the class that the base model is of, which
    is how a reader that has only the folder loads it."""
    config = adapted.configs[name].as_stored()
    if config.task_type is not None or config.auto_mapping is not None:
        return config
    kind = type(unwrapped(adapted.root))
    return replace(config, auto_mapping={"base_model_class": kind.__name__, "parent_library": kind.__module__})


def warn_of_what_stays_behind(adapted: Adapted, slots: Iterable[Slot]) -> None:
    """Warn of parameters of the base that are trained by the caller's own choice, and that no file of an adapter holds:
    ``slots`` are those that are written."""
    held = {id(slot.tensor) for slot in slots}
    for part in adapted.parts():
        held |= {id(tensor) for name in part.adapter_names() for tensor in part.adapter_tensors(name).values()}
    names = [name for name, p in adapted.root.named_parameters() if p.requires_grad and id(p) not in held]
    if names:
        warnings.warn(
            f"save_pretrained: {len(names)} parameters of the base model are trained, {canonical(names[0])} for one, "
            "and an adapter's files hold none of them; name their modules in modules_to_save (biases: bias='all'), or "
            "save the base model too",
            stacklevel=2,
        )


def say_what_others_misread(adapted: Adapted) -> None:
    """Log which adapted layers PEFT and transformers take for others, by names that are saved as they are."""
    if misread := taken_for_experts(adapted.tree(), adapted.layers()):
        logger.warning(
            "save_pretrained: PEFT and transformers take the names of %d adapted layers, %s for one, for those of this "
            "model's experts, and load the adapter wrongly or not at all; here it loads as it is. To share it with "
            "them leave these layers out",
            len(misread),
            misread[0],
        )
