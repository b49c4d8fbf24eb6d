"""What the command lines share: a group of commands with ``--version`` and ``-h``, and ends without a traceback.

A command ends in one of four ways. It is done; or an error of this toolkit says what is wrong with what was given, in
the command's words (``in_words_of``); or the machine has no room, no right or no memory; or its user stops it. The last
two are the same for every command, but for how one goes on (``Group``). What else is raised is ours to mend and stays
loud.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import torch
import typer
from typer.core import TyperGroup

from ..errors import QLoRAKitError
from .notices import notices_to
from .wording import Wording, wording_of

# What a shell reports of a command that Ctrl-C stopped.
_STOPPED = 130
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOTHING_WRITTEN = "nothing was written; give the same command again"


def command_group(name: str, help_text: str, resumed: Mapping[str, str] | None = None) -> typer.Typer:
    """An empty group; a callback keeps it one when it has a single command.

    Args:
        name: of the program, which begins its messages.
        resumed: how one goes on with a command that was stopped, by the command's name, where it has written something.
    """

    class Group(TyperGroup):
        """Ends of a command that no argument of its has a part in."""

        def invoke(self, ctx: Any) -> Any:
            try:
                return super().invoke(ctx)
            except (KeyboardInterrupt, OSError, MemoryError, torch.OutOfMemoryError) as error:
                if isinstance(error, OSError) and error.errno == errno.EPIPE:  # who reads what is printed has enough
                    raise
                command = ctx.invoked_subcommand
                say_error(f"{name} {command}: {_end(error, (resumed or {}).get(command, _NOTHING_WRITTEN))}")
                raise typer.Exit(_STOPPED if isinstance(error, KeyboardInterrupt) else 1) from error

    app = typer.Typer(
        cls=Group,
        help=help_text,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_show_locals=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def main(
        version: Annotated[
            bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
        ] = False,
    ) -> None:
        pass

    main.__doc__ = help_text
    return app


@contextmanager
def in_words_of(
    command: str, context: typer.Context, *functions: Callable[..., Any], **renamed: str
) -> Iterator[Wording]:
    """Errors of this toolkit end the command with their message alone, in the command's words, and what it says on the
    way is in them too. Yields what puts other texts into these words.

    Args:
        command: begins each error.
        context, functions, renamed: see ``wording.wording_of``.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its advice is about inference
    words = wording_of(context, functions, renamed)
    try:
        with notices_to(lambda text: say_on_the_way(f"{command}: {words(text)}")):
            yield words
    except QLoRAKitError as error:
        say_error(f"{command}: {words(str(error))}", anyway=getattr(error, "spokesman", False))
        raise typer.Exit(1) from error


def leads() -> bool:
    """Whether this process speaks for all that torchrun started with it."""
    return os.environ.get("RANK", "0") == "0"


def say_error(text: str, *, anyway: bool = False) -> None:
    """Print ``text`` to stderr; what a name of unknown origin would do to a terminal is shown, not done. Of several
    processes the first speaks, or another that has to (``anyway``)."""
    if anyway or leads():
        _show(text, typer.colors.RED)


def say_on_the_way(text: str) -> None:
    """Print ``text`` to stderr, as ``say_error`` does: something to know, that ends nothing."""
    if leads():
        _show(text, typer.colors.YELLOW)


def _show(text: str, color: str) -> None:
    shown = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    typer.secho(shown, err=True, fg=color)


def names_or_pattern(text: str) -> list[str] | str:
    """``--targets`` as ``LoraConfig.target_modules`` takes it: names with commas between, a regex, or "all-linear"."""
    if text != "all-linear" and ("," in text or text.replace("_", "").isalnum()):
        return [name.strip() for name in text.split(",")]
    return text


def _end(error: BaseException, go_on: str) -> str:
    """What to say of an end that the machine or the user brought about."""
    if isinstance(error, KeyboardInterrupt):
        return f"stopped; {go_on}"
    if not isinstance(error, OSError):
        said = next(iter(str(error).splitlines()), "")
        return f"expected enough memory, found none left{f' ({said})' if said else ''}; free some: {go_on}"
    where = f"{error.filename}: " if error.filename else ""
    found = error.strerror or str(error)
    if error.errno in _NO_ROOM:
        return f"{where}expected room for what is written, found none ({found}); free some: {go_on}"
    return f"{where}expected a file or folder that can be read and written, found none ({found}); {go_on}"


def _print_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(__version__)
        raise typer.Exit()
