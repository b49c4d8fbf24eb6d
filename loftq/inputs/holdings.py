"""Which memory each of many holds, and how much all of it is: an account that is kept, not counted each time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import Tensor


class Holdings:
    """Storages by holder. What two hold counts for both.

    Attributes:
        nbytes: of all holders that count.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._storages: dict[int, dict[int, int]] = {}
        self._counted: dict[int, int] = {}
        self._holders: Counter[int] = Counter()

    def note(self, holder: int, tensors: Iterable[Tensor], *, counts: bool = True) -> None:
        """``holder`` has these tensors now, and no others; their bytes go into the sum if it ``counts``."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        self._holders.subtract(self._storages.get(holder, {}).keys())
        self._holders.update(storages.keys())
        self._storages[holder] = storages
        self.nbytes -= self.of(holder)
        self._counted[holder] = sum(storages.values()) if counts else 0
        self.nbytes += self.of(holder)

    def of(self, holder: int) -> int:
        """Bytes of ``holder`` in the sum."""
        return self._counted.get(holder, 0)

    def shared(self, holder: int, address: int) -> bool:
        """Whether another than ``holder`` has the storage at ``address`` too."""
        return self._holders[address] > (address in self._storages.get(holder, {}))
