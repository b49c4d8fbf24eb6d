"""``qlora-kit``: the command line, and what it shares with ``loftq``'s.

- ``commands``: the commands; each one's work is an importable function
- ``group``: a group of commands with ``--version`` and ``-h``, and ends without a traceback
- ``notices``: what is said while a command works
- ``numbers``: sizes with their units, and lists with commas between
- ``wording``: what a function says, in the words of the command that called it
"""

from .commands import app

__all__ = ["app"]
