"""One model of the zoo on its way through the toolkit, and the registry of the stages of that way."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import zoo
from safetensors.torch import load_file
from torch import Tensor, nn
from zoo import Member

from qlora_kit import LoraConfig, LoraModel, apply_lora, merge

RANK = 4


class Life:
    """What the stages of one member's life share; each thing is made when it is first asked for.

    Attributes:
        member: whose life it is.
        room: an empty folder for all that is written.
    """

    def __init__(self, member: Member, room: Path) -> None:
        self.member, self.room = member, room

    def config(self, base: nn.Module | None = None) -> LoraConfig:
        """Adapters on the member's targets, less those that are to stay aside (in ``base``, if it has 4 bits)."""
        in_4_bits = self.member.aside_in_4_bits if getattr(base, "is_loaded_in_4bit", False) else ()
        excluded = [*self.member.aside, *in_4_bits] or None
        return LoraConfig(r=RANK, lora_alpha=RANK, target_modules=self.member.targets, exclude_modules=excluded)

    def base(self) -> Any:
        """A new model, frozen, as it is under an adapter: torch takes other kernels where gradients may be wanted."""
        return self.member.make().requires_grad_(False)

    def adapted(self, base: nn.Module | None = None) -> LoraModel:
        """``base``, or a new model, with adapters that matter: a delta of about a third of the weight's norm each."""
        lora = apply_lora(self.member.make() if base is None else base, self.config(base)).eval()
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for layer in lora.adapter_layers().values():
                A, B = (torch.randn(factor.shape, generator=generator) for factor in layer.factors("default"))
                layer.set_factors_("default", A, B * 0.3 * zoo.STD / RANK**0.5)
        return lora

    @cached_property
    def trained(self) -> Training:
        """Two steps of training on the batch, from a fresh adapter."""
        return Training(apply_lora(self.member.make(), self.config()), self.member)

    @cached_property
    def base_folder(self) -> Path:
        """The model as transformers saves it."""
        self.member.make().save_pretrained(self.room / "base")
        return self.room / "base"

    @cached_property
    def adapter_folder(self) -> Path:
        """An adapter that matters, made on the model in ``base_folder``."""
        self.adapted(self.member.load(self.base_folder)).save_pretrained(self.room / "adapter")
        return self.room / "adapter"

    def fresh_folder(self, name: str) -> Path:
        """``room / name``, which isn't there yet."""
        shutil.rmtree(self.room / name, ignore_errors=True)
        return self.room / name

    @torch.no_grad()
    def output(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        """What ``model`` makes of the batch, in eval mode and from inputs of ``dtype``."""
        inputs = self.member.batch()
        inputs = {n: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in inputs.items()}
        return zoo.output_of(model.eval()(**inputs))


class Training:
    """Two steps on the member's batch.

    Attributes:
        lora: the trained model.
        gradients: of all parameters that had one, by name, at each of the two steps.
        losses: at each.
    """

    def __init__(self, lora: LoraModel, member: Member) -> None:
        self.lora = lora.train()
        self.gradients: list[dict[str, Tensor]] = []
        self.losses: list[float] = []
        optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(2):
            loss = zoo.loss_of(lora(**member.batch()))
            loss.backward()
            self.losses.append(loss.item())
            self.gradients.append({n: p.grad.clone() for n, p in lora.named_parameters() if p.grad is not None})
            optimizer.step()
            optimizer.zero_grad()


def merged(lora: LoraModel, into: str = "float32") -> Any:
    """The model that a merge leaves."""
    return merge(lora, into=into).model


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def off(found: Tensor, right: Tensor, scale: Tensor | None = None) -> float:
    """How far ``found`` is from ``right``, relative to the norm of ``scale`` (by default ``right``)."""
    return float((found.double() - right.double()).norm() / (right if scale is None else scale).double().norm())


Stage = Callable[[Life], None]
STAGES: dict[str, Stage] = {}
_APPLIES: dict[str, Callable[[Member], Any]] = {}


def stage(name: str, *, of: Callable[[Member], Any] = lambda member: True) -> Callable[[Stage], Stage]:
    """Register a stage of the life of those members that ``of`` says yes to."""

    def register(function: Stage) -> Stage:
        STAGES[name], _APPLIES[name] = function, of
        return function

    return register


def has_folder(member: Member) -> bool:
    """Whether transformers saves and loads it."""
    return member.model_class is not None


def stages_of(member: Member) -> list[str]:
    """The names of the stages of ``member``'s life, in order."""
    return [name for name in STAGES if _APPLIES[name](member) and name not in member.impossible]
