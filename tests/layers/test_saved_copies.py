"""Trained copies of whole modules: in float32 within half-precision models, and of modules that hold others."""

import copy
from contextlib import nullcontext

import pytest
import torch
from tiny_llama import batch, llama, load
from torch import nn

from qlora_kit import LoraConfig, LoraModel, apply_lora, merge, prepare_model_for_kbit_training

HALVES = [torch.bfloat16, torch.float16]


class Head(nn.Module):
    """Gives a tuple and a dictionary, and takes its input by name."""

    def __init__(self):
        super().__init__()
        self.dense, self.norm, self.out = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, *, states):
        hidden = self.norm(self.dense(states))
        return hidden, {"logits": self.out(hidden), "rows": states.shape[0]}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.norm, self.conv = nn.Embedding(11, 8), nn.RMSNorm(8), nn.Conv1d(8, 8, 3, padding=1)
        self.body, self.head = nn.Linear(8, 8), Head()

    def forward(self, ids):
        hidden = self.body(self.norm(self.table(ids)))
        hidden = hidden + self.conv(hidden.transpose(1, 2)).transpose(1, 2)
        first, second = self.head(states=hidden)
        return first.dtype, second["logits"]


IDS = torch.arange(10).view(2, 5)


def made(saved, dtype, prepared=False):
    torch.manual_seed(0)
    net = Net().to(dtype)
    if prepared:
        net = prepare_model_for_kbit_training(net)
    torch.manual_seed(1)
    lora = apply_lora(net, LoraConfig(r=2, target_modules=["body"], modules_to_save=saved, init_lora_weights=False))
    with torch.no_grad():
        for module in lora.saved_modules().values():
            for tensor in module.adapter_tensors("default").values():
                tensor.add_(0.1 * torch.randn_like(tensor, dtype=torch.float32).to(tensor.dtype))
    return lora


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("saved", [["table"], ["norm"], ["conv"], ["head"], ["table", "norm", "conv", "head"]])
@pytest.mark.slow
def test_a_float32_copy_speaks_the_dtype_of_its_half_precision_model(saved, dtype, prepared, autocast):
    lora = made(saved, dtype, prepared)
    inner = {id(p): p.dtype for m in lora.saved_modules().values() for p in m.modules_to_save.parameters()}
    assert set(inner.values()) == {torch.float32}
    seen = []
    lora.model.body.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", dtype) if autocast else nullcontext():
        first, logits = lora(IDS)
    logits.float().sum().backward()
    if not autocast:  # which has opinions of its own: torch's norms give float32 there
        assert seen == [dtype]
        assert first == logits.dtype == dtype
    reference = copy.deepcopy(lora)
    for tensor in [*reference.parameters(), *reference.buffers()]:
        tensor.data = tensor.data.float()
    for module in reference.model.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    expected = reference(IDS)[1]
    # The hidden states in between are rounded to a half about ten times.
    assert (logits.float() - expected).norm() < 30 * torch.finfo(dtype).eps * expected.norm()
    for module in lora.saved_modules().values():
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.modules_to_save.parameters())


@pytest.mark.parametrize("dtype", HALVES)
def test_a_half_precision_copy_of_a_float32_module_gives_float32(dtype):
    torch.manual_seed(0)
    lora = apply_lora(
        Net(), LoraConfig(r=2, target_modules=["conv"], modules_to_save=["table", "head"]), adapter_dtype=dtype
    )
    lora.saved_modules()["head"].modules_to_save["default"].to(dtype)
    lora.saved_modules()["table"].modules_to_save["default"].to(dtype)
    first, logits = lora(IDS)
    assert first == logits.dtype == torch.float32


def test_merging_a_copy_of_a_prepared_head_leaves_the_dtypes_that_loading_gives():
    lora = made(["head"], torch.bfloat16, prepared=True)
    wanted = lora(IDS)[1]
    merged = merge(lora).model
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert (merged(IDS)[1].float() - wanted.float()).norm() < 0.05 * wanted.float().norm()


