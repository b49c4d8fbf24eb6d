"""Models of sounds."""

from __future__ import annotations

from .batches import HEADS, INTERMEDIATE, VOCABULARY, spectrograms, speech, waves
from .decoders import WIDTHS
from .encoder_decoders import BART
from .member import of_transformers

_WAVES = {
    **{"vocab_size": VOCABULARY, **WIDTHS, "intermediate_size": INTERMEDIATE, "classifier_proj_size": 32},
    **{"conv_dim": (32, 32), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0, "layerdrop": 0.0},
}
for _name, _stem in (("wav2vec2", "Wav2Vec2"), ("hubert", "Hubert")):
    of_transformers(
        _name,
        "audio",
        f"{_stem}ForSequenceClassification",
        f"{_stem}Config",
        _WAVES,
        waves,
        head=("projector", "classifier"),
    )
of_transformers(
    "ast",
    "audio",
    "ASTForAudioClassification",
    "ASTConfig",
    {
        **{**WIDTHS, "intermediate_size": INTERMEDIATE, "patch_size": 8, "max_length": 32, "num_mel_bins": 16},
        **{"frequency_stride": 8, "time_stride": 8},
    },
    spectrograms,
    head=("classifier",),
)
of_transformers(
    "whisper",
    "audio",
    "WhisperForConditionalGeneration",
    "WhisperConfig",
    {
        **{**BART, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 64},
        **{"suppress_tokens": None, "begin_suppress_tokens": None, "encoder_attention_heads": HEADS},
    },
    speech,
    head=("proj_out",),
    generates=True,
)
