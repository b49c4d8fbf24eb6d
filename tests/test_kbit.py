"""Preparation of dense, 4-bit, 8-bit and foreign models, the memory bill, and the gradient check."""

from __future__ import annotations

import copy
import io
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from qlora_kit import (
    AdapterError,
    LoraConfig,
    LoraModel,
    apply_lora,
    check_gradients,
    prepare_model_for_int8_training,
    prepare_model_for_kbit_training,
)
from qlora_kit.kbit import is_norm, memory_bill

HIDDEN, INTERMEDIATE, VOCABULARY = 64, 96, 128
HALF = [torch.bfloat16, torch.float16]
STORAGES = ["dense", "4-bit", "8-bit"]


def llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=0,
        )
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(folder)
    return folder


def load(folder: Path, storage: str, dtype: torch.dtype) -> LlamaForCausalLM:
    config = {
        "dense": None,
        "4-bit": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=True,
        ),
        "8-bit": BitsAndBytesConfig(load_in_8bit=True),
    }[storage]
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config)


def batch() -> dict[str, Tensor]:
    ids = torch.randint(1, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def adapted(model: nn.Module) -> LoraModel:
    return apply_lora(model, LoraConfig(r=4, target_modules="all-linear"))


# -- what is cast and what isn't -----------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", HALF)
def test_only_norms_become_float32_and_nothing_is_trainable(saved: Path, storage: str, dtype: torch.dtype) -> None:
    model = load(saved, storage, dtype)
    before = {name: (p.dtype, p.detach().clone()) for name, p in model.named_parameters()}
    assert prepare_model_for_kbit_training(model) is model
    norms = {f"{path}.weight" for path, module in model.named_modules() if "RMSNorm" in type(module).__name__}
    assert len(norms) == 5
    for name, parameter in model.named_parameters():
        old_dtype, old = before[name]
        assert not parameter.requires_grad
        assert parameter.dtype == (torch.float32 if name in norms else old_dtype), name
        assert torch.equal(parameter.to(old_dtype), old), name


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", HALF)
def test_prepared_model_trains_and_keeps_its_output_dtype(saved: Path, storage: str, dtype: torch.dtype) -> None:
    lora = adapted(prepare_model_for_kbit_training(load(saved, storage, dtype)))
    lora.train()
    output = lora(**batch())
    assert output.logits.dtype == dtype
    output.loss.backward()
    report = check_gradients(lora)
    assert len(report.norms) == 14  # seven linears in each of two layers
    assert all(p.grad is None for name, p in lora.named_parameters() if "lora_" not in name)


@pytest.mark.parametrize("dtype", HALF)
def test_float32_norms_are_not_less_exact(saved: Path, dtype: torch.dtype) -> None:
    """Against the same weights in float64: holding norms in float32 must not move the logits away."""
    exact = load(saved, "dense", dtype).double()
    plain = load(saved, "dense", dtype)
    prepared = prepare_model_for_kbit_training(load(saved, "dense", dtype)).eval()
    inputs = {k: v for k, v in batch().items() if k != "labels"}
    with torch.no_grad():
        reference = exact.eval()(**inputs).logits
        errors = [(m(**inputs).logits.double() - reference).norm() / reference.norm() for m in (plain, prepared)]
    assert errors[1] < 1.1 * errors[0]  # a tenth: the two round at different places, so neither is always below


@pytest.mark.parametrize("cast_embeddings", [False, True])
@pytest.mark.parametrize("cast_head", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_by_request(cast_embeddings: bool, cast_head: bool, tied: bool) -> None:
    model = llama(tied).to(torch.bfloat16)
    prepare_model_for_kbit_training(model, cast_embeddings=cast_embeddings, cast_head=cast_head)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding is head) == tied
    wide = {True: torch.float32, False: torch.bfloat16}
    assert embedding.dtype == wide[cast_embeddings or (tied and cast_head)]
    assert head.dtype == wide[cast_head or (tied and cast_embeddings)]
    lora = adapted(model)
    output = lora.train()(**batch())
    assert output.logits.dtype == wide[cast_head]
    output.loss.backward()
    check_gradients(lora)


def test_head_by_request_needs_a_head() -> None:
    with pytest.raises(AdapterError, match=r"cast_head=True: expected a model whose get_output_embeddings"):
        prepare_model_for_kbit_training(nn.Sequential(nn.Linear(4, 4)), cast_head=True)


@pytest.mark.parametrize("dtype", HALF)
def test_bert_layer_norm(dtype: torch.dtype) -> None:
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
    )
    model = prepare_model_for_kbit_training(BertModel(config).to(dtype))
    assert {m.weight.dtype for m in model.modules() if isinstance(m, nn.LayerNorm)} == {torch.float32}
    assert {m.bias.dtype for m in model.modules() if isinstance(m, nn.LayerNorm)} == {torch.float32}
    lora = adapted(model)
    ids = batch()["input_ids"]
    assert lora(input_ids=ids).last_hidden_state.dtype == dtype
    # The pooler sees the first token's output, so its adapter is reached by pooler_output alone.
    (lora(input_ids=ids).last_hidden_state.float().square().mean() + lora(input_ids=ids).pooler_output.sum()).backward()
    check_gradients(lora)


