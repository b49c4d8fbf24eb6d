"""What the ranks do in the tests of files and checkpoints of sharded models."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist
from engine_models import adapted, batch
from jobs_of_engines import prepared, share

from qlora_kit import LoraConfig, merge
from qlora_kit.distributed import Prepared, load_checkpoint, save_checkpoint
from qlora_kit.model import lora_model

#: Seconds that ranks wait for each other.
PATIENCE = 20


def message_of(function: Callable[[], Any]) -> str:
    """What ``function`` raises, as text; empty where it doesn't."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def step(run: Prepared, i: int) -> float:
    ids = batch(i, *share())
    loss = run.model(input_ids=ids, labels=ids).loss
    run.backward(loss)
    run.step()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    return mean.item() / dist.get_world_size()


def saves(engine: str, kind: str, folder: str) -> dict[str, Any]:
    """An adapter that isn't trained, saved from a model in pieces in several ways."""
    place = Path(folder)
    run = prepared(adapted(kind, "copies biases two adapters"), engine)
    lora, rank = run.lora, dist.get_rank()
    lora.save_pretrained(place / "all")
    if rank == 1:  # which mustn't write anything
        lora_model.Path = lambda _: place / "a file" / "below it"  # type: ignore[assignment,misc]
        (place / "a file").write_text("")
    lora.save_pretrained(place / "first", is_main_process=rank == 0)
    lora.save_pretrained(place / "trainer", is_main_process=rank == 0, state_dict=None)
    lora_model.Path = Path  # type: ignore[misc]
    found: dict[str, Any] = {}
    local = {n: (p.to_local() if hasattr(p, "to_local") else p).detach() for n, p in lora.named_parameters()}
    found["partial"] = message_of(lambda: lora.save_pretrained(place / "partial", state_dict=local))
    found["empty"] = message_of(
        lambda: lora.save_pretrained(place / "partial", state_dict={}, is_main_process=rank == 0)
    )
    found["merge"] = message_of(lambda: merge(lora))
    found["merge_adapter"] = message_of(lora.merge_adapter)
    found["add"] = message_of(lambda: lora.add_adapter("third", LoraConfig(r=2, target_modules=["q_proj"])))
    found["unload"] = message_of(lora.unload)
    found["delete"] = message_of(lambda: lora.delete_adapter("second"))
    if rank == 0:
        found["alone"] = message_of(lambda: lora.save_pretrained(place / "alone"))
    else:
        found["alone"] = ""
        time.sleep(PATIENCE + 1)
    lora.save_pretrained(place / "after")  # nobody is out of step
    dist.barrier()
    found["losses"] = [step(run, i) for i in range(2)]
    run.model.eval()
    with torch.no_grad():
        found["on"] = run.model(input_ids=batch(0)).logits  # after which FSDP2 leaves the outermost group whole
        with lora.disable_adapter():
            found["off"] = run.model(input_ids=batch(0)).logits
        found["on again"] = run.model(input_ids=batch(0)).logits
    run.model.train()
    lora.load_adapter(place / "all", "default")
    dist.barrier()
    lora.save_pretrained(place / "loaded")
    found["next"] = trains_and_saves(engine, kind, str(place / "step-3"), 3, 2)
    return found


def saves_and_merges(engine: str, kinds: list[str], folder: str) -> dict[str, Any]:
    """For each base: saved as it began, a step, saved, and merged in each process; a message where that is refused, or
    what the merged model computes. And what is said to an adapter that is chosen after the engine is there."""
    found: dict[str, Any] = {}
    for kind in kinds:
        run = prepared(adapted(kind, "copies"), engine)
        run.lora.save_pretrained(Path(folder) / kind / "begun", is_main_process=dist.get_rank() == 0)
        step(run, 0)
        run.lora.save_pretrained(Path(folder) / kind / "stepped", is_main_process=dist.get_rank() == 0)
        dist.barrier()
        merged: Any = []
        found[kind] = message_of(lambda run=run, merged=merged: merged.append(merge(run.lora, into="float32").model))
        if merged:
            with torch.no_grad():
                found[kind] = merged[0](input_ids=batch(0)).logits
    lora = adapted("float32", "two adapters")
    lora.set_adapter("default")
    run = prepared(lora, engine)
    step(run, 0)
    lora.set_adapter("second")
    found["chosen later"] = message_of(lambda: step(run, 1))
    return found


def trains_and_saves(engine: str, kind: str, folder: str, steps: int, more: int) -> list[float]:
    run = prepared(adapted(kind, "copies"), engine)
    for i in range(steps):
        step(run, i)
    save_checkpoint(folder, run.lora, run.optimizer)
    return [step(run, steps + i) for i in range(more)]


def resumes(engine: str, kind: str, folder: str, steps: int, more: int, early: bool) -> list[float]:
    """Go on from ``folder``; ``early``: into an optimizer that has made no step."""
    run = prepared(adapted(kind, "copies", seed=99), engine)
    if not early:
        step(run, 50)
    load_checkpoint(folder, run.lora, run.optimizer)
    return [step(run, steps + i) for i in range(more)]


def dies(engine: str, folder: str, when: str) -> str:
    """Rank 1 dies in a step, or while a second checkpoint is written; what rank 0 hears of it is on the disk."""
    place = Path(folder)
    run = prepared(adapted("nf4"), engine)
    step(run, 0)
    save_checkpoint(place / "step-1", run.lora, run.optimizer)
    if dist.get_rank() == 1:
        if when == "step":
            os._exit(9)

        def exits(*args: Any, **kwargs: Any) -> None:
            os._exit(9)

        lora_model.LoraModel.save_pretrained = exits  # type: ignore[method-assign,assignment]
    said = message_of(lambda: step(run, 1)) if when == "step" else ""
    said = said or message_of(lambda: save_checkpoint(place / "step-2", run.lora, run.optimizer))
    (place / "said").write_text(said)
    raise RuntimeError(said)
