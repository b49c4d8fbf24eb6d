"""What is known of each model of the zoo, and the registry of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit import MergeError, TargetError

Batch = dict[str, Any]
Settings = Mapping[str, Any]

# Weights of this size make a random model's layers matter to its output; transformers' own start has 0.02.
STD = 0.08
LOFTQ = ("loftq init, 4 bits", "loftq init, 2 bits")


@dataclass(frozen=True)
class Refusal:
    """How a stage must be refused.

    Attributes:
        error: the type of the error, no subclass of it.
        text: a regular expression for its reason.
    """

    error: type[Exception]
    text: str


#: Of models that have no default targets, and of targets that aren't linear layers.
UNKNOWN = {"default targets": Refusal(TargetError, "expected a known architecture")}
NOT_LINEAR = {
    **dict.fromkeys(("4 bits in memory", "2 bits"), Refusal(TargetError, "expected a dense linear layer")),
    **dict.fromkeys(LOFTQ, Refusal(TargetError, "expected a linear layer or an embedding")),
}
#: Where weights are larger than ``STD``, an adapter of its size is lost in what 2 bits round off.
LOST_IN_TWO_BITS = {"2 bits": Refusal(MergeError, "of the delta to survive rounding")}


@dataclass(frozen=True)
class Member:
    """A tiny model.

    Attributes:
        name, kind: what it is called, and what sort of model it is: the name of its module in this package.
        build: makes one from torch's global random state.
        batch: keyword arguments of its forward, with labels where the model has a loss.
        head: paths of the modules that give the output: ``all-linear`` leaves them and all inside them out.
        targets: what to adapt; ``all-linear`` where the linears are what matters.
        aside: names of modules that ``all-linear`` must leave out, and say so: stacked experts, linears whose weight
            is read past the module or computed, and those that don't give what a linear layer gives.
        aside_in_4_bits: what it must leave out as well, and say so, where transformers has made the linears 4-bit ones.
        unused: a regular expression for the paths of linears that this batch doesn't reach.
        model_class: transformers' class; None for a plain net, which has no folder.
        generates: whether ``generate`` is for it. checkpoints: whether it can recompute activations.
        refuses: the stages of its life that the toolkit must refuse.
        impossible: those that it can't go through with transformers alone, and why.
    """

    name: str
    kind: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    head: tuple[str, ...] = ()
    targets: str | list[str] = "all-linear"
    aside: tuple[str, ...] = ()
    aside_in_4_bits: tuple[str, ...] = ()
    unused: str = ""
    model_class: str | None = None
    generates: bool = False
    checkpoints: bool = False
    refuses: Mapping[str, Refusal] = field(default_factory=dict)
    impossible: Mapping[str, str] = field(default_factory=dict)

    def make(self, seed: int = 0) -> Any:
        """The model in float32, in eval mode; the same weights for the same seed. Biases and norms aren't neutral."""
        torch.manual_seed(seed)
        model = self.build()
        if self.model_class is not None:
            _enliven_(model, seed + 1)
        return model.eval()

    def load(self, folder: Path, **options: Any) -> Any:
        """The model in ``folder`` by transformers, in eval mode."""
        import transformers

        return getattr(transformers, str(self.model_class)).from_pretrained(folder, **options).eval()


ZOO: dict[str, Member] = {}


def register(member: Member) -> None:
    """Put ``member`` into the zoo."""
    assert member.name not in ZOO, f"two models are called {member.name}"
    ZOO[member.name] = member


def of_transformers(
    name: str,
    kind: str,
    model_class: str,
    config_class: str,
    settings: Settings,
    batch: Callable[[], Batch],
    **traits: Any,
) -> None:
    """Register ``model_class`` built from ``config_class(**settings)``; ``traits`` are further fields of ``Member``."""

    def build() -> nn.Module:
        import transformers

        return getattr(transformers, model_class)(getattr(transformers, config_class)(**settings))

    register(Member(name, kind, build, batch, model_class=model_class, **{"checkpoints": True, **traits}))


@torch.no_grad()
def _enliven_(model: nn.Module, seed: int) -> None:
    """Random biases, norms a little off one, no matrix at zero, and matrices of the size ``STD`` where smaller."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() < 2:
            parameter.add_(noise * 0.02)
        elif parameter.dim() == 2 and (size := parameter.std()) < STD:
            parameter.mul_(STD / size) if size > 0 else parameter.copy_(noise * STD)


def output_of(result: Any) -> Tensor:
    """The tensor that a forward is about."""
    if isinstance(result, Tensor):
        return result
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        if getattr(result, name, None) is not None:
            return getattr(result, name)
    raise TypeError(f"no output known in {type(result).__name__}")


def loss_of(result: Any) -> Tensor:
    """The loss, or where there is none the mean square of the output."""
    loss = getattr(result, "loss", None)
    return output_of(result).float().square().mean() if loss is None else loss
