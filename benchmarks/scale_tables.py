"""The tables of docs/SCALE.md, from the planner and from models' configurations; nothing is measured or downloaded.

Run: python benchmarks/scale_tables.py, which writes them into the page; half a minute of one core.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from qlora_kit.training.planner.cards import CARDS
from qlora_kit.training.planner.estimate import Estimator
from qlora_kit.training.planner.settings import Settings
from qlora_kit.training.planner.world import traffic

PAGE = Path(__file__).resolve().parents[1] / "docs" / "SCALE.md"
#: Llama 3.1's sizes: hidden, feed-forward, layers, heads; the same vocabulary and 8 heads of keys.
MODELS = {"8B": (4096, 14336, 32, 32), "70B": (8192, 28672, 80, 64), "405B": (16384, 53248, 126, 128)}
RUN = {"rank": 16, "seq": 2048, "batch": 1, "chunked_loss": True}
CARD = CARDS["h100"]
#: Columns: GPUs and the engines that are planned on them. Linears have 8 heads of keys to be cut by.
WORLDS = [(1, "ddp"), (8, "ddp"), (8, "zero2"), (8, "zero3"), (8, "fsdp2"), (8, "tp"), (64, "zero3"), (64, "fsdp2")]
TYPES: dict[str, dict[str, object]] = {
    "16": {"bits": 16},
    "4, nf4": {"bits": 4},
    "4, nf4, scales in 8 bits": {"bits": 4, "double_quant": True},
    "2": {"bits": 2},
}
#: Weights a second that `loftq init` starts on 2 threads, NF4, r = 64, T = 5: RESULTS.md, 4096 x 4096 in 0.996 s.
STARTED = 4096**2 / 0.996
#: Of calibration as it is unless asked otherwise: batches, and tokens in all.
BATCHES, TOKENS = 128 // 8, 128 * 512


def folder_of(name: str, room: Path) -> Path:
    """A folder with the configuration of that model and nothing else."""
    hidden, inner, layers, heads = MODELS[name]
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": 128256}
    attention = {"num_attention_heads": heads, "num_key_value_heads": 8, "max_position_embeddings": 131072}
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
    (folder := room / name).mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**kind, **sizes, **attention}))
    return folder


def memory_and_traffic(names: Sequence[str], room: Path) -> tuple[list[str], list[str]]:
    """Rows of GiB that a GPU holds at the peak, and of GiB that it sends in a step."""
    memory, sent = [], []
    for name in names:
        estimator = Estimator(folder_of(name, room))
        for kind, how in TYPES.items():
            held, going = [], []
            for size, engine in WORLDS:
                settings = Settings(**RUN, **how, world_size=size, engine=engine)  # type: ignore[arg-type]
                total = estimator(settings).total
                shown = f"{total / 2**30:.1f}"
                held.append(f"**{shown}**" if total <= CARD.usable else shown)
                if size > 1:
                    going.append(f"{sum(traffic(estimator.empty(settings), settings).values()) / 2**30:.2f}")
            memory.append(f"| {name} | {kind} | {' | '.join(held)} |")
            sent.append(f"| {name} | {kind} | {' | '.join(going)} |")
    return memory, sent


def starting(names: Sequence[str]) -> Iterator[str]:
    """Rows of what `loftq init` takes."""
    for name in names:
        hidden, inner, layers, heads = MODELS[name]
        keys = 8 * hidden // heads
        shapes = [
            (hidden, hidden),
            (keys, hidden),
            (keys, hidden),
            (hidden, hidden),
            *[(inner, hidden)] * 2,
            (hidden, inner),
        ]
        weights = layers * sum(rows * columns for rows, columns in shapes)
        inputs = [hidden, hidden, hidden, inner]  # q, k and v; o; gate and up; down
        streams = [0, hidden, 0, hidden]  # o's and down's outputs are added to one
        sizes = [4 * (4 * width**2 + 2 * out * width) for width, out in zip(inputs, streams, strict=True)]
        moments, passed = max(sizes), layers * BATCHES * sum(sizes)
        forward = 2 * weights * TOKENS
        yield (
            f"| {name} | {weights / 1e9:.1f} | {_hours(weights / STARTED)} | {_hours(weights / STARTED / 8)} | "
            f"{moments / 2**30:.1f} | {passed / 2**30:,.0f} | {forward / 1e15:,.1f} |"
        )


def _hours(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def tables(names: Sequence[str] = tuple(MODELS)) -> dict[str, list[str]]:
    """Rows of the page's tables, by the tables' names, of these models."""
    with tempfile.TemporaryDirectory() as room:
        memory, sent = memory_and_traffic(names, Path(room))
    return {"memory": memory, "traffic": sent, "init": list(starting(names))}


def heads() -> dict[str, list[str]]:
    """The tables' first two lines."""
    columns = [f"{size} {engine}" if size > 1 else "1 GPU" for size, engine in WORLDS]
    init = ["model", "10⁹ weights", "one process", "8", "moments, GiB", "passed on, GiB", "a forward, PFLOP"]
    found = {
        "memory": ["model", "bits", *columns],
        "traffic": ["model", "bits", *columns[1:]],
        "init": init,
    }
    return {
        name: [f"| {' | '.join(titles)} |", f"| {' | '.join(['---'] * 2 + ['---:'] * (len(titles) - 2))} |"]
        for name, titles in found.items()
    }


def main() -> None:
    text, found = PAGE.read_text(encoding="utf-8"), tables()
    for name, head in heads().items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = before + begin + "\n".join([*head, *found[name]]) + "\n" + end + after
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
