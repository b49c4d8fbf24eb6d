"""What is said while a command works: warnings and notes of this toolkit, in the command's words, each once.

Python shows a warning with the file and the line that gave it, and what is logged without saying who speaks. Those
help who calls a function; of a command they are one line that begins as its errors do. What other libraries say is
shown as ever.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_OURS = ("qlora_kit", "loftq")
# Where they lie: a checkout, whose name may be one of theirs, can hold other libraries too.
_PLACES = tuple(Path(__file__).parents[2] / name for name in _OURS)


@contextmanager
def notices_to(say: Callable[[str], None]) -> Iterator[None]:
    """``say`` gets the text of each warning and note of this toolkit inside of the block, once.

    For all threads of the process.
    """
    said: set[str] = set()

    def say_once(text: str) -> None:
        if text not in said:
            said.add(text)
            say(text)

    shown_as_ever = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], filename: str, *where: Any, **more: Any) -> None:
        if any(Path(filename).is_relative_to(place) for place in _PLACES):
            say_once(str(message))
        else:
            shown_as_ever(message, category, filename, *where, **more)

    warnings.showwarning = show
    handler = _Saying(say_once)
    loggers = [logging.getLogger(name) for name in _OURS]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        warnings.showwarning = shown_as_ever
        for logger in loggers:
            logger.removeHandler(handler)


class _Saying(logging.Handler):
    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self.say = say

    def emit(self, record: logging.LogRecord) -> None:
        self.say(record.getMessage())