class Parts(nn.Module):
    """Modules that are taken out of others, and never called themselves."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(8, 8), nn.Identity(), nn.ModuleList([nn.Linear(8, 8)])])
        self.named = nn.ModuleDict({"left": nn.Linear(8, 8), "right": nn.LayerNorm(8)})
        self.row = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.scales = nn.ParameterList([torch.ones(8), torch.ones(8)])
        self.body = nn.Linear(8, 8)

    def forward(self, x):
        x = self.heads[2][0](self.heads[1](self.heads[0](self.body(x))))
        for name, part in self.named.items():
            x = x + part(x) * (1 if name == "left" else 2)
        for part in self.row:
            x = part(x)
        x = self.row[-1](x) + self.row(x)
        for scale in self.scales:
            x = x * scale
        return x * self.scales[0] * len(self.scales)


CONTAINERS = ["heads", "named", "row", "scales"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("saved", [*([name] for name in CONTAINERS), CONTAINERS])
def test_a_container_in_modules_to_save_is_trained_stored_merged_and_switched_off(saved, dtype, tmp_path):
    torch.manual_seed(0)
    net = Parts().to(dtype)
    x = torch.randn(4, 8).to(dtype)
    plain = copy.deepcopy(net)
    before = net(x)
    lora = apply_lora(net, LoraConfig(r=2, target_modules=["body"], modules_to_save=saved))
    assert torch.equal(lora(x), before) or dtype != torch.float32
    trained = {n: p for n, p in lora.named_parameters() if p.requires_grad and "lora_" not in n}
    lora(x).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.1)
    after = lora.eval()(x)
    assert (after - before).abs().max() > 0.01
    with lora.disable_adapter():
        assert torch.equal(lora(x), before)
    lora.save_pretrained(tmp_path)
    again = LoraModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    assert torch.equal(again(x), after)
    merged = merge(lora).model
    assert type(merged.heads) is nn.ModuleList
    assert type(merged.row) is nn.Sequential
    assert set(merged.state_dict()) == set(plain.state_dict())
    tolerance = 1e-6 if dtype == torch.float32 else 0.1  # the copy's own rounding to the base's dtype
    assert (merged(x) - after).abs().max() <= tolerance * after.abs().max()


def test_names_of_a_containers_tensors_in_a_file_are_those_in_the_model(tmp_path):
    lora = apply_lora(Parts(), LoraConfig(r=2, target_modules=["body"], modules_to_save=["heads"]))
    lora.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    names = {key.removeprefix("base_model.model.") for key in load_file(tmp_path / "adapter_model.safetensors")}
    assert {n for n in names if "lora_" not in n} == {
        f"heads.{part}.{tensor}" for part in ("0", "2.0") for tensor in ("weight", "bias")
    }


@pytest.mark.slow
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("saved", [["embed_tokens"], ["embed_tokens", "lm_head"], ["norm"]])
def test_a_half_precision_llama_trains_stores_and_generates_with_copies(saved, dtype, bits, tmp_path):
    llama().save_pretrained(tmp_path / "base")
    ids = batch()["input_ids"]
    for prepared in (False, True):

        def made(prepared=prepared):
            model = load(tmp_path / "base", "4-bit" if bits else "dense", dtype)
            return prepare_model_for_kbit_training(model) if prepared else model

        lora = apply_lora(made(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=saved)).train()
        seen = []
        lora.model.model.layers[0].register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
        for context in (nullcontext(), torch.autocast("cpu", dtype)):
            with context:
                loss = lora(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            assert loss.isfinite()
        assert {hidden.dtype for hidden in seen} == {dtype}
        lora.save_pretrained(tmp_path / "adapter")
        again = LoraModel.from_pretrained(made(), tmp_path / "adapter")
        assert torch.equal(again(input_ids=ids).logits, lora.eval()(input_ids=ids).logits)
        assert again.generate(ids, max_new_tokens=2, do_sample=False).shape == (2, 14)
