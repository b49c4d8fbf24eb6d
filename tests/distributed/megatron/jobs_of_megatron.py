"""What the ranks do in the tests of Megatron's models: numbers of one run, for the tests to compare between runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jobs_of_linears import linears, quantized_linears
from megatron_gpt import batch, begin, gpt, logits_of, loss_of
from torch import Tensor, nn

from qlora_kit import AdapterError, LoraConfig, LoraModel, apply_lora, make_plan, merge, quantize_
from qlora_kit.codecs import codec_for
from qlora_kit.layers.sharded.parts import gathered
from qlora_kit.layers.sharded.sharding import sharding_of

WHOLE = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "word_embeddings", "output_layer")
PARTS = ("linear_q", "linear_k", "linear_v", "linear_fc1_gate", "linear_fc1_up")
SPLIT = (*PARTS, "linear_proj", "linear_fc2")
STEPS = 10


def adapter(targets: Any = WHOLE, **options: Any) -> LoraConfig:
    """A start in which both factors count from the first step."""
    return LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), init_lora_weights=False, **options)


def gradients(lora: LoraModel) -> dict[str, tuple[Tensor, Tensor]]:
    """Those of every layer's A and B, of all ranks together."""
    found = {}
    for path, layer in lora.adapter_layers().items():
        pairs = zip(layer.adapter_tensors("default").values(), layer.sharding.factor_dims, strict=True)
        A, B = (gathered(layer.sharding, parameter.grad, dim) for parameter, dim in pairs)
        found[path] = A, B
    return found


def factors(lora: LoraModel) -> dict[str, tuple[Tensor, Tensor]]:
    """Every layer's whole A and B."""
    layers = lora.adapter_layers().items()
    return {path: tuple(f.clone() for f in layer.whole_factors("default")) for path, layer in layers}  # type: ignore[misc]


def replicas(lora: LoraModel) -> dict[str, Tensor]:
    """The factor of every layer that all ranks are to have alike, as this one has it."""
    found = {}
    for path, layer in lora.adapter_layers().items():
        pairs = zip(layer.factors("default"), layer.sharding.factor_dims, strict=True)
        found[path] = next(part.detach().clone() for part, dim in pairs if dim is None)
    return found


def norm_by_megatron(lora: LoraModel) -> float:
    """That of all gradients, as Megatron's optimizers sum it up: of parts every rank's own, of copies the first's."""
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

    own = [p.grad for p in lora.parameters() if p.grad is not None and param_is_not_tensor_parallel_duplicate(p)]
    total = sum((grad.square().sum() for grad in own), torch.zeros(()))
    dist.all_reduce(total)
    return float(total.sqrt())


def trained(lora: LoraModel, steps: int = STEPS) -> dict[str, Any]:
    """Losses of ``steps`` steps, the first one's gradients, and the factors afterwards."""
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-2)
    found: dict[str, Any] = {"losses": []}
    for step in range(steps):
        loss = loss_of(lora)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            found["gradients"], found["norm"] = gradients(lora), norm_by_megatron(lora)
        optimizer.step()
        found["losses"].append(float(loss))
    return {**found, "factors": factors(lora), "replicas": replicas(lora)}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """What every linear layer's weight reads as, of all ranks together."""
    found = {}
    for path, module in model.named_modules():
        if (sharding := sharding_of(module)) is not None and module._parameters.get("bias") is None:
            found[path] = gathered(sharding, codec_for(module).read(module), sharding.dim)
    return found


def saved(lora: LoraModel, folder: Path) -> None:
    """Have it written before anyone reads it."""
    lora.save_pretrained(folder)
    dist.barrier()


def keys_of_megatron(model: nn.Module) -> list[str]:
    """What Megatron's own checkpoints call the tensors of ``model``."""
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    found = model.sharded_state_dict(metadata={"dp_cp_group": group})  # type: ignore[operator]
    return sorted(found)


