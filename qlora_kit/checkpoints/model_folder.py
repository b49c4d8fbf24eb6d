"""A model's folder beside its tensors: what its config builds, what else is to be copied, and what tells it from
another or a changed one."""

from __future__ import annotations

import hashlib
import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..compat.neighbours.unpartitioned import unpartitioned
from ..errors import StorageError
from .files import json_object

# Weights of a 16-bit checkpoint in other formats, and what the output gets anew or isn't: an index, an adapter, the
# reports of the runs that made the source.
NOT_COPIED = re.compile(
    r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx|ot)(\.index\.json)?$|config\.json$|\..*|"
    r"adapter_config\.json$|(merge|loftq)_report\..*"
)
# No model has more; a config that says so would be built for hours.
_MOST_LAYERS = 4096
# What turns a text into tokens, in whatever of transformers' formats.
_TOKENIZER = re.compile(r"(tokenizer|vocab|merges|special_tokens|added_tokens).*|.*\.(model|tiktoken)$")
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
_FEATURES = "FEATURE_EXTRACTION"
# What PEFT's class of a task calls the model with, by name, whatever it was called with itself.
_WORDS = "input_ids attention_mask inputs_embeds"
_KEYWORDS = {
    **dict.fromkeys(("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS"), f"{_WORDS} labels"),
    "SEQ_2_SEQ_LM": f"{_WORDS} decoder_input_ids decoder_attention_mask decoder_inputs_embeds labels",
    "QUESTION_ANS": f"{_WORDS} start_positions end_positions",
    _FEATURES: _WORDS,
}


def identity(folder: Path) -> dict[str, str]:
    """What tells this model from another or a changed one: each file's size and a hash of samples."""
    files = [*sorted(folder.glob("*.safetensors")), folder / "config.json"]
    files += [file for file in other_files(folder) if _TOKENIZER.match(file.name)]
    return identity_of(files)


def identity_of(files: Iterable[Path]) -> dict[str, str]:
    """The size of each of ``files``, by its name, and a hash of samples."""
    return {file.name: f"{file.stat().st_size} bytes, {_sampled_hash(file)}" for file in files}


def tokenizer_files(folder: Path) -> list[Path]:
    """What turns a text into tokens, and a chat into a text."""
    return [file for file in other_files(folder) if _TOKENIZER.match(file.name) or "chat_template" in file.name]


def other_files(folder: Path) -> list[Path]:
    """Tokenizer, chat template, generation config and the like: to be copied as they are."""
    entries = sorted(entry for entry in folder.iterdir() if entry.is_file())
    return [entry for entry in entries if not NOT_COPIED.match(entry.name) and not _is_adapters_card(entry)]


def _is_adapters_card(file: Path) -> bool:
    """Whether ``file`` is the README of an adapter that lies beside the model, by the front matter that hubs read."""
    return file.name == "README.md" and b"library_name: peft" in file.read_bytes()[:4096]


def read_settings(folder: Path) -> dict[str, Any]:
    """What the folder's config.json says.

    Raises:
        StorageError: there is none, or none that is JSON of a dictionary.
    """
    try:
        return json_object((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{folder}: expected config.json beside the weights, found none that can be read ({error}); pass a "
            "model's folder"
        ) from error


def skeleton(folder: Path, *, quantized: bool = False, **overrides: Any) -> nn.Module:
    """The folder's model on the meta device, as its config names it; all of its modules dense.

    Args:
        quantized: take a model whose config says that it is quantized.
        overrides: entries of the config to be taken in the place of the folder's.

    Raises:
        StorageError: no config, or one of a quantized model.
    """
    settings = {**read_settings(folder), **overrides}
    _check_layers(folder, settings)
    config = _config(folder, overrides)
    if getattr(config, "quantization_config", None) is not None and not quantized:
        raise StorageError(
            f"{folder}: expected a model in 16 or 32 bits, found one that is quantized already; pass the original, "
            "or load this one and use init_lora_weights='loftq' with LoftQConfig(weights=original)"
        )
    return _without_weights(folder, config)


def empty_model(model: str | os.PathLike[str], dtype: torch.dtype, attention: str | None = None) -> nn.Module:
    """The model of a folder or of a name on the Hub on the meta device, dense, however it is stored; only its
    configuration is read.

    Args:
        dtype: of its weights.
        attention: transformers' name of how it attends; by default the best that the architecture has.

    Raises:
        StorageError: neither a folder with a config.json nor a name whose configuration can be had; or one of a model
            that transformers doesn't have.
    """
    if Path(model).is_dir():
        _check_layers(Path(model), read_settings(Path(model)))
    return _without_weights(model, _config(model, {}), attention, dtype=dtype)


def stored_by(model: str | os.PathLike[str]) -> str | None:
    """The quantization method that the configuration of a folder or of a name on the Hub says; None for 16 bits.

    Raises:
        StorageError: as ``empty_model``.
    """
    found = getattr(_config(model, {}), "quantization_config", None) or {}
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def _without_weights(
    folder: str | os.PathLike[str], config: Any, attention: str | None = None, **options: Any
) -> nn.Module:
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        # Kernels that a config names would be fetched, and nothing is computed here.
        config._attn_implementation, config._experts_implementation = attention, None
        with torch.device("meta"), unpartitioned():
            return _maker(config)(config, **options)
    except Exception as error:
        raise _not_built(folder, error) from error


def plainly(folder: str | os.PathLike[str], **options: Any) -> dict[str, Any]:
    """Keyword arguments for transformers' ``from_pretrained`` of ``folder``, or of a name on the Hub, that load its
    model and nothing else: no code or kernel that its config names, and no adapter that lies beside it.

    Args:
        options: for the configuration, ``local_files_only`` say.
    """
    config = _config(folder, options)
    config._attn_implementation = config._experts_implementation = None
    # An adapter is looked for in a folder within, which no system has.
    alone = {"adapter_kwargs": {"subfolder": "\0"}} if Path(folder).is_dir() else {}
    return {"config": config, "trust_remote_code": False, **alone}


def _config(folder: str | os.PathLike[str], overrides: Mapping[str, Any]) -> Any:
    """transformers' object of config.json; code that lies beside it is never run or asked about."""
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, **overrides)
    except Exception as error:
        raise _not_built(folder, error) from error


