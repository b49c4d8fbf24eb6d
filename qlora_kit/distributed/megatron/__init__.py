"""Adapters of Megatron's models in the files of the Hugging Face model of the same weights.

- ``names``: which module there is which here, and where a fused linear's rows go
- ``export``: ``save_for_hugging_face``, the files
"""

from .export import save_for_hugging_face

__all__ = ["save_for_hugging_face"]
