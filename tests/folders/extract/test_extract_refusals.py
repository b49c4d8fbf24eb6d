"""Pairs of checkpoints that make no adapter: each refused by name, before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import llama
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from tuned_models import low_rank, noise, pair

from qlora_kit import ConfigError, LoraConfig, StorageError, TargetError, apply_lora
from qlora_kit.folders.extract.run import extract_folders

QUERY, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return pair(llama(), tmp_path_factory.mktemp("pair"), low_rank(2, only="proj"))


def changed(folder: Path, to: Path, change: Callable[[dict[str, Tensor]], Any], **settings: Any) -> Path:
    """A copy of a checkpoint with other tensors, and other entries of its config."""
    shutil.copytree(folder, to)
    state = load_file(to / "model.safetensors")
    change(state)
    save_file(state, to / "model.safetensors", {"format": "pt"})
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **settings}))
    return to


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "rank, energy: expected one of the two, found None and None; pass rank=32"),
        ({"rank": 4, "energy": 0.5}, "rank, energy: expected one of the two, found 4 and 0.5"),
        ({"rank": 0}, "rank: expected an integer of at least 1, found 0"),
        ({"rank": True}, "rank: expected an integer of at least 1, found True"),
        ({"energy": 0.0}, r"energy: expected a share in \(0, 1\], found 0.0"),
        ({"energy": 1.5}, r"energy: expected a share in \(0, 1\], found 1.5"),
        ({"rank": 2, "dtype": torch.int8}, "dtype: expected one of float32, bfloat16, float16, found torch.int8"),
        ({"rank": 2, "dtype": "halves"}, "dtype: expected one of float32, bfloat16, float16, found 'halves'"),
        ({"rank": 2, "whole": "norm"}, r"whole: expected 'changed' or a list of module names, found 'norm'"),
        ({"rank": 2, "whole": [3]}, "whole: expected a list of module names, found"),
    ],
)
def test_arguments(fields: dict[str, Any], message: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        extract_folders(*folders, tmp_path / "out", **fields)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["q_prj"]}, "target_modules: 'q_prj' matches no module"),
        ({"target_modules": ["norm"]}, "expected a module type with a registered codec, found"),
        ({"whole": ["nrm"]}, "whole: 'nrm' matches no module"),
    ],
)
def test_targets(fields: dict[str, Any], message: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=message):
        extract_folders(*folders, tmp_path / "out", 2, **fields)
    assert not (tmp_path / "out").exists()


def test_folders(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = folders
    (tmp_path / "link").symlink_to(base)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for given, message in (
        ((base, base, tmp_path / "out"), "expected two checkpoints, found one folder for both"),
        ((base, tmp_path / "link", tmp_path / "out"), "expected two checkpoints, found one folder for both"),
        ((base, tuned, tuned), r"expected a new or empty folder, found \['config.json'"),
        ((base, tuned, tmp_path / "link"), r"expected a new or empty folder, found \['config.json'"),
        ((base, tuned, tmp_path / "file"), "expected a new or empty folder, found a file"),
        ((base, tmp_path / "empty", tmp_path / "out"), "empty: expected config.json beside the weights"),
        ((tmp_path / "empty", tuned, tmp_path / "out"), "empty: expected config.json beside the weights"),
        ((base, tmp_path / "gone", tmp_path / "out"), "tuned='.*gone': expected a folder or a repository on the Hub"),
        ((tmp_path / "gone", tuned, tmp_path / "out"), "base='.*gone': expected a folder or a repository on the Hub"),
    ):
        before = sorted(base.iterdir()), sorted(tuned.iterdir())
        with pytest.raises(StorageError, match=message):
            extract_folders(*given, 2)
        assert (sorted(base.iterdir()), sorted(tuned.iterdir())) == before
        assert not (tmp_path / "out").exists()


def nan(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda state: state[name].view(-1)[:3].fill_(float("nan"))


@pytest.mark.parametrize(
    ("side", "change", "message"),
    [
        (1, lambda s: s.pop(QUERY), rf"tuned: expected a tensor '{QUERY}' as in the base, found none; the closest"),
        (0, lambda s: s.pop(QUERY), rf"{QUERY}: expected it in both checkpoints, found it in .*tuned alone"),
        (1, lambda s: s.update({"more.weight": torch.ones(2)}), "tuned: .*found 'more.weight', which neither"),
        (0, lambda s: s.update({"more.weight": torch.ones(2)}), "base: .*found 'more.weight', which neither"),
        (1, nan(QUERY), rf"tuned: {QUERY}: expected finite values, found 3 NaN or infinite of 4096"),
        (0, nan(NORM), rf"base: {NORM}: expected finite values, found 3 NaN or infinite of 64"),
        (
            1,
            lambda s: s.update({QUERY: s[QUERY][:32].clone()}),
            rf"tuned: {QUERY}: expected shape \(64, 64\), as config.json",
        ),
        (0, lambda s: s.update({QUERY: s[QUERY].char()}), rf"base: {QUERY}: expected a floating-point weight, or all"),
    ],
)
def test_tensors(
    side: int, change: Callable[[dict[str, Tensor]], Any], message: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    given = list(folders)
    given[side] = changed(given[side], tmp_path / given[side].name, change)
    with pytest.raises(StorageError, match=message):
        extract_folders(*given, tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()


def test_targets_that_neither_has(folders: tuple[Path, Path], tmp_path: Path) -> None:
    given = [changed(folder, tmp_path / folder.name, lambda s: s.pop(QUERY)) for folder in folders]
    with pytest.raises(StorageError, match=f"expected the targeted weight '{QUERY}', found no such tensor"):
        extract_folders(*given, tmp_path / "out", 2)
    given = [changed(folder, tmp_path / f"{folder.name}2", lambda s: s.pop(NORM)) for folder in folders]
    with pytest.raises(StorageError, match=f"{NORM}: expected it in .*, whence it is to be stored whole, found none"):
        extract_folders(*given, tmp_path / "out", 2, whole=["norm"])
    assert not (tmp_path / "out").exists()


def test_two_architectures_and_two_sizes(folders: tuple[Path, Path], tmp_path: Path) -> None:
    GPT2LMHeadModel(
        GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
    ).save_pretrained(tmp_path / "gpt2")
    llama(num_hidden_layers=3).save_pretrained(tmp_path / "deeper")
    llama(intermediate_size=80).save_pretrained(tmp_path / "narrower")
    for other, message in (
        ("gpt2", "expected a model of the base's architecture, 'llama', found 'gpt2'"),
        ("deeper", r"deeper: expected the base's layers, found 'model.layers.2.*of a layer that the model in .*base"),
        ("narrower", r"mlp.down_proj.weight: expected the base's shape \(64, 96\), found \(64, 80\)"),
    ):
        with pytest.raises(StorageError, match=message):
            extract_folders(folders[0], tmp_path / other, tmp_path / "out", 2)
    deeper = llama(num_hidden_layers=3)
    deeper.model.save_pretrained(tmp_path / "backbone")
    for first, second, message in (
        (tmp_path / "deeper", folders[1], r"found 'model.layers.2.input_layernorm.weight', which neither the other"),
        (tmp_path / "backbone", folders[1], r"found 'layers.2.input_layernorm.weight', which neither the other"),
        (folders[0], tmp_path / "backbone", r"found 'layers.2.input_layernorm.weight', which neither the other"),
    ):
        with pytest.raises(StorageError, match=message):
            extract_folders(first, second, tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()


def test_nothing_to_extract(folders: tuple[Path, Path], tmp_path: Path) -> None:
    copy = changed(folders[0], tmp_path / "copy", lambda s: None)
    with pytest.raises(StorageError, match="found nothing to extract: all 14 are equal; pass the tuned checkpoint"):
        extract_folders(folders[0], copy, tmp_path / "out", 2)
    base, tuned = pair(llama(), tmp_path, noise(only=("model.norm",)))
    with pytest.raises(StorageError, match=f"all 14 are equal; what differs is {NORM}, so target that"):
        extract_folders(base, tuned, tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_no_checkpoint(folders: tuple[Path, Path], tmp_path: Path) -> None:
    apply_lora(llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(StorageError, match=r"adapter: expected config.json beside the weights"):
        extract_folders(folders[0], tmp_path / "adapter", tmp_path / "out", 2)


def test_an_adapter_that_is_there_is_never_written_over(folders: tuple[Path, Path], tmp_path: Path) -> None:
    extract_folders(*folders, tmp_path / "out", 2)
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    with pytest.raises(
        StorageError, match=r"expected a new or empty folder, found .*; choose another folder or remove"
    ):
        extract_folders(*folders, tmp_path / "out", 2)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
