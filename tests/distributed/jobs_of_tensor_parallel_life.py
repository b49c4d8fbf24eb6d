"""What the ranks do in the tests of what adapters on a Llama that is shared out go through beside training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jobs_of_tensor_parallel import BLOCK, LINEARS, SIZES, adapted, base, by_torch
from sharded_nets import PLANS, apart, mesh, net, steps, whole
from tiny_llama import batch, llama
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import LlamaForCausalLM

from qlora_kit import LoftQConfig, LoraConfig, apply_lora, merge
from qlora_kit.adapter_files.backbone import fingerprint
from qlora_kit.codecs import codec_for
from qlora_kit.layers import AdapterLayer, sharding_of
from qlora_kit.layers.sharded.whole import whole_module
from qlora_kit.naming import base_of
from qlora_kit.training.optimizers.lorafa import lora_fa_
from qlora_kit.training.preparation.kbit import count_parameters, memory_bill, prepare_model_for_kbit_training
from qlora_kit.training.preparation.quantize import quantize_


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(**batch()).logits
    return found


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The base's weights as one process would read them, by path."""
    found = {}
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in LINEARS:
            own = base_of(module)
            sharding = sharding_of(own)
            own = own if sharding is None else whole_module(own, sharding)
            found[path] = codec_for(own).read(own)
    return found


def merging(bits: int | None) -> dict[str, Any]:
    """Merged in place and taken out again, then for good; each beside one process."""
    one, two = adapted(base("alone", bits=bits)).eval(), adapted(base("torch", bits=bits)).eval()
    before, weights = logits(two), whole_weights(two.model)
    one.merge_adapter()
    two.merge_adapter()
    found: dict[str, Any] = {"merged": _same(whole_weights(one.model), whole_weights(two.model))}
    found["merged logits"] = float((logits(one) - logits(two)).abs().max())
    two.unmerge_adapter()
    one.unmerge_adapter()
    found["unmerged"] = _same(weights, whole_weights(two.model)) and torch.equal(before, logits(two))
    first, second = merge(one, force=True), merge(two, force=True)
    found["for good"] = _same(whole_weights(first.model), whole_weights(second.model))
    found["logits"] = float((logits(first.model) - logits(second.model)).abs().max())
    found["account"] = max(
        max(abs(getattr(a, n) - getattr(b, n)) for n in ("delta_ratio", "retained", "error", "delta_error"))
        for a, b in zip(first.layers, second.layers, strict=True)
    )
    found["left"] = [path for path, m in second.model.named_modules() if isinstance(m, AdapterLayer)]
    return found


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[path], other[path]) for path in one)


def one_rank_holds_nan() -> dict[str, Any]:
    """A part that can't be merged on one rank alone: nobody merges."""
    lora = adapted(base("torch")).eval()
    layer = lora.model.model.layers[1].mlp.up_proj
    if dist.get_rank() == 1:
        with torch.no_grad():
            layer.factors("default")[1].fill_(float("nan"))
    before = {path: weight.clone() for path, weight in whole_weights(lora.model).items()}
    found = {"in place": said(lambda: lora.merge_adapter(safe_merge=True)), "for good": said(lambda: merge(lora))}
    found["unchanged"] = str(_same(before, whole_weights(lora.model)))
    return found


def said(do: Callable[[], Any]) -> str:
    """What an error says; nothing without one."""
    try:
        do()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def two_adapters() -> dict[str, float]:
    """A second adapter, switching, a weighted sum, adapters off, and one deleted; each beside one process."""
    models = [adapted(base("alone")).eval(), adapted(base("torch")).eval()]
    found = {}
    for lora in models:
        torch.manual_seed(6)
        lora.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))

    def compare(what: str) -> None:
        found[what] = float((logits(models[0]) - logits(models[1])).abs().max())

    for lora in models:
        lora.set_adapter("other")
    compare("other")
    for lora in models:
        lora.set_adapter(["default", "other"])
    compare("both")
    for combination in ("svd", "linear", "cat", "ties_svd"):
        for lora in models:
            more = {"density": 0.5} if combination.startswith("ties") else {}
            lora.add_weighted_adapter(
                ["default", "other"], [0.7, 0.4], combination, combination_type=combination, **more
            )
            lora.set_adapter(combination)
        compare(combination)
    with models[0].disable_adapter(), models[1].disable_adapter():
        compare("off")
    for lora in models:
        lora.set_adapter("default")
        lora.delete_adapter("other")
    compare("deleted")
    return found


