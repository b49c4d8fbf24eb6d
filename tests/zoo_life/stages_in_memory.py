"""The life of an adapter on a model of 32 bits: targets, training, files, merging, generating."""

from __future__ import annotations

import math
import re

import torch
import zoo
from checkpointing import enable_checkpointing, is_checkpointing
from lives import Life, Training, merged, off, stage
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlora_kit import LoraConfig, LoraModel, TargetError, apply_lora, make_plan

# Between a branch beside the weight and the same delta inside it lie roundings of float32, a few for each of some ten
# products in a row; relative to what the adapter changes.
FLOAT32 = 1e-4


def _inside(path: str, names: tuple[str, ...]) -> bool:
    """Whether ``path`` is one of ``names``, by its last components, or lies inside of it."""
    return any(f".{name}." in f".{path}." for name in names)


@stage("made")
def made(life: Life) -> None:
    """The same each time, and small."""
    first, second = (life.member.make().state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert sum(parameter.numel() for parameter in life.member.make().parameters()) < 400_000


@stage("all-linear")
def all_linear(life: Life) -> None:
    """The plan has every linear layer but the head and what can't be adapted, by its real name."""
    member, model = life.member, life.member.make()
    plan = make_plan(model, LoraConfig(target_modules="all-linear"))
    modules = dict(model.named_modules(remove_duplicate=False))
    for entry in plan.entries:
        assert type(modules[entry.path]).__name__ == entry.module_type
        assert all(modules[path] is modules[entry.path] for path in entry.aliases)
    linears = {path for path, module in modules.items() if isinstance(module, (nn.Linear, Conv1D))}
    expected = {path for path in linears if not _inside(path, (*member.head, *member.aside))}
    assert {path for entry in plan.entries for path in (entry.path, *entry.aliases)} == expected


@stage("left out", of=lambda member: member.aside)
def left_out(life: Life) -> None:
    """The plan says what all-linear leaves out."""
    plan = make_plan(life.member.make(), LoraConfig(target_modules="all-linear"))
    adapted = tuple(f"{entry.path} " for entry in plan.entries)
    rest = "\n".join(line for line in str(plan).splitlines() if not line.startswith(adapted))
    assert [name for name in life.member.aside if not re.search(rf"\b{re.escape(name)}\b", rest)] == []


@stage("default targets")
def default_targets(life: Life) -> None:
    """Where the architecture has default targets, they reach all layers of a stack, or none of it."""
    model = life.member.make()
    found = [entry.path for entry in make_plan(model, LoraConfig()).entries]
    modules = dict(model.named_modules())
    assert found
    assert all(path in modules for path in found)
    stacks = [path for path, module in modules.items() if isinstance(module, nn.ModuleList)]
    for path in stacks:
        nested = any(path.startswith(f"{outer}.") for outer in stacks)
        if not nested and all(_has_linear(layer) for layer in modules[path].children()):
            reached = {inner.removeprefix(f"{path}.").split(".")[0] for inner in found if inner.startswith(f"{path}.")}
            assert len(reached) in (0, len(modules[path])), f"{path}: {len(reached)} of {len(modules[path])}"


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(inner, nn.Linear) for inner in module.modules())


@stage("fresh")
def fresh(life: Life) -> None:
    """A new adapter changes nothing, to the bit."""
    lora = apply_lora(life.member.make(), life.config())
    assert torch.equal(life.output(lora), life.output(life.base()))


@stage("gradients")
def gradients(life: Life) -> None:
    """B of every adapter that the batch reaches gets a gradient at once, A from the second step on, the base never."""
    first, second = life.trained.gradients
    assert all(".lora_" in name for name in (*first, *second))
    unused = re.compile(life.member.unused or r"(?!)")
    reached = {path for path in life.trained.lora.adapter_layers() if not unused.fullmatch(path)}
    assert reached - _alive(first, "B") == set()
    assert reached - _alive(second, "A") == set()
    assert _alive(first, "A") == set()


