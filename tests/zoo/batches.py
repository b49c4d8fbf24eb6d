"""What the models of the zoo are called with: small, and the same each time."""

from __future__ import annotations

import torch
from torch import Tensor

from .member import Batch

VOCABULARY, HIDDEN, INTERMEDIATE, LAYERS, HEADS = 256, 64, 128, 2, 4
#: Stands for an image in the words; ids from 16 on are words.
IMAGE = 4


def words(length: int = 12, seed: int = 3) -> Tensor:
    """(2, length) token ids."""
    return torch.randint(16, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(seed))


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def text() -> Batch:
    """For language models, masked ones too."""
    ids = words()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def text_alone() -> Batch:
    """For those that know no mask."""
    ids = words()
    return {"input_ids": ids, "labels": ids.clone()}


def text_pair() -> Batch:
    """For encoder-decoders."""
    return {**text(), "labels": words(8, seed=4)}


def text_class() -> Batch:
    """Two texts of two classes."""
    return {**text(), "labels": torch.tensor([0, 1])}


def word_classes() -> Batch:
    """A class for each word."""
    return {**text(), "labels": words() % 2}


def images(size: int = 32) -> Batch:
    """Two images of two classes."""
    return {"pixel_values": _noise(2, 3, size, size), "labels": torch.tensor([0, 1])}


def segmented_images() -> Batch:
    """Two images, a class for each pixel."""
    return {"pixel_values": _noise(2, 3, 32, 32), "labels": (_noise(2, 32, 32) > 0).long()}


def images_and_texts() -> Batch:
    """Two images and the two texts that belong to them."""
    return {"pixel_values": _noise(2, 3, 32, 32), "input_ids": words(), "return_loss": True}


def image_in_text(places: int) -> Batch:
    """Texts with an image each, which takes ``places`` of the words."""
    ids = torch.cat([words(2), torch.full((2, places), IMAGE), words(8, seed=7)], 1)
    pixels = {"pixel_values": _noise(2, 3, 32, 32), "attention_mask": torch.ones_like(ids)}
    return {**pixels, "input_ids": ids, "labels": ids.clone()}


def patches_in_text() -> Batch:
    """The same for Qwen's models, which take images as rows of patches."""
    start, end = torch.full((2, 1), 6), torch.full((2, 1), 7)
    ids = torch.cat([words(2), start, torch.full((2, 4), IMAGE), end, words(6, seed=7)], 1)
    patches = {"pixel_values": _noise(32, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]])}
    kinds = {"mm_token_type_ids": (ids == IMAGE).long(), "attention_mask": torch.ones_like(ids)}
    return {**patches, **kinds, "input_ids": ids, "labels": ids.clone()}


def waves() -> Batch:
    """Two sounds of two classes."""
    return {"input_values": _noise(2, 400), "labels": torch.tensor([0, 1])}


def spectrograms() -> Batch:
    """The same as pictures of 16 frequencies."""
    return {"input_values": _noise(2, 32, 16), "labels": torch.tensor([0, 1])}


def speech() -> Batch:
    """Two spectrograms and what is said."""
    return {"input_features": _noise(2, 16, 40), "labels": words(8, seed=4)}


def vectors(*shape: int) -> Batch:
    """For plain nets: noise of that shape."""
    return {"x": _noise(*shape)}
