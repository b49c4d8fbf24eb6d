"""Under which names a model may have what is stored, by transformers' own table of renamings."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from qlora_kit.naming import Variants


def vit() -> nn.Module:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    with torch.device("meta"):
        return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=8, patch_size=4, **sizes))


def test_a_net_of_ones_own_has_one_name_for_each() -> None:
    assert set(Variants(nn.Linear(2, 2))("layers.0.weight")) == {"layers.0.weight"}


def test_with_and_without_the_backbones_prefix() -> None:
    variants = Variants(vit())
    assert variants.prefix == "vit."
    assert variants.of_prefix("layers.0.weight") == ("layers.0.weight", "vit.layers.0.weight", "layers.0.weight")
    assert variants.of_prefix("vit.layers.0.weight")[2] == "layers.0.weight"


def test_what_transformers_saves_it_finds_again() -> None:
    """Every name of a stored ViT, which is an older release's, means one of the model's parameters."""
    model = vit()
    known = set(model.state_dict())
    variants = Variants(model)
    old = "vit.encoder.layer.0.attention.attention.query.weight"
    assert old not in known
    assert [name for name in variants(old) if name in known] == ["vit.layers.0.attention.q_proj.weight"]
    assert all(name in variants(name) for name in known)
