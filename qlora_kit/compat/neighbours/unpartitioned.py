"""Models without weights, built while DeepSpeed's ZeRO-3 is about to cut those with weights into parts.

As long as a ZeRO-3 configuration lives (``TrainingArguments``', accelerate's plugin's), transformers builds every model
under ``deepspeed.zero.Init`` and fills in its weights, which one on the meta device hasn't.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_INTEGRATION = "transformers.integrations.deepspeed"
_CONFIGURATION = "_hf_deepspeed_config_weak_ref"


@contextmanager
def unpartitioned() -> Iterator[None]:
    """transformers builds models as it does without DeepSpeed."""
    integration = sys.modules.get(_INTEGRATION)
    said = getattr(integration, _CONFIGURATION, None)
    if said is None:
        yield
        return
    setattr(integration, _CONFIGURATION, None)
    try:
        yield
    finally:
        setattr(integration, _CONFIGURATION, said)
