"""Types that nothing is computed in: float8 weights that are the matrices, and tensors of types that only lie there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from disk_merges import on_disk, save_adapter, tensors
from safetensors.torch import load_file, save_file

from qlora_kit import MergeError, StorageError
from qlora_kit.folders import combine_folders, compress_folder, extract_folders

QUERY = "model.layers.0.self_attn.q_proj.weight"
NARROW = (torch.float8_e4m3fn, torch.float8_e5m2)


def rewritten(source: Path, folder: Path, change: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    name = next(file.name for file in source.glob("*.safetensors"))
    save_file({**load_file(source / name), **change}, folder / name, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def base(bases: dict[str, Path]) -> Path:
    return bases["bfloat16"]


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("into", ["bfloat16", "nf4"])
@pytest.mark.slow
def test_float8_weights_are_widened(dtype: torch.dtype, into: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    """The result is that of the same values in bfloat16, in which float8's are exact."""
    matrices = {name: t.to(dtype) for name, t in tensors(base).items() if t.dim() == 2}
    narrow = rewritten(base, tmp_path / "narrow", matrices)
    wide = rewritten(base, tmp_path / "wide", {name: t.bfloat16() for name, t in matrices.items()})
    for source in (narrow, wide):
        on_disk(source, [adapter], tmp_path / f"{source.name}-out", into=into)
    found, expected = tensors(tmp_path / "narrow-out"), tensors(tmp_path / "wide-out")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        same = found[name] if into == "bfloat16" else found[name].to(tensor.dtype)
        assert torch.equal(same, tensor), name


def test_float8_weights_take_no_delta_as_they_are(base: Path, adapter: Path, tmp_path: Path) -> None:
    narrow = rewritten(base, tmp_path / "narrow", {QUERY: tensors(base)[QUERY].to(NARROW[0])})
    with pytest.raises(MergeError, match=rf"{QUERY}: expected a weight in 16 or 32 bits.*; merge into 'bfloat16'"):
        on_disk(narrow, [adapter], tmp_path / "out", into="same")
    assert not (tmp_path / "out").exists()


def test_scales_beside_float8_weights_are_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    scales = {QUERY: tensors(base)[QUERY].to(NARROW[0]), f"{QUERY}_scale_inv": torch.ones(1, 1)}
    scaled = rewritten(base, tmp_path / "scaled", scales)
    with pytest.raises(StorageError, match=r"found scales beside them \('.*weight_scale_inv'\).*pass the 16-bit model"):
        on_disk(scaled, [adapter], tmp_path / "out")


def test_adapters_in_float8(base: Path, tmp_path: Path) -> None:
    source = save_adapter(base, tmp_path / "adapter", ["q_proj"])
    factors = {key: factor.to(NARROW[0]) for key, factor in tensors(source).items()}
    narrow = rewritten(source, tmp_path / "narrow", factors)
    wide = rewritten(source, tmp_path / "wide", {key: factor.float() for key, factor in factors.items()})
    for one in (narrow, wide):
        on_disk(base, [one], tmp_path / f"{one.name}-merged", into="float32")
        compress_folder(one, tmp_path / f"{one.name}-small", 2)
        combine_folders([one], [0.5], tmp_path / f"{one.name}-half")
    for what in ("merged", "small", "half"):
        found, expected = (tensors(tmp_path / f"{name}-{what}") for name in ("narrow", "wide"))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_factors_that_are_no_floats(dtype: torch.dtype, base: Path, tmp_path: Path) -> None:
    source = save_adapter(base, tmp_path / "adapter", ["q_proj"])
    key = next(iter(tensors(source)))
    odd = rewritten(source, tmp_path / "odd", {key: tensors(source)[key].to(dtype)})
    for run in (
        lambda: on_disk(base, [odd], tmp_path / "out"),
        lambda: compress_folder(odd, tmp_path / "out", 2),
        lambda: combine_folders([odd], [1.0], tmp_path / "out"),
    ):
        with pytest.raises(StorageError, match=rf"expected factors of floating-point numbers, .*{key} \({dtype}\)"):
            run()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.bool, torch.int16])
@pytest.mark.slow
def test_other_tensors_are_copied(dtype: torch.dtype, base: Path, adapter: Path, tmp_path: Path) -> None:
    more = torch.arange(6).reshape(2, 3).to(dtype)
    odd = rewritten(base, tmp_path / "odd", {"extra.table": more})
    on_disk(odd, [adapter], tmp_path / "out", into="float32")
    found = tensors(tmp_path / "out")["extra.table"]
    assert found.dtype == dtype
    assert found.tolist() == more.tolist()


def test_a_folder_with_a_model_and_an_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    """It is a base like any other; its adapter isn't a part of it, nor of what is made of it."""
    both = rewritten(base, tmp_path / "both", {})
    for file in adapter.iterdir():
        (both / file.name).write_bytes(file.read_bytes())
    (both / "merge_report.json").write_text("{}")
    (both / "loftq_report.json").write_text("{}")
    on_disk(both, [both], tmp_path / "out")
    on_disk(base, [adapter], tmp_path / "plain")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {file.name for file in (tmp_path / "plain").iterdir()}
    assert not any("adapter" in name or name.startswith("loftq") for name in names)
    found, expected = tensors(tmp_path / "out"), tensors(tmp_path / "plain")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    extract_folders(both, tmp_path / "out", tmp_path / "extracted", 4)
    assert json.loads((tmp_path / "extracted" / "adapter_config.json").read_text())["r"] == 4


def test_one_adapter_by_two_names(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(adapter)
    for again in (tmp_path / "link", adapter.parent / "." / ".." / adapter.parent.name / adapter.name):
        with pytest.raises(ValueError, match=r"expected each adapter once, found it again as|one stands twice"):
            on_disk(base, [adapter, again], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("into", [torch.bfloat16, "bf16", "torch.bfloat16"])
def test_dtypes_by_any_of_their_names(into: object, base: Path, adapter: Path, tmp_path: Path) -> None:
    report = on_disk(base, [adapter], tmp_path / "out", into=into)
    assert report.into == "bfloat16"
    assert {tensor.dtype for tensor in tensors(tmp_path / "out").values()} == {torch.bfloat16}
    on_disk(base, [adapter], tmp_path / "out", into="bfloat16")  # one and the same run
