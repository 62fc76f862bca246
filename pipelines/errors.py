"""Errors that end with one line for the user instead of a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 1500  # characters of a message: it may quote a file that holds megabytes


class UserError(Exception):
    """A mistake that the user can fix. The message is one line that names the field or file, and the fix.

    A message may quote untrusted text, so control characters and line breaks in it are escaped, and the middle of a
    very long one is left out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class FieldError(UserError):
    """A value that a settings class refuses. A recipe may hold the class in several places: `from_dict` names the one.

    Attributes:
        field, reason: the class's own field, and what is wrong with its value.
    """

    def __init__(self, owner: str, field: str, reason: str) -> None:
        super().__init__(f"{owner}.{field}: {reason}")
        self.field, self.reason = field, reason


class DataError(UserError):
    """Data that cannot be used as it is: the message names the file, the sample and what to do."""


class CorruptImage(DataError):
    """The bytes of one image can be read, but not decoded."""


def printable(text: str) -> str:
    """Text from any source as one line: bytes that are not UTF-8, and control characters, are escaped."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def one_line(text: str) -> str:
    """`printable`, with the middle of a very long text left out."""
    text = printable(text if len(text) <= 2 * LONGEST else text[:LONGEST] + text[-LONGEST:])
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[: half - 3]} ... {text[2 - half :]}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'NEAR'?` to end a message with, or nothing where no known name is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def quantity(number: int, unit: str) -> str:
    """`1 epoch`, `2,000 images`, `3 classes`."""
    return f"{number:,} {unit}{'' if number == 1 else 'es' if unit.endswith('s') else 's'}"
