"""The zoo: tiny random models of many architectures, each with a batch and what is to be expected of it.

``ZOO`` has them by name. A model is made deterministically, in a fraction of a second, of about a hundred thousand
weights, and nothing here imports transformers before one is made.

- ``member``: what is known of each model, and the registry
- ``batches``: what the models are called with
- ``decoders``, ``mixtures``, ``state_space``: causal language models: dense, with experts, with a recurrence
- ``encoders``, ``encoder_decoders``: other language models
- ``vision``, ``audio``, ``vision_language``: models of images, sounds, and both images and words
- ``plain``: nets without transformers
- ``faults``: where the toolkit is known to fail on them
"""

from . import (  # noqa: F401  # each fills ZOO
    audio,
    decoders,
    encoder_decoders,
    encoders,
    mixtures,
    plain,
    state_space,
    vision,
    vision_language,
)
from .faults import FAULTS, Fault
from .member import STD, ZOO, Member, Refusal, loss_of, output_of

#: Those that the quick tests take, one of each kind.
QUICK = ("llama-tied", "mixtral", "bert", "t5", "clip", "cnn")

__all__ = ["FAULTS", "QUICK", "STD", "ZOO", "Fault", "Member", "Refusal", "loss_of", "output_of"]
