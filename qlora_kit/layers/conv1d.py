"""transformers' Conv1D is a linear layer with a transposed weight; the codec knows, the branch needn't."""

from __future__ import annotations

from transformers.pytorch_utils import Conv1D

from .linear import LinearAdapter
from .registry import register_layer

register_layer(Conv1D)(LinearAdapter)
