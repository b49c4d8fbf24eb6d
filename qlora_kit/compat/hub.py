"""Where an adapter lies: in a local folder, or in a repository on the Hugging Face Hub that the caller named.

The toolkit itself reads local folders only. PEFT's users also write ``from_pretrained("someone/an-adapter")``,
and with it ask for a download.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import StorageError, closest

#: What callers may say about a download.
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "force_download", "local_files_only", "proxies")

#: Keywords that say how an adapter is loaded, and nothing to a base model's ``from_pretrained``.
OF_LOADING = (
    "allow_pickle",
    "autocast_adapter_dtype",
    "ephemeral_gpu_offload",
    "ignore_mismatched_sizes",
    "low_cpu_mem_usage",
)

# Keywords of PEFT's loading functions that say where and how to place tensors; here that follows from the base.
_WITHOUT_EFFECT = (
    "autocast_adapter_dtype",
    "device_map",
    "ephemeral_gpu_offload",
    "low_cpu_mem_usage",
    "max_memory",
    "offload_buffers",
    "offload_dir",
    "offload_folder",
    "offload_index",
    "torch_device",
    "torch_dtype",
)


def adapter_folder(name: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any) -> Path:
    """The local folder of adapter ``name``, downloaded first where ``name`` is the id of a Hub repository.

    Raises:
        StorageError: ``name`` is neither a folder nor a repository that can be reached.
        TypeError: a keyword that PEFT's loading functions don't know.
    """
    known = (*HUB_ARGUMENTS, *_WITHOUT_EFFECT, "subfolder")
    for key in kwargs:
        if key not in known:
            raise TypeError(f"unexpected keyword argument {key!r}; closest: {closest(key, known)}")
    folder = Path(name)
    if not folder.is_dir():
        folder = _download(str(name), {k: v for k, v in kwargs.items() if k in HUB_ARGUMENTS and v is not None})
    return folder / subfolder if subfolder else folder


def _download(repo_id: str, arguments: dict[str, Any]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["adapter_config.json", "adapter_model.*", "*/adapter_config.json", "*/adapter_model.*"]
    try:
        return Path(snapshot_download(repo_id, allow_patterns=patterns, **arguments))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise StorageError(
            f"{repo_id}: expected a local folder with an adapter or the id of a repository on the Hub, found "
            f"neither ({type(error).__name__}: {str(error).splitlines()[0]}); check the spelling"
        ) from error
