"""Checkpoints as folders of safetensors shards, read one tensor at a time.

``ShardReader`` knows where each tensor lies from the checkpoint's index, or from the shards' own headers
where there is none, and maps a file only while one of its tensors is read: memory use is that tensor's size,
whatever the checkpoint's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import StorageError, closest
from .files import json_object, not_whole

# The format's names of the types that torch has.
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
    **{"F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
    **{"C64": torch.complex64, "BOOL": torch.bool},
}
FORMAT_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
INDEX_SUFFIX = ".safetensors.index.json"
_ADAPTER = "adapter_model.safetensors"


class ShardReader:
    """The tensors of a folder of safetensors files, by name.

    Args:
        folder: holds ``*.safetensors`` and, if there are several, usually an index beside them.

    Raises:
        StorageError: the folder, its index or a shard is missing or damaged, or two shards hold one name.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise StorageError(
                f"{self.folder}: expected a folder of safetensors files, found "
                f"{'a file' if self.folder.exists() else 'nothing'}; pass the folder that holds the checkpoint"
            )
        indexes = sorted(self.folder.glob(f"*{INDEX_SUFFIX}"))
        if len(indexes) > 1:
            names = ", ".join(index.name for index in indexes)
            raise StorageError(
                f"{self.folder}: expected one index, found {names}; move all but one checkpoint elsewhere"
            )
        self._files = self._from_index(indexes[0]) if indexes else self._from_headers(self._shards())

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> ShardReader:
        """The tensors of a folder, of one safetensors file, or of those that an index lists."""
        file = Path(path)
        if not file.is_file():
            return cls(path)
        reader = cls.__new__(cls)
        reader.folder = file.parent
        is_index = file.name.endswith(INDEX_SUFFIX)
        reader._files = reader._from_index(file) if is_index else reader._from_headers([file])
        return reader

    def keys(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self._files)

    def tensor(self, name: str) -> Tensor:
        """One tensor in its stored shape and dtype, on the CPU; nothing else is read.

        Raises:
            StorageError: no such name (the closest are listed), or its shard is damaged or lacks it.
        """
        with self._shard_of(name) as shard:
            return shard.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from its shard's header alone; raises as ``tensor`` does."""
        with self._shard_of(name) as shard:
            return tuple(shard.get_slice(name).get_shape())

    def types(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Every tensor's dtype and shape; each shard's header is read once, and nothing else.

        Raises:
            StorageError: a shard is damaged, lacks a tensor, or holds a type that torch hasn't.
        """
        headers = {file: _header(file) for file in sorted(set(self._files.values()))}
        found = {}
        for name in self:
            entry = headers[self._files[name]].get(name)
            if entry is None or entry["dtype"] not in _DTYPES:
                what = "no such tensor" if entry is None else f"a type {entry['dtype']} that torch hasn't"
                raise StorageError(
                    f"{self._files[name]}: expected {name!r} in one of {sorted(_DTYPES)}, found {what}; "
                    "download or convert the checkpoint again"
                )
            found[name] = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        return found

    @contextmanager
    def _shard_of(self, name: str) -> Iterator[Any]:
        if name not in self._files:
            raise StorageError(
                f"{self.folder}: expected a tensor {name!r}, found none of that name among {len(self)}; "
                f"the closest are {closest(name, self._files)}"
            )
        with _opened(self._files[name]) as shard:
            if name not in shard.keys():  # noqa: SIM118 - safe_open is no mapping
                raise StorageError(
                    f"{self._files[name]}: expected the tensor {name!r} that the index puts there, found "
                    f"{closest(name, shard.keys())} and others; download or save the checkpoint again"
                )
            yield shard

    def _from_index(self, index: Path) -> dict[str, Path]:
        try:
            weight_map = json_object(index.read_bytes())["weight_map"]
            files = {str(name): str(file) for name, file in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(
                f"{index}: expected JSON with a 'weight_map' from tensor to file, found something else "
                f"({error!r}); download or save the checkpoint again"
            ) from error
        for file in sorted(set(files.values())):
            if Path(file).name != file:
                raise StorageError(
                    f"{index}: expected file names inside the checkpoint's folder, found {file!r}; "
                    "the index is foreign or tampered with"
                )
            if not (self.folder / file).is_file():
                raise StorageError(
                    f"{index}: expected the shard {file} beside it, found none; "
                    "finish the download or save the checkpoint again"
                )
        return {name: self.folder / file for name, file in files.items()}

    def _from_headers(self, shards: Iterable[Path]) -> dict[str, Path]:
        files: dict[str, Path] = {}
        for file in shards:
            with _opened(file) as shard:
                for name in shard.keys():  # noqa: SIM118 - safe_open is no mapping
                    if name in files:
                        raise StorageError(
                            f"{self.folder}: expected each tensor once, found {name!r} in {files[name].name} "
                            f"and {file.name}; keep one checkpoint in the folder, or add its index"
                        )
                    files[name] = file
        if not files:
            raise StorageError(
                f"{self.folder}: expected safetensors files, found "
                f"{sorted(entry.name for entry in self.folder.iterdir())[:8]}; pass the folder that holds the "
                "weights, and convert .bin checkpoints to safetensors first"
            )
        return files

    def _shards(self) -> list[Path]:
        """The folder's files; an adapter that lies beside a model isn't a part of it."""
        files = sorted(self.folder.glob("*.safetensors"))
        return [file for file in files if file.name != _ADAPTER] or files


def _header(file: Path) -> dict[str, Any]:
    """A shard's header as it stands at the beginning of the file; opening it first checks that it is whole."""
    with _opened(file), file.open("rb") as stream:
        return json.loads(stream.read(int.from_bytes(stream.read(8), "little")))


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt", device="cpu") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise not_whole(file, error, "download or save it again") from error
