"""What a model foretells of a text: the labels that its quantized copy learns from (Hinton et al. 2015).

Of each token the likeliest words are kept, a few hundred of a vocabulary: 2 kB a token, where all logits would take
hundreds. So the original needn't be there while its copy learns. Of a model without logits the output itself is kept.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.config.checks import check_int
from qlora_kit.errors import ConfigError
from qlora_kit.merging.agreement import output_of, shown_in

from ..inputs.batches import in_parts
from ..inputs.moments import watchable
from ..inputs.other_rows import other_rows
from ..inputs.text import batches_for
from .divergence import Likeliest, likeliest
from .surroundings import undisturbed

# Of 49,152 words they have 93 % of the chance and show nine tenths of a divergence: benchmarks/RESULTS.md.
_LIKELIEST = 256


@dataclass(frozen=True)
class SoftLabels:
    """Of ``soft_labels``; on the CPU.

    Attributes:
        rows: what the model was called with, a row of the text each.
        labels: of each row, for its tokens that aren't padding: the likeliest words and their log-probabilities
            (tokens, k), or the output itself (tokens, width) of a model without logits, or with those of one class.

    Raises:
        ConfigError: there aren't as many labels as rows.
    """

    rows: Sequence[Mapping[str, Any]]
    labels: Sequence[Likeliest | Tensor]

    def __post_init__(self) -> None:
        if len(self.rows) != len(self.labels):
            raise ConfigError(
                f"SoftLabels: expected a label for each row, found {len(self.labels)} for {len(self.rows)} rows; take "
                "both of one soft_labels"
            )

    @property
    def nbytes(self) -> int:
        """Of the labels."""
        return sum(t.nbytes for own in self.labels for t in (own if isinstance(own, Likeliest) else (own,)))

    @cached_property
    def words(self) -> int:
        """How many words the model has at least; 0 of one without logits."""
        ids = (own.ids for own in self.labels if isinstance(own, Likeliest))
        return max((1 + int(own.max()) for own in ids if len(own)), default=0)

    @cached_property
    def mean_square(self) -> float:
        """Of a model without logits the squares of an output, summed over its width: the mean over all tokens, or 1
        where that is 0."""
        outputs = [own for own in self.labels if not isinstance(own, Likeliest)]
        return sum(float(own.square().sum()) for own in outputs) / max(1, sum(map(len, outputs))) or 1.0


def soft_labels(
    model: nn.Module,
    text: Any = "builtin",
    *,
    rows: int = 128,
    tokens: int = 512,
    likeliest_words: int = _LIKELIEST,
    folder: str | os.PathLike[str] | None = None,
    looked_at: tuple[int, int] | None = None,
) -> SoftLabels:
    """What ``model`` foretells of a text, for ``loftq.distill`` to hold a quantized model with adapters to.

    Args:
        model: the original, or any other with the same words; it is in evaluation mode meanwhile.
        text: "builtin", a UTF-8 file, token ids (rows, tokens), or batches that the model is called with. Text of what
            the model is for is best.
        rows, tokens: of a file, or of the built-in text: how many rows of how many tokens to cut from it.
        likeliest_words: of each token so many are told apart, and the others taken together.
        folder: where the tokenizer is; None is the folder that the model came from.
        looked_at: how many rows of how many tokens the start was given of that file, which others are taken than, as
            far as it has others; None is as many as here.

    Raises:
        ConfigError: no such text, it is nothing but padding, or what the model computes of it isn't finite.
        StorageError: no such file, or no tokenizer.
    """
    for name, value in (("rows", rows), ("tokens", tokens), ("likeliest_words", likeliest_words)):
        check_int(name, value, 1, f"pass {name}=128")
    others = partial(other_rows, looked_at=looked_at or (rows, tokens))
    kept, labels = list[Mapping[str, Any]](), list[Likeliest | Tensor]()
    with undisturbed(), torch.no_grad(), watchable(model):
        batches = batches_for(text, model, rows=rows, window=tokens, folder=folder, choose=others)
        for row in (row for batch in batches for row in in_parts(batch, 1)):
            output, predicts = output_of(model, row)
            told = output[shown_in(row, output).to(output.device)]
            if not told.isfinite().all():
                raise ConfigError(
                    f"soft_labels: expected finite outputs of {type(model).__name__}, found NaN or infinity in row "
                    f"{len(kept)}; load the model in bfloat16 or float32"
                )
            if len(told):  # of padding alone there is nothing to say
                labels.append(likeliest(told, likeliest_words) if predicts else told.float().cpu())
                kept.append({key: _kept(value) for key, value in row.items()})
    if not kept:
        raise ConfigError("soft_labels: expected text, found padding alone; correct the batches' attention_mask")
    return SoftLabels(kept, labels)


def _kept(value: Any) -> Any:
    """A copy of the row's own, on the CPU, of which gradients can be taken whatever made the batch."""
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value
