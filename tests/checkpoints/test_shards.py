"""The lazy reader: what it finds, and what it says when something is missing or damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlora_kit.checkpoints.shards import ShardReader
from qlora_kit.errors import StorageError

TENSORS = {
    "model.a.weight": torch.arange(12.0).reshape(3, 4),
    "model.b.weight": torch.arange(6.0).reshape(2, 3).bfloat16(),
    "lm_head.weight": torch.arange(4, dtype=torch.uint8),
}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards and the index that transformers writes."""
    files = {"model-00001-of-00002.safetensors": ["model.a.weight"]}
    files["model-00002-of-00002.safetensors"] = ["model.b.weight", "lm_head.weight"]
    for file, names in files.items():
        save_file({name: TENSORS[name] for name in names}, tmp_path / file)
    weight_map = {name: file for file, names in files.items() for name in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


@pytest.mark.parametrize("with_index", [True, False])
def test_reads_every_tensor_of_the_shards(sharded: Path, with_index: bool) -> None:
    if not with_index:
        (sharded / "model.safetensors.index.json").unlink()
    reader = ShardReader(sharded)
    assert reader.keys() == list(reader) == sorted(TENSORS)
    assert len(reader) == 3
    assert "model.a.weight" in reader
    assert "a.weight" not in reader
    for name, expected in TENSORS.items():
        found = reader.tensor(name)
        assert found.dtype == expected.dtype
        assert reader.shape(name) == expected.shape
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_reads_a_single_file(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    torch.testing.assert_close(ShardReader(str(tmp_path)).tensor("model.a.weight"), TENSORS["model.a.weight"])


def test_only_the_shard_that_is_asked_for_is_opened(sharded: Path) -> None:
    """A damaged second shard doesn't matter until one of its tensors is read."""
    damaged = sharded / "model-00002-of-00002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-4])
    reader = ShardReader(sharded)
    torch.testing.assert_close(reader.tensor("model.a.weight"), TENSORS["model.a.weight"])
    with pytest.raises(StorageError, match=r"00002-of-00002.safetensors: expected a whole safetensors file"):
        reader.tensor("lm_head.weight")
    damaged.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(StorageError, match=r"found the pointer that Git LFS puts in its place; run git lfs pull"):
        reader.tensor("lm_head.weight")


def test_a_file_without_the_right_to_read_it(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the file's mode, which binds no superuser."""

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    reader = ShardReader(sharded)
    monkeypatch.setattr("qlora_kit.checkpoints.shards.safe_open", denied)
    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(
        StorageError, match=r"00001-of-00002.safetensors: .*found one that can't be read \(Permission d"
    ):
        reader.tensor("model.a.weight")


def test_an_unknown_name_lists_the_closest(sharded: Path) -> None:
    with pytest.raises(StorageError, match=r"expected a tensor 'a.weight', .* among 3; .*'model.a.weight'"):
        ShardReader(sharded).tensor("a.weight")


def test_missing_folder_and_empty_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"nowhere: expected a folder of safetensors files, found nothing"):
        ShardReader(tmp_path / "nowhere")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(StorageError, match=r"found \['pytorch_model.bin'\]; .* convert .bin"):
        ShardReader(tmp_path)
    with pytest.raises(StorageError, match=r"pytorch_model.bin: .* found a file"):
        ShardReader(tmp_path / "pytorch_model.bin")


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(StorageError, match=r"expected the shard model-00002-of-00002.safetensors beside it"):
        ShardReader(sharded)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_named(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(StorageError, match=r"index.json: expected JSON with a 'weight_map'"):
        ShardReader(sharded)


def test_an_index_that_points_outside_the_folder_is_refused(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(StorageError, match=r"inside the checkpoint's folder, found '../secret.safetensors'"):
        ShardReader(sharded)


def test_an_index_that_misplaces_a_tensor_is_named(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(StorageError, match=r"00001-of-00002.safetensors: expected the tensor 'lm_head.weight'"):
        ShardReader(sharded).tensor("lm_head.weight")


def test_one_name_in_two_files_is_refused(tmp_path: Path) -> None:
    for file in ("a.safetensors", "b.safetensors"):
        save_file({"w": torch.zeros(1)}, tmp_path / file)
    with pytest.raises(StorageError, match=r"found 'w' in a.safetensors and b.safetensors"):
        ShardReader(tmp_path)


def test_two_indexes_are_refused(sharded: Path) -> None:
    (sharded / "other.safetensors.index.json").write_text("{}")
    with pytest.raises(StorageError, match=r"expected one index, found model.*, other"):
        ShardReader(sharded)