def life(folder: Path, sequence_parallel: bool = False, loads: Path | None = None) -> dict[str, Any]:
    """A model adapted, trained, saved, merged, taken apart; and what another run saved, loaded."""
    config = begin(sequence_parallel=sequence_parallel)
    model = gpt(config)
    without, keys = logits_of(model), keys_of_megatron(model)
    lora = apply_lora(model, adapter())
    found: dict[str, Any] = {
        "keys": keys,
        "adapted keys": keys_of_megatron(model),
        "without": without,
        "start": logits_of(lora),
        **trained(lora),
        "logits": logits_of(lora),
    }
    saved(lora, folder)
    lora.merge_adapter()
    found["merged"] = logits_of(lora)
    lora.unmerge_adapter()
    found["unmerged"] = logits_of(lora)
    report = merge(lora)
    found["taken out"] = logits_of(report.model)
    found["types"] = sorted({type(module).__name__ for module in report.model.modules()})
    if loads is not None:
        again = LoraModel.from_pretrained(gpt(config), loads)
        found["loaded"] = logits_of(again)
        saved(again, folder / "again")
        found["base"] = logits_of(again.unload())
    return found


def parts(folder: Path) -> dict[str, Any]:
    """Adapters on q, k, v, gate and up, beside those on the fused linears that they are to equal, and trained."""
    config = begin()
    fused = apply_lora(gpt(config), adapter(("linear_qkv", "linear_fc1")))
    model = gpt(config)
    keys, before = keys_of_megatron(model), str(make_plan(model, adapter(PARTS)))
    types = [type(module).__name__ for module in model.modules()]
    split = apply_lora(model, adapter(PARTS))
    _tie(split, fused)
    found: dict[str, Any] = {"plan": [entry.path for entry in split.plan.entries], "fused": logits_of(fused)}
    found["tied"] = logits_of(split)
    found["plans"] = before, str(split.plan)
    found["keys"], found["adapted keys"] = keys, keys_of_megatron(model)
    found["refused"] = [_said(split, "linear_qkv"), _said(fused, "linear_q"), _said(split, "linear_r")]
    expression = apply_lora(gpt(config), replace(adapter(), target_modules=r".*\.1\..*linear_(q|fc1_up)"))
    found["by expression"] = [entry.path for entry in expression.plan.entries]
    for lora in (fused, split):
        loss_of(lora).backward()
    found["gradients of fused"], found["gradients of parts"] = gradients(fused), gradients(split)
    lora = apply_lora(gpt(config), adapter(("linear_q", "linear_v", "linear_fc1_up"), rank_pattern={"linear_v": 2}))
    found |= trained(lora) | {"logits": logits_of(lora)}
    saved(lora, folder)
    found["loaded"] = logits_of(LoraModel.from_pretrained(gpt(config), folder))
    found["read"] = {
        name: [_read(each, name) for each in (fused, lora)] for name in ("self_attention.linear_qkv", "mlp.linear_fc1")
    }
    found["multiplied"] = _multiplied(lora)
    lora.merge_adapter()
    found["merged"] = logits_of(lora)
    lora.unmerge_adapter()
    found["unmerged"] = logits_of(lora)
    report = merge(lora)
    found["merge"], found["layers"] = logits_of(report.model), [layer.path for layer in report.layers]
    found["types"] = types == [type(module).__name__ for module in report.model.modules()]
    found["unloaded"] = types == [type(module).__name__ for module in split.unload().modules()]
    return found


