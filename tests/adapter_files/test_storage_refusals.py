"""Adapter files that don't fit are refused and change nothing; writers that die leave the old or the new."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_nets import CONFIG, WEIGHTS, assert_same, base_net, snapshot, trained
from safetensors.torch import load_file, save_file
from tiny_net import randomize_trainable_

from qlora_kit import LoraConfig, LoraModel
from qlora_kit.adapter_files.folder import read_adapter
from qlora_kit.adapter_files.tensors import adapter_state, load_adapter_state_, save_adapter
from qlora_kit.errors import AdapterError, ConfigError, StorageError


def test_a_misfit_lists_both_sides_and_changes_nothing() -> None:
    lora = trained()
    before = snapshot(lora)
    state = adapter_state(lora)
    prefix = "base_model.model."
    state[prefix + "fcc.lora_A.weight"] = state.pop(prefix + "fc.lora_A.weight")
    state[prefix + "fc.lora_B.weight"] = torch.zeros(8, 5)
    state[prefix + "head.lora_B.weight"] = torch.zeros(3, 2, dtype=torch.int64)
    state[prefix + "head.lora_A.weight"] += 1
    with pytest.raises(StorageError) as caught:
        load_adapter_state_(lora, "default", state)
    message = str(caught.value)
    assert "found 1 missing, 1 unexpected and 2 mis-shaped keys; nothing was loaded" in message
    assert f"missing: {prefix}fc.lora_A.weight (closest on the other side: {prefix}fcc.lora_A.weight)" in message
    assert f"unexpected: {prefix}fcc.lora_A.weight (closest on the other side: {prefix}fc.lora_A.weight)" in message
    assert "fc.lora_B.weight: expected (8, 2) torch.float32, found (8, 5) torch.float32" in message
    assert "head.lora_B.weight: expected (3, 2) torch.float32, found (3, 2) torch.int64" in message
    assert_same(snapshot(lora), before)
    with pytest.raises(AdapterError, match="unknown adapter 'x'"):
        load_adapter_state_(lora, "x", state)


@pytest.mark.parametrize("extra", ["fc.base_layer.weight", "conv.weight", "norm.bias", "fc.lora_magnitude_vector"])
def test_tensors_of_the_base_are_not_overwritten_by_an_adapter(extra: str) -> None:
    lora = trained()
    state = {**adapter_state(lora), f"base_model.model.{extra}": torch.zeros(8)}
    with pytest.raises(StorageError, match=f"unexpected: base_model.model.{extra}"):
        load_adapter_state_(lora, "default", state)


def test_nothing_is_loaded_under_a_merge() -> None:
    lora = trained()
    state = adapter_state(lora)
    lora.merge_adapter()
    with pytest.raises(AdapterError, match=r"merged .*unmerge_adapter"):
        load_adapter_state_(lora, "default", state)


def test_a_failed_load_leaves_no_adapter_and_the_same_model(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    state.pop("base_model.model.fc.lora_B.weight")
    save_file(state, tmp_path / WEIGHTS)
    model = base_net()
    modules, before = dict(model.named_modules()), snapshot(model)
    with pytest.raises(StorageError, match=r"missing: base_model.model.fc.lora_B.weight"):
        LoraModel.from_pretrained(model, tmp_path)
    assert dict(model.named_modules()) == modules
    assert_same(snapshot(model), before)
    lora = trained()
    paths = [path for path, _ in lora.named_modules()]
    with pytest.raises(StorageError):
        lora.load_adapter(tmp_path, "second")
    assert list(lora.peft_config) == ["default"]
    assert [path for path, _ in lora.named_modules()] == paths


def test_folders_without_an_adapter_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"expected a local folder.*snapshot_download"):
        read_adapter(tmp_path / "absent")
    with pytest.raises(StorageError, match="found none; pass the folder that an adapter was saved to"):
        read_adapter(tmp_path)
    lora = trained()
    save_adapter(lora, tmp_path / "sub")
    with pytest.raises(StorageError, match=r"in its subfolders \['sub'\]"):
        read_adapter(tmp_path)
    (tmp_path / "sub" / WEIGHTS).unlink()
    with pytest.raises(StorageError, match=f"expected {WEIGHTS}, found none"):
        read_adapter(tmp_path / "sub")
    (tmp_path / "sub" / CONFIG).write_text("{}")
    with pytest.raises(ConfigError, match="peft_type"):
        read_adapter(tmp_path / "sub")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="expected a folder to save to, found a file"):
        save_adapter(lora, tmp_path / "file")


def test_damaged_and_foreign_weights(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    for part in (whole[:-1], whole[:20], b"", b"not safetensors, but long enough"):
        (tmp_path / WEIGHTS).write_bytes(part)
        with pytest.raises(StorageError, match="expected a whole safetensors file, found a truncated or foreign one"):
            read_adapter(tmp_path)
    (tmp_path / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(StorageError, match="found the pointer that Git LFS puts in its place; run git lfs pull"):
        read_adapter(tmp_path)
    save_file({"model.weight": torch.zeros(2)}, tmp_path / WEIGHTS)
    with pytest.raises(StorageError, match=r"expected an adapter.*found \['model.weight'\]"):
        read_adapter(tmp_path)


def test_links_may_not_leave_the_folder(tmp_path: Path) -> None:
    lora = trained()
    lora.save_pretrained(tmp_path / "real")
    (tmp_path / "trap").mkdir()
    for name in (CONFIG, WEIGHTS):
        (tmp_path / "trap" / name).symlink_to(tmp_path / "real" / name)
    with pytest.raises(StorageError, match="expected a file of this folder, found a link to"):
        read_adapter(tmp_path / "trap")
    # A hub's cache is made of links into its own blobs.
    snapshot_folder, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot_folder.mkdir(parents=True)
    blobs.mkdir()
    for name in (CONFIG, WEIGHTS):
        os.rename(tmp_path / "real" / name, blobs / name)
        (snapshot_folder / name).symlink_to(f"../../blobs/{name}")
    assert_same(read_adapter(snapshot_folder)[1], adapter_state(lora))
    lora.add_adapter("second", LoraConfig(r=2, target_modules=["fc"]))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "second").symlink_to(tmp_path / "trap")
    with pytest.raises(StorageError, match="adapter 'second': expected a name whose subfolder lies in"):
        save_adapter(lora, tmp_path / "out")
    lora.peft_config["../evil"] = lora.peft_config["second"]
    with pytest.raises(StorageError, match=r"adapter '../evil': expected a name whose subfolder lies in"):
        save_adapter(lora, tmp_path / "out", ["../evil"])


# -- writers that die -----------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a kill: nothing that handles ordinary errors sees it."""


