"""What preparation casts, freezes and refuses, on dense, 4-bit, 8-bit and foreign models."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from tiny_llama import HALF, STORAGES, VOCABULARY, adapted, batch, llama, load
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
)

from qlora_kit import (
    AdapterError,
    LoraConfig,
    apply_lora,
    check_gradients,
    prepare_model_for_int8_training,
    prepare_model_for_kbit_training,
)
from qlora_kit.training.preparation.kbit import is_norm

# -- what is cast and what isn't -----------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", HALF)
def test_only_norms_become_float32_and_nothing_is_trainable(llama_dir: Path, storage: str, dtype: torch.dtype) -> None:
    model = load(llama_dir, storage, dtype)
    before = {name: (p.dtype, p.detach().clone()) for name, p in model.named_parameters()}
    assert prepare_model_for_kbit_training(model) is model
    norms = {f"{path}.weight" for path, module in model.named_modules() if "RMSNorm" in type(module).__name__}
    assert len(norms) == 5
    for name, parameter in model.named_parameters():
        old_dtype, old = before[name]
        assert not parameter.requires_grad
        assert parameter.dtype == (torch.float32 if name in norms else old_dtype), name
        assert torch.equal(parameter.to(old_dtype), old), name


@pytest.mark.slow
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", HALF)
def test_prepared_model_trains_and_keeps_its_output_dtype(llama_dir: Path, storage: str, dtype: torch.dtype) -> None:
    lora = adapted(prepare_model_for_kbit_training(load(llama_dir, storage, dtype)))
    lora.train()
    output = lora(**batch())
    assert output.logits.dtype == dtype
    output.loss.backward()
    report = check_gradients(lora)
    assert len(report.norms) == 14  # seven linears in each of two layers
    assert all(p.grad is None for name, p in lora.named_parameters() if "lora_" not in name)


@pytest.mark.parametrize("dtype", HALF)
def test_float32_norms_are_not_less_exact(llama_dir: Path, dtype: torch.dtype) -> None:
    """Against the same weights in float64: holding norms in float32 must not move the logits away."""
    exact = load(llama_dir, "dense", dtype).double()
    plain = load(llama_dir, "dense", dtype)
    prepared = prepare_model_for_kbit_training(load(llama_dir, "dense", dtype)).eval()
    inputs = {k: v for k, v in batch().items() if k != "labels"}
    with torch.no_grad():
        reference = exact.eval()(**inputs).logits
        errors = [(m(**inputs).logits.double() - reference).norm() / reference.norm() for m in (plain, prepared)]
    assert errors[1] < 1.1 * errors[0]  # a tenth: the two round at different places, so neither is always below


@pytest.mark.slow
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


# -- calling it ----------------------------------------------------------------------------------------------


def test_no_warning_and_the_old_name(llama_dir: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = prepare_model_for_int8_training(
            load(llama_dir, "8-bit", torch.float16), use_gradient_checkpointing=False
        )
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


class TakesItsNormsDtype(nn.Module):
    """As BLIP-2's query former: what comes after the norm computes in the norm's dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other = nn.LayerNorm(8), nn.LayerNorm(8)
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.norm.weight.dtype)
        return self.fc(x + self.norm(x)) + self.other(x)


def test_a_norm_whose_dtype_others_take_stays_as_it_is() -> None:
    model = prepare_model_for_kbit_training(TakesItsNormsDtype().bfloat16())
    assert model.norm.weight.dtype == torch.bfloat16
    assert model.other.weight.dtype == torch.float32
    assert model(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


@torch.no_grad()
def test_a_kernel_that_takes_all_weights_at_once_finds_one_dtype() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True).bfloat16().eval()
    x = torch.randn(2, 3, 16, dtype=torch.bfloat16)
    expected = layer(x)
    assert torch.equal(prepare_model_for_kbit_training(layer)(x), expected)


@pytest.mark.parametrize(("asked", "calls"), [({}, 1), ({"auto_clear_cache": False}, 0)])
def test_what_casts_left_free_goes_back_to_the_accelerator(
    asked: dict[str, bool], calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cleared: list[int] = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: cleared.append(1))
    prepare_model_for_kbit_training(nn.Sequential(nn.LayerNorm(4)).to(torch.bfloat16), False, **asked)
    assert len(cleared) == calls
