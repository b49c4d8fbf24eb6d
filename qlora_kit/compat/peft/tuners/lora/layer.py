"""Layer classes, for ``isinstance``."""

from .....layers import AdapterLayer as LoraLayer
from ....layer_kinds import Conv1d, Conv2d, Conv3d, Embedding, Linear

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Embedding", "Linear", "LoraLayer"]
