"""Models of images and words."""

from __future__ import annotations

from functools import partial
from typing import Any

from .batches import HEADS, HIDDEN, IMAGE, INTERMEDIATE, image_in_text, images_and_texts, patches_in_text
from .decoders import GROUPED, WIDTHS
from .encoders import SIZES
from .member import LOST_IN_TWO_BITS, of_transformers
from .vision import PATCHES

_WORDS = {**SIZES, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_QWEN_VISION = {
    **{"depth": 2, "embed_dim": HIDDEN, "hidden_size": HIDDEN, "num_heads": HEADS, "mlp_ratio": 2, "patch_size": 4},
    **{"spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, "in_chans": 3},
    **{"out_hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE},
}


def answering(name: str, stem: str, settings: dict[str, Any], **traits: Any) -> None:
    """Register transformers' ``{stem}ForConditionalGeneration``."""
    own = {"head": ("lm_head",), "generates": True, **traits}
    of_transformers(name, "vision_language", f"{stem}ForConditionalGeneration", f"{stem}Config", settings, **own)


def qwen(name: str, stem: str, vision: dict[str, Any], **rope: Any) -> None:
    """Register one of Qwen's."""
    text = {**GROUPED, "head_dim": 16, "rope_parameters": {**_ROPE, **rope}}
    tokens = {"image_token_id": IMAGE, "video_token_id": 3, "vision_start_token_id": 6, "vision_end_token_id": 7}
    settings = {"text_config": text, "vision_config": {**_QWEN_VISION, **vision}, **tokens, "pad_token_id": 0}
    answering(name, stem, settings, batch=patches_in_text)


qwen("qwen2-vl", "Qwen2VL", {})
qwen("qwen2.5-vl", "Qwen2_5_VL", {"fullatt_block_indexes": [1], "window_size": 16})
qwen("qwen3-vl", "Qwen3VL", {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}, mrope_interleaved=True)
answering(
    "llava",
    "Llava",
    {
        "vision_config": {"model_type": "clip_vision_model", **PATCHES},
        "text_config": {"model_type": "llama", **GROUPED},
        **{"image_token_index": IMAGE, "vision_feature_layer": -2, "image_seq_length": 16},
    },
    batch=partial(image_in_text, 16),
    unused=r".*vision_tower.*\.layers\.1\..*",  # it takes the last layer but one
)


def _gemma3_batch() -> dict[str, Any]:
    batch = image_in_text(4)
    return {**batch, "token_type_ids": (batch["input_ids"] == IMAGE).long()}


answering(
    "gemma3",
    "Gemma3",
    {
        "text_config": {**GROUPED, "head_dim": 16, "sliding_window": 8},
        "vision_config": {**PATCHES, "vision_use_head": False},
        **{"mm_tokens_per_image": 4, "image_token_id": IMAGE, "boi_token_index": 6, "eoi_token_index": 7},
    },
    batch=_gemma3_batch,
)
answering(
    "blip2",
    "Blip2",
    {
        "vision_config": PATCHES,
        "qformer_config": {**SIZES, "encoder_hidden_size": HIDDEN, "cross_attention_frequency": 1},
        "text_config": {
            **{
                "model_type": "opt",
                **WIDTHS,
                "vocab_size": 256,
                "ffn_dim": INTERMEDIATE,
                "word_embed_proj_dim": HIDDEN,
            },
            **{"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        },
        **{"num_query_tokens": 4, "image_token_index": IMAGE, "image_text_hidden_size": 32},
    },
    batch=partial(image_in_text, 4),
    head=("language_model.lm_head",),
)
for _name, _stem in (("clip", "CLIP"), ("siglip", "Siglip")):
    of_transformers(
        _name,
        "vision_language",
        f"{_stem}Model",
        f"{_stem}Config",
        {"text_config": _WORDS, "vision_config": PATCHES, **({"projection_dim": 32} if _name == "clip" else {})},
        images_and_texts,
        aside=("attention.out_proj",) if _name == "siglip" else (),
        refuses=LOST_IN_TWO_BITS if _name == "siglip" else {},
    )
