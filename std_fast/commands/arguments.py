"""What the verbs of `std-fast` share: the parser, a recipe's fields on the command line, JSON output, exit codes.

Imports nothing heavy, as all modules `*_verbs.py`: `std-fast --help` starts at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from pipelines.errors import UserError
from std_fast.runtime.process import say, settle

# exit codes: saved and resumable; a loss or gradient was not finite; another process of the run died or hangs
STOPPED, NOT_FINITE, PEER_LOST = 3, 4, 5

FLAG = re.compile("--?[A-Za-z]")  # a value may be a negative number


class Parser(argparse.ArgumentParser):
    """argparse with its errors as UserError: one line, without the usage."""

    takes_recipe = False
    of_a_run: Collection[str] = ()
    """the fields that the verb takes of a run, where it takes one in place of a recipe"""

    def format_help(self) -> str:
        if self.takes_recipe:
            self.epilog = recipe_fields(self.of_a_run)
        return super().format_help()

    def error(self, message: str) -> None:  # type: ignore[override]
        verb = self.prog.removeprefix("std-fast").strip()  # the line begins with `std-fast:` already
        raise UserError(f"{verb}{': ' if verb else ''}{message}; see {self.prog} --help")


class Verb(NamedTuple):
    """One command: `std-fast NAME ...`."""

    run: Callable[[argparse.Namespace], int | None]
    """does it and returns the exit code, None for 0"""
    add_arguments: Callable[[Parser], None]
    text: str
    """one line for `std-fast --help`"""


def parse(parser: Parser, words: list[str]) -> argparse.Namespace:
    """The arguments of one verb. Where it takes a recipe, `overrides` holds the fields that the words set.

    Raises:
        UserError: an argument that the verb does not have, or one without its value.
    """
    if not parser.takes_recipe:
        return parser.parse_args(words)
    own, overrides = split_overrides(words, set(parser._option_string_actions))
    for word in own:
        if re.fullmatch(r"[a-z_]+(\.[a-z_0-9]+)+=.*", word):
            raise UserError(f"{word}: write --{word.replace('=', ' ', 1)}")
    args, rest = parser.parse_known_args(own)
    if rest:
        resume = "; --resume takes no file: it finds the newest checkpoint of run.out" * getattr(args, "resume", False)
        parser.error(f"unrecognized arguments: {' '.join(rest)}{resume}")
    args.overrides = overrides
    return args


def split_overrides(words: list[str], options: Collection[str] = ()) -> tuple[list[str], list[tuple[str, str]]]:
    """A verb's own words, and the recipe's fields: `--a.b value` or `--a.b=value` for each that is none of `options`.

    argparse itself would take a field's value for the recipe where the field comes first.

    Raises:
        UserError: flags that set no field, or a field without a value.
    """
    own: list[str] = []
    given: list[tuple[str, str | None]] = []
    rest = list(words)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if not FLAG.match(flag) or flag in options:
            own.append(flag + equals + value)
        elif not equals and rest and not FLAG.match(rest[0]):
            given.append((flag, rest.pop(0)))
        else:
            given.append((flag, value if equals else None))
    if given:
        from std_fast.config.foreign import check_flags
        from std_fast.config.recipe import Recipe

        check_flags([flag for flag, _ in given], options, Recipe)
    overrides = []
    for flag, text in given:
        if text is None:
            raise UserError(f"{flag}: needs a value")
        overrides.append((flag.lstrip("-").replace("-", "_"), text))
    return own, overrides


@contextlib.contextmanager
def printing(kept: str = "") -> Iterator[None]:
    """The block prints to standard output, and a reader that has left is no error.

    Args:
        kept: the file that also holds what is printed. Output that cannot be written is then only a warning.

    Raises:
        UserError: standard output cannot be written.
    """
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        if error.filename is not None:  # of another file
            raise
        settle(sys.stdout)
        if isinstance(error, BrokenPipeError):
            return
        if not kept:
            raise UserError(output_lost(error)) from None
        say(f"{output_lost(error)}; what it lost is in {kept}")


def show(args: argparse.Namespace, data: dict, text: str, kept: str = "") -> None:
    """One JSON document on standard output with --json, otherwise the text; see `printing`."""
    with printing(kept):
        print(json.dumps(data, indent=1) if args.json else text)


def output_lost(error: OSError) -> str:
    return f"standard output: cannot be written ({error.strerror})"


def add_json(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")


def add_recipe(parser: Parser) -> None:
    parser.add_argument("recipe", help="a recipe file, or the name of a built-in recipe")
    parser.takes_recipe = True


def recipe_fields(of_a_run: Collection[str] = ()) -> str:
    """For the help of a verb that takes a recipe; imported only for help that is printed. See `Parser.of_a_run`."""
    from std_fast.config.recipe import Recipe
    from std_fast.config.schema import describe

    rows = [*describe(Recipe), ("budget.gpu-hours", "", "the same as --run.length 'N gpu-hours'")]
    width = shutil.get_terminal_size().columns - 2
    lines = ["fields of the recipe, each set by --section.key value; [default]:"]
    if of_a_run:
        rows = [row for row in rows if row[0] in of_a_run]
        lines = ["fields of the run's recipe that may be set (with --teacher all, as in `std-fast train --help`):"]
    for name, default, text in rows:
        lines.append(f"  --{name}" + (f"  [{default}]" if default else ""))
        lines += textwrap.wrap(text, width, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)
