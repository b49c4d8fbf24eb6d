"""Models of images."""

from __future__ import annotations

from typing import Any

from qlora_kit import TargetError

from .batches import INTERMEDIATE, images, segmented_images
from .decoders import WIDTHS
from .member import NOT_LINEAR, UNKNOWN, Refusal, of_transformers

PATCHES = {**WIDTHS, "intermediate_size": INTERMEDIATE, "image_size": 32, "patch_size": 8}


def seeing(name: str, stem: str, settings: dict[str, Any], **traits: Any) -> None:
    """Register transformers' ``{stem}ForImageClassification``."""
    own = {"batch": images, "head": ("classifier",), **traits}
    of_transformers(name, "vision", f"{stem}ForImageClassification", f"{stem}Config", settings, **own)


seeing("vit", "ViT", PATCHES)
seeing("deit", "DeiT", PATCHES)
seeing("beit", "Beit", PATCHES)
seeing("dinov2", "Dinov2", {**PATCHES, "mlp_ratio": 2})
_SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
seeing("swin", "Swin", _SWIN)
seeing(
    "convnext",
    "ConvNext",
    {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
    checkpoints=False,
    refuses=UNKNOWN,
)
_RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
_NO_LINEAR = {"all-linear": Refusal(TargetError, "no linear module besides its head")}
seeing(
    "resnet",
    "ResNet",
    _RESNET,
    targets=["convolution"],
    checkpoints=False,
    refuses={**UNKNOWN, **NOT_LINEAR, **_NO_LINEAR},
)
_SEGFORMER = {
    **{"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [32, 64]},
    **{"patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2]},
    **{"decoder_hidden_size": 32},
}
of_transformers(
    "segformer",
    "vision",
    "SegformerForSemanticSegmentation",
    "SegformerConfig",
    _SEGFORMER,
    segmented_images,
    head=("decode_head",),
)