def _alive(gradients: dict[str, Tensor], side: str) -> set[str]:
    """Paths of the adapters whose factor on that side, A or B, got a gradient other than zero."""
    alive = [name for name, gradient in gradients.items() if f".lora_{side}" in name and gradient.abs().max() > 0]
    return {name.partition(".lora_")[0].removeprefix("model.") for name in alive}


@stage("two steps")
def two_steps(life: Life) -> None:
    """Training changes the output and nothing of the base."""
    assert all(math.isfinite(loss) for loss in life.trained.losses)
    base = life.output(life.base())
    assert not torch.equal(life.output(life.trained.lora), base)
    with life.trained.lora.disable_adapter():
        assert torch.equal(life.output(life.trained.lora), base)


@stage("named", of=lambda member: member.aside)
def named(life: Life) -> None:
    """What all-linear leaves out, when it is named, is refused or takes part: it gets gradients, and merges exactly."""
    for name in life.member.aside:
        config = LoraConfig(r=1, target_modules=[name], init_lora_weights=False)
        try:
            lora = apply_lora(life.member.make(), config)
        except TargetError:
            continue
        first = Training(lora, life.member).gradients[0]
        assert set(lora.adapter_layers()) - _alive(first, "B") == set()
        _merges_exactly(life, lora)


@stage("save and reload")
def save_and_reload(life: Life) -> None:
    """On a new copy of the base, the stored adapter does what it did, to the bit."""
    folder = life.fresh_folder("trained")
    life.trained.lora.save_pretrained(folder)
    again = LoraModel.from_pretrained(life.member.make(), folder, is_trainable=True)
    assert torch.equal(life.output(again), life.output(life.trained.lora))


@stage("merge in memory")
def merge_in_memory(life: Life) -> None:
    """The merged model computes what base and adapter do."""
    _merges_exactly(life, life.adapted())


def _merges_exactly(life: Life, lora: LoraModel) -> None:
    adapted = life.output(lora)
    with lora.disable_adapter():
        effect = adapted - life.output(lora)
    assert off(effect, torch.zeros_like(effect), adapted) > 1e-3
    model = merged(lora)
    assert not any("lora_" in name for name, _ in model.named_modules())
    assert off(life.output(model), adapted, effect) < FLOAT32


@stage("generate", of=lambda member: member.generates)
def generate(life: Life) -> None:
    """Written with the cache, without it, and by the merged model: the same scores."""
    lora = life.adapted()
    inputs = {name: value for name, value in life.member.batch().items() if name != "labels"}
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    cached = torch.stack(lora.generate(**inputs, **options).logits)
    assert torch.isfinite(cached).all()
    assert off(torch.stack(lora.generate(**inputs, **options, use_cache=False).logits), cached) < FLOAT32
    assert off(torch.stack(merged(lora).generate(**inputs, **options).logits), cached) < FLOAT32


@stage("checkpointing", of=lambda member: member.checkpoints)
def checkpointing(life: Life) -> None:
    """With activations recomputed, the gradients are the same."""
    lora = life.adapted().train()
    plain = _gradients(lora, life)
    enable_checkpointing(lora)
    assert is_checkpointing(lora)
    recomputed = _gradients(lora, life)
    assert recomputed.keys() == plain.keys()
    # Sums in another order at most; gradients beside others that are far larger have none of their own digits.
    size = max(gradient.norm() for gradient in plain.values())
    assert [n for n, gradient in plain.items() if off(recomputed[n], gradient, size) > FLOAT32] == []


def _gradients(lora: LoraModel, life: Life) -> dict[str, Tensor]:
    lora.zero_grad()
    torch.manual_seed(0)
    zoo.loss_of(lora(**life.member.batch())).backward()
    return {name: p.grad.clone() for name, p in lora.named_parameters() if p.grad is not None}