def by_lorafa() -> float:
    """How far parameters are from one process after steps that project gradients by whole factors."""
    runs = []
    for way in ("alone", "torch"):
        lora = adapted(base(way)).train()
        optimizer = lora_fa_(lora, torch.optim.SGD, lr=0.05)
        for _ in range(3):
            lora(**batch()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append([whole(p) for name, p in lora.named_parameters() if "lora_B" in name])
    return max(float((one - two).abs().max()) for one, two in zip(*runs, strict=True))


def refused() -> dict[str, str]:
    """What can't be done, and what is said of it."""

    def asked(bits: int = 4, **options: Any) -> Callable[[], Any]:
        return lambda: quantize_(by_torch(llama(**SIZES)), bits, **options)

    def after() -> None:
        lora = adapted(llama(**SIZES))
        place = "model.layers.0.self_attn.q_proj.base_layer"
        parallelize_module(lora.model, mesh(), {place: ColwiseParallel()})
        logits(lora)

    def calibrated() -> None:
        ids = torch.randint(1, 128, (4, 16), generator=torch.Generator().manual_seed(0))
        options = LoftQConfig(loftq_bits=2, calibration=ids, blocksize=BLOCK)
        adapted(base("torch"), init_lora_weights="loftq", loftq_config=options)

    def odd_plan() -> None:
        model = parallelize_module(net(), mesh(), {"table": PLANS["plain"]()["table"]})
        model.table._forward_pre_hooks.clear()
        apply_lora(model, LoraConfig(r=2, target_modules=["table"]))

    def out_of_step() -> None:
        lora = adapted(base("torch"), lora_dropout=0.5).train()
        torch.manual_seed(dist.get_rank())
        lora(**batch())

    def rows(targets: list[str]) -> Callable[[], Any]:
        lora = adapted(base("torch"), target_modules=targets).eval()
        return lambda: lora(**batch(), adapter_names=["default", "__base__"])

    return {
        "random states": said(out_of_step),
        "blocks": said(asked(blocksize=64)),
        "scales in 8 bits": said(asked(blocksize=BLOCK, double_quant=True)),
        "rows": said(asked(8)),
        "LoftQ's blocks": said(
            lambda: adapted(
                base("torch"), init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_bits=4, method="loftq")
            )
        ),
        "calibrated": said(calibrated),
        "sharded afterwards": said(after),
        "merge_aware": said(lambda: adapted(base("torch", bits=2), merge_aware="same")),
        "rows of a batch": said(rows(LINEARS)),
        "rows of a table": said(rows(["embed_tokens"])),
        "into another type": said(lambda: merge(adapted(base("torch")), into="nf4")),
        "unknown hooks": said(odd_plan),
    }


def fingerprints() -> list[str]:
    """Of a base in two bits, in one process and in two."""
    found = []
    for way in ("alone", "torch"):
        lora = adapted(base(way, bits=2))
        found.append(fingerprint(lora.adapted.bases_of("default")))
    return found


def prepared() -> dict[str, Any]:
    """What is counted of a model in few bits, beside one process; and training of it as it was prepared."""
    found: dict[str, Any] = {"counted": [], "bytes": [], "losses": []}
    for way in ("alone", "torch"):
        model = prepare_model_for_kbit_training(base(way, bits=4))
        lora = adapted(model).train()
        found["counted"].append(count_parameters(lora))
        found["bytes"].append(memory_bill(lora).total)
        found["losses"].append([loss for loss, _ in steps(lora, lambda m: m(**batch()).loss, 2)])
    return found


