"""What a configuration selects, and what it says when it selects nothing."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from qlora_kit import LoraConfig, TargetError, UnsupportedModuleError, apply_lora, make_plan, merge, quantize_
from qlora_kit.injection.targets import resolve, resolve_saved, shortest_names
from qlora_kit.naming import pattern_value


def llama(**kwargs: object) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        **kwargs,
    )
    return LlamaForCausalLM(config)


def paths(model: nn.Module, **kwargs: object) -> list[str]:
    return [target.path for target in resolve(model, LoraConfig(**kwargs))]


def test_a_name_matches_whole_components_only() -> None:
    model = nn.ModuleDict(
        {"proj": nn.Linear(2, 2), "q_proj": nn.Linear(2, 2), "a": nn.ModuleDict({"proj": nn.Linear(2, 2)})}
    )
    assert paths(model, target_modules=["proj"]) == ["proj", "a.proj"]
    assert paths(model, target_modules=["a.proj"]) == ["a.proj"]


def test_a_regex_matches_the_whole_path() -> None:
    model = llama()
    assert paths(model, target_modules=r".*\.1\.self_attn\.(q|v)_proj") == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    with pytest.raises(TargetError, match=r"matches no whole module path.*q_proj"):
        paths(model, target_modules=r"self_attn\.q_proj")


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("all_linear", '"all-linear"'),
        ("all", '"all-linear"'),
        ("q_proj", "['q_proj']"),
        ("q_proj, v_proj", "['q_proj', 'v_proj']"),
        ("self_attn.q_proj", None),
    ],
)
def test_a_text_that_is_no_expression_is_told_what_to_pass(text: str, advice: str | None) -> None:
    with pytest.raises(TargetError) as caught:
        paths(llama(), target_modules=text)
    assert str(caught.value).endswith(f"pass target_modules={advice}") == (advice is not None)


def test_all_linear_leaves_the_output_head_out() -> None:
    for tied in (True, False):
        found = paths(llama(tie_word_embeddings=tied), target_modules="all-linear")
        assert len(found) == 3 * 7
        assert "lm_head" not in found


def test_all_linear_leaves_a_classification_head_out() -> None:
    config = BertConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    found = paths(BertForSequenceClassification(config), target_modules="all-linear")
    assert "classifier" not in found
    assert "bert.encoder.layer.0.attention.self.query" in found


def test_all_linear_takes_transposed_linears_but_no_embedding() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=8))
    assert {path.rpartition(".")[2] for path in paths(model, target_modules="all-linear")} == {
        "c_attn",
        "c_proj",
        "c_fc",
    }


def test_defaults_by_architecture_and_by_naming_scheme() -> None:
    assert {path.rpartition(".")[2] for path in paths(llama())} == {"q_proj", "v_proj"}
    unknown = nn.ModuleDict({"query": nn.Linear(2, 2), "key": nn.Linear(2, 2), "value": nn.Linear(2, 2)})
    assert paths(unknown) == ["query", "value"]
    with pytest.raises(TargetError, match=r"target_modules=None.*set target_modules.*'fc'"):
        paths(nn.ModuleDict({"fc": nn.Linear(2, 2)}))


def test_a_name_that_matches_nothing_names_the_closest() -> None:
    with pytest.raises(TargetError, match=r"target_modules: 'qproj' matches no module.*'q_proj'"):
        paths(llama(), target_modules=["v_proj", "qproj"])
    with pytest.raises(TargetError, match=r"modules_to_save: 'lmhead'.*'lm_head'"):
        resolve_saved(llama(), ["lmhead"])
    with pytest.raises(TargetError, match=r"exclude_modules: 'k_prj'.*'k_proj'"):
        paths(llama(), target_modules="all-linear", exclude_modules=["k_prj"])
    with pytest.raises(TargetError, match=r"rank_pattern: 'k_proj' matches no module"):
        paths(llama(), target_modules=["q_proj"], rank_pattern={"k_proj": 4})


def test_an_unsupported_type_is_named_with_its_path() -> None:
    with pytest.raises(UnsupportedModuleError, match=r"model\.layers\.0\.input_layernorm: .*LlamaRMSNorm"):
        paths(llama(), target_modules=["input_layernorm"])


class Numbered(nn.Module):
    """Layers at ``layers`` or below it, each with experts that hold two branches of ``up_proj``."""

    def __init__(self, inside: str, kind: type[nn.Module]) -> None:
        super().__init__()

        def branch() -> nn.Module:
            return nn.ModuleDict({"up_proj": nn.Linear(2, 2)})

        def layer() -> nn.Module:
            experts = kind(*([[branch() for _ in range(2)]] if kind is nn.ModuleList else [branch(), branch()]))
            return nn.ModuleDict({"q_proj": nn.Linear(2, 2), "experts": experts})

        layers = nn.ModuleList(layer() for _ in range(3))
        if inside:
            self.add_module(inside, nn.ModuleDict({"layers": layers}))
        else:
            self.layers = layers


@pytest.mark.parametrize("kind", [nn.ModuleList, nn.Sequential])
@pytest.mark.parametrize("inside", ["", "model"])
@pytest.mark.parametrize("pattern", [None, "layers", ["h", "layers"]])
def test_the_index_of_a_layer_isnt_that_of_an_expert_in_it(inside: str, kind: type, pattern: object) -> None:
    above = f"{inside}.layers.1".lstrip(".")
    names = {"target_modules": ["up_proj", "q_proj"], "layers_pattern": pattern}
    found = paths(Numbered(inside, kind), **names, layers_to_transform=[1])
    assert found == [f"{above}.q_proj", f"{above}.experts.0.up_proj", f"{above}.experts.1.up_proj"]
    with pytest.raises(TargetError, match=r"layer\(s\) \[3\].*layers \[0, 1, 2\]"):
        paths(Numbered(inside, kind), **names, layers_to_transform=[3])


def test_a_pattern_says_which_list_counts_and_the_first_that_fits_is_taken() -> None:
    names = {"target_modules": ["up_proj"], "layers_to_transform": 1}
    experts = [f"layers.{i}.experts.1.up_proj" for i in range(3)]
    assert paths(Numbered("", nn.ModuleList), **names, layers_pattern="experts") == experts
    assert paths(Numbered("", nn.ModuleList), **names, layers_pattern=["experts", "layers"]) == experts


@pytest.mark.parametrize("pattern", [None, "layers", "experts", ["experts", "layers"]])
def test_layers_are_those_of_peft(pattern: object) -> None:
    names = {"r": 1, "target_modules": ["up_proj", "q_proj"], "layers_to_transform": [1], "layers_pattern": pattern}
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(**names), Numbered("model", nn.ModuleList))
    adapted = {path for path, module in theirs.named_modules() if hasattr(module, "lora_A")}
    assert set(paths(Numbered("model", nn.ModuleList), **names)) == adapted


@pytest.mark.parametrize("whole", ["lm_head", "model.layers.2.self_attn.q_proj"])
def test_a_whole_path_says_itself_which_layer_it_means(whole: str) -> None:
    names = {"r": 1, "target_modules": ["v_proj", whole], "layers_to_transform": [1]}
    found = paths(llama(), **names)
    assert set(found) == {"model.layers.1.self_attn.v_proj", whole}
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(**names), llama())
    assert set(found) == {path for path, module in theirs.named_modules() if hasattr(module, "lora_A")}
    with pytest.raises(TargetError, match=r"no selected module in layer\(s\) \[1\]"):
        paths(llama(), target_modules=["lm_head"], layers_to_transform=[1])


def test_layers_and_exclusions() -> None:
    model = llama()
    assert paths(model, target_modules=["q_proj"], layers_to_transform=1) == ["model.layers.1.self_attn.q_proj"]
    chosen = paths(model, target_modules=["q_proj"], layers_to_transform=[0, 2], layers_pattern="layers")
    assert chosen == ["model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.q_proj"]
    with pytest.raises(TargetError, match=r"layer\(s\) \[7\].*layers \[0, 1, 2\]"):
        paths(model, target_modules=["q_proj"], layers_to_transform=[0, 7])
    with pytest.raises(TargetError, match="layers_to_transform"):
        paths(model, target_modules=["q_proj"], layers_to_transform=0, layers_pattern="blocks")
    rest = paths(model, target_modules="all-linear", exclude_modules=["mlp.up_proj", "k_proj"])
    assert len(rest) == 3 * 5
    assert paths(model, target_modules=["q_proj"], exclude_modules=r".*\.[12]\..*") == [
        "model.layers.0.self_attn.q_proj"
    ]
    with pytest.raises(TargetError, match="leave no module"):
        paths(model, target_modules=["q_proj"], exclude_modules=["q_proj"])


def test_ranks_and_alphas_by_pattern() -> None:
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"layers.0.self_attn.q_proj": 2, r".*v_proj": 3},
        alpha_pattern={"v_proj": 5},
    )
    targets = {target.path.removeprefix("model.layers."): target for target in resolve(llama(), config)}
    assert targets["0.self_attn.q_proj"].rank == 2
    assert targets["1.self_attn.q_proj"].rank == 8
    assert targets["1.self_attn.v_proj"].rank == 3
    assert (targets["1.self_attn.v_proj"].alpha, targets["1.self_attn.q_proj"].alpha) == (5, 16)


def test_the_first_matching_pattern_wins() -> None:
    assert pattern_value("a.b", {"b": 1, "a.b": 2}, 0) == 1
    assert pattern_value("a.bb", {"b": 1}, 0) == 0


def test_a_shared_module_is_one_target_with_aliases() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(4, 4)})
    first, second = resolve(model, LoraConfig(target_modules=["a", "b", "c"]))
    assert (first.path, first.aliases, second.path) == ("a", ("b",), "c")
    lora = apply_lora(model, LoraConfig(target_modules=["a", "b"], init_lora_weights=False))
    assert model["a"] is model["b"]
    assert lora.unload()["b"] is shared


def test_a_tied_weight_is_not_quantized_until_untied() -> None:
    model = llama(tie_word_embeddings=True)
    for target in ("lm_head", "embed_tokens"):
        with pytest.raises(TargetError, match=r"tied to .*untie first"):
            make_plan(model, LoraConfig(target_modules=[target], init_lora_weights="loftq"))
        with pytest.raises(TargetError, match=r"tied to .*untie first"):
            quantize_(model, target_modules=["q_proj", target])
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    plan = make_plan(model, LoraConfig(target_modules=["lm_head"], init_lora_weights="loftq"))
    assert [entry.path for entry in plan.entries] == ["lm_head"]


def test_layers_that_share_a_matrix_are_refused() -> None:
    """Their class makes them one, whatever a merge makes of them."""
    model = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 4), "three": nn.Linear(4, 4)})
    model["two"].weight = model["one"].weight
    for config in ({"target_modules": ["two"]}, {"target_modules": ["three"], "modules_to_save": ["two"]}):
        with pytest.raises(TargetError, match=r"two: its weight is tied to one's.*untie first"):
            make_plan(model, LoraConfig(**config))


def test_a_table_and_a_head_of_any_model_may_be_parted() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=False)})
    model["head"].weight = model["table"].weight
    with pytest.warns(UserWarning, match="tied"):
        lora = apply_lora(model, LoraConfig(r=2, target_modules=["head"], init_lora_weights=False))
    expected = lora.model["head"](torch.ones(4))
    table = model["table"].weight.detach().clone()
    merged = merge(lora).model
    torch.testing.assert_close(merged["head"](torch.ones(4)), expected)
    assert torch.equal(merged["table"].weight, table)


@pytest.mark.parametrize("ensured", [False, True])
def test_tied_tables_are_adapted_one_by_one_or_together(ensured: bool) -> None:
    model = llama(tie_word_embeddings=True)
    both = ["model.embed_tokens", "lm_head"]
    for target, path in zip(("embed_tokens", "lm_head"), both, strict=True):
        plan = make_plan(model, LoraConfig(target_modules=["q_proj", target], ensure_weight_tying=ensured))
        tables = {entry.path: entry for entry in plan.entries if "q_proj" not in entry.path}
        assert list(tables) == (both if ensured else [path])
        assert all(entry.shared for entry in tables.values())
        if ensured:
            assert tables["lm_head"].tied_to == "model.embed_tokens"
            assert tables["lm_head"].trainable_parameters == 0
        assert resolve_saved(model, [target], tied=ensured) == (both if ensured else [path])


def test_a_module_to_save_is_no_target() -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    assert paths(model, target_modules="all-linear", modules_to_save=["head"]) == ["body"]
    with pytest.raises(TargetError, match="'head' matches no module"):
        paths(model, target_modules=["head"], modules_to_save=["head"])


def test_a_part_of_a_module_to_save_is_trained_with_it() -> None:
    model = llama()
    whole = resolve_saved(model, ["mlp"])
    assert resolve_saved(model, ["mlp", "up_proj"]) == whole
    lora = apply_lora(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp", "up_proj"]))
    assert list(lora.saved_modules()) == whole


def test_a_second_adapter_resolves_as_the_first() -> None:
    model = llama()
    before = paths(model, target_modules="all-linear")
    apply_lora(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    assert paths(model, target_modules="all-linear") == before


def test_shortest_names_select_exactly_the_paths() -> None:
    model = nn.ModuleDict(
        {"x": nn.ModuleDict({"proj": nn.Linear(2, 2)}), "y": nn.ModuleDict({"proj": nn.Linear(2, 2)})}
    )
    assert shortest_names(["x.proj"], model) == ["x.proj"]
    assert shortest_names(["x.proj", "y.proj"], model) == ["proj"]
