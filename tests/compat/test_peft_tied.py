"""Adapters on tied tables: what PEFT makes of them, in memory, in files of both, and after a merge."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import batch, llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from qlora_kit import LoraConfig, LoraModel, StorageError, apply_lora, merge
from qlora_kit.folders.combine import combine_folders
from qlora_kit.folders.merge.run import merge_folders

IDS = batch()["input_ids"]
# float32 sums in another order.
RELATIVE = 1e-5
CASES: dict[str, dict[str, Any]] = {
    "both saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "table saved": {"modules_to_save": ["embed_tokens"]},
    "head saved": {"modules_to_save": ["lm_head"]},
    "branch on the table": {"target_modules": ["q_proj", "embed_tokens"]},
    "branch on the head": {"target_modules": ["q_proj", "lm_head"]},
    "branch on both": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "a regular expression": {"target_modules": r".*(q_proj|lm_head)"},
    "one of each": {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
}
EACH = [(name, ensured) for name in CASES for ensured in (False, True) if not (name == "one of each" and ensured)]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= RELATIVE * expected.abs().max())


@pytest.fixture
def base(tmp_path: Path) -> Path:
    llama(tied=True).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base)


def quiet(made: Any, *args: Any, **kwargs: Any) -> Any:
    """Both libraries warn of weights that the adapter parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return made(*args, **kwargs)


def peft_model(base: Path, ensured: bool, **config: Any) -> Any:
    torch.manual_seed(3)
    config = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, **config}
    model = quiet(peft.get_peft_model, load(base), peft.LoraConfig(**config, ensure_weight_tying=ensured))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "modules_to_save" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(("case", "ensured"), EACH)
@pytest.mark.slow
def test_both_libraries_compute_the_same_from_either_s_file(case: str, ensured: bool, base: Path, tmp_path: Path):
    theirs = peft_model(base, ensured, **copy.deepcopy(CASES[case]))
    expected = logits(theirs)
    quiet(theirs.save_pretrained, tmp_path / "theirs")
    ours = quiet(LoraModel.from_pretrained, load(base), tmp_path / "theirs")
    assert close(logits(ours), expected)
    ours.save_pretrained(tmp_path / "ours")
    names = [set(load_file(tmp_path / who / "adapter_model.safetensors")) for who in ("theirs", "ours")]
    assert names[1] == names[0]
    again = quiet(peft.PeftModel.from_pretrained, load(base), tmp_path / "ours")
    assert close(logits(again), expected)


@pytest.mark.parametrize(("case", "ensured"), EACH)
@pytest.mark.slow
def test_a_merge_in_memory_and_on_disk_computes_the_same(case: str, ensured: bool, base: Path, tmp_path: Path):
    theirs = peft_model(base, ensured, **copy.deepcopy(CASES[case]))
    expected = logits(theirs)
    quiet(theirs.save_pretrained, tmp_path / "adapter")
    ours = quiet(LoraModel.from_pretrained, load(base), tmp_path / "adapter")
    merged = merge(ours, into="float32").model
    assert close(logits(merged), expected)
    merged.save_pretrained(tmp_path / "memory")
    merge_folders(base, [tmp_path / "adapter"], tmp_path / "disk", into="float32")
    for folder in ("memory", "disk"):
        again = load(tmp_path / folder)
        assert close(logits(again), expected)
        assert again.config.tie_word_embeddings == ensured
        assert (again.lm_head.weight is again.model.embed_tokens.weight) == ensured