def tied(folder: Path) -> dict[str, Any]:
    """One adapter for a table and the head that shares it, as transformers shares them out."""
    if dist.get_rank() == 0:
        llama(tied=True, **SIZES).save_pretrained(folder)
    dist.barrier()
    runs = []
    for options in ({}, {"tp_plan": "auto"}):
        model = LlamaForCausalLM.from_pretrained(folder, **options)
        lora = adapted(model, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True).train()
        held = (
            lora.model.model.embed_tokens.lora_embedding_A["default"] is lora.model.lm_head.lora_B["default"].transposed
        )
        runs.append(steps(lora, lambda m: m(**batch()).loss, 3, lr=1e-3))
    return {**apart(*runs), "held": held}


def stored_in_few_bits(folder: Path) -> dict[str, Any]:
    """A model that was stored in two bits, shared out as it is loaded; and what can't be loaded or saved so."""
    places = {"whole": {}, "mixed": {"target_modules": ["layers.0.self_attn.q_proj"]}, "blocks": {"blocksize": 64}}
    for name, options in places.items():
        if dist.get_rank() == 0:
            quantize_(llama(**SIZES), 2, **{"blocksize": BLOCK, **options}).save_pretrained(folder / name)
    dist.barrier()
    one = LlamaForCausalLM.from_pretrained(folder / "whole")
    two = LlamaForCausalLM.from_pretrained(folder / "whole", tp_plan="auto")
    found: dict[str, Any] = {"logits": float((logits(one) - logits(two)).abs().max())}
    found["same"] = _same(whole_weights(one), whole_weights(two))
    found["part"] = codec_for(two.model.layers[0].mlp.down_proj).shape(two.model.layers[0].mlp.down_proj)
    runs = [steps(adapted(m, lora_dropout=0.2).train(), lambda m: m(**batch()).loss, 3) for m in (one, two)]
    found |= apart(*runs)
    words = batch()["input_ids"][:, :4]
    first, second = (m.eval().generate(input_ids=words, max_new_tokens=4, do_sample=False) for m in (one, two))
    found["generated"] = torch.equal(first, second)
    found["saved"] = said(lambda: two.save_pretrained(folder / "again"))
    found["mixed"] = said(lambda: LlamaForCausalLM.from_pretrained(folder / "mixed", tp_plan="auto"))
    found["blocks"] = said(lambda: LlamaForCausalLM.from_pretrained(folder / "blocks", tp_plan="auto"))
    return found


def merged_and_saved(folder: Path) -> float:
    """How far a merged model that transformers has gathered and saved is from one process's."""
    if dist.get_rank() == 0:
        llama(**SIZES).save_pretrained(folder / "base")
    dist.barrier()
    one = merge(adapted(LlamaForCausalLM.from_pretrained(folder / "base"))).model
    two = merge(adapted(LlamaForCausalLM.from_pretrained(folder / "base", tp_plan="auto"))).model
    two.save_pretrained(folder / "merged")
    dist.barrier()
    again = LlamaForCausalLM.from_pretrained(folder / "merged")
    return float((logits(one) - logits(again)).abs().max())


def everything(folder: Path) -> dict[str, Any]:
    return {
        "merging": {bits: merging(bits) for bits in (None, 4, 2)},
        "NaN": one_rank_holds_nan(),
        "two adapters": two_adapters(),
        "LoRA-FA": by_lorafa(),
        "refused": refused(),
        "fingerprints": fingerprints(),
        "prepared": prepared(),
        "tied": tied(folder / "tied"),
        "stored in few bits": stored_in_few_bits(folder),
        "merged and saved": merged_and_saved(folder),
    }
