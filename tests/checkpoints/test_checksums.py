"""A checksum of each tensor that was written finds a byte that changed, a tensor that went and one that came."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_kit.checkpoints.checksums import KEY, check_tensors, checksum, checksum_of, checksums_in
from qlora_kit.checkpoints.growing_file import GrowingFile, header_room
from qlora_kit.checkpoints.shards import FORMAT_NAMES, ShardReader
from qlora_kit.errors import StorageError

TENSORS = {
    "matrix": torch.arange(12.0).view(3, 4),
    "half": torch.arange(6.0).to(torch.bfloat16),
    "float8": torch.arange(6.0).to(torch.float8_e4m3fn),
    "codes": torch.arange(9, dtype=torch.uint8),
    "scalar": torch.tensor(2.5),
    "none": torch.empty(0, 3),
    "mask": torch.tensor([True, False]),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_checksum_is_that_of_type_and_shape_and_the_bytes_in_order(name: str) -> None:
    tensor = TENSORS[name]
    data = bytes(tensor.reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""
    head = f"{FORMAT_NAMES[tensor.dtype]} {list(tensor.shape)}".encode()
    assert checksum(tensor) == checksum_of(data, head) == f"{zlib.crc32(head + data):08x}"
    assert checksum_of(data) == f"{zlib.crc32(data):08x}"


def test_the_same_bytes_are_another_tensor_in_another_shape_or_type() -> None:
    matrix = TENSORS["matrix"]
    found = {checksum(matrix), checksum(matrix.reshape(4, 3)), checksum(matrix.view(torch.int32)), checksum(matrix[:0])}
    assert len(found) == 4


def test_the_layout_in_memory_has_no_part_in_it() -> None:
    matrix = TENSORS["matrix"]
    assert checksum(matrix.T.contiguous().T) == checksum(matrix) != checksum(matrix.T)
    assert checksum(matrix[:, ::2]) == checksum(matrix[:, ::2].clone())


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    file = GrowingFile(tmp_path / "model.safetensors", header_room(TENSORS))
    found = checksums_in({name: file.append(name, tensor) for name, tensor in TENSORS.items()})
    file.finish()
    return tmp_path, found


def test_what_was_written_is_found_as_it_was(written: tuple[Path, dict[str, str]]) -> None:
    folder, expected = written
    assert expected == {name: checksum(tensor) for name, tensor in TENSORS.items()}
    assert check_tensors(ShardReader(folder), expected, fix="go") == len(TENSORS)
    assert KEY.encode() not in (folder / "model.safetensors").read_bytes()  # the format has no such entry


def test_a_flipped_bit_is_found(written: tuple[Path, dict[str, str]]) -> None:
    folder, expected = written
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # in the tensor that was written last
    file.write_bytes(data)
    with pytest.raises(StorageError, match=r"found 1 of 7 tensors changed since \(mask\); run it again"):
        check_tensors(ShardReader(folder), expected, fix="run it again")


def test_a_tensor_that_went_and_one_that_came_are_named(written: tuple[Path, dict[str, str]]) -> None:
    folder, expected = written
    tensors = load_file(folder / "model.safetensors")
    tensors["another"] = tensors.pop("matrix")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(StorageError, match=r"7 tensors that were written, found 1 missing \(matrix\) and 1 more \(ano"):
        check_tensors(ShardReader(folder), expected, fix="run it again")
