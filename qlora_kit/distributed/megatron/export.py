"""A Megatron model's adapter as PEFT files of the Hugging Face model that has the same weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ...adapter_files.folder import PREFIX, write_adapter
from ...config.lora import LoraConfig
from ...errors import StorageError
from ...injection.adapted import Adapted, adapted_of
from ...naming import Tree, every_module
from .names import destinations


def save_for_hugging_face(
    model: Any,
    directory: str | Path,
    adapter_name: str = "default",
    *,
    base_model_name_or_path: str | None = None,
    vocab_size: int | None = None,
) -> None:
    """Write ``adapter_name`` as an adapter of the Hugging Face model of the same weights, PEFT's layout; every rank has
    to call, and the first one of all writes.

    Fused linears are taken apart: an adapter on ``linear_qkv`` becomes three on q_proj, k_proj and v_proj with one A.

    Args:
        model: a ``LoraModel`` of a Megatron ``GPTModel`` (or one that contains it), on one pipeline stage.
        base_model_name_or_path: that model, for the files to name.
        vocab_size: its words, where tables here are padded to more.

    Raises:
        StorageError: stages of a pipeline, or an adapter with trained biases or copies, which have no place there.
        TargetError: see ``names.destinations``.
    """
    adapted = adapted_of(model)
    adapted.check_known(adapter_name)
    config = adapted.configs[adapter_name]
    _check(adapted, adapter_name, config)
    state: dict[str, Tensor] = {}
    settings: dict[str, tuple[int, float]] = {}
    tree = Tree(adapted.root)
    numbers = _numbers(tree)
    for path, layer in adapted.layers(tree).items():
        if adapter_name not in layer.r:
            continue
        A, B = layer.whole_factors(adapter_name)
        if layer.family == "embedding":
            A = A[:, :vocab_size]
        elif path.rpartition(".")[2] == "output_layer":
            B = B[:vocab_size]
        a, b = layer.factor_names if layer.family == "embedding" else ("lora_A.weight", "lora_B.weight")
        for there, rows in destinations(path, B, _config(adapted.root), numbers):
            for suffix, tensor in ((a, A), (b, rows)):
                state[f"{PREFIX}{there}.{suffix}"] = tensor.detach().to("cpu", copy=True).contiguous()
            settings[there] = layer.r[adapter_name], layer.lora_alpha[adapter_name]
    if not dist.is_initialized() or dist.get_rank() == 0:
        written = _config_there(config, settings, _config(adapted.root).num_layers)
        write_adapter(
            Path(directory), replace(written, base_model_name_or_path=base_model_name_or_path), state, {"format": "pt"}
        )
    if dist.is_initialized():
        dist.barrier()


def _check(adapted: Adapted, name: str, config: LoraConfig) -> None:
    own = _config(adapted.root)
    if own.pipeline_model_parallel_size > 1:
        raise StorageError(
            f"expected all layers of the model on each rank, found {own.pipeline_model_parallel_size} pipeline stages; "
            "save_pretrained, load the adapter on one stage, and export it there"
        )
    if config.bias != "none" or adapted.copies([name]):
        raise StorageError(
            f"adapter {name!r}: expected factors alone, found trained biases or copies (modules_to_save), which the "
            "model there has no place for; export an adapter without them"
        )


def _config(root: nn.Module) -> Any:
    """The model's TransformerConfig."""
    for module in every_module(root):
        config = vars(module).get("config")
        if hasattr(config, "num_query_groups") and hasattr(config, "gated_linear_unit"):
            return config
    raise StorageError(f"{type(root).__name__}: expected a model of Megatron's, found none of its configurations")


def _numbers(tree: Tree) -> dict[int, int]:
    """From the index of a layer to its number in the whole model, from 0."""
    found = {}
    for path, module in tree.modules.items():
        *above, index = path.split(".")
        if index.isdecimal() and above[-2:] == ["decoder", "layers"]:
            found[int(index)] = getattr(module, "layer_number", int(index) + 1) - 1
    return found


def _config_there(config: LoraConfig, settings: dict[str, tuple[int, float]], layers: int) -> LoraConfig:
    """``config`` for the modules of ``settings``, whose rank and alpha it holds: by their last names where every layer
    has them, and by whole paths elsewhere."""
    counts = Counter(path.rpartition(".")[2] for path in settings)
    names = {path: path.rpartition(".")[2] for path in settings}
    everywhere = {
        path for path, name in names.items() if counts[name] == layers or not path.startswith("model.layers.")
    }
    targets = sorted({names[path] if path in everywhere else path for path in settings})
    (rank, alpha), _ = Counter(settings.values()).most_common(1)[0]
    return replace(
        config.as_stored(),
        r=rank,
        lora_alpha=alpha,
        target_modules=targets,
        rank_pattern={path: r for path, (r, _) in settings.items() if r != rank},
        alpha_pattern={path: a for path, (_, a) in settings.items() if a != alpha},
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        megatron_config=None,
        megatron_core="megatron.core",
        task_type=config.task_type or "CAUSAL_LM",
    )
