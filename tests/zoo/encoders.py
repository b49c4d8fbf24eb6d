"""Encoders of text with the heads that people train: of classes, of classes of words, of masked words."""

from __future__ import annotations

from typing import Any

from .batches import HEADS, HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY, text, text_class, word_classes
from .decoders import SPECIAL, WIDTHS
from .member import UNKNOWN, of_transformers

SIZES = {"vocab_size": VOCABULARY, **WIDTHS, "intermediate_size": INTERMEDIATE, "max_position_embeddings": 128}


def classifying(name: str, stem: str, settings: dict[str, Any], **traits: Any) -> None:
    """Register transformers' ``{stem}ForSequenceClassification``."""
    own = {"batch": text_class, "head": ("classifier",), **traits}
    of_transformers(name, "encoders", f"{stem}ForSequenceClassification", f"{stem}Config", settings, **own)


classifying("bert", "Bert", SIZES)
classifying("roberta", "Roberta", SIZES)
classifying("electra", "Electra", {**SIZES, "embedding_size": 32})
classifying("albert", "Albert", {**SIZES, "embedding_size": 32}, checkpoints=False)
_DISTILBERT = {"vocab_size": VOCABULARY, "dim": HIDDEN, "hidden_dim": INTERMEDIATE, "n_layers": LAYERS}
classifying(
    "distilbert",
    "DistilBert",
    {**_DISTILBERT, "n_heads": HEADS, "max_position_embeddings": 128},
    head=("pre_classifier", "classifier"),
    refuses=UNKNOWN,
)
_DEBERTA = {"relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}
classifying(
    "deberta-v2",
    "DebertaV2",
    {**SIZES, **_DEBERTA, "share_att_key": True, "max_relative_positions": -1},
    head=("pooler", "classifier"),
)
_MODERN = {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 8}
classifying("modernbert", "ModernBert", {**SIZES, **SPECIAL, **_MODERN}, head=("head", "classifier"))

of_transformers(
    "xlm-roberta",
    "encoders",
    "XLMRobertaForTokenClassification",
    "XLMRobertaConfig",
    SIZES,
    word_classes,
    head=("classifier",),
)
of_transformers(
    "bert-masked", "encoders", "BertForMaskedLM", "BertConfig", SIZES, text, head=("cls.predictions.decoder",)
)
