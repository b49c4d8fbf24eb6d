"""Combining and compressing folders: the same bits as on the model, checks of what files can't know, commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_nets import GOLDEN, base_net, ids
from lowrank.algebra.adapters import DENSITY_TYPES, relative
from lowrank.algebra.pairs import assert_close, deltas, fill_, in_peft, ours, peft_deltas, peft_talks
from reference import algebra as reference
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from qlora_kit import AdapterError, ConfigError, LoftQConfig, LoraConfig, LoraModel, StorageError, apply_lora
from qlora_kit.cli.commands import app
from qlora_kit.folders.combine import combine_folders, compress_folder
from qlora_kit.lowrank.algebra import combination_types

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def folders(lora: LoraModel, out: Path) -> list[Path]:
    lora.save_pretrained(out)
    return [out / name for name in lora.peft_config]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def assert_same_files(left: Path, right: Path) -> None:
    first, second = load_file(left / WEIGHTS), load_file(right / WEIGHTS)
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert tensor.dtype == second[key].dtype
        assert torch.equal(tensor, second[key]), key
    assert json.loads((left / CONFIG).read_text()) == json.loads((right / CONFIG).read_text())


# -- the same as on the model ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", combination_types())
@pytest.mark.slow
def test_files_and_model_give_the_same_bits(kind: str, tmp_path: Path) -> None:
    """On a linear layer, an embedding, a Conv1D and a convolution; one source lacks modules."""
    lora = ours({"lora_alpha": 5}, {"use_rslora": True, "target_modules": ["fc", "emb", "conv"]})
    sources = folders(lora, tmp_path)
    fields = {"density": 0.5 if kind in DENSITY_TYPES else None, "seed": 3}
    in_memory = lora.add_weighted_adapter(["a0", "a1"], [0.7, -0.3], "new", kind, **fields)
    lora.save_pretrained(tmp_path, selected_adapters=["new"])
    on_files = combine_folders(sources, [0.7, -0.3], tmp_path / "out", kind, **fields)
    assert_same_files(tmp_path / "out", tmp_path / "new")
    assert {line.path: line.distance for line in on_files.layers} == {
        line.path: line.distance for line in in_memory.layers
    }
    again = LoraModel.from_pretrained(base_net(), tmp_path / "out", "new")
    assert_close(deltas(again, "new"), deltas(lora, "new"), 0)


@pytest.mark.parametrize("case", ["rank_pattern", "rslora", "conv1d", "embedding"])
def test_golden_files_of_pefts(case: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / case, tmp_path / "copy")
    combine_folders([GOLDEN / case, tmp_path / "copy"], [0.25, 0.5], tmp_path / "out", "exact")
    once, found = (LoraModel.from_pretrained(base_net(), folder) for folder in (GOLDEN / case, tmp_path / "out"))
    expected = {path: 0.75 * delta for path, delta in deltas(once, "default").items()}
    assert_close(deltas(found, "default"), expected, 1e-6)


@peft_talks
def test_peft_reads_the_result(tmp_path: Path) -> None:
    lora = ours({"r": 1, "rank_pattern": {"fc": 3}}, {"r": 2, "target_modules": ["fc", "head"]})
    combine_folders(folders(lora, tmp_path), [1.0, -2.0], tmp_path / "out", "exact")
    again = LoraModel.from_pretrained(base_net(), tmp_path / "out", "new")
    assert_close(peft_deltas(in_peft(again, tmp_path / "peft"), "new"), deltas(again, "new"), 1e-12)


def test_the_trained_copy_of_one_source_comes_along(tmp_path: Path) -> None:
    lora = ours({"target_modules": ["fc"], "modules_to_save": ["head"]}, {"target_modules": ["fc", "conv"]})
    sources = folders(lora, tmp_path)
    lora.add_weighted_adapter(["a0", "a1"], [0.5, 0.5], "new")
    lora.save_pretrained(tmp_path, selected_adapters=["new"])
    report = combine_folders(sources, [0.5, 0.5], tmp_path / "out")
    assert report.copied == {"head": str(sources[0])}
    assert_same_files(tmp_path / "out", tmp_path / "new")


def test_half_precision_sources_give_float32(tmp_path: Path) -> None:
    lora = apply_lora(base_net(), LoraConfig(r=2, target_modules=["fc"]), "a", adapter_dtype=torch.bfloat16)
    fill_(lora)
    (source,) = folders(lora, tmp_path)
    shutil.copytree(source, tmp_path / "copy")
    combine_folders([source, tmp_path / "copy"], [0.3, 0.4], tmp_path / "out", "exact")
    again = LoraModel.from_pretrained(base_net(), tmp_path / "out", "new")
    assert {t.dtype for t in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch.float32}
    assert_close(deltas(again, "new"), {"fc": 0.7 * deltas(lora, "a")["fc"]}, 1e-6)


# -- what files can't know -------------------------------------------------------------------------------


def loftq(seed: int, targets: tuple[str, ...] = ("0", "2")) -> LoraModel:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    start = {"init_lora_weights": "loftq", "loftq_config": LoftQConfig(loftq_bits=4)}
    return apply_lora(net, LoraConfig(r=2, target_modules=list(targets), **start), "a")


def backbone_of(folder: Path) -> str | None:
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return (file.metadata() or {}).get("backbone")


def test_one_quantized_base_is_made_sure_of(tmp_path: Path) -> None:
    lora = loftq(1)
    lora.add_adapter("b", LoraConfig(r=2, target_modules=["0", "2"]))
    lora.save_pretrained(tmp_path)
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    combine_folders([tmp_path / "a", tmp_path / "copy"], [0.5, 0.5], tmp_path / "same", "exact")
    assert backbone_of(tmp_path / "same") == backbone_of(tmp_path / "a") == lora.backbones["a"]
    loftq(2).save_pretrained(tmp_path / "other")
    loftq(1, ("0",)).save_pretrained(tmp_path / "fewer")
    for second in (tmp_path / "other" / "a", tmp_path / "fewer" / "a", tmp_path / "b"):
        with pytest.raises(StorageError, match=r"one quantized base, found fingerprints .*pass check_backbone=False"):
            combine_folders([tmp_path / "a", second], [0.5, 0.5], tmp_path / "out")
        assert not (tmp_path / "out").exists()
    combine_folders([tmp_path / "a", tmp_path / "b"], [0.5, 0.5], tmp_path / "out", check_backbone=False)
    assert backbone_of(tmp_path / "out") is None


def test_one_folder_has_several_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    names = "model", str(tmp_path / "model")
    lora = ours(*({"base_model_name_or_path": name} for name in names), paths=("fc",))
    combine_folders(folders(lora, tmp_path), [0.7, 0.3], tmp_path / "out")


def test_two_base_models_are_refused_unless_told(tmp_path: Path) -> None:
    lora = ours({"base_model_name_or_path": "one"}, {"base_model_name_or_path": "two"}, paths=("fc",))
    sources = folders(lora, tmp_path)
    with pytest.raises(StorageError, match=r"expected adapters of one base model, found .*'one'.*'two'"):
        combine_folders(sources, [1, 1], tmp_path / "out")
    combine_folders(sources, [1, 1], tmp_path / "out", check_backbone=False)
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["base_model_name_or_path"] == "one"


def rewrite(folder: Path, change: Any) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)


def test_files_that_cannot_be_combined_leave_nothing(tmp_path: Path) -> None:
    lora = ours({}, {}, paths=("fc", "conv"))
    good, other = folders(lora, tmp_path)
    out = tmp_path / "out"
    A, B, conv = (f"base_model.model.{key}.weight" for key in ("fc.lora_A", "fc.lora_B", "conv.lora_A"))

    def transposed(state: dict[str, Any]) -> None:
        state[conv] = state[conv].reshape(2, 8, 4, 1)

    changes: list[tuple[Any, str]] = [
        (lambda s: s.pop(A), r"expected factors A and B of fc, found only \['base_model.model.fc.lora_B.weight'\]"),
        (lambda s: s.update({A: s[A][:1].clone()}), r"expected factors of rank 2 for fc, as its config says"),
        (lambda s: s.update({A: s[A][:, :5].clone()}), r"fc: expected adapters of one module.*\(.*8\).*\(.*5\)"),
        (lambda s: s.update({B: s[B][:5].clone()}), r"fc: expected adapters of one module"),
        (transposed, r"conv: expected adapters of one module"),
        (lambda s: s.update({A: s[A] * float("nan")}), r"fc: adapter '.*bad': expected finite factors and scaling"),
        (
            lambda s: s.update({"base_model.model.emb.scale": s[A].clone()}),
            "expected low-rank factors, modules_to_save and tables",
        ),
        (lambda s: [s.pop(key) for key in list(s) if "lora" in key] and s.update({PLAIN: torch.ones(1)}), "found none"),
    ]
    for change, message in changes:
        shutil.copytree(other, tmp_path / "bad", dirs_exist_ok=True)
        rewrite(tmp_path / "bad", change)
        with pytest.raises((AdapterError, StorageError), match=message):
            combine_folders([good, tmp_path / "bad"], [1, 1], out)
        assert not out.exists()
    before = contents(good)
    (link := tmp_path / "link").symlink_to(good)
    for arguments, message in (
        (([], []), r"folders: expected a list with at least one adapter's folder, found \[\]"),
        (([good, tmp_path / "nothing"], [1, 1]), "expected a local folder with adapter_config.json"),
        (([good, other], [1]), "expected 2 weights, one for each adapter, found 1"),
        (([good], [1], good / WEIGHTS), "expected a new or empty folder, found a file"),
        (([good], [1], good), r"expected a new or empty folder, found \['README.md', 'adapter_config.json'"),
        (
            ([good], [1], good / WEIGHTS / "in" / "a" / "file"),
            "expected a folder that can be written to, found Not a directory; choose another",
        ),
        (([good, good.parent / "." / good.name], [1, 1]), "expected each adapter once, found it again as"),
        (([good, link], [1, 1]), "expected each adapter once, found it again as"),
    ):
        with pytest.raises((AdapterError, StorageError), match=message):
            combine_folders(*arguments, **({} if len(arguments) > 2 else {"out": out}))  # type: ignore[misc]
        assert not out.exists()
    assert contents(good) == before


PLAIN = "base_model.model.norm.weight"


def test_whole_modules_and_biases_that_cannot_be_combined(tmp_path: Path) -> None:
    twice = ours(*[{"target_modules": ["fc"], "modules_to_save": ["head"]}] * 2)
    with pytest.raises(StorageError, match=r"head: expected at most one of the adapters to hold its own trained copy"):
        combine_folders(folders(twice, tmp_path / "twice"), [1, 1], tmp_path / "out")
    mixed = ours({"target_modules": ["fc", "head"]}, {"target_modules": ["fc"], "modules_to_save": ["head"]})
    with pytest.raises(AdapterError, match=r"head: expected a module that one adapter trains whole"):
        combine_folders(folders(mixed, tmp_path / "mixed"), [1, 1], tmp_path / "out")
    with pytest.raises(StorageError, match="expected bias='none', found 'lora_only'"):
        combine_folders([GOLDEN / "bias_lora_only"], [1], tmp_path / "out")


# -- compress --------------------------------------------------------------------------------------------


def test_compress_keeps_the_best_and_all_else(tmp_path: Path) -> None:
    lora = ours({"r": 4, "use_rslora": True, "target_modules": ["fc", "emb", "conv"], "modules_to_save": ["head"]})
    (source,) = folders(lora, tmp_path)
    report = compress_folder(source, tmp_path / "small", 2)
    again = LoraModel.from_pretrained(base_net(), tmp_path / "small", "new")
    assert {line.path: line.rank for line in report.layers} == {"fc": 2, "emb": 2, "conv": 2}
    full = deltas(lora, "a0")
    assert_close(deltas(again, "new"), {path: reference.truncated(d, 2) for path, d in full.items()}, 1e-5)
    for line in report.layers:
        lost = relative(reference.truncated(full[line.path], 2), full[line.path])
        assert line.error == pytest.approx(lost, abs=1e-6)
    head = "base_model.model.head.weight"
    assert torch.equal(load_file(tmp_path / "small" / WEIGHTS)[head], load_file(source / WEIGHTS)[head])
    config = LoraConfig.from_pretrained(tmp_path / "small")
    assert (config.r, config.lora_alpha, config.use_rslora, config.modules_to_save) == (2, 2, False, ["head"])
    lora.add_weighted_adapter(["a0"], [1.0], "less", "svd", svd_rank=2)
    assert_close(deltas(again, "new"), deltas(lora, "less"), 0)


def test_compress_to_an_energy(tmp_path: Path) -> None:
    lora = ours({"r": 5, "target_modules": ["fc", "conv"]})
    (source,) = folders(lora, tmp_path)
    full = deltas(lora, "a0")
    expected = {}
    for path, delta in full.items():
        squares = np.cumsum(np.linalg.svd(delta, compute_uv=False) ** 2)
        expected[path] = int((squares < 0.8 * squares[-1]).sum()) + 1
    before = contents(source)
    with pytest.raises(StorageError, match="expected a new or empty folder, found"):
        compress_folder(source, source, energy=0.8)
    assert contents(source) == before
    report = compress_folder(source, tmp_path / "own", energy=0.8, own_ranks=True)
    assert LoraConfig.from_pretrained(tmp_path / "own").rank_pattern
    assert {line.path: line.rank for line in report.layers} == expected
    assert all(line.captured >= 0.8 for line in report.layers)
    again = LoraModel.from_pretrained(base_net(), tmp_path / "own", "new")
    assert_close(deltas(again, "new"), {p: reference.truncated(d, expected[p]) for p, d in full.items()}, 1e-5)


@pytest.mark.parametrize("case", ["bias_all", "bias_lora_only", "modules_to_save", "embedding"])
def test_compress_at_full_energy_is_the_same_adapter(case: str, tmp_path: Path) -> None:
    compress_folder(GOLDEN / case, tmp_path / "out", energy=1.0)
    once, again = (LoraModel.from_pretrained(base_net(), f) for f in (GOLDEN / case, tmp_path / "out"))
    with torch.no_grad():
        torch.testing.assert_close(again(ids()), once(ids()), rtol=0, atol=1e-5)


def test_compress_keeps_the_backbone(tmp_path: Path) -> None:
    lora = loftq(1)
    (source,) = folders(lora, tmp_path)
    compress_folder(source, tmp_path / "small", 1)
    assert backbone_of(tmp_path / "small") == lora.backbones["a"]


def test_compress_takes_a_rank_or_an_energy(tmp_path: Path) -> None:
    for fields, message in (
        ({}, "rank, energy: expected one of the two, found None and None"),
        ({"rank": 1, "energy": 0.5}, "rank, energy: expected one of the two, found 1 and 0.5"),
        ({"rank": 0}, "rank: expected an integer of at least 1, found 0"),
        ({"energy": 2.0}, r"energy: expected a share in \(0, 1\], found 2.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            compress_folder(GOLDEN / "linear", tmp_path / "out", **fields)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


# -- commands --------------------------------------------------------------------------------------------


def test_the_commands_do_what_the_functions_do(tmp_path: Path) -> None:
    lora = ours({}, {}, paths=("fc", "conv"))
    a, b = folders(lora, tmp_path)
    options = ["--type", "ties", "--density", "0.5", "--majority-sign", "frequency", "--seed", "4"]
    outcome = CliRunner().invoke(app, ["combine", f"{a}=0.7", f"{b}=-0.3", *options, "--out", str(tmp_path / "cli")])
    assert outcome.exit_code == 0, outcome.output
    assert "2 modules, ties of" in outcome.output
    fields: dict[str, Any] = {"density": 0.5, "majority_sign_method": "frequency", "seed": 4}
    combine_folders([a, b], [0.7, -0.3], tmp_path / "function", "ties", **fields)
    assert_same_files(tmp_path / "cli", tmp_path / "function")
    outcome = CliRunner().invoke(app, ["compress", str(a), "--rank", "1", "--out", str(tmp_path / "one")])
    assert outcome.exit_code == 0, outcome.output
    assert "captured" in outcome.output
    compress_folder(a, tmp_path / "function-one", 1)
    assert_same_files(tmp_path / "one", tmp_path / "function-one")
    outcome = CliRunner().invoke(app, ["compress", str(a), "--energy", "0.9", "--out", str(tmp_path / "most")])
    assert outcome.exit_code == 0, outcome.output


def test_the_commands_say_what_is_wrong(tmp_path: Path) -> None:
    (a,) = folders(ours({}, paths=("fc",)), tmp_path)
    out = ["--out", str(tmp_path / "out")]
    for arguments, message in (
        (["combine", str(a), *out], "expected a folder and its weight, found another text; pass DIR=0.7"),
        (["combine", f"{a}=x", *out], "expected a folder and its weight"),
        (["combine", f"{a}=1", "--type", "ties", *out], "--density: expected a share of entries to keep"),
        (["compress", str(a), *out], "--rank, --energy: expected one of the two"),
        (["compress", str(tmp_path / "no"), "--rank", "2", *out], "expected a local folder"),
    ):
        outcome = CliRunner().invoke(app, arguments)
        assert outcome.exit_code == 1
        assert message in outcome.output.replace("\n", " ")
        assert not (tmp_path / "out").exists()