@pytest.mark.parametrize("alpha", [3, 100], ids=["same config", "other config"])
@pytest.mark.parametrize("step", range(9))
@pytest.mark.slow
def test_a_killed_save_never_mixes_old_and_new(
    alpha: int, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = trained(), trained(lora_alpha=alpha)
    randomize_trainable_(new, seed=9)
    old.save_pretrained(tmp_path)
    pairs = [(m.peft_config["default"].lora_alpha, adapter_state(m)) for m in (old, new)]
    calls = iter(range(100))

    def mortal(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == step:
                raise Killed
            return function(*args, **kwargs)

        return call

    # Every call that changes what a reader can see, or makes it last, is a place to die.
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", mortal(os.replace))
        patch.setattr(os, "fsync", mortal(os.fsync))
        patch.setattr(Path, "unlink", mortal(Path.unlink))
        try:
            new.save_pretrained(tmp_path)
        except Killed:
            finished = False
        else:
            finished = True
    if (tmp_path / CONFIG).exists():
        config, state = read_adapter(tmp_path)
        found = [
            which
            for which, (its_alpha, its_state) in enumerate(pairs)
            if its_alpha == config.lora_alpha and all(torch.equal(its_state[key], state[key]) for key in state)
        ]
        assert found, "weights of one save are paired with the config of another"
        assert not finished or found == [1]
    else:
        assert not finished
        assert alpha != 3, "a config that doesn't change needn't go"
        with pytest.raises(StorageError, match="as after a save that was killed: save the adapter again"):
            read_adapter(tmp_path)
    assert not [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")]
    new.save_pretrained(tmp_path)
    assert_same(read_adapter(tmp_path)[1], pairs[1][1])


def test_a_full_disk_leaves_the_old_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained().save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            trained(lora_alpha=100).save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
