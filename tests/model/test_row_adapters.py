"""One call of a model with an adapter for each row: each is as with its adapter alone, in forward and generate."""

from __future__ import annotations

from functools import partial
from typing import Any

import peft
import pytest
import torch
from tiny_llama import llama
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.tokenization_utils_base import BatchEncoding
from two_adapters import IDS, NAMES, NEAR, alone, two, with_two
from zoo import ZOO, output_of

from qlora_kit import AdapterError, quantize_
from qlora_kit.compat.peft import PeftModel, get_peft_model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::qlora_kit.errors.LeftOutWarning")  # stacked experts
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "bert", "t5", "mixtral", "qwen2-moe", "cnn", "clip", "mamba"])
def test_each_row_is_as_with_its_adapter_alone(name: str) -> None:
    """Decoders, encoders, both, experts whose words are laid end to end, convolutions, two towers, a recurrence."""
    member = ZOO[name]
    lora, batch = with_two(member.make(), member.targets), member.batch()

    def call(**names: Any) -> Tensor:
        result = lora(**batch, **names)  # of CLIP's two towers the logits compare rows with each other
        return result.image_embeds if name == "clip" else output_of(result)

    with torch.no_grad():
        outputs = {adapter: alone(lora, adapter, call) for adapter in ("p", "q", "__base__")}
        rows = len(outputs["p"])
        for names in (NAMES[:rows], ["p", "q", "p", "__base__"][:rows], ["q"] * rows):
            expected = torch.stack([outputs[own][row] for row, own in enumerate(names)])
            assert (call(adapter_names=names) - expected).abs().max() <= NEAR * expected.abs().max()
    assert (outputs["p"] - outputs["q"]).abs().max() > 0.02 * outputs["p"].abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["switch", "deberta-v2", "swin", "qwen2-vl"])
def test_models_that_hand_layers_something_else_than_rows_are_refused(name: str) -> None:
    """Some of the words for each expert; positions; windows; patches of all images end to end."""
    member = ZOO[name]
    lora = with_two(member.make(), member.targets)
    with torch.no_grad(), pytest.raises(AdapterError, match=r"don't tell what row they belong to.*set_adapter"):
        lora(**member.batch(), adapter_names=["p", "q"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("storage", ["dense", "4 bits", "2 bits"])
def test_peft_gives_the_same(storage: str) -> None:
    """The same factors in peft's layers, which compute with the same matrices, and its mixed batch."""
    lora = two()
    theirs = with_two(
        llama(),
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        peft.get_peft_model,
        peft.LoraConfig,
    )
    if storage != "dense":
        base = quantize_(llama(), int(storage[0]))
        lora = with_two(base, "all-linear")
        for path, layer in lora.adapter_layers().items():
            theirs.base_model.model.get_submodule(path).base_layer.weight.data = layer.codec.read(layer.base_layer)
    for path, layer in lora.adapter_layers().items():
        for name in ("p", "q"):
            for ours, other in zip(layer.factors(name), ("lora_A", "lora_B"), strict=True):
                getattr(theirs.base_model.model.get_submodule(path), other)[name].weight.data = ours.detach()
    with torch.no_grad():
        found, expected = (model(input_ids=IDS, adapter_names=NAMES).logits for model in (lora, theirs))
    assert (found - expected).abs().max() <= NEAR * expected.abs().max()


# -- generate ------------------------------------------------------------------------------------------------


def each(lora: Any, **settings: Any) -> Tensor:
    """Tokens of every row, generated with its adapter alone."""
    settings = {"max_new_tokens": 4, "do_sample": False, **settings}
    rows = [alone(lora, own, partial(lora.generate, IDS[i : i + 1], **settings)) for i, own in enumerate(NAMES)]
    return torch.cat(rows)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_cache": False},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"generation_config": GenerationConfig(num_beams=2, eos_token_id=None, pad_token_id=0)},
    ],
    ids=["greedy", "without a cache", "beams", "several of each", "by a configuration"],
)
@pytest.mark.slow
def test_generate(settings: dict[str, Any]) -> None:
    lora = two()
    found = lora.generate(IDS, max_new_tokens=4, do_sample=False, adapter_names=NAMES, **settings)
    assert torch.equal(found, each(lora, **settings))
    lora.generation_config.num_beams = 2  # the model's own setting
    assert torch.equal(lora.generate(IDS, max_new_tokens=2, adapter_names=NAMES, do_sample=False)[:, :6], IDS)


