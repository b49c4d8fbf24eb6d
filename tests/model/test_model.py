"""The life of named adapters, and that the wrapper passes for the model it wraps."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from checkpointing import enable_checkpointing
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from qlora_kit import AdapterError, AdapterLayer, LoraConfig, LoraModel, MergeError, TargetError, apply_lora

IDS = torch.arange(16).view(2, 8)


def llama(**kwargs: object) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        tie_word_embeddings=False,
        **kwargs,
    )
    return LlamaForCausalLM(config).eval()


def lora_llama(**kwargs: object) -> LoraModel:
    return apply_lora(llama(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **kwargs))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    now = model.state_dict()
    assert list(now) == list(state)
    assert all(torch.equal(now[key], state[key]) for key in state)


# -- modes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_every_module_keeps_its_own_mode(training: bool) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)).train(training)
    net[1].train(not training)
    net[2].train(not training)
    lora = apply_lora(net, LoraConfig(target_modules=["0", "2"], modules_to_save=["1"], lora_dropout=0.5))
    assert [lora.training, net.training] == [training, training]
    saved = net[1]
    assert [m.training for m in (saved, saved.original_module, saved.modules_to_save["default"])] == [not training] * 3
    for layer, mode in ((net[0], training), (net[2], not training)):
        assert all(module.training == mode for module in layer.modules())


# -- the life of adapters ------------------------------------------------------------------------------------


def test_a_default_start_changes_nothing_and_trains_only_the_factors() -> None:
    model = llama()
    before = logits(model)
    lora = apply_lora(model, LoraConfig(target_modules="all-linear"))
    assert torch.equal(logits(lora), before)
    trainable = {name for name, p in lora.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".lora_A.default." in name or ".lora_B.default." in name for name in trainable)


def test_training_reaches_every_factor_and_no_base_weight() -> None:
    lora = lora_llama(lora_dropout=0.1)
    before = state_of(lora)
    lora.train()
    optimizer = torch.optim.SGD([p for p in lora.parameters() if p.requires_grad], lr=0.1)
    lora(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    after = lora.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if ".lora_A." in key or ".lora_B." in key}


def test_adapters_are_added_switched_combined_and_deleted() -> None:
    lora = lora_llama()
    lora.disable_adapter_layers()
    base = logits(lora)
    lora.enable_adapter_layers()
    first = logits(lora)
    lora.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    assert torch.equal(logits(lora), first), "a new adapter must not act before it is set"
    assert lora.active_adapter == "default"
    lora.set_adapter("second")
    second = logits(lora)
    assert not torch.allclose(second, first)
    assert all(p.requires_grad == (".second." in n) for n, p in lora.named_parameters())
    lora.set_adapter(["default", "second"])
    assert lora.active_adapter == ["default", "second"]
    assert not torch.allclose(logits(lora), second)
    lora.delete_adapter("default")
    assert torch.equal(logits(lora), second)
    # Modules that no adapter uses any more are the user's own again.
    assert {path.rpartition(".")[2] for path in lora.adapter_layers()} == {"q_proj"}
    lora.delete_adapter("second")
    assert lora.peft_config == {}
    assert torch.equal(logits(lora), base)


def test_deleting_the_active_adapter_activates_another() -> None:
    lora = lora_llama()
    lora.add_adapter("other", LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    lora.delete_adapter("default")
    assert lora.active_adapters == ["other"]


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "..", 3, "default"])
def test_names_that_cannot_be_are_refused_before_anything_changes(name: object) -> None:
    lora = lora_llama()
    before = state_of(lora)
    with pytest.raises(AdapterError, match=r"adapter( name)? "):
        lora.add_adapter(name, LoraConfig(target_modules=["q_proj"]))
    assert_same_state(lora, before)


def test_unknown_names_are_named_with_the_known_ones() -> None:
    lora = lora_llama()
    for call in (lora.set_adapter, lora.delete_adapter, lambda name: lora.merge_adapter([name])):
        with pytest.raises(AdapterError, match=r"'nobody'.*\['default'\]"):
            call("nobody")
    with pytest.raises(MergeError, match=r"'nobody'.*\['default'\]"):
        lora.merge_and_unload(adapter_names=["nobody"])


def test_disabling_nests_and_keeps_merges_and_gradients() -> None:
    model = llama()
    base = logits(model)
    lora = apply_lora(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    lora.merge_adapter()
    merged = logits(lora)
    with lora.disable_adapter():
        assert torch.equal(logits(lora), base)
        with lora.disable_adapter():
            assert torch.equal(logits(lora), base)
        assert torch.equal(logits(lora), base)
    assert torch.equal(logits(lora), merged)
    assert any(p.requires_grad for p in lora.parameters())


def test_merge_and_unmerge_come_back_bitwise() -> None:
    lora = lora_llama()
    before, apart = state_of(lora), logits(lora)
    lora.merge_adapter()
    torch.testing.assert_close(logits(lora), apart, rtol=0, atol=1e-5)
    assert {name for layer in lora.adapter_layers().values() for name in layer.merged_adapters} == {"default"}
    with pytest.raises(AdapterError, match="unmerge_adapter"):
        lora.delete_adapter("default")
    with pytest.raises(MergeError, match="merged already"):
        lora.merge_adapter()
    torch.testing.assert_close(logits(lora), apart, rtol=0, atol=1e-5)
    lora.unmerge_adapter()
    assert_same_state(lora, before)
    assert torch.equal(logits(lora), apart)


def test_merging_adapters_one_after_the_other_is_merging_both() -> None:
    lora = lora_llama()
    lora.add_adapter("b", LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    lora.set_adapter(["default", "b"])
    both = logits(lora)
    lora.merge_adapter(["default"])
    lora.merge_adapter(["b"])
    torch.testing.assert_close(logits(lora), both, rtol=0, atol=1e-5)


def test_merge_and_unload_and_unload_leave_a_bare_model() -> None:
    lora = lora_llama()
    apart = logits(lora)
    merged = copy.deepcopy(lora).merge_and_unload()
    torch.testing.assert_close(logits(merged), apart, rtol=0, atol=1e-5)
    original = {path: layer.base_layer for path, layer in lora.adapter_layers().items()}
    base = lora.unload()
    assert all(base.get_submodule(path) is module for path, module in original.items())
    for model in (merged, base):
        assert type(model) is LlamaForCausalLM
        assert not any(isinstance(module, AdapterLayer) for module in model.modules())
    with pytest.raises(MergeError, match="nothing to merge"):
        lora.merge_and_unload()


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_train_and_come_back(bias: str) -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    kept = state_of(model)
    lora = apply_lora(model, LoraConfig(target_modules=["a"], bias=bias))
    trainable = {n for n, p in lora.named_parameters() if p.requires_grad and n.endswith("bias")}
    expected = {"model.a.base_layer.bias", "model.b.bias"} if bias == "all" else {"model.a.base_layer.bias"}
    assert trainable == expected
    with torch.no_grad():
        lora.model.a.base_layer.bias += 1
    trained = lora.model.a.base_layer.bias.detach().clone()
    with lora.disable_adapter():
        assert torch.equal(lora.model.a.base_layer.bias, kept["a.bias"])
    assert torch.equal(lora.model.a.base_layer.bias, trained)
    with pytest.raises(AdapterError, match="bias"):
        lora.add_adapter("second", LoraConfig(target_modules=["a"], bias=bias))
    lora.unload()
    assert_same_state(model, kept)


def test_modules_to_save_train_a_copy() -> None:
    model = llama()
    head = model.lm_head
    lora = apply_lora(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    base = logits(lora)
    lora.train()
    optimizer = torch.optim.SGD([p for p in lora.parameters() if p.requires_grad], lr=1.0)
    kept = head.weight.detach().clone()
    lora(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    lora.eval()
    trained = logits(lora)
    assert not torch.allclose(trained, base)
    assert torch.equal(head.weight, kept)
    with lora.disable_adapter():
        assert torch.equal(logits(lora), base)
    second = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    lora.add_adapter("second", second)
    with pytest.raises(AdapterError, match=r"lm_head: expected at most one .* trained copy.*active together"):
        lora.set_adapter(["default", "second"])
    merged = copy.deepcopy(lora).merge_and_unload()
    torch.testing.assert_close(logits(merged), trained, rtol=0, atol=1e-5)
    assert lora.unload().lm_head is head


def test_configs_are_copied_and_targets_written_out() -> None:
    config = LoraConfig(target_modules="all-linear")
    model = llama()
    model.config._name_or_path = "some/base"
    lora = apply_lora(model, config)
    assert (config.target_modules, config.base_model_name_or_path) == ("all-linear", None)
    recorded = lora.peft_config["default"]
    assert recorded.target_modules == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert recorded.base_model_name_or_path == "some/base"


def test_inference_mode_freezes() -> None:
    lora = apply_lora(llama(), LoraConfig(target_modules=["q_proj"], inference_mode=True))
    assert not any(p.requires_grad for p in lora.parameters())


# -- passing for the base model --------------------------------------------------------------------------------


def test_it_is_the_base_model_to_whoever_asks(capsys: pytest.CaptureFixture[str]) -> None:
    lora = lora_llama()
    assert isinstance(lora, LoraModel)
    assert isinstance(lora, PreTrainedModel)
    assert lora.config is lora.model.config
    assert lora.device == torch.device("cpu")
    assert lora.base_model.model is lora.model
    assert "labels" in inspect.signature(lora.forward).parameters
    assert [lora.is_quantized, lora.is_loaded_in_4bit, lora.is_loaded_in_8bit] == [False] * 3
    assert repr(lora).startswith("LoraModel(")
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = lora.no_such_thing
    lora.print_trainable_parameters()
    trainable, total = lora.get_nb_trainable_parameters()
    assert capsys.readouterr().out == (
        f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}\n"
    )


def test_a_plain_module_stays_a_plain_module() -> None:
    lora = apply_lora(nn.Sequential(nn.Linear(2, 2)), LoraConfig(r=1, target_modules=["0"]))
    assert not isinstance(lora, nn.Sequential)
    assert lora(torch.ones(1, 2)).shape == (1, 2)


@pytest.mark.slow
def test_generate_compile_deepcopy_and_pickle() -> None:
    lora = lora_llama()
    expected = logits(lora)
    assert lora.generate(IDS, max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(IDS)).shape == (2, 11)
    compiled = torch.compile(lora, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), expected, rtol=0, atol=1e-5)
    twin = copy.deepcopy(lora)
    assert torch.equal(logits(twin), expected)
    twin.delete_adapter("default")
    assert torch.equal(logits(lora), expected), "a deep copy shares nothing"
    thawed = pickle.loads(pickle.dumps(lora))
    assert torch.equal(logits(thawed), expected)
    other = lora_llama()
    other.load_state_dict(pickle.loads(pickle.dumps(lora.state_dict())))
    assert torch.equal(logits(other), expected)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        lora = lora_llama()
        lora.train()
        if checkpointing:
            enable_checkpointing(lora)
        lora(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in lora.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_resizing_the_vocabulary() -> None:
    lora = lora_llama()
    lora.resize_token_embeddings(40)
    assert logits(lora).shape[-1] == 40
    adapted = apply_lora(llama(), LoraConfig(target_modules=["embed_tokens"]))
    with pytest.raises(AdapterError, match="resize before applying the adapter"):
        adapted.resize_token_embeddings(40)


def test_half_precision_bases_get_float32_factors_unless_told() -> None:
    for chosen, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        model = llama().to(torch.bfloat16)
        lora = apply_lora(model, LoraConfig(target_modules=["q_proj"]), adapter_dtype=chosen)
        assert {p.dtype for p in lora.parameters() if p.requires_grad} == {expected}
        assert lora(IDS).logits.dtype == torch.bfloat16


def test_a_wrong_target_leaves_the_model_usable() -> None:
    model = llama()
    before, expected = state_of(model), logits(model)
    with pytest.raises(TargetError):
        apply_lora(model, LoraConfig(target_modules=["q_proj", "nope"]))
    assert_same_state(model, before)
    assert torch.equal(logits(model), expected)
    assert all(p.requires_grad for p in model.parameters())
