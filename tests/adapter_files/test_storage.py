"""Adapter files: both directions against peft, golden files, gathered states, older files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_nets import CONFIG, GOLDEN, WEIGHTS, assert_same, base_net, ids, snapshot, trained
from safetensors.torch import load_file
from tiny_net import CASES, randomize_trainable_

from qlora_kit import LoraConfig, LoraModel, apply_lora
from qlora_kit.adapter_files.folder import read_adapter
from qlora_kit.adapter_files.tensors import adapter_state, load_adapter_state_, save_adapter
from qlora_kit.errors import AdapterError, StorageError

# float32 logits of order 1 from the same factors, products taken in another order: a few roundings of 1e-7.
FLOAT32 = 1e-6

# What peft says about these tiny models, none of it about the files.
peft_talks = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set:UserWarning",
    "ignore:Setting `save_embedding_layers`:UserWarning",
    "ignore:Could not identify embedding layer:UserWarning",
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)


# -- both directions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_golden_adapters_give_pefts_logits(case: str) -> None:
    lora = LoraModel.from_pretrained(base_net(), GOLDEN / case)
    expected = load_file(GOLDEN / "expected.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(lora(expected["ids"]), expected[case], rtol=0, atol=FLOAT32)
        assert (lora.unload()(expected["ids"]) - expected[case]).abs().max() > 0.01


@pytest.mark.slow
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
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", CONFIG, WEIGHTS]
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


@pytest.mark.parametrize("case", ["bias_all", "modules_to_save"])
def test_resume_copy_holds_every_adapter_and_loads(case: str, tmp_path: Path) -> None:
    lora = trained(case)
    lora.add_adapter("second", LoraConfig(r=2, target_modules=["fc", "proj"]))
    lora.set_adapter(["default", "second"])
    save_adapter(lora, tmp_path, resume_copy=True)
    resumed = load_file(tmp_path / "model.safetensors")
    wanted = {name: adapter_state(lora, name) for name in lora.peft_config}
    assert len(resumed) == sum(map(len, wanted.values()))
    randomize_trainable_(lora, seed=5)
    changed = snapshot(lora)
    with pytest.raises(StorageError, match=r"adapter 'second': .*2 missing"):
        lora.load_state_dict({key: value for key, value in resumed.items() if "lora_A.second" not in key})
    with pytest.raises(AdapterError, match=r"expected one adapter in use .* found \['default', 'second'\]"):
        lora.load_state_dict(wanted["default"])
    assert_same(snapshot(lora), changed)
    lora.load_state_dict(resumed, strict=False)
    for name, state in wanted.items():
        assert_same(adapter_state(lora, name), state)
    # An adapter that isn't in use need not be there, and the keys of an adapter's own file go to the one in use.
    lora.set_adapter("default")
    lora.load_state_dict({key: value + 1 for key, value in resumed.items() if "second" not in key})
    assert_same(adapter_state(lora), {key: value + 1 for key, value in wanted["default"].items()})
    lora.load_state_dict(wanted["default"])
    assert_same(adapter_state(lora), wanted["default"])
    assert_same(adapter_state(lora, "second"), wanted["second"])


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


def test_a_model_without_embeddings(tmp_path: Path) -> None:
    """transformers' convolution models raise where they are asked for their embeddings."""
    from transformers import ResNetConfig, ResNetModel

    def model() -> ResNetModel:
        torch.manual_seed(0)
        return ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_channels=3)).eval()

    config = LoraConfig(r=2, target_modules=r".*convolution", init_lora_weights=False)
    lora = apply_lora(model(), config)
    lora.save_pretrained(tmp_path)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        found = LoraModel.from_pretrained(model(), tmp_path)(images).last_hidden_state
        assert torch.equal(found, lora(images).last_hidden_state)
