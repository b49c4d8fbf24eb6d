"""The life of named adapters on one model: added, active, switched off, merged, saved, deleted.

``LoraModel`` is a face: what it knows of its adapters is in an ``Adapted``, and each method is a call of the function
that does it, over that value alone. How the wrapper passes for the model it wraps is in ``proxy``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..adapter_files.folder import PREFIX
from ..adapter_files.gathering import roles
from ..adapter_files.tensors import load_resume_state_, save_adapter
from ..codecs import protect_storage_
from ..codecs.shards.tensors import to_pieces_
from ..config.lora import LoraConfig
from ..errors import AdapterError, MergeError
from ..injection.adapted import Adapted
from ..injection.engine import Plan
from ..injection.uncollected import uncollected
from ..layers import AdapterLayer, ModulesToSave
from ..merging.in_memory import merge
from ..merging.in_place import layers_to_merge, merge_in_place_, switch_off_, switch_on_, unmerge_
from ..naming import Tree
from ..training.preparation.trainers import marks_of
from .combining import add_weighted_adapter
from .counting import get_nb_trainable_parameters, print_trainable_parameters
from .hub import push_to_hub
from .keywords import as_names, check_save_keywords
from .life import add_, delete_, take_out_, train_
from .loading import AdapterContents, config_for, fill_, load_, opened_parts, record_, resumed_
from .merge_aware import set_merge_aware
from .of_transformers import dequantize, resize_token_embeddings
from .proxy import ModelProxy, check_model

L = TypeVar("L", bound="LoraModel")

_NOT_GIVEN = object()


class LoraModel(ModelProxy):
    """``model`` with adapter ``adapter_name`` injected in place, active and trainable; all else is frozen.

    Args:
        model: any torch model; a transformers model keeps all that it can do.
        config: what to adapt and how; it is copied, never changed.
        adapter_name: any name without a dot.
        adapter_dtype: dtype of the factors. By default float32 on half-precision and k-bit bases (small
            updates vanish in bfloat16) and the base's own dtype elsewhere.

    Attributes:
        model: the base model, adapter layers inside.
        peft_config: the configuration of each adapter by name.
        active_adapters: the names that forward applies, in order.
        plan: what was done for the adapter added last, a printable value.
        adapted: the adapters as a value, for functions that are written over it.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LoraConfig,
        adapter_name: str = "default",
        *,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(model)
        self.adapted = Adapted(model, adapter_dtype)
        self.adapted.marks = marks_of(model)
        self.add_adapter(adapter_name, config)
        protect_storage_(model)  # what isn't adapted too
        self.set_adapter(adapter_name, inference_mode=config.inference_mode)
        self.training = model.training  # each module inside keeps its own mode

    # -- adding, choosing, deleting ------------------------------------------------------------------------

    def add_adapter(self, adapter_name: str, config: LoraConfig) -> Plan:
        """Inject another adapter, neither active nor trainable yet; all of it, or on any error nothing.

        With one of the model's own configurations (``peft_config[other]``) and a start that can't be made twice, such
        as LoftQ's, which looks at weights that are gone, the new adapter begins as a copy of the other.

        Raises:
            AdapterError: the name is taken or can't be one, or two adapters would train the base's biases.
            TargetError: see ``qlora_kit.injection.targets``.
        """
        return add_(self.adapted, adapter_name, config)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one or several adapters the active ones, and (unless ``inference_mode``) the trainable ones."""
        self.adapted.choose_(as_names(adapter_name), trainable=not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train or freeze adapters without changing which ones are active."""
        train_(self.adapted, as_names(adapter_names), requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter. Where it was the only active one, the first of the others becomes active."""
        delete_(self.adapted, adapter_name)

    add_weighted_adapter = add_weighted_adapter
    set_merge_aware = set_merge_aware

    # -- switching off and on ------------------------------------------------------------------------------

    def disable_adapter_layers(self) -> None:
        """Compute as the base model does: branches, saved copies, trained biases and merges are set aside."""
        to_pieces_(self)
        switch_off_(self.adapted)

    def enable_adapter_layers(self) -> None:
        """Undo ``disable_adapter_layers``."""
        to_pieces_(self)
        switch_on_(self.adapted)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """``with lora.disable_adapter(): ...`` computes as the base model."""
        was_disabled = self.adapted.disabled
        self.disable_adapter_layers()
        try:
            yield
        finally:
            if not was_disabled:
                self.enable_adapter_layers()

    # -- merging and taking out ------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: str | Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Add the named (default: active) adapters to the base weights, keeping what undoes it bit for bit.

        Adapters merged before stay merged, and naming these alone is a MergeError. While any is, forward applies no
        others.
        """
        names = list(self.active_adapters) if adapter_names is None else as_names(adapter_names)
        for name in names:
            self.adapted.check_known(name)
        if not names:
            raise MergeError(f"nothing to merge: no adapter is active or named; the model has {list(self.peft_config)}")
        if self.adapted.disabled:
            raise MergeError("adapters are switched off, and so would the merge be; enable_adapter_layers() first")
        layers = layers_to_merge(self.adapted)
        of_each = {path: layer.active_adapters if adapter_names is None else names for path, layer in layers.items()}
        merge_in_place_(layers, of_each, safe=safe_merge)

    def unmerge_adapter(self) -> None:
        """Put every base weight back as it was before ``merge_adapter``, bit for bit."""
        unmerge_(self.adapted)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: str | Sequence[str] | None = None,
    ) -> nn.Module:
        """Merge into each module's own storage and return the base model without adapter layers.

        ``qlora_kit.merge`` does the same with a choice of storage and returns what was lost on the way. It
        refuses values that aren't finite; so does this, and ``safe_merge`` is here for PEFT's callers. A delta that
        rounding swallows, which it refuses too, is merged here as PEFT does it, and logged. Adapters that are trained
        for a merge (``LoraConfig.merge_aware``) get that one.
        """
        return merge(self, adapters=adapter_names, progressbar=progressbar, force=True, account=False).model

    def unload(self) -> nn.Module:
        """Return the base model as it was before the first adapter: its own module objects, biases and flags."""
        return take_out_(self.adapted)

    def get_base_model(self) -> nn.Module:
        """The wrapped model, adapter layers inside; ``unload()`` gives it without them."""
        return self.model

    # -- files -----------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        *,
        state_dict: Mapping[str, Tensor] | object | None = _NOT_GIVEN,
        is_main_process: bool | None = None,
        save_embedding_layers: bool | str = "auto",
        push_to_hub: bool = False,
        **others: Any,
    ) -> None:
        """Write the adapters, PEFT's layout: "default" in the folder, others in subfolders of their names.

        A Trainer's call (``is_main_process`` or ``state_dict=None``) also writes ``model.safetensors``, to resume from.
        ``save_embedding_layers`` says whether the base's tables of words go along (PEFT's argument): "auto" where the
        model has other words than its base, or the adapter has branches on them; True or False in any case.
        Of a sharded model every rank has to call this; the first writes, or who says ``is_main_process``.
        """
        check_save_keywords(others)
        if push_to_hub:
            raise AdapterError("push_to_hub=True: save_pretrained writes to a folder only; call push_to_hub(repo_id)")
        if not safe_serialization:
            raise AdapterError("safe_serialization=False would write a pickle; adapters are written as safetensors")
        if not self.peft_config:
            raise AdapterError(
                "save_pretrained: expected at least one adapter to save, found none, as they are merged, unloaded or "
                "deleted; a merged model is saved by report.model.save_pretrained(folder), with report = merge(lora)"
            )
        given = None if state_dict is _NOT_GIVEN else cast("Mapping[str, Tensor] | None", state_dict)
        takes_part, writes = roles(self, is_main_process, gathered=given is not None)
        if takes_part:
            options: Any = {"state_dict": given, "save_embedding_layers": save_embedding_layers, "writes": writes}
            options["resume_copy"] = is_main_process is not None or state_dict is None
            save_adapter(self.adapted, Path(save_directory), selected_adapters, **options)

    push_to_hub = push_to_hub

    @classmethod
    def from_pretrained(
        cls: type[L],
        model: Any,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        *,
        config: LoraConfig | None = None,
        allow_pickle: bool = False,
        check_backbone: bool = True,
        check_finite: bool = True,
        adapter_dtype: torch.dtype | None = None,
        ignore_mismatched_sizes: bool = False,
    ) -> L:
        """``model`` with the adapter stored in folder ``model_id``; on any error ``model`` is as it was.

        Unless ``is_trainable`` the adapter is frozen and the model in evaluation mode. ``config`` replaces the stored
        one. ``check_backbone`` refuses a LoftQ adapter on another base than its own, ``check_finite`` NaN and infinity;
        ``ignore_mismatched_sizes`` leaves out, with a warning, what doesn't fit.
        """
        check_model(model, "LoraModel.from_pretrained(model, folder)")
        stored = AdapterContents.read(model_id, allow_pickle=allow_pickle, check_finite=check_finite)
        config = stored.config if config is None else config
        with uncollected(), opened_parts(model, config):
            injected = config_for(model, config, stored.state, trainable=is_trainable)
            lora = cls(model, injected, adapter_name, adapter_dtype=adapter_dtype)
            try:
                fill_(lora.adapted, adapter_name, stored, check_base=check_backbone, any_size=ignore_mismatched_sizes)
            except BaseException:
                lora.unload()
                raise
            record_(lora.adapted, adapter_name, config, stored.backbone)
            return lora if is_trainable else lora.eval()

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        *,
        allow_pickle: bool = False,
        check_backbone: bool = True,
        check_finite: bool = True,
        ignore_mismatched_sizes: bool = False,
    ) -> None:
        """Add the adapter stored in folder ``model_id``, or overwrite the one of that name with it; from a Trainer's
        checkpoint of several adapters, all that are in use come back (by one name it asks for its best checkpoint)."""
        to_pieces_(self)
        new = adapter_name not in self.peft_config
        if resumed_(self.adapted, adapter_name, Path(model_id)):
            return
        load_(
            self.adapted,
            adapter_name,
            AdapterContents.read(model_id, allow_pickle=allow_pickle, check_finite=check_finite),
            trainable=is_trainable,
            check_base=check_backbone,
            any_size=ignore_mismatched_sizes,
            add=self.add_adapter,
            delete=self.delete_adapter,
        )
        if new and is_trainable:
            self.set_requires_grad(adapter_name)
        elif new:
            self.eval()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's; the state of a Trainer's checkpoint, or of an adapter's file, goes to its adapters, strictly."""
        if any(key.startswith(PREFIX) for key in state_dict):
            to_pieces_(self)
            load_resume_state_(self.adapted, state_dict)
            return torch.nn.modules.module._IncompatibleKeys([], [])
        return super().load_state_dict(state_dict, strict, assign)

    # -- looking at it -------------------------------------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        return self.adapted.configs

    @property
    def active_adapters(self) -> list[str]:
        return self.adapted.active

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, or the list of names where several are active."""
        return self.active_adapters[0] if len(self.active_adapters) == 1 else self.active_adapters

    @property
    def plan(self) -> Plan | None:
        return self.adapted.plan

    @property
    def backbones(self) -> dict[str, str]:
        """Fingerprints of the quantized bases that LoftQ adapters were started on, by adapter."""
        return self.adapted.backbones

    @property
    def adapter_dtype(self) -> torch.dtype | None:
        return self.adapted.adapter_dtype

    def adapter_layers(self) -> dict[str, AdapterLayer]:
        """Every adapter layer by its path in ``model``; one that stands at several paths comes once."""
        return self.adapted.layers()

    def saved_modules(self) -> dict[str, ModulesToSave]:
        """Every module with trained copies, by its path in ``model``."""
        return self.adapted.saved_modules()

    def paths_of(self, path: str) -> list[str]:
        """All paths in ``model`` where the module at ``path`` stands."""
        tree = Tree(self.model)
        return list(tree.paths_of(tree.modules[path]))

    get_nb_trainable_parameters = get_nb_trainable_parameters
    print_trainable_parameters = print_trainable_parameters
    dequantize = dequantize
    resize_token_embeddings = resize_token_embeddings


def apply_lora(
    model: nn.Module,
    config: LoraConfig,
    adapter_name: str = "default",
    *,
    adapter_dtype: torch.dtype | None = None,
) -> LoraModel:
    """Inject a trainable adapter into ``model`` (in place) and return the model wrapped. See ``LoraModel``."""
    return LoraModel(model, config, adapter_name, adapter_dtype=adapter_dtype)
