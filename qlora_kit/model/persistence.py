"""An adapter's way to files and back, as methods of ``LoraModel``; the files themselves are ``storage``'s."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..adapter_files.backbone import METADATA_KEY, check_backbone, fingerprint
from ..adapter_files.folder import PREFIX, read_metadata
from ..adapter_files.tensors import load_adapter_state_, load_resume_state_, read_adapter, save_adapter
from ..config.lora import LoraConfig
from ..errors import AdapterError
from ..injection.targets import ends_with, modules_of
from .proxy import ModelProxy

if TYPE_CHECKING:
    from .lora_model import LoraModel


_NOT_GIVEN = object()


class Persistence(ModelProxy):
    """Saving and loading adapters. Mixed into ``LoraModel``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        #: Fingerprints of the quantized bases that LoftQ adapters were started on, by adapter.
        self.backbones: dict[str, str] = {}

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        *,
        state_dict: Mapping[str, Tensor] | object | None = _NOT_GIVEN,
        is_main_process: bool | None = None,
        push_to_hub: bool = False,
        **_: Any,
    ) -> None:
        """Write the adapters, PEFT's layout: "default" in the folder, others in subfolders of their names.

        A call that says ``is_main_process`` or ``state_dict=None`` comes from a Trainer (a newer or an older
        one), which resumes from ``model.safetensors``; all adapters are then written into a file of that name
        as well, so that a stock resume finds them.
        """
        if push_to_hub:
            raise AdapterError("push_to_hub=True: save_pretrained writes to a folder only; call push_to_hub(repo_id)")
        if not safe_serialization:
            raise AdapterError("safe_serialization=False would write a pickle; adapters are written as safetensors")
        if is_main_process is not False:
            for_trainer = is_main_process is not None or state_dict is None
            given = None if state_dict is _NOT_GIVEN else cast("Mapping[str, Tensor] | None", state_dict)
            save_adapter(
                cast("LoraModel", self),
                Path(save_directory),
                selected_adapters,
                state_dict=given,
                resume_copy=for_trainer,
            )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Save the adapters (never the base model) and upload them to a Hub repository, made if it isn't there."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **kwargs)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or "Upload adapter",
                revision=revision,
                create_pr=create_pr,
            )

    @classmethod
    def from_pretrained(
        cls,
        model: Any,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        *,
        config: LoraConfig | None = None,
        allow_pickle: bool = False,
        check_backbone: bool = True,
        adapter_dtype: torch.dtype | None = None,
    ) -> Any:
        """``model`` with the adapter stored in folder ``model_id``; on any error ``model`` is as it was.

        Unless ``is_trainable`` the adapter is frozen and the model put into evaluation mode. A ``config`` given
        replaces the stored one. An adapter that LoftQ started fits the quantized base that it was started on,
        and ``check_backbone`` refuses others.
        """
        stored, state = read_adapter(model_id, allow_pickle=allow_pickle)
        config = stored if config is None else config
        lora = cast(Any, cls)(
            model, _for_loading(config, model, is_trainable), adapter_name, adapter_dtype=adapter_dtype
        )
        try:
            if check_backbone:
                lora._check_backbone(adapter_name, model_id)
            load_adapter_state_(lora, adapter_name, state)
        except BaseException:
            lora.unload()
            raise
        lora._loaded_(adapter_name, config, is_trainable, model_id)
        return lora

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        *,
        allow_pickle: bool = False,
        check_backbone: bool = True,
    ) -> None:
        """Add the adapter stored in folder ``model_id``, or overwrite the one of that name with it."""
        config, state = read_adapter(model_id, allow_pickle=allow_pickle)
        if adapter_name in self.peft_config:
            if check_backbone:
                self._check_backbone(adapter_name, model_id)
            load_adapter_state_(cast("LoraModel", self), adapter_name, state)
            return
        self.add_adapter(adapter_name, _for_loading(config, self.model, is_trainable))
        try:
            if check_backbone:
                self._check_backbone(adapter_name, model_id)
            load_adapter_state_(cast("LoraModel", self), adapter_name, state)
        except BaseException:
            self.delete_adapter(adapter_name)
            raise
        self._loaded_(adapter_name, config, is_trainable, model_id)
        if is_trainable:
            self.set_requires_grad(adapter_name)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's; the state of a Trainer's checkpoint, or of an adapter's file, goes to its adapters, strictly."""
        if any(key.startswith(PREFIX) for key in state_dict):
            load_resume_state_(cast("LoraModel", self), state_dict)
            return torch.nn.modules.module._IncompatibleKeys([], [])
        return super().load_state_dict(state_dict, strict, assign)

    def _loaded_(self, name: str, config: LoraConfig, is_trainable: bool, folder: str | Path) -> None:
        """Record how a loaded adapter once started, which its placeholder configuration doesn't say."""
        recorded = self.peft_config[name]
        self.peft_config[name] = dataclasses.replace(
            recorded, init_lora_weights=config.init_lora_weights, loftq_config=config.loftq_config
        )
        if backbone := read_metadata(folder).get(METADATA_KEY):
            self.backbones[name] = backbone
        if not is_trainable:
            self.eval()

    def _note_backbone_(self, name: str) -> None:
        """Keep what a LoftQ start was made for; taken at once, before shards or merges hide the codes."""
        if self.peft_config[name].init_lora_weights == "loftq":
            self.backbones[name] = fingerprint(self._bases_of(name))

    def _check_backbone(self, name: str, folder: str | Path) -> None:
        if expected := read_metadata(folder).get(METADATA_KEY):
            check_backbone(expected, self._bases_of(name), folder)

    def _bases_of(self, name: str) -> dict[str, nn.Module]:
        layers = cast("LoraModel", self).adapter_layers().items()
        return {path: layer.base_layer for path, layer in layers if name in layer.adapter_names()}


def _for_loading(config: LoraConfig, model: nn.Module, is_trainable: bool) -> LoraConfig:
    """The stored configuration with a start that costs nothing: every value is about to be overwritten.

    PEFT lists every usual name of a classification head in ``modules_to_save``. A name that matches nothing is
    dropped: were there tensors of such a module in the file, the strict load would refuse them.
    """
    paths = [path for path, _ in modules_of(model)]
    saved = [name for name in config.modules_to_save or () if any(ends_with(path, name) for path in paths)]
    return dataclasses.replace(
        config,
        modules_to_save=saved or None,
        init_lora_weights=True,
        loftq_config=None,
        inference_mode=not is_trainable,
    )
