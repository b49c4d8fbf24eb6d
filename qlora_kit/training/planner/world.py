"""A training run on several GPUs: what each of them holds of a model, and what it sends in a step.

The peak of one GPU is found by running a step (``estimate``); here is which of its bytes an engine shares out among
``world_size`` GPUs, and what it adds. Every parameter is looked at, since engines share out parameters and nothing
else: what a k-bit weight keeps beside its codes, in buffers and quantization states, stays whole on each GPU unless the
weight was cut before it was quantized.

- ``ddp``: everything whole, and buckets for the gradients that go around.
- ``fsdp2``: ``fully_shard`` of each block and of the whole: each parameter, its gradient and its optimizer states cut
  along their first dimension. A block's parameters are gathered while it computes, and the next one's meanwhile; what
  lies outside of blocks (embeddings, head) stays gathered from the forward to the end of the backward.
- ``zero2``: gradients and optimizer states shared out, with the copy of the trained parameters that is stepped, and a
  bucket for what goes around; parameters are whole.
- ``zero3``: parameters too; those up to ``PERSISTENT`` numbers DeepSpeed keeps whole beside.
- ``tp``: the linears of transformers' own plan cut by columns or rows before they are quantized, scales with them, and
  the adapter's factor on that side; all GPUs work at the same rows. Activations are counted whole: what a block keeps
  between is less, which isn't counted off.

Traffic is what one GPU sends in a step by ring algorithms: of P bytes that are gathered or scattered among N it sends
(N - 1) / N P, in an all-reduce twice that (Patarasuk and Yuan 2009).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from ...codecs.registry import registered_codec
from ...errors import ConfigError
from .empty import Empty
from .settings import Settings

#: Numbers up to which DeepSpeed keeps a parameter whole (``stage3_param_persistence_threshold``), and those of a bucket
#: (``reduce_bucket_size``), whatever the model's size; both unless it is told otherwise.
PERSISTENT, BUCKET = 100_000, 500_000_000
GATHERED, ON_THE_WAY = "weights gathered while they are used", "gradients on their way"
STEPPED = "adapters, the copy that is stepped"


@dataclass(frozen=True)
class Held:
    """A parameter.

    Attributes:
        name: in the model; the adapter's own part of it is cut off in ``path``.
        block: its block's number; None outside of blocks.
        beside: bytes that its module keeps beside it: scales.
    """

    name: str
    tensor: Tensor
    block: int | None
    beside: int = 0

    @property
    def trained(self) -> bool:
        return self.tensor.requires_grad

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes


def held_by(model: nn.Module) -> list[Held]:
    """All parameters, shared ones once."""
    blocks = {
        id(parameter): number for number, block in enumerate(blocks_of(model)) for parameter in block.parameters()
    }
    beside: dict[int, int] = {}
    for module in model.modules():
        weight, codec = module._parameters.get("weight"), registered_codec(module)
        if weight is not None and codec is not None and not weight.is_floating_point():
            beside[id(weight)] = codec.nbytes(module) - weight.nbytes
    return [Held(n, p, blocks.get(id(p)), beside.get(id(p), 0)) for n, p in model.named_parameters()]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """What is gathered and computed at a time: the members of the outermost lists of modules."""

    def search(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) > 1:
                yield from child
            else:
                yield from search(child)

    return list(search(model))


@dataclass(frozen=True)
class Sharing:
    """How an engine shares a model out among ``size`` GPUs.

    Attributes:
        kept: bytes that a GPU keeps of a parameter.
        beside: bytes of what its module keeps beside it.
        of_states: the part of a trained parameter's gradient and optimizer states that a GPU has, in bytes of these.
        gathered: further bytes while computing.
        on_the_way: bytes of gradients on their way, beside their own place.
        stepped: whether the optimizer has a copy of what it steps.
    """

    size: int
    kept: Callable[[Held], int]
    beside: Callable[[Held], int]
    of_states: Callable[[Held], int]
    gathered: int = 0
    on_the_way: int = 0
    stepped: bool = False


def sharing_of(model: nn.Module, settings: Settings, held: list[Held]) -> Sharing:
    """How ``settings.engine`` shares ``model`` out.

    Raises:
        ConfigError: "tp" for a model for which transformers has no plan, or whose heads can't be cut in so many.
    """
    size = settings.world_size
    trained = sum(one.nbytes for one in held if one.trained)
    if settings.engine == "fsdp2":
        largest = max((sum(one.nbytes for one in held if one.block == n) for n in _numbers(held)), default=0)
        root = sum(one.nbytes for one in held if one.block is None)
        grads = (sum(one.nbytes for one in held if one.trained and one.block == n) for n in _numbers(held))
        share = _by_first_dimension(size)
        return Sharing(size, share, _whole_beside, share, root + 2 * largest, max(grads, default=trained))
    if settings.engine in ("zero2", "zero3"):
        flat = _flat(size)
        bucket = BUCKET * max((one.tensor.element_size() for one in held if one.trained), default=4)
        if settings.engine == "zero2":
            return Sharing(size, _whole, _whole_beside, flat, 0, bucket, stepped=True)
        persistent = [one for one in held if one.tensor.numel() <= PERSISTENT]
        live = [sum(one.nbytes for one in held if one.block == n) for n in [None, *_numbers(held)]]
        gathered = 2 * max(live, default=0) + sum(one.nbytes for one in persistent)
        return Sharing(size, flat, _whole_beside, flat, gathered, bucket, stepped=True)
    if settings.engine == "tp":
        cut = _cut_by_plan(model)
        _check_heads(model, size)

        def part(one: Held) -> int:
            return -(-one.nbytes // size) if cut(one.name) else one.nbytes

        return Sharing(size, part, lambda one: -(-one.beside // size) if cut(one.name) else one.beside, part)
    return Sharing(size, _whole, _whole_beside, _whole, 0, trained)


def on_each(parts: dict[str, int], empty: Empty, settings: Settings) -> dict[str, int]:
    """``parts`` of the peak of a run on one GPU, as each of several has them."""
    held = held_by(empty.model)
    sharing = sharing_of(_base(empty), settings, held)
    weights = {kind: parts[kind] for kind in empty.bytes if kind in parts}
    trained = [one for one in held if one.trained]
    whole, own = sum(one.nbytes for one in trained), sum(map(sharing.of_states, trained))
    beside, own_beside = sum(one.beside for one in held), sum(map(sharing.beside, held))
    not_parameters = sum(weights.values()) - sum(one.nbytes for one in held) - beside
    found = {
        "adapters": sum(map(sharing.kept, trained)),
        "frozen weights": sum(sharing.kept(one) for one in held if not one.trained),
        "k-bit scales": own_beside,
        "buffers": not_parameters,
        GATHERED: sharing.gathered,
        ON_THE_WAY: sharing.on_the_way,
        STEPPED: own if sharing.stepped else 0,
    }
    for kind, count in parts.items():
        if kind not in weights:
            shared = kind in ("gradients", "optimizer states", "work of the optimizer")
            found[kind] = count * own // max(1, whole) if shared else count
    return {kind: count for kind, count in found.items() if count}


def traffic(empty: Empty, settings: Settings) -> dict[str, int]:
    """Bytes that one GPU sends in a step of the optimizer, by what for; nothing on a single one."""
    size, held = settings.world_size, held_by(empty.model)
    if size == 1:
        return {}
    share = _by_first_dimension(size)
    trained = [one for one in held if one.trained]
    ring, gradients = (size - 1) / size, sum(one.nbytes for one in trained)
    if settings.engine == "ddp":
        return {"gradients": int(2 * ring * gradients)}
    if settings.engine == "fsdp2":
        twice = sum(share(one) * (1 + (one.block is not None)) for one in held)  # the root's stay
        passes = (size - 1) * twice * settings.accumulation
        return {"weights": passes, "gradients": (size - 1) * sum(map(share, trained)) * settings.accumulation}
    if settings.engine == "zero2":
        return {"gradients": int(ring * gradients), "weights": int(ring * gradients)}
    if settings.engine == "zero3":
        gathered = sum(one.nbytes for one in held if one.tensor.numel() > PERSISTENT)
        kept = sum(one.nbytes for one in trained if one.tensor.numel() <= PERSISTENT)
        passes = int(2 * ring * gathered) * settings.accumulation + int(ring * kept)
        return {"weights": passes, "gradients": int(ring * gradients) * settings.accumulation}
    return {"activations": _traffic_of_tp(empty, settings)}


def _traffic_of_tp(empty: Empty, settings: Settings) -> int:
    """By the model's plan, as transformers carries it out: outputs of what is cut by rows, of embeddings too, are added
    up in a forward, and gradients of inputs of what is cut by columns in a backward, for each linear by itself; the
    outputs of a head are gathered. Recomputed blocks go through the forward again. Of the adapters' thin products,
    whose rank is a small part of these widths, nothing is counted."""
    base, size = _base(empty), settings.world_size
    kind_of, inside = _plan_of(base), {id(module) for block in blocks_of(base) for module in block.modules()}
    numbers = 0.0
    for name, module in base.named_modules():
        codec, kind = registered_codec(module), kind_of(f"{name}.weight")
        if kind is None or codec is None or "weight" not in module._parameters or ".lora_" in name:
            continue
        out_features, in_features = codec.shape(module)
        if codec.name == "embedding":
            numbers += 2 * min(out_features, in_features)
        elif "row" in kind:
            numbers += 2 * out_features * (2 if settings.checkpointing and id(module) in inside else 1)
        else:
            numbers += 2 * in_features + (out_features if "gather" in kind else 0)
    tokens = settings.batch * settings.seq * settings.accumulation
    return int((size - 1) / size * numbers * tokens * settings.compute_dtype.itemsize)


def _base(empty: Empty) -> Any:
    return empty.model.model


def _numbers(held: list[Held]) -> list[int]:
    return sorted({one.block for one in held if one.block is not None})


def _whole(one: Held) -> int:
    return one.nbytes


def _whole_beside(one: Held) -> int:
    return one.beside


def _by_first_dimension(size: int) -> Callable[[Held], int]:
    """The largest of the pieces that ``torch.chunk`` makes, to whose size the others are filled up."""

    def share(one: Held) -> int:
        rows = one.tensor.shape[0] if one.tensor.dim() else 1
        return -(-rows // size) * (one.nbytes // max(1, rows))

    return share


def _flat(size: int) -> Callable[[Held], int]:
    return lambda one: -(-one.tensor.numel() // size) * one.tensor.element_size()


def _plan_of(model: Any) -> Callable[[str], str | None]:
    """How the model's own plan cuts the module that a parameter of that name is of: "colwise", say.

    Raises:
        ConfigError: there is no plan.
    """
    plan = {**(getattr(model.config, "base_model_tp_plan", None) or {}), **(getattr(model, "_tp_plan", None) or {})}
    kinds = {name: str(kind) for name, kind in plan.items() if "wise" in str(kind) or "embed" in str(kind)}
    if not kinds:
        raise ConfigError(
            f"engine: expected a model that transformers has a plan of tensor parallelism for, found "
            f"{type(model).__name__}, for which it has none; pass engine='fsdp2'"
        )
    return lambda name: next((kind for pattern, kind in kinds.items() if _names(pattern, name)), None)


def _check_heads(model: Any, size: int) -> None:
    """Each GPU has whole heads of what the plan cuts, or a layer's own arithmetic of heads fails in the first step.

    Raises:
        ConfigError: ``size`` doesn't divide their number; says the next smaller that does.
    """
    kind_of, config = _plan_of(model), model.config.get_text_config()
    names = ("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")
    cut = {
        suffix for suffix, _ in names for name, _ in model.named_modules() if name.endswith(suffix) and kind_of(name)
    }
    heads = [count for suffix, key in names if suffix in cut and (count := getattr(config, key, None))]
    if odd := [count for count in heads if count % size]:
        fits = next(less for less in range(size, 0, -1) if not any(count % less for count in heads))
        raise ConfigError(
            f"world_size: expected a number of GPUs that divides the {min(odd)} heads that engine='tp' cuts, found "
            f"{size}; pass world_size={fits}"
        )


def _cut_by_plan(model: Any) -> Callable[[str], bool]:
    """Whether tensor parallelism cuts a parameter of that name."""
    kind_of = _plan_of(model)

    def cut(name: str) -> bool:
        kind = kind_of(name)
        if kind is None or "lora_A" in name or "lora_embedding_A" in name:
            return kind is not None and "row" in kind
        return "col" in kind if "lora_B" in name or "lora_embedding_B" in name else True

    return cut


def _names(pattern: str, name: str) -> bool:
    """Whether a module of the plan, "layers.*.mlp.up_proj", is the one that the parameter ``name`` is of."""
    module = name.partition(".base_layer")[0].partition(".lora_")[0]
    module = module.removesuffix(".weight").removesuffix(".bias")
    return fnmatchcase(f".{module}", f"*.{pattern}")
