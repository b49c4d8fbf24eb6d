"""The commands as functions, from folders to a folder; no model is ever whole in memory.

They read what is stored, hand tensors to the functions that work in memory, and write what comes out. They must not
have arithmetic of their own: the bits are those of the same job in memory.

- ``merge/``: adapters into a stored model
- ``extract/``: the difference of two checkpoints as an adapter
- ``combine``: stored adapters combined and compressed
- ``stored_adapter``: an adapter's folder, read without its model
"""

from .combine import combine_folders, compress_folder
from .extract.run import extract_folders
from .merge.run import merge_folders

__all__ = ["combine_folders", "compress_folder", "extract_folders", "merge_folders"]
