"""transformers' Conv1D is a linear layer with a transposed weight; the codec knows, the branch needn't."""

from __future__ import annotations

from transformers.pytorch_utils import Conv1D

from .base import register_layer
from .linear import LinearAdapter

register_layer(Conv1D)(LinearAdapter)
