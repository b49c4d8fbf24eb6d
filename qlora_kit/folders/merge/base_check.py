"""Is a stored model the base that a stored adapter was started on?"""

from __future__ import annotations

from ...adapter_files.backbone import codes_digest, combine
from ...checkpoints.stored_model import StoredModel
from ...codecs import codec_for
from ...errors import StorageError
from ..stored_adapter import StoredAdapter


def check_stored_backbone(base: StoredModel, name: str, adapter: StoredAdapter) -> None:
    """Compare the fingerprint that ``adapter`` carries, if it does, with the stored codes of ``base``.

    Args:
        name: of the adapter, for messages.

    Raises:
        StorageError: they differ, so what the adapter makes up for isn't in this base.
    """
    if adapter.backbone is None:
        return
    digests, dense = {}, 0
    for path in adapter.branches:
        own = base.names.path_of(path)
        weight = base.names.known.get(f"{own}.weight", "")
        if weight not in base.names.stored:
            continue  # no place for this branch, which is said elsewhere
        reads = base.names.parts.get(weight, {"weight": base.names.stored[weight]})
        module = base.module(weight, {part: base.reader.tensor(stored) for part, stored in reads.items()})
        digests[path] = codes_digest(codec_for(module, path).stored(module)[0])
        dense += len(reads) == 1
        vars(module).clear()
    found = combine(digests)
    if found == adapter.backbone:
        return
    kind = "one in 16 or 32 bits" if dense else "another"
    raise StorageError(
        f"{name}: expected the quantized base model that this adapter was started on (fingerprint "
        f"{adapter.backbone[:12]}), found {kind} ({found[:12]}) in {base.folder}, on which its correction is noise; "
        "pass the base that was saved with it, or check_backbone=False to merge it all the same"
    )
