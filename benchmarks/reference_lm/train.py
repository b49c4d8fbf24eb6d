"""Train the reference language model: ``python benchmarks/reference_lm/train.py``.

A 3.7 M-parameter Llama (hidden 256, intermediate 768, 4 layers, grouped-query attention, tied head) on
the Python standard library's sources (corpus.py). Everything the rest of the repository measures on a
trained model is measured on this one, so it is trained properly: the schedule is warm-up, constant,
linear decay to zero, which lets a run be continued with more ``--steps`` from any checkpoint of the
constant part and give what one long run would have given.

Order of batches is a function of ``--seed`` and the step alone; the state of a run is written every
``--every`` steps to ``--state`` and a second call goes on from there.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import platform
import time
from pathlib import Path

import corpus
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
VOCAB, CONTEXT, HEAD = 2048, 256, 64
END = "<|endoftext|>"


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 2,048 tokens trained on ``texts``; ``<|endoftext|>`` is token 0."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END, model_max_length=512
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All ``texts`` as one int16 row of token ids, an end-of-text token after each."""
    ids = [t for text in texts for t in (*tokenizer.backend_tokenizer.encode(text).ids, 0)]
    return torch.tensor(ids, dtype=torch.int16)


def make_model(seed: int, hidden: int = 256, intermediate: int = 768, layers: int = 4) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD,
        num_key_value_heads=max(1, hidden // HEAD // 2),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, ids: torch.Tensor, windows: int | None = None) -> float:
    """exp of the mean next-token loss over consecutive windows of ``CONTEXT`` tokens, in float32."""
    model.eval()
    rows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT).long()[:windows]
    losses = [model(input_ids=b, labels=b).loss.item() * len(b) for b in rows.split(32)]
    model.train()
    return math.exp(sum(losses) / len(rows))


def learning_rate(step: int, steps: int, peak: float, warmup: int = 200, decay: float = 0.3) -> float:
    start = int(steps * (1 - decay))
    if step < start:
        return peak * min(1.0, (step + 1) / warmup)
    return peak * (steps - step) / (steps - start)


def batch(ids: torch.Tensor, step: int, rows: int, seed: int) -> torch.Tensor:
    """``rows`` windows of step ``step``; each epoch visits every window once, at its own offset."""
    per_epoch = (len(ids) - CONTEXT) // (rows * CONTEXT)
    epoch, index = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(seed * 1000 + epoch)
    offset = int(torch.randint(CONTEXT, (), generator=generator))
    order = torch.randperm(per_epoch * rows, generator=generator)
    starts = order[index * rows : (index + 1) * rows] * CONTEXT + offset
    return torch.stack([ids[s : s + CONTEXT] for s in starts.tolist()]).long()


def save_state(state: dict[str, object], path: Path) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--state", type=Path, default=HERE / ".state.pt")
    parser.add_argument("--steps", type=int, default=6400)
    parser.add_argument("--rows", type=int, default=16, help="windows of 256 tokens in a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden", type=int, default=256, help=f"a multiple of {HEAD}")
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--every", type=int, default=250)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    texts = {split: list(corpus.read(split)) for split in ("train", "test")}
    tokenizer = make_tokenizer(texts["train"])
    train, test = (encode(tokenizer, texts[split]) for split in ("train", "test"))
    print(f"{len(train):,} training tokens, {len(test):,} test tokens", flush=True)

    model = make_model(args.seed, args.hidden, args.intermediate, args.layers).to(args.device)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
    log: list[dict[str, float]] = []
    first, seconds = 0, 0.0
    if args.state.exists():
        state = torch.load(args.state, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, log, seconds = state["step"], state["log"], state["seconds"]
        print(f"going on at step {first}", flush=True)

    forward = torch.compile(model)
    began, total = time.monotonic() - seconds, 0.0
    for step in range(first, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        tokens = batch(train, step, args.rows, args.seed).to(args.device)
        with torch.autocast(args.device, torch.bfloat16):
            loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            row = {
                "step": step + 1,
                "tokens": (step + 1) * args.rows * CONTEXT,
                "train_loss": round(total / ((step % args.every) + 1), 4),
                "test_perplexity": round(perplexity(model, test.to(args.device), 128), 3),
                "seconds": round(time.monotonic() - began),
            }
            total = 0.0
            log.append(row)
            print(row, flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            save_state({**state, "log": log, "seconds": time.monotonic() - began}, args.state)

    model = model.to("cpu", torch.bfloat16)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    with (args.out / "training_log.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(log[0]))
        writer.writeheader()
        writer.writerows(log)
    reloaded = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "test_perplexity": round(perplexity(reloaded, test), 4),
        "test_tokens": len(test),
        "train_tokens": len(train),
        "steps": args.steps,
        "tokens_per_step": args.rows * CONTEXT,
        "learning_rate": args.lr,
        "seed": args.seed,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sha256": hashlib.sha256((args.out / "model.safetensors").read_bytes()).hexdigest(),
    }
    (args.out / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
