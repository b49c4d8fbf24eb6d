"""A tiny ``GPTModel`` of megatron-core on the CPU, the same numbers at any world size, and single sharded linears.

megatron-core asks CUDA for the current device and for random states, whatever the model lies on. ``begin`` answers
from the CPU: its bookkeeping (one random state for all ranks, one of each rank's own) is then what runs on a GPU.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

VOCABULARY, LENGTH = 64, 16


def begin(**options: Any) -> Any:
    """Megatron's groups over all ranks, if there are none yet, its random states anew, and a configuration; ``options``
    are the latter's."""
    warnings.filterwarnings("ignore")  # of what isn't installed, and of the library's own deprecations
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.transformer.transformer_config import TransformerConfig

    states = tensor_parallel.random
    states._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    states._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()
    torch.cuda.manual_seed = torch.manual_seed
    size = options.get("tensor_model_parallel_size", dist.get_world_size())
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    settings: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 64,
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "tensor_model_parallel_size": size,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "pipeline_dtype": torch.float32,
    }
    return TransformerConfig(**{**settings, **options})


class Norm(nn.Module):
    """RMSNorm for sequence parallel runs, which megatron-core has of Apex and TransformerEngine alone."""

    def __init__(self, config: Any = None, hidden_size: int = 0, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def gpt(config: Any, *, seed: int = 3, shared: bool = False) -> nn.Module:
    """Two layers by the local specification, rotary positions; every rank draws the whole weights and keeps its own."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    from megatron.core.transformer import transformer_block

    if config.sequence_parallel:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    usual = transformer_block.LayerNormImpl
    transformer_block.LayerNormImpl = Norm if config.sequence_parallel else usual
    torch.manual_seed(seed)
    model: nn.Module = GPTModel(
        config,
        layer,
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=shared,
    )
    transformer_block.LayerNormImpl = usual
    return model


def batch(count: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Words (count, length), their positions and the causal mask, the same on all ranks."""
    words = torch.randint(VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(5))
    mask = torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1)[None, None]
    return words, torch.arange(LENGTH).expand(count, LENGTH), mask


def loss_of(model: nn.Module) -> Tensor:
    words, positions, mask = batch()
    loss: Tensor = model(words, positions, mask, labels=words.roll(-1, 1)).mean()
    return loss


def logits_of(model: nn.Module) -> Tensor:
    """Logits (count, length, vocabulary), gathered over the ranks."""
    from megatron.core import tensor_parallel

    with torch.no_grad():
        local = model(*batch())
        whole: Tensor = tensor_parallel.gather_from_tensor_model_parallel_region(local)
    return whole
