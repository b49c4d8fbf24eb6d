"""What the ranks do in the tests of plans for several GPUs: a step by an engine, with its bytes counted."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
from measured import tensors_of
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from qlora_kit import LoraConfig, LoraModel, apply_lora, prepare_model_for_kbit_training, quantize_
from qlora_kit.training.planner.world import blocks_of

RANK, SEQ, BATCH = 8, 32, 2


class Sent(TorchDispatchMode):
    """Bytes that this rank would send by ring algorithms, from the collectives that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        size = dist.get_world_size()
        if func is torch.ops.c10d._allgather_base_.default:
            self.bytes["weights"] += (size - 1) * args[1].nbytes
        elif func is torch.ops._c10d_functional.all_gather_into_tensor.default:
            self.bytes["activations"] += (size - 1) * args[0].nbytes
        elif func is torch.ops._c10d_functional.all_reduce.default:
            self.bytes["activations"] += 2 * (size - 1) * args[0].nbytes // size
        elif func is torch.ops.c10d._reduce_scatter_base_.default:
            self.bytes["gradients"] += (size - 1) * args[0].nbytes
        return func(*args, **(kwargs or {}))


def adapted(folder: Path, bits: int) -> LoraModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    if bits < 16:
        prepare_model_for_kbit_training(quantize_(model, bits), use_gradient_checkpointing=False)
    return apply_lora(model, LoraConfig(r=RANK, target_modules="all-linear")).train()


def step_by(engine: str, folder: Path, bits: int) -> dict[str, Any]:
    """A step of AdamW; bytes that this rank holds by what for, and those that it has sent."""
    torch.manual_seed(0)
    lora = adapted(folder, bits)
    words = torch.randint(16, 64, (BATCH, SEQ), generator=torch.Generator().manual_seed(dist.get_rank()))
    sent, run = Sent(), lora
    if engine == "fsdp2":
        for block in blocks_of(lora):
            fully_shard(block)
        fully_shard(lora.model)
    elif engine == "ddp":
        run: Any = DistributedDataParallel(lora)

        def counting(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            size = dist.get_world_size()
            sent.bytes["gradients"] += 2 * (size - 1) * bucket.buffer().nbytes // size
            return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])

        counting.__annotations__ = {}  # torch refuses those that are text
        run.register_comm_hook(None, counting)
    trained = [parameter for parameter in lora.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    with sent:
        run(input_ids=words, labels=words, use_cache=False).loss.backward()
    optimizer.step()
    held = {id(local(tensor)): local(tensor) for tensor in tensors_of(lora)}
    states = [local(value) for state in optimizer.state.values() for value in state.values() if value.dim()]
    return {
        "sharded": sum(isinstance(parameter, DTensor) for parameter in lora.parameters()),
        "weights": storages(held.values()),
        "gradients": storages(local(parameter.grad) for parameter in trained),
        "states": storages(states),
        "sent": dict(sent.bytes),
    }


def local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def storages(tensors: Any) -> int:
    """Bytes of what ``tensors`` lie in, once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


def by_tensor_parallelism(folder: Path) -> dict[str, Any]:
    """What a rank keeps of a model that transformers cuts by the model's own plan, and what it sends in a step."""
    by_plan = DistributedConfig(tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, distributed_config=by_plan)
    sharded = sum(isinstance(parameter, DTensor) for parameter in model.parameters())
    held = storages(local(tensor) for tensor in tensors_of(model))
    words = torch.randint(16, 64, (BATCH, SEQ), generator=torch.Generator().manual_seed(1))
    with Sent() as sent:
        model(input_ids=words, labels=words, use_cache=False).loss.backward()
    return {"weights": held, "sharded": sharded, "sent": dict(sent.bytes)}


def step_by_zero(stage: int, folder: Path) -> dict[str, int]:
    """A step by DeepSpeed as it is unless told otherwise; what this rank holds of parameters, and for the optimizer."""
    import deepspeed

    deepspeed.init_distributed("gloo")
    lora = apply_lora(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), LoraConfig(r=RANK)).train()
    trained = [parameter for parameter in lora.parameters() if parameter.requires_grad]
    settings = {
        "train_micro_batch_size_per_gpu": BATCH,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 4096},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(trained)
    engine, optimizer, *_ = deepspeed.initialize(
        model=lora, model_parameters=trained, optimizer=optimizer, config=settings
    )
    words = torch.randint(16, 64, (BATCH, SEQ), generator=torch.Generator().manual_seed(1))
    engine.backward(engine(input_ids=words, labels=words, use_cache=False).loss)
    engine.step()
    kept = [p.ds_tensor if stage == 3 else p for p in lora.parameters()]
    states = [
        v for state in optimizer.optimizer.state.values() for v in state.values() if torch.is_tensor(v) and v.dim()
    ]
    return {"weights": sum(tensor.nbytes for tensor in kept), "states": sum(tensor.nbytes for tensor in states)}


def steps(folder: Path, kinds: list[tuple[str, int]]) -> dict[tuple[str, int], Any]:
    found = {(engine, bits): step_by(engine, folder, bits) for engine, bits in kinds}
    return {**found, ("tp", 16): by_tensor_parallelism(folder)}
