"""Nets of plain torch, with what transformers' models don't have."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from .batches import vectors, words
from .member import NOT_LINEAR, UNKNOWN, Batch, Member, register


class ConvNet(nn.Module):
    """Convolutions, one of them grouped, under batch norm; (batch, 3, 16, 16) to (batch, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(16, 32, 3, 1, 1, groups=4), nn.BatchNorm2d(32), nn.ReLU())
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.stem(x)).mean((2, 3)))


class Attention(nn.Module):
    """torch's own attention, alone and in an encoder layer, which read their output projection's weight themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(256, 64)
        self.attn = nn.MultiheadAttention(64, 4, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.emb(x)
        h = h + self.attn(h, h, h, need_weights=False)[0]
        return self.head(self.layer(h).mean(1))


class WeightNorm(nn.Module):
    """A linear layer whose weight is computed from two others at each access."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = weight_norm(nn.Linear(64, 64))
        self.out = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.normed(x).tanh())


class Recurrent(nn.Module):
    """A GRU between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(32, 64)
        self.gru = nn.GRU(64, 64, batch_first=True)
        self.after = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.gru(self.before(x).tanh())[0])


def _words() -> Batch:
    return {"x": words()}


_CONVOLUTIONS = r"stem\.0|block\.0|fc"
_REFUSES = {**UNKNOWN, **{stage: NOT_LINEAR[stage] for stage in ("4 bits in memory", "2 bits")}}

register(Member("cnn", "plain", ConvNet, partial(vectors, 2, 3, 16, 16), targets=_CONVOLUTIONS, refuses=_REFUSES))
# Its input projections are one parameter of no linear layer.
_ATTENTION = ("out_proj", "attn", "self_attn")
register(Member("attention", "plain", Attention, _words, aside=_ATTENTION, refuses=UNKNOWN))
register(Member("weight-norm", "plain", WeightNorm, partial(vectors, 4, 64), aside=("normed",), refuses=UNKNOWN))
register(Member("gru", "plain", Recurrent, partial(vectors, 2, 5, 32), aside=("gru",), refuses=UNKNOWN))