@pytest.mark.slow
def test_samples_of_a_row_are_its_adapters() -> None:
    """Drawn from the likeliest word alone."""
    lora = two()
    settings: dict[str, Any] = {"top_k": 1, "do_sample": True, "num_return_sequences": 3, "max_new_tokens": 3}
    found = lora.generate(IDS, adapter_names=NAMES, **settings)
    greedy = each(lora, max_new_tokens=3)
    assert torch.equal(found, greedy.repeat_interleave(3, 0))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::qlora_kit.errors.LeftOutWarning")  # stacked experts
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", ["t5", "mixtral"])
def test_generate_of_encoder_decoders_and_experts(name: str, settings: dict[str, Any]) -> None:
    """An encoder sees each row once and the decoder once for each beam."""
    member = ZOO[name]
    lora = with_two(member.make(), member.targets)
    ids = {key: value for key, value in member.batch().items() if key in ("input_ids", "attention_mask")}
    names = ["q", "p"]
    settings = {**settings, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    found = lora.generate(**ids, adapter_names=names, **settings)
    for row, own in enumerate(names):
        one = {key: value[row : row + 1] for key, value in ids.items()}
        assert torch.equal(found[row : row + 1], alone(lora, own, partial(lora.generate, **one, **settings)))


def test_an_assistant_has_no_rows_of_its_own() -> None:
    """A draft with adapters of the same names proposes with what it has active."""
    lora, draft = two(), two()
    draft.set_adapter("q")
    expected = alone(lora, "p", lambda: lora.generate(IDS[:1], max_new_tokens=4, do_sample=False))
    layer, seen = draft.adapter_layers()["model.layers.0.self_attn.q_proj"], []

    def compare(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        right = layer.base_layer(inputs[0]) + layer.branch(inputs[0], "q")
        seen.append(torch.allclose(output, right, atol=1e-5))

    layer.register_forward_hook(compare)
    found = lora.generate(IDS[:1], max_new_tokens=4, do_sample=False, adapter_names=["p"], assistant_model=draft.model)
    assert torch.equal(found, expected)
    assert seen
    assert all(seen)


def test_inputs_of_any_kind() -> None:
    lora = two()
    expected = lora(input_ids=IDS, adapter_names=NAMES).logits
    embeddings = lora.get_input_embeddings()(IDS)
    batch = BatchEncoding({"input_ids": IDS, "attention_mask": torch.ones_like(IDS)})
    for found in (
        lora(IDS, adapter_names=tuple(NAMES)).logits,
        lora(**batch, adapter_names=NAMES).logits,
        lora(inputs_embeds=embeddings, adapter_names=NAMES).logits,
        lora(attention_mask=torch.ones(4, 6), inputs_embeds=embeddings, adapter_names=NAMES).logits,
    ):
        torch.testing.assert_close(found, expected)
    tokens = lora.generate(inputs_embeds=embeddings, max_new_tokens=2, do_sample=False, adapter_names=NAMES)
    assert torch.equal(tokens, lora.generate(IDS, max_new_tokens=2, do_sample=False, adapter_names=NAMES)[:, 6:])

    class TakesOne(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 3)

        def forward(self, batch: dict[str, Any]) -> Tensor:
            return self.proj(batch["x"])

    one = with_two(TakesOne(), ["proj"])
    x = torch.randn(3, 4)
    for batch in ({"x": x}, BatchEncoding({"x": x})):
        found = one(batch, adapter_names=["p", "q", "__base__"])
        assert torch.equal(found[2], one.model.proj.base_layer(x)[2])
        with pytest.raises(AdapterError, match="each of the 3 rows of x, found 2 names"):
            one(batch, adapter_names=["p", "q"])


# -- peft's names --------------------------------------------------------------------------------------------


def test_peft_model() -> None:
    """In training peft refuses with a ValueError, which ours is."""
    model = with_two(llama(), ["q_proj", "v_proj"], get_peft_model)
    assert isinstance(model, PeftModel)
    with torch.no_grad():
        found = model(input_ids=IDS, adapter_names=NAMES).logits
        for row, name in enumerate(NAMES):
            expected = alone(model, name, lambda: model(input_ids=IDS).logits)[row]
            torch.testing.assert_close(found[row], expected, rtol=0, atol=NEAR * float(expected.abs().max()))
    with pytest.raises(ValueError, match="training mode"):
        model.train()(input_ids=IDS, adapter_names=NAMES)