def _read(lora: LoraModel, name: str) -> dict[str, list[Tensor]]:
    """What a fused linear gives, and the gradients of its factors or of its parts', where it is called and where its
    weight is read."""
    linear = lora.model.get_submodule(f"decoder.layers.1.{name}")
    factors = [p for n, p in linear.named_parameters() if "lora_" in n]
    x = torch.randn(3, 2, linear.weight.shape[1], generator=torch.Generator().manual_seed(1))
    found = {}
    for way, out in (("called", linear(x)[0]), ("by weight", torch.nn.functional.linear(x, linear.weight))):
        wanted = torch.linspace(-1, 1, out[0, 0].numel()) * (1 + dist.get_rank())
        found[way] = [out.detach(), *torch.autograd.grad((out * wanted).sum(), factors)]
    return found


def _multiplied(lora: LoraModel) -> str:
    """What is said to who would multiply a fused linear's weight."""
    try:
        lora.model.get_submodule("decoder.layers.1.mlp.linear_fc1").weight.mul_(2.0)
    except AdapterError as error:
        return str(error)
    return "nothing"


def _said(lora: LoraModel, target: str) -> str:
    """What is said of another adapter on ``target``, which leaves the model as it was."""
    before = [type(module) for module in lora.model.modules()]
    try:
        lora.add_adapter("second", adapter((target,)))
    except ValueError as error:
        assert [type(module) for module in lora.model.modules()] == before
        return str(error)
    return "nothing"


def _tie(split: LoraModel, fused: LoraModel) -> None:
    """Give every part the A of the fused layer, and its own rows of B."""
    layers = fused.adapter_layers()
    with torch.no_grad():
        for path, part in split.adapter_layers().items():
            A, B = layers[path.rpartition(".")[0]].factors("default")
            own = part.adapter_tensors("default").values()
            for parameter, value in zip(own, (A, B[part.base_layer.rows]), strict=True):
                parameter.copy_(value)


def few_bits(quant_type: str, folder: Path, sequence_parallel: bool = False) -> dict[str, Any]:
    """A sharded model that is quantized, adapted, trained, saved, loaded and merged."""
    config = begin(hidden_size=64, ffn_hidden_size=128, sequence_parallel=sequence_parallel)

    def quantized() -> nn.Module:
        return quantize_(gpt(config), quant_type=quant_type, blocksize=32)

    model = quantized()
    found: dict[str, Any] = {
        "dense": logits_of(gpt(config)),
        "quantized": logits_of(model),
        "weights": weights_of(model),
    }
    found["types"] = sorted({type(module).__name__ for module in model.modules()})
    lora = apply_lora(model, replace(adapter("all-linear"), target_modules="all-linear"))
    found |= trained(lora, 5) | {"logits": logits_of(lora)}
    saved(lora, folder)
    found["loaded"] = logits_of(LoraModel.from_pretrained(quantized(), folder))
    lora.merge_adapter()
    found["merged"] = logits_of(lora)
    lora.unmerge_adapter()
    found["unmerged"] = logits_of(lora)
    found["dense again"] = logits_of(merge(lora, into="float32").model)
    return found


def others() -> dict[str, Any]:
    """Starts that look at whole weights; parts of a quantized fused linear; a head that is the embedding's table."""
    config = begin(hidden_size=128, ffn_hidden_size=128)
    loftq = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="loftq", loftq_config={"loftq_bits": 4})
    lora = apply_lora(gpt(config), loftq)
    found: dict[str, Any] = {"loftq": logits_of(lora), "loftq losses": trained(lora, 3)["losses"]}
    lora = apply_lora(quantize_(gpt(config), quant_type="nf4", blocksize=32), adapter(PARTS))
    found["parts losses"], found["parts"] = trained(lora, 3)["losses"], logits_of(lora)
    lora.merge_adapter()
    found["parts merged"] = logits_of(lora)
    lora.unmerge_adapter()
    found["parts unmerged"] = logits_of(lora)
    found["parts in float32"] = logits_of(merge(lora, into="float32").model)
    lora = apply_lora(gpt(config, shared=True), adapter(("word_embeddings", "linear_proj")))
    return {**found, "tied": trained(lora, 3), "tied logits": logits_of(lora)}


