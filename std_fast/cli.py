"""`std-fast VERB`: parses, calls, and turns a user's mistake into one line and exit code 2.

Arguments and handler of each verb are in `std_fast/commands/*_verbs.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

from pipelines.errors import UserError, did_you_mean, one_line
from std_fast.commands import data_verbs, run_verbs, tool_verbs, train_verbs
from std_fast.commands.arguments import STOPPED, Parser, Verb, parse
from std_fast.runtime.memory import ran_out

_ORDER = (
    "convert inspect verify warm train plan report teach eval predict export recipes preview info bench doctor demo"
)
_ALL = {**data_verbs.VERBS, **train_verbs.VERBS, **run_verbs.VERBS, **tool_verbs.VERBS}
VERBS: dict[str, Verb] = {name: _ALL[name] for name in _ORDER.split()}


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; returns the exit code (0 done, 2 the user's mistake, 3 to 5: see commands/arguments.py)."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal's encoding lacks is escaped, and no error
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("std_fast").setLevel(logging.INFO)
    try:
        with stoppable() if argv[:1] == ["train"] else contextlib.nullcontext():
            return run(argv)
    except UserError as error:
        print(f"std-fast: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        what = " ".join(str(error).split()) or "no more to be had"
        print(f"std-fast: memory was short ({what}); use smaller batches or fewer workers", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has left, e.g. `| head`
        return 0
    except OSError as error:
        if error.filename is None:
            raise
        line = one_line(f"{os.fsdecode(error.filename)}: {error.strerror}; make it usable, or name another path")
        print(f"std-fast: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("std-fast: interrupted", file=sys.stderr)
        return 130


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM or SIGUSR1 before a training has begun (importing torch takes seconds), or after it: exit code 3.

    The process ends at once: an exception would be lost where a module is compiled, and the training would begin.
    """

    def leave(_signum: int, _frame: object) -> NoReturn:
        with contextlib.suppress(Exception):  # a reader that has left, or the signal came in the middle of a write
            sys.stdout.flush()
        os._exit(STOPPED)

    kept = {}
    with contextlib.suppress(ValueError):  # not the main thread
        for signum in (signal.SIGTERM, signal.SIGUSR1):
            kept[signum] = signal.signal(signum, leave)
    try:
        yield
    finally:
        for signum, handler in kept.items():
            signal.signal(signum, handler)


def entry(argv: list[str] | None = None) -> NoReturn:
    """`main` as a process."""
    code = main(argv)
    for signum in (signal.SIGTERM, signal.SIGUSR1):  # all is saved and said: a late one must not change the exit code
        signal.signal(signum, signal.SIG_IGN)
    try:
        sys.stdout.flush()
    except OSError:  # the reader has left: the interpreter must not try again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def run(argv: list[str]) -> int:
    """Runs one verb; returns the exit code. UserError for a mistake in the words or in what they name."""
    if not argv or argv[0].startswith("-"):
        overview().parse_args(argv or ["--help"])  # prints, or refuses what it does not know
        return 0
    name, *words = argv
    if name not in VERBS:
        raise UserError(f"{name}: unknown verb{did_you_mean(name, VERBS)} (verbs: {', '.join(VERBS)})")
    verb = VERBS[name]
    parser = Parser(
        prog=f"std-fast {name}", description=verb.text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verb.add_arguments(parser)
    return verb.run(parse(parser, words)) or 0


def overview() -> Parser:
    """The parser of `std-fast --help` and `--version`, which lists the verbs."""
    from std_fast import __version__

    parser = Parser(prog="std-fast", description="Train vision MLPs by spatial-channel token distillation, fast.")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(metavar="VERB")
    for name, verb in VERBS.items():
        verbs.add_parser(name, help=verb.text)
    return parser


if __name__ == "__main__":
    entry()
