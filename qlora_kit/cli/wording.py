"""What a function says, in the words of the command that called it: options in the place of Python's names.

The work of each command is a function that is called from Python too, so its errors speak Python: ``pass
check_backbone=False``. They are written once, and put into a command's words on their way to the terminal:

1. *A named argument becomes the command's option.* ``into='nf4'`` is ``--into nf4``, ``check_backbone=False`` is
   ``--any-base``. So does a name that opens a message or a part of it (``rank, energy: expected one of the two``), and
   one that can't be a word of prose, since it has an underscore or is a single letter. None is "none".
2. *What the command has no option for isn't advised.* Advice follows a message's last semicolon; of its alternatives,
   parted by commas and "or", those are left out that need another argument of the function.

Which arguments there are, and which have an option, is read from the command's own parameters and the signatures of the
functions behind it. All else is left as it is: names of files, of modules and of other libraries' arguments.
"""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

# A literal, or the name of what is meant: FOLDER.
_VALUE = r"""(?:'[^']*'|"[^"]*"|\[[^\]]*\]|\([^()]*\)|[\w+-]+(?:\.\w+)*)"""
# Not inside another word, a path, a quotation or a call.
_BEFORE, _AFTER = r"(?<![\w./'\"=-])(?<!\w\()", r"(?![\w/'\"=(-]|\.\w)"
_ALTERNATIVES = re.compile(r"(, or |, | or )")


@dataclass(frozen=True)
class Option:
    """How an argument is given to a command.

    Attributes:
        on: "--into"; the name itself of what is given by its place.
        off: of a flag, what sets it to False; "" if nothing does.
        flag: takes no value.
        repeated: once for each of several values, which have commas between them otherwise.
        unit: how much of what Python has is one of the option's.
    """

    on: str
    off: str = ""
    flag: bool = False
    repeated: bool = False
    unit: float = 1.0

    def negated(self) -> Option:
        """That of an argument which is False where this flag is given."""
        return Option(self.off or f"no {self.on}", self.on, self.flag)

    def given(self, value: str) -> str:
        """The option with ``value``, a literal of Python or what stands for one."""
        try:
            found = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found = value
        if self.flag and found is not None:
            return self.on if found else self.off or f"no {self.on}"
        if found is None or found == ():
            return f"no {self.on}"
        if self.unit != 1 and isinstance(found, (int, float)):
            found = f"{found / self.unit:g}"
        several = [shlex.quote(str(one)) for one in (found if isinstance(found, (list, tuple)) else [found])]
        if self.repeated:
            return " ".join(f"{self.on} {one}" for one in several)
        return f"{self.on} {','.join(several)}"


class Wording:
    """The words of one command.

    Args:
        options: by the names that Python has for what they give.
        arguments: all names that the functions behind the command have.
        values: what was given, which may be a folder called as an argument is.
    """

    def __init__(self, options: Mapping[str, Option], arguments: set[str], values: Collection[str] = ()) -> None:
        self.options = options
        self._named = _any_of(options)
        self._opening_names = _any_of(name for name in options if name not in values)
        self._unambiguous = _any_of(name for name in options if _is_no_word(name))
        others = arguments - options.keys()
        self._other_named, self._other = _any_of(others), _any_of(name for name in others if _is_no_word(name))

    def __call__(self, text: str) -> str:
        """``text`` in the command's words."""
        return "\n".join(self._line(line) for line in text.split("\n"))

    def _line(self, line: str) -> str:
        line = self._without_what_is_out_of_reach(line)
        line = re.sub(rf"{_BEFORE}({self._named})=({_VALUE})", self._mention, line)
        names = self._opening_names
        line = re.sub(rf"(^|: )((?:{names})(?:, (?:{names}))*)(?=: )", self._opening, line)
        line = re.sub(rf"{_BEFORE}({self._unambiguous}){_AFTER}", lambda found: self.options[found[1]].on, line)
        return re.sub(rf"{_BEFORE}None{_AFTER}", "none", line)

    def _mention(self, found: re.Match[str]) -> str:
        return self.options[found[1]].given(found[2])

    def _opening(self, found: re.Match[str]) -> str:
        return found[1] + ", ".join(self.options[name].on for name in found[2].split(", "))

    def _without_what_is_out_of_reach(self, line: str) -> str:
        facts, semicolon, advice = line.rpartition("; ")
        if not semicolon:
            return line
        first, *rest = _ALTERNATIVES.split(advice)
        alternatives = [("", first), *zip(rest[::2], rest[1::2], strict=True)]
        kept = [(between, text) for between, text in alternatives if not self._needs_another(text)]
        if len(kept) == len(alternatives):
            return line
        if len(kept) > 1 and kept[-1][0] == ", ":
            kept[-1] = (" or ", kept[-1][1])
        left = "".join((between if number else "") + text for number, (between, text) in enumerate(kept))
        return facts + semicolon + left if left else facts

    def _needs_another(self, text: str) -> bool:
        """Whether ``text`` mentions an argument that the command has no option for."""
        return re.search(rf"{_BEFORE}(?:(?:{self._other_named})=|(?:{self._other}){_AFTER})", text) is not None


def wording_of(context: Any, functions: tuple[Callable[..., Any], ...], renamed: Mapping[str, str]) -> Wording:
    """The wording of a running command.

    Args:
        context: typer's, of the command.
        functions: what it calls, configurations included.
        renamed: the command's parameters, by Python's names for the same where those are others; "not any_base" for an
            argument that is False where the flag is given, "GB shard_size" for one in bytes.
    """
    own = {parameter.name: _option(parameter) for parameter in context.command.params}
    options = dict(own)
    for name, parameter in renamed.items():
        how, _, parameter = parameter.rpartition(" ")
        option = own[parameter]
        options[name] = option.negated() if how == "not" else replace(option, unit=1e9) if how == "GB" else option
    arguments = {name for function in functions for name in inspect.signature(function).parameters}
    return Wording(options, arguments, {str(value) for value in context.params.values()})


def _option(parameter: Any) -> Option:
    if parameter.param_type_name == "argument":
        return Option((parameter.metavar or parameter.name.upper()).rstrip("."), repeated=True)
    off = parameter.secondary_opts[-1] if parameter.secondary_opts else ""
    return Option(parameter.opts[-1], off, bool(parameter.is_flag), bool(parameter.multiple))


def _is_no_word(name: str) -> bool:
    return "_" in name or len(name) == 1


def _any_of(names: Iterable[str]) -> str:
    """A pattern for any of ``names``, and for nothing if there are none."""
    return "|".join(sorted(map(re.escape, names), key=len, reverse=True)) or r"(?!)"