@pytest.mark.parametrize("ensured", [False, True])
@pytest.mark.parametrize("case", [name for name in CASES if name != "one of each"])
@pytest.mark.slow
def test_what_is_ensured_trains_as_one(case: str, ensured: bool):
    torch.manual_seed(1)
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **CASES[case]}, ensure_weight_tying=ensured)
    lora = quiet(apply_lora, llama(tied=True), config)
    before = logits(llama(tied=True))
    assert torch.equal(logits(lora), before)
    optimizer = torch.optim.Adam([p for p in lora.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        lora.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(logits(lora), before)
    with lora.disable_adapter():
        assert torch.equal(logits(lora), before)
    if ensured:
        merged = merge(lora).model
        assert merged.lm_head.weight is merged.model.embed_tokens.weight
        assert merged.config.tie_word_embeddings


@pytest.mark.parametrize("case", ["branch on the table", "branch on the head", "branch on both"])
@pytest.mark.parametrize("ensured", [False, True])
def test_merging_in_place_leaves_the_other_table_alone_and_comes_back(case: str, ensured: bool):
    torch.manual_seed(1)
    config = LoraConfig(r=4, init_lora_weights=False, **CASES[case], ensure_weight_tying=ensured)
    model = llama(tied=True)
    plain = logits(model)
    lora = quiet(apply_lora, model, config)
    adapted = logits(lora)
    lora.merge_adapter()
    assert close(logits(lora), adapted)
    with lora.disable_adapter():
        assert torch.equal(logits(lora), plain)
    assert close(logits(lora), adapted)
    lora.unmerge_adapter()
    assert torch.equal(logits(lora), adapted)
    assert torch.equal(logits(lora.unload()), plain)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_it_is_said_that_one_of_two_tied_is_trained_alone():
    with pytest.warns(UserWarning, match=r"lm_head: .*tied to model\.embed_tokens's.*ensure_weight_tying=True"):
        apply_lora(llama(tied=True), LoraConfig(target_modules=["lm_head"]))
    with pytest.warns(UserWarning, match="none of them is adapted"):
        apply_lora(llama(tied=True), LoraConfig(target_modules=["q_proj"], ensure_weight_tying=True))
    with pytest.warns(UserWarning, match="no tied tables"):
        apply_lora(llama(), LoraConfig(target_modules=["lm_head"], ensure_weight_tying=True))


def test_factors_that_peft_trained_apart_are_loaded_apart(base: Path, tmp_path: Path):
    """On a half-precision base PEFT brings shared factors to float32 one by one, so they are shared no more."""
    theirs = peft_model(base, True, target_modules=["q_proj", "lm_head"])
    quiet(theirs.save_pretrained, tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    key = "base_model.model.lm_head.lora_B.weight"
    weights[key] = weights[key] * 2
    save_file(weights, tmp_path / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    ours = quiet(LoraModel.from_pretrained, load(base), tmp_path / "adapter")
    with torch.no_grad():
        head = theirs.base_model.model.lm_head.lora_B["default"]
        head.weight = nn.Parameter(head.weight * 2)
    assert close(logits(ours), logits(theirs))
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], ensure_weight_tying=True)
    shared = quiet(apply_lora, load(base), config)
    with pytest.raises(StorageError, match="one tensor in this model"):
        shared.load_adapter(tmp_path / "adapter", "default")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["branch on the table", "branch on the head", "both saved", "head saved"])
def test_what_was_trained_as_one_is_loaded_apart_on_an_untied_model(case: str, base: Path, tmp_path: Path):
    theirs = peft_model(base, True, **copy.deepcopy(CASES[case]))
    expected = logits(theirs)
    quiet(theirs.save_pretrained, tmp_path / "adapter")
    model = load(base)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    plain = logits(model)
    ours = LoraModel.from_pretrained(model, tmp_path / "adapter")
    assert close(logits(ours), expected)
    with ours.disable_adapter():
        assert torch.equal(logits(ours), plain)


@pytest.mark.parametrize("ensured", [False, True])
@pytest.mark.parametrize("case", ["branch on the table", "branch on the head", "branch on both"])
@pytest.mark.slow
def test_a_merge_into_few_bits_is_the_same_on_disk(case: str, ensured: bool, base: Path, tmp_path: Path):
    """The head is quantized then, and the table isn't, so they can't stay one."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, init_lora_weights=False, **CASES[case], ensure_weight_tying=ensured)
    lora = quiet(apply_lora, load(base), config)
    lora.save_pretrained(tmp_path / "adapter")
    merge(lora, into="nf4").model.save_pretrained(tmp_path / "memory")
    merge_folders(base, [tmp_path / "adapter"], tmp_path / "disk", into="nf4")
    memory, disk = load(tmp_path / "memory"), load(tmp_path / "disk")
    assert torch.equal(logits(memory), logits(disk))
    assert memory.config.tie_word_embeddings == disk.config.tie_word_embeddings


@pytest.mark.parametrize("case", ["branch on the head", "head saved"])
def test_adapters_that_train_tables_as_one_are_combined(case: str, base: Path, tmp_path: Path):
    torch.manual_seed(1)
    config = LoraConfig(r=4, init_lora_weights=False, **{"target_modules": ["q_proj"], **CASES[case]})
    config.ensure_weight_tying = True
    lora = quiet(apply_lora, load(base), config)
    lora.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path)
    lora.set_adapter(["default", "second"])
    expected = logits(lora)
    quiet(lora.add_weighted_adapter, ["default", "second"], [1.0, 1.0], "sum", "cat")
    lora.set_adapter("sum")
    assert close(logits(lora), expected)
    combine_folders([tmp_path, tmp_path / "second"], [1.0, 1.0], tmp_path / "sum", "cat")
    assert close(logits(quiet(LoraModel.from_pretrained, load(base), tmp_path / "sum")), expected)


def test_other_architectures_tie_under_other_names(tmp_path: Path):
    sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["c_attn", "lm_head"], init_lora_weights=False, ensure_weight_tying=True)
    lora = apply_lora(GPT2LMHeadModel.from_pretrained(tmp_path / "base"), config)
    ids = IDS % 32
    expected = lora.eval()(input_ids=ids).logits
    assert set(lora.adapter_layers()) == {"transformer.wte", "transformer.h.0.attn.c_attn", "lm_head"}
    lora.save_pretrained(tmp_path / "adapter")
    again = LoraModel.from_pretrained(GPT2LMHeadModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(again(input_ids=ids).logits, expected)
    merged = merge(again).model
    assert merged.lm_head.weight is merged.transformer.wte.weight
    assert close(merged(input_ids=ids).logits, expected)
