"""Adapter files: both directions against peft, golden files, refusals that change nothing, writers that die."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_net import CASES, TinyNet, randomize_trainable_
from torch import nn

from qlora_kit import LoraConfig, LoraModel, apply_lora
from qlora_kit.adapter_folder import read_adapter
from qlora_kit.errors import AdapterError, ConfigError, StorageError
from qlora_kit.storage import adapter_state, load_adapter_state_, save_adapter

GOLDEN = Path(__file__).parent / "data" / "golden"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# float32 logits of order 1 from the same factors, products taken in another order: a few roundings of 1e-7.
FLOAT32 = 1e-6

# What peft says about these tiny models, none of it about the files.
peft_talks = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set:UserWarning",
    "ignore:Setting `save_embedding_layers`:UserWarning",
    "ignore:Could not identify embedding layer:UserWarning",
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)


def base_net() -> TinyNet:
    model = TinyNet().eval()
    model.load_state_dict(load_file(GOLDEN / "base.safetensors"))
    return model


def ids() -> torch.Tensor:
    return load_file(GOLDEN / "expected.safetensors")["ids"]


def trained(case: str = "linear", **changes: Any) -> LoraModel:
    """A TinyNet with an adapter whose parameters, biases and copies all differ from their start."""
    lora = apply_lora(base_net(), LoraConfig(**{**CASES[case], **changes}))
    randomize_trainable_(lora)
    return lora.eval()


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for key in left:
        assert torch.equal(left[key], right[key]), key


# -- both directions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_golden_adapters_give_pefts_logits(case: str) -> None:
    lora = LoraModel.from_pretrained(base_net(), GOLDEN / case)
    expected = load_file(GOLDEN / "expected.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(lora(expected["ids"]), expected[case], rtol=0, atol=FLOAT32)
        assert (lora.unload()(expected["ids"]) - expected[case]).abs().max() > 0.01


@peft_talks
@pytest.mark.parametrize("case", CASES)
def test_peft_reads_ours_and_writes_the_same_keys(case: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="files are exchanged with the installed peft")
    lora = trained(case)
    lora.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(base_net(), str(tmp_path / "ours")).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids()), lora(ids()), rtol=0, atol=FLOAT32)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours, back = (load_file(tmp_path / who / WEIGHTS) for who in ("ours", "theirs"))
    # With bias="all" PEFT also stores the frozen original of a saved module, and its copy a second time.
    extra = {key for key in back.keys() - ours.keys() if "original_module" in key or "modules_to_save" in key}
    assert not extra or case == "bias_all"
    assert_same(ours, {key: back[key] for key in back.keys() - extra})
    again = LoraModel.from_pretrained(base_net(), tmp_path / "theirs")
    with torch.no_grad():
        assert torch.equal(again(ids()), lora(ids()))


def test_transformers_reads_ours(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="transformers loads adapters through peft")
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    lora = apply_lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(r=2))
    randomize_trainable_(lora)
    lora.eval().save_pretrained(tmp_path / "adapter")
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        expected = lora(tokens).logits
        direct = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
        torch.testing.assert_close(direct(tokens).logits, expected, rtol=0, atol=FLOAT32)
        onto = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        onto.load_adapter(str(tmp_path / "adapter"))
        torch.testing.assert_close(onto.eval()(tokens).logits, expected, rtol=0, atol=FLOAT32)


@peft_talks
def test_tables_that_peft_adds_go_into_the_base(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the file is written by the installed peft")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    theirs = peft.get_peft_model(
        LlamaForCausalLM(config), peft.LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"])
    )
    randomize_trainable_(theirs)
    theirs.save_pretrained(str(tmp_path))
    assert any(key.endswith("base_layer.weight") for key in load_file(tmp_path / WEIGHTS))
    other = LlamaForCausalLM(config)
    other.model.layers.load_state_dict(theirs.base_model.model.model.layers.state_dict())
    lora = LoraModel.from_pretrained(other, tmp_path)
    tokens = torch.arange(5)[None]
    with torch.no_grad():
        torch.testing.assert_close(lora(tokens).logits, theirs.eval()(tokens).logits, rtol=0, atol=FLOAT32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_are_stored_and_parameters_keep_theirs(dtype: torch.dtype, tmp_path: Path) -> None:
    lora = trained()
    for tensor in lora.adapter_layers()["fc"].adapter_tensors("default").values():
        tensor.data = tensor.data.to(dtype)
    lora.save_pretrained(tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    assert stored["base_model.model.fc.lora_A.weight"].dtype == dtype
    assert stored["base_model.model.head.lora_A.weight"].dtype == torch.float32
    again = LoraModel.from_pretrained(base_net(), tmp_path)
    for key, tensor in adapter_state(again, "default").items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, stored[key].float())


def test_file_is_minimal_and_says_pt(tmp_path: Path) -> None:
    from safetensors import safe_open

    trained().save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert sorted(file.keys()) == [
            f"base_model.model.{path}.lora_{x}.weight" for path in ("fc", "head") for x in "AB"
        ]
    stored = json.loads((tmp_path / CONFIG).read_text())
    assert (stored["inference_mode"], "init_lora_weights" in stored) == (True, False)


def test_other_adapters_live_in_subfolders(tmp_path: Path) -> None:
    lora = trained()
    lora.add_adapter("second", LoraConfig(r=3, target_modules=["fc"], init_lora_weights=False))
    lora.save_pretrained(tmp_path)
    assert (tmp_path / "second" / CONFIG).is_file()
    again = LoraModel.from_pretrained(base_net(), tmp_path)
    again.load_adapter(tmp_path / "second", "renamed")
    again.set_adapter("renamed")
    lora.set_adapter("second")
    with torch.no_grad():
        assert torch.equal(again(ids()), lora(ids()))
    lora.save_pretrained(tmp_path / "one", selected_adapters=["second"])
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["second"]
    with pytest.raises(AdapterError, match=r"unknown adapter 'third'; the model has \['default', 'second'\]"):
        save_adapter(lora, tmp_path / "none", ["second", "third"])
    assert not (tmp_path / "none").exists()


def test_biases_are_stored_as_trained_while_switched_off(tmp_path: Path) -> None:
    lora = trained("bias_all")
    before = adapter_state(lora)
    with lora.disable_adapter():
        lora.save_pretrained(tmp_path)
    assert_same(before, load_file(tmp_path / WEIGHTS))


# -- states that others gather, and resuming ------------------------------------------------------------------


@pytest.mark.parametrize("case", ["linear", "embedding", "bias_all", "modules_to_save"])
def test_a_gathered_state_dict_is_stored_in_place_of_the_parameters(case: str, tmp_path: Path) -> None:
    lora = trained(case)
    gathered = {key: value + 1 for key, value in snapshot(lora).items()}
    live = adapter_state(lora)
    save_adapter(lora, tmp_path, state_dict=gathered)
    assert_same(load_file(tmp_path / WEIGHTS), {key: value + 1 for key, value in live.items()})
    shard = next(key for key in gathered if "default" in key)
    gathered[shard] = gathered[shard][:0]
    with pytest.raises(StorageError, match=r"state_dict: expected all tensors.*missing or empty.*gather the shards"):
        save_adapter(lora, tmp_path / "other", state_dict=gathered)
    assert not (tmp_path / "other").exists()


def test_resume_copy_has_the_same_bytes_and_loads(tmp_path: Path) -> None:
    lora = trained("modules_to_save")
    lora.add_adapter("second", LoraConfig(r=2, target_modules=["fc"]))
    save_adapter(lora, tmp_path, resume_copy=True)
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / WEIGHTS).read_bytes()
    wanted = adapter_state(lora)
    randomize_trainable_(lora, seed=5)
    lora.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert_same(adapter_state(lora), wanted)


# -- older files --------------------------------------------------------------------------------------------


def test_keys_of_older_releases_are_understood(tmp_path: Path) -> None:
    lora = trained("bias_lora_only", modules_to_save=["head"])
    state = adapter_state(lora)
    older = {
        key.replace(".base_layer.bias", ".bias").replace(".head.", ".head.modules_to_save."): value
        for key, value in state.items()
    }
    assert len(older.keys() - state.keys()) == 4
    randomize_trainable_(lora, seed=7)
    load_adapter_state_(lora, "default", older)
    assert_same(adapter_state(lora), state)


def test_a_pickle_is_read_only_on_request_and_never_run(tmp_path: Path) -> None:
    lora = trained()
    lora.save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    (tmp_path / WEIGHTS).unlink()
    torch.save(state, tmp_path / "adapter_model.bin")
    with pytest.raises(StorageError, match=r"adapter_model.bin: expected .*found a pickle.*allow_pickle=True"):
        read_adapter(tmp_path)
    assert_same(read_adapter(tmp_path, allow_pickle=True)[1], state)

    class Trap:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"base_model.model.fc.lora_A.weight": Trap()}, tmp_path / "adapter_model.bin")
    with pytest.raises(StorageError, match="expected a pickle of tensors only"):
        read_adapter(tmp_path, allow_pickle=True)
    assert not (tmp_path / "sprung").exists()
    torch.save([1], tmp_path / "adapter_model.bin")
    with pytest.raises(StorageError, match="expected a dict of tensors, found a list"):
        read_adapter(tmp_path, allow_pickle=True)


# -- refusals ------------------------------------------------------------------------------------------------


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
