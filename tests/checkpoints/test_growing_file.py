"""A safetensors file written tensor by tensor: what readers make of it, and going on after a cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from qlora_kit.checkpoints.growing_file import GrowingFile, header_room
from qlora_kit.checkpoints.shards import FORMAT_NAMES, ShardReader
from qlora_kit.errors import StorageError


def tensors() -> dict[str, Tensor]:
    """One of each dtype, and the shapes that are easy to get wrong."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(5, 7, generator=generator) * 40
    made = {str(dtype): (noise > 0 if dtype is torch.bool else noise.to(dtype)) for dtype in FORMAT_NAMES}
    return {
        **made,
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "odd bytes": torch.ones(3, dtype=torch.int8),  # what follows isn't aligned
        "after them": noise.double(),
        "transposed": noise.T,
        "strided": noise[::2, 1::3].bfloat16(),
        "expanded": torch.tensor([1.0]).expand(2, 3),
        "parameter": torch.nn.Parameter(noise[:2].clone()),
        'näme "quoted" \n': torch.zeros(1),
    }


def equal(a: Tensor, b: Tensor) -> bool:
    """Bitwise, in dtype and shape too; torch.equal doesn't know float8."""
    a, b = a.detach().contiguous().reshape(-1), b.detach().contiguous().reshape(-1)
    return a.dtype == b.dtype and bool((a.view(torch.uint8) == b.view(torch.uint8)).all())


def write(path: Path, values: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    writer = GrowingFile(path, header_room(values))
    for name, tensor in values.items():
        writer.append(name, tensor)
    writer.finish(metadata)


def test_a_finished_file_is_read_in_every_dtype_and_shape(tmp_path: Path) -> None:
    path, values = tmp_path / "model.safetensors", tensors()
    write(path, values)
    loaded = load_file(path)
    assert loaded.keys() == values.keys()
    with safe_open(path, framework="pt") as file:
        for name, tensor in values.items():
            for found in (loaded[name], file.get_tensor(name)):
                assert found.shape == tensor.shape
                assert equal(found, tensor), name


def test_a_file_of_no_tensors_is_read(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", {})
    assert load_file(tmp_path / "model.safetensors") == {}


def test_the_readers_types_agree_with_what_is_loaded(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", tensors())
    loaded = load_file(tmp_path / "model.safetensors")
    expected = {name: (loaded[name].dtype, tuple(loaded[name].shape)) for name in sorted(loaded)}
    assert ShardReader(tmp_path).types() == expected


def test_metadata_is_kept_beside_the_format(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write(path, {"a": torch.ones(2)}, {"backbone": "0123"})
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "backbone": "0123"}


def test_no_reader_takes_an_unfinished_file_for_whole(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    writer = GrowingFile(path, header_room(["a", "b"]))
    for name in "ab":
        writer.append(name, torch.ones(100))
        writer.sync()
        with pytest.raises(SafetensorError), safe_open(path, framework="pt"):
            pass
    writer.close()
    with pytest.raises(StorageError, match="expected a whole safetensors file"):
        ShardReader(tmp_path)


def test_a_name_is_written_once(tmp_path: Path) -> None:
    writer = GrowingFile(tmp_path / "model.safetensors", header_room("a"))
    writer.append("a", torch.ones(2))
    with pytest.raises(StorageError, match=r"model.safetensors: a: expected a name once"):
        writer.append("a", torch.zeros(2))
    writer.finish()
    assert equal(load_file(tmp_path / "model.safetensors")["a"], torch.ones(2))


def test_a_dtype_that_the_format_lacks_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    writer = GrowingFile(tmp_path / "model.safetensors", header_room("ab"))
    with pytest.raises(StorageError, match=r"a: expected one of .*torch.bfloat16.*found .* torch.complex128"):
        writer.append("a", torch.ones(2, dtype=torch.complex128))
    writer.append("b", torch.ones(2))
    writer.finish()
    assert load_file(tmp_path / "model.safetensors").keys() == {"b"}


def test_a_header_that_does_not_fit_its_room_is_refused(tmp_path: Path) -> None:
    writer = GrowingFile(tmp_path / "model.safetensors", 64)
    writer.append("a rather long name of a tensor", torch.ones(2))
    with pytest.raises(StorageError, match="expected a header of at most 64 bytes, found"):
        writer.finish()
    writer.close()
    with pytest.raises(SafetensorError), safe_open(tmp_path / "model.safetensors", framework="pt"):
        pass


def test_the_reserved_room_holds_the_longest_entries(tmp_path: Path) -> None:
    """Names that JSON writes longer, large offsets, and several dimensions."""
    names = [f'模型.layers.{i}."experts".weight' for i in range(50)]
    writer = GrowingFile(tmp_path / "model.safetensors", header_room(names))
    for name in names:
        writer.append(name, torch.zeros(1, 1, 100, 1, 1))
    # Offsets as in a shard of a petabyte.
    for entry in writer.entries.values():
        entry["data_offsets"] = [10**15, 10**15 + 400]
    writer.finish({"backbone": "0" * 32})


@pytest.mark.parametrize("garbage", [b"", b"\xff" * 1001], ids=["clean cut", "with more behind it"])
@pytest.mark.parametrize("kept", [0, 1, 7, 15, len(tensors())])
def test_going_on_after_a_cut_ends_with_the_same_bytes(tmp_path: Path, kept: int, garbage: bytes) -> None:
    values = tensors()
    write(tmp_path / "whole", values, {"key": "value"})
    path, room = tmp_path / "cut", header_room(values)
    first = GrowingFile(path, room)
    entries = {name: first.append(name, tensor) for name, tensor in list(values.items())[:kept]}
    first.close()
    with path.open("ab") as file:
        file.write(garbage)
    second = GrowingFile(path, room, entries)
    for name, tensor in list(values.items())[kept:]:
        second.append(name, tensor)
    second.finish({"key": "value"})
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_finished_file_can_be_finished_again(tmp_path: Path) -> None:
    path, values = tmp_path / "model.safetensors", tensors()
    room, entries = header_room(values), {}
    writer = GrowingFile(path, room)
    for name, tensor in values.items():
        entries[name] = writer.append(name, tensor)
    writer.finish()
    before = path.read_bytes()
    GrowingFile(path, room, entries).finish()
    assert path.read_bytes() == before


@pytest.mark.parametrize("missing", [1, 10**6], ids=["by a byte", "gone"])
def test_a_file_shorter_than_its_entries_is_refused_and_left(tmp_path: Path, missing: int) -> None:
    path, room = tmp_path / "model.safetensors", header_room("a")
    writer = GrowingFile(path, room)
    entries = {"a": writer.append("a", torch.ones(8))}
    writer.close()
    if missing > 1:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    left = path.stat().st_size if path.exists() else 0
    with pytest.raises(StorageError, match=rf"expected at least {8 + room + 32:,} bytes .* found {left:,}"):
        GrowingFile(path, room, entries)
    assert (path.stat().st_size if path.exists() else 0) == left