def dropout() -> dict[str, Any]:
    """What is dropped of parts, and of what all ranks have; and replicas after steps with dropout."""
    config = begin()
    lora = apply_lora(gpt(config), adapter(("linear_proj", "linear_qkv"), lora_dropout=0.5))
    row, column = (lora.adapter_layers()[f"decoder.layers.0.self_attention.linear_{n}"] for n in ("proj", "qkv"))
    before = torch.get_rng_state()
    of_parts = row.dropped(torch.ones(64), nn.Dropout(0.5), "features")
    shared = torch.equal(before, torch.get_rng_state())
    of_whole = column.dropped(torch.ones(64), nn.Dropout(0.5), "whole")
    found = {"parts": of_parts, "whole": of_whole, "shared state is as it was": shared, **trained(lora, 3)}
    found["states agree"] = torch.get_rng_state()
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    for name, options in (("kept", {}), ("recomputed", recompute)):
        model = gpt(begin(**options))
        # Megatron's checkpoints are reentrant, and want an input that has a gradient.
        model.embedding.register_forward_hook(lambda module, args, out: out.requires_grad_())  # type: ignore[operator, union-attr]
        found[name] = trained(apply_lora(model, adapter(("linear_proj", "linear_qkv"), lora_dropout=0.3)), 3)["losses"]
    return found


def refusals() -> dict[str, str]:
    """What is said of models that can't be had."""
    found = {}
    config = begin(hidden_size=64, ffn_hidden_size=64)
    loftq = LoraConfig(target_modules=["linear_q"], init_lora_weights="loftq", loftq_config={"loftq_bits": 4})

    def rows(*targets: str) -> Tensor:
        lora = apply_lora(gpt(config), adapter(targets)).eval()
        lora.set_adapter([])
        return lora(*batch(), adapter_names=["default", "__base__"])  # type: ignore[no-any-return]

    tries = {
        "rows of a fused linear": lambda: rows("linear_qkv"),
        "rows of parts": lambda: rows("linear_fc1_up"),
        "rows of a table": lambda: rows("word_embeddings"),
        "blocks": lambda: quantize_(gpt(config), quant_type="nf4", blocksize=64),
        "double": lambda: quantize_(gpt(config), quant_type="nf4", blocksize=32, double_quant=True),
        "loftq on parts": lambda: apply_lora(gpt(config), loftq),
    }
    for name, attempt in tries.items():
        try:
            attempt()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def exported(folder: Path, targets: tuple[str, ...]) -> dict[str, Any]:
    """An adapter written for the Hugging Face model, this model's logits, and its whole base weights."""
    from qlora_kit.distributed.megatron import save_for_hugging_face

    config = begin()
    model = gpt(config)
    found: dict[str, Any] = {"weights": weights_of(model), "base": logits_of(model)}
    norms = {name: p.detach().clone() for name, p in model.named_parameters() if "norm" in name}
    lora = apply_lora(model, adapter(targets, rank_pattern={"linear_proj": 2}))
    save_for_hugging_face(lora, folder, base_model_name_or_path="some/model")
    return {**found, "norms": norms, "logits": logits_of(lora)}


def alone(loads: Path, folder: Path) -> dict[str, Any]:
    """Two processes that share nothing, each a whole model: what two that share one saved, loaded."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    config = begin(tensor_model_parallel_size=1)
    lora = LoraModel.from_pretrained(gpt(config), loads)
    found = {
        "loaded": logits_of(lora),
        "sizes": sorted({layer.sharding.size for layer in lora.adapter_layers().values()}),
    }
    if dist.get_rank() == 0:
        lora.save_pretrained(folder)
    dist.barrier()
    return found


def several(tasks: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """What each of ``tasks``, names of functions here with their arguments, returns."""
    jobs = {**globals(), "linears": linears, "quantized_linears": quantized_linears}
    return {name: jobs[function](**arguments) for name, (function, arguments) in tasks.items()}