class Plain(nn.Module):
    """A model without transformers' methods; its names look like norms where they aren't, and the reverse."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_projection = nn.Linear(8, 8)
        self.scale = nn.LayerNorm(8)
        self.batch = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_projection(self.batch(self.scale(x)))


def test_plain_module() -> None:
    model = prepare_model_for_kbit_training(Plain().to(torch.bfloat16))
    assert model.norm_projection.weight.dtype == torch.bfloat16
    assert model.scale.weight.dtype == model.batch.running_mean.dtype == torch.float32
    assert model(torch.randn(4, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert model.memory_bill.activation_checkpointing == "not offered by the model"
    lora = apply_lora(model, LoraConfig(r=2, target_modules=["norm_projection"]))
    check_gradients(lora, x=torch.randn(4, 8, dtype=torch.bfloat16))


def test_norms_are_told_by_their_type() -> None:
    model = Plain()
    assert is_norm(model.scale)
    assert is_norm(model.batch)
    assert not is_norm(model.norm_projection)

    class NormalizedLinear(nn.Linear):
        pass

    assert not is_norm(NormalizedLinear(4, 4))  # called one, but its weight is a matrix


class QuantLinear(nn.Module):
    """Laid out as GPTQ's linears are: packed int32 codes and zeros, float16 scales, no ``weight``."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.randint(-(2**31), 2**31 - 1, (size // 8, size), dtype=torch.int32))
        self.register_buffer("qzeros", torch.randint(-(2**31), 2**31 - 1, (1, size // 8), dtype=torch.int32))
        self.register_buffer("scales", torch.rand(1, size, dtype=torch.float16))
        self.register_buffer("g_idx", torch.zeros(size, dtype=torch.int32))
        self.bias = nn.Parameter(torch.zeros(size, dtype=torch.float16))

    def forward(self, x: Tensor) -> Tensor:
        shifts = torch.arange(0, 32, 4)
        codes = (self.qweight[:, None, :] >> shifts[None, :, None] & 15).reshape(-1, self.qweight.shape[1])
        return x @ ((codes.to(x.dtype) - 8) * self.scales.to(x.dtype)) + self.bias.to(x.dtype)


def test_foreign_storage_is_left_alone() -> None:
    size = 16
    model = nn.Sequential(QuantLinear(size), nn.LayerNorm(size), nn.Linear(size, 4)).to(torch.float16)
    before = {name: (t.dtype, t.clone()) for name, t in model[0].state_dict().items()}
    prepare_model_for_kbit_training(model)
    for name, tensor in model[0].state_dict().items():
        assert tensor.dtype == before[name][0]
        assert torch.equal(tensor, before[name][1])
    assert model.memory_bill.bytes["k-bit weights"] == size * size // 2 + size // 8 * 4 + size * 4
    assert model.memory_bill.bytes["k-bit scales"] == size * 2
    lora = apply_lora(model, LoraConfig(r=2, target_modules=["2"]))
    report = check_gradients(lora, input=torch.randn(3, size, dtype=torch.float16))
    assert list(report.norms) == ["2 (default)"]


# -- protection from the platform ----------------------------------------------------------------------------


def test_evaluation_does_not_change_4bit_weights(saved: Path) -> None:
    """On CPUs with AVX512_BF16 an unprotected evaluation forward rewrites packed weights in place."""
    model = prepare_model_for_kbit_training(load(saved, "4-bit", torch.bfloat16)).eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scales = {name: p.quant_state.absmax.clone() for name, p in model.named_parameters() if hasattr(p, "quant_state")}
    assert len(scales) == 14
    with torch.no_grad():
        model(**batch())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        if name in scales:
            assert torch.equal(parameter.quant_state.absmax, scales[name]), name


@pytest.mark.parametrize("storage", STORAGES)
def test_copies_right_after_training(saved: Path, storage: str) -> None:
    """Evaluation, deepcopy, a pickle of the model and of its state all show the same trained model."""
    lora = adapted(prepare_model_for_kbit_training(load(saved, storage, torch.bfloat16))).train()
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        lora(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    lora.eval()
    inputs = {k: v for k, v in batch().items() if k != "labels"}
    with torch.no_grad():
        expected = lora(**inputs).logits
        assert torch.equal(lora(**inputs).logits, expected)
        assert torch.equal(copy.deepcopy(lora)(**inputs).logits, expected)
        assert torch.equal(pickled(lora)(**inputs).logits, expected)
        state = pickled(lora.state_dict())
        other = adapted(prepare_model_for_kbit_training(load(saved, storage, torch.bfloat16))).eval()
        assert not torch.equal(other(**inputs).logits, expected)
        trained = {name: value for name, value in state.items() if "lora_" in name}
        other.load_state_dict(trained, strict=False)
        assert torch.equal(other(**inputs).logits, expected)


def pickled(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("storage", STORAGES)
def test_generate(saved: Path, storage: str) -> None:
    lora = adapted(prepare_model_for_kbit_training(load(saved, storage, torch.bfloat16))).eval()
    ids = batch()["input_ids"][:1]
    out = lora.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert out.shape == (1, ids.shape[1] + 4)
    with torch.no_grad():
        greedy = ids
        for _ in range(4):
            greedy = torch.cat([greedy, lora(input_ids=greedy).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out, greedy)


@pytest.mark.xfail(strict=False, reason="torch.compile cannot trace the lookup autograd function of odd 4-bit shapes")
@pytest.mark.parametrize("storage", ["dense", "4-bit"])
def test_compiled_forward(saved: Path, storage: str) -> None:
    """Traced with Dynamo and run eagerly, so that equality is bitwise; hooks must not be lost on the way."""
    lora = adapted(prepare_model_for_kbit_training(load(saved, storage, torch.bfloat16))).eval()
    inputs = {k: v for k, v in batch().items() if k != "labels"}
    with torch.no_grad():
        assert torch.equal(torch.compile(lora, backend="eager")(**inputs).logits, lora(**inputs).logits)


# -- activation checkpointing --------------------------------------------------------------------------------


@pytest.mark.xfail(strict=False, reason="forwarding of checkpointing attributes through the wrapper is unfinished")
def test_checkpointing_is_non_reentrant_without_input_gradients(saved: Path) -> None:
    plain = adapted(prepare_model_for_kbit_training(load(saved, "4-bit", torch.bfloat16), False)).train()
    model = prepare_model_for_kbit_training(load(saved, "4-bit", torch.bfloat16))
    assert plain.memory_bill.activation_checkpointing == "off"
    assert model.memory_bill.activation_checkpointing == "non-reentrant"
    assert not plain.is_activation_checkpointing
    assert model.is_activation_checkpointing
    lora = adapted(model).train()
    seen: list[bool] = []
    lora.get_input_embeddings().register_forward_hook(lambda *a: seen.append(a[2].requires_grad))
    torch.manual_seed(0)
    for name, parameter in lora.named_parameters():  # adapters of equal value, away from the zero start
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
            plain.get_parameter(name).data.copy_(parameter.data)
    losses = [m(**batch()).loss for m in (plain, lora)]
    for loss in losses:
        loss.backward()
    assert seen == [False]
    assert torch.equal(*losses)
    for name, parameter in lora.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, plain.get_parameter(name).grad), name


def test_checkpointing_saves_memory(saved: Path) -> None:
    kept = {}
    for on in (False, True):
        lora = adapted(prepare_model_for_kbit_training(load(saved, "dense", torch.bfloat16), on)).train()
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            lora(**batch())
        kept[on] = total
    assert kept[True] < kept[False] / 2


def test_reentrant_by_request_keeps_input_gradients(saved: Path) -> None:
    model = load(saved, "dense", torch.bfloat16)
    prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": True})
    assert model.memory_bill.activation_checkpointing == "reentrant"
    check_gradients(adapted(model), **batch())


def test_the_older_interface() -> None:
    class Older(nn.Linear):
        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any]) -> None:
            self.given = gradient_checkpointing_kwargs

    model = prepare_model_for_kbit_training(Older(4, 4), True, {"preserve_rng_state": False})
    assert model.given == {"use_reentrant": False, "preserve_rng_state": False}
    assert model.memory_bill.activation_checkpointing == "non-reentrant"


def test_a_model_that_refuses_checkpointing() -> None:
    class Refuses(PreTrainedModel):
        config_class = LlamaConfig
        supports_gradient_checkpointing = False

        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.linear = nn.Linear(4, 4)

    model = prepare_model_for_kbit_training(Refuses(LlamaConfig()))
    assert model.memory_bill.activation_checkpointing == "not offered by the model"


# -- calling it ----------------------------------------------------------------------------------------------


def test_no_warning_and_the_old_name(saved: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = prepare_model_for_int8_training(load(saved, "8-bit", torch.float16), use_gradient_checkpointing=False)
    assert model.memory_bill.activation_checkpointing == "off"


def test_twice_is_once() -> None:
    model = prepare_model_for_kbit_training(llama().to(torch.bfloat16), cast_head=True)
    hooks = {path: (len(m._forward_hooks), len(m._forward_pre_hooks)) for path, m in model.named_modules()}
    prepare_model_for_kbit_training(model, cast_head=True)
    assert hooks == {path: (len(m._forward_hooks), len(m._forward_pre_hooks)) for path, m in model.named_modules()}


def test_after_apply_lora_is_refused() -> None:
    lora = adapted(llama())
    with pytest.raises(AdapterError, match=r"model\.layers\.0\.self_attn\.q_proj: expected a model without adapters"):
        prepare_model_for_kbit_training(lora)
    assert any(p.requires_grad for p in lora.parameters())


# -- the memory bill -----------------------------------------------------------------------------------------


def test_bill_counts_every_byte_once(saved: Path) -> None:
    linear = 2 * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 2 + 3 * HIDDEN * INTERMEDIATE)
    outputs = 2 * (2 * HIDDEN + 2 * HIDDEN // 2 + 2 * INTERMEDIATE + HIDDEN)
    table = VOCABULARY * HIDDEN * 2
    bills = {s: prepare_model_for_kbit_training(load(saved, s, torch.bfloat16)).memory_bill for s in STORAGES}
    norms = 5 * HIDDEN
    for storage, bill in bills.items():
        assert bill.bytes["embeddings, bfloat16"] == table
        assert bill.bytes["norms, float32"] == norms * 4
        assert bill.before["norms, bfloat16"] == norms * 2
        assert "norms, bfloat16" not in bill.bytes
        assert bill.total - sum(bill.before.values()) == norms * 2
        assert bill.bytes["dense weights, bfloat16"] == table + (linear * 2 if storage == "dense" else 0)
    assert bills["4-bit"].bytes["k-bit weights"] == linear // 2
    assert bills["8-bit"].bytes["k-bit weights"] == linear
    assert bills["8-bit"].bytes["k-bit scales"] == outputs * 4  # one float32 a row
    # Doubly quantized: a byte for every 64 values, a float32 for every 256 of those or part of them, and a mean.
    assert linear // 64 <= bills["4-bit"].bytes["k-bit scales"] <= linear // 64 + 14 * 8
    tied = memory_bill(llama(tied=True))
    assert tied.total == memory_bill(llama()).total - VOCABULARY * HIDDEN * 4


def test_bill_is_printable_plain_data_and_knows_adapters(saved: Path) -> None:
    lora = adapted(prepare_model_for_kbit_training(load(saved, "4-bit", torch.bfloat16)))
    assert lora.memory_bill.to_dict() == json.loads(json.dumps(lora.memory_bill.to_dict()))
    text = str(lora.memory_bill)
    assert "k-bit weights" in text
    assert f"{lora.memory_bill.total:,}" in text
    assert "activation checkpointing: non-reentrant" in text
    trainable = sum(p.nbytes for p in lora.parameters() if p.requires_grad)
    now = memory_bill(lora)
    assert now.bytes["adapters, float32"] == trainable
    assert now.total == lora.memory_bill.total + trainable


# -- the gradient check --------------------------------------------------------------------------------------


def test_check_runs_its_own_backward_and_leaves_no_trace() -> None:
    lora = apply_lora(llama(), LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.5)).eval()
    random = torch.get_rng_state()
    report = check_gradients(lora, **batch())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in lora.parameters())
    assert not any(module.training for module in lora.modules())
    assert list(report.norms) == [f"model.layers.{i}.self_attn.q_proj (default)" for i in range(2)]
    assert "gradients reach all 2 trainable adapters" in str(report)
    assert report.to_dict() == {"norms": report.norms}


def test_check_without_labels_and_after_a_backward() -> None:
    lora = adapted(llama())
    check_gradients(lora, input_ids=batch()["input_ids"])
    lora(**batch()).loss.backward()
    given = {name: p.grad.clone() for name, p in lora.named_parameters() if p.requires_grad}
    norms = check_gradients(lora).norms
    path = "model.layers.0.mlp.up_proj"
    expected = sum(g.square().sum() for name, g in given.items() if name.startswith(f"model.{path}.")).sqrt()
    assert norms[f"{path} (default)"] == pytest.approx(expected.item(), rel=1e-5)  # float32 sums in another order


def test_check_names_what_is_wrong() -> None:
    with pytest.raises(AdapterError, match="expected a model with adapters, found LlamaForCausalLM without any"):
        check_gradients(llama())
    lora = adapted(llama())
    with pytest.raises(AdapterError, match=r"14 of 14 .*q_proj \(default\).*no backward pass was run"):
        check_gradients(lora)
    lora(**batch()).logits.mul(0).sum().backward()
    with pytest.raises(AdapterError, match=r"all labels -100"):
        check_gradients(lora)
    lora.zero_grad()
    lora.merge_adapter()
    with pytest.raises(AdapterError, match=r"call unmerge_adapter\(\)"):
        check_gradients(lora)
    lora.unmerge_adapter()
    lora.requires_grad_(False)
    with pytest.raises(AdapterError, match="found 14 frozen ones"):
        check_gradients(lora)


def test_check_finds_an_unused_module_and_an_overflow() -> None:
    class TwoTowers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    lora = apply_lora(TwoTowers(), LoraConfig(r=2, target_modules=["used", "unused"]))
    with pytest.raises(
        AdapterError, match=r"1 of 2 trainable adapters: unused \(default\)\. .*took no part in the loss"
    ):
        check_gradients(lora, x=torch.randn(2, 4))
    with pytest.raises(AdapterError, match="a value overflowed"):
        check_gradients(lora, x=torch.full((2, 4), float("inf")))


@pytest.mark.xfail(strict=False, reason="forwarding of checkpointing attributes through the wrapper is unfinished")
def test_check_finds_reentrant_checkpointing_without_input_gradients(saved: Path) -> None:
    model = load(saved, "dense", torch.float32)
    prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": True})
    model.disable_input_require_grads()
    with (
        pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"),
        pytest.raises(AdapterError, match=r"use_reentrant=False"),
    ):
        check_gradients(adapted(model), **batch())