def _maker(config: Any) -> Callable[..., nn.Module]:
    """What builds the model that ``config`` names first, among those that transformers has."""
    import transformers

    listed = config.architectures if isinstance(config.architectures, (list, tuple)) else ()
    found = (getattr(transformers, name, None) for name in listed if isinstance(name, str))
    kind: Any = next((k for k in found if isinstance(k, type) and issubclass(k, transformers.PreTrainedModel)), None)
    if kind is not None:
        return kind._from_config
    return partial(transformers.AutoModel.from_config, trust_remote_code=False)


def _check_layers(folder: Path, settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        if isinstance(value, dict):
            _check_layers(folder, value)
        elif "layers" in key and isinstance(value, (int, float)) and not value <= _MOST_LAYERS:
            raise StorageError(
                f"{folder / 'config.json'}: {key}: expected at most {_MOST_LAYERS} layers, found {value}; download or "
                "save the model again"
            )


def _not_built(folder: str | os.PathLike[str], error: Exception) -> StorageError:
    said = next(iter(str(error).splitlines()), "") or type(error).__name__
    if isinstance(error, OSError) and not Path(folder).is_dir():
        return _neither("model", folder, error)
    if "trust_remote_code" in str(error) or "custom code" in str(error):
        said = "one whose code lies beside it (auto_map), which is never run here"
    return StorageError(
        f"{Path(folder) / 'config.json'}: expected a config of a model that transformers has, found another "
        f"({said}); save the model again with transformers' save_pretrained"
    )


def task_type(model: nn.Module) -> str | None:
    """PEFT's name of what the model is for, from its class; None where PEFT's own class for that couldn't call it.

    PEFT wraps a model in a class of its task, which calls it with certain keywords: one that takes sounds or images in
    the place of words, or words beside them and no decoder's, would fail at the first forward. With a null task it is
    wrapped in one that passes on whatever it is called with.
    """
    name = type(model).__name__
    task = task_of(name)
    taken = inspect.signature(type(model).forward).parameters
    bare = name.endswith("Model")  # what AutoModel builds; features are had from nothing else
    called_so = all(keyword in taken for keyword in _KEYWORDS[task].split())
    return task if called_so and (bare or task != _FEATURES) else None


def task_of(name: str) -> str:
    """PEFT's name of what a model class of this name is for."""
    return next((kind for part, kind in _TASKS.items() if part in name), _FEATURES)


def locate(model: str | os.PathLike[str], argument: str = "model") -> Path:
    """The folder of ``model``: itself, or a Hub repository's, downloaded unless the environment is offline.

    Args:
        argument: what it was given as, for messages.

    Raises:
        StorageError: neither a folder nor a repository that can be had.
    """
    if Path(model).is_dir():
        return Path(model)
    if Path(model).exists():
        raise StorageError(
            f"{argument}={str(model)!r}: expected a folder or a repository on the Hub, found a file; pass the folder "
            "that it is in"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
    try:
        return Path(snapshot_download(str(model), allow_patterns=wanted))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise _neither(argument, model, error) from error


def _neither(argument: str, model: str | os.PathLike[str], error: Exception) -> StorageError:
    return StorageError(
        f"{argument}={str(model)!r}: expected a folder or a repository on the Hub, found neither "
        f"({str(error).splitlines()[0]}); correct the name, or download it first"
    )


def _sampled_hash(file: Path, samples: int = 64, length: int = 4096) -> str:
    """Of the first 64 kB, where the header is, and of pieces spread evenly over the file."""
    size = file.stat().st_size
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        digest.update(stream.read(1 << 16))
        for index in range(samples):
            stream.seek(max(0, size - length) * index // max(1, samples - 1))
            digest.update(stream.read(length))
    return digest.hexdigest()[:32]
