"""What the command lines share: a group of commands with ``--version``, and errors without a traceback."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from ..errors import QLoRAKitError
from .wording import Wording, wording_of


def command_group(help_text: str) -> typer.Typer:
    """An empty group; a callback keeps it one when it has a single command."""
    app = typer.Typer(help=help_text, no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)

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
    """Errors of this toolkit end the command with their message alone, in the command's words; others are ours to mend
    and stay loud. Yields what puts other texts into these words.

    Args:
        command: begins each error.
        context, functions, renamed: see ``wording.wording_of``.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its advice is about inference
    words = wording_of(context, functions, renamed)
    try:
        yield words
    except QLoRAKitError as error:
        typer.secho(f"{command}: {words(str(error))}", err=True, fg=typer.colors.RED)
        raise typer.Exit(1) from error


def names_or_pattern(text: str) -> list[str] | str:
    """``--targets`` as ``LoraConfig.target_modules`` takes it: names with commas between, a regex, or "all-linear"."""
    if text != "all-linear" and ("," in text or text.replace("_", "").isalnum()):
        return [name.strip() for name in text.split(",")]
    return text


def _print_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(__version__)
        raise typer.Exit()
