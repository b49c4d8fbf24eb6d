"""Models that a chunked loss doesn't fit: found out when it is asked for, and left as they were."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tiny_llama import llama
from torch import Tensor, nn

from qlora_kit import ConfigError, UnsupportedModuleError
from qlora_kit.training import use_chunked_loss


class Toy(nn.Module):
    """A language model with a loss of its own."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], head: nn.Module | None = None) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(20, 8), head or nn.Linear(8, 20)
        self.of = loss

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.table(input_ids)).flatten(0, 1)
        return {"logits": logits, **({} if labels is None else {"loss": self.of(logits, labels.flatten())})}


class Centred(nn.Linear):
    """Its rows depend on each other."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


class Unused(Toy):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = F.linear(self.table(input_ids), self.head.weight).flatten(0, 1)
        return {"logits": logits, "loss": F.cross_entropy(logits, labels.flatten())}


def by_log_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(logits.log_softmax(-1), labels)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Toy(by_log_softmax), "found that its logits go through log_softmax"),
        (Unused(F.cross_entropy), "found that its head, Linear, isn't called"),
        (Toy(F.cross_entropy, Centred(8, 20)), r"found a (loss|gradient by .*) that is .* of its norm apart"),
    ],
)
def test_a_model_that_it_doesnt_fit_is_as_it_was(model: nn.Module, reason: str) -> None:
    with pytest.raises(UnsupportedModuleError, match=reason):
        use_chunked_loss(model, chunk=3)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert vars(model.head).keys() == vars(nn.Linear(1, 1)).keys()


def test_models_without_a_head_and_wrong_chunks_are_refused() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(UnsupportedModuleError, match=r"Sequential: expected a forward that takes labels.*found none"):
        use_chunked_loss(net)
    with pytest.raises(ConfigError, match="chunk: expected a number of rows"):
        use_chunked_loss(llama(), chunk=0)


def test_a_batch_that_doesnt_fit_is_named() -> None:
    reason = r"expected a loss for pixels, labels, found ValueError.*pass batch="
    with pytest.raises(UnsupportedModuleError, match=reason):
        use_chunked_loss(llama(), batch={"pixels": torch.ones(1), "labels": torch.ones(1)})
