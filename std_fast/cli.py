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
from typing import NoReturn

if (  # `python -m` looks into the current folder first, where `pipelines` may be a project's own
    __name__ == "__main__"
    and os.path.abspath(sys.path[0]) != os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    and not getattr(sys.flags, "safe_path", False)
):
    sys.path.append(sys.path.pop(0))

from pipelines.errors import UserError, did_you_mean, one_line
from std_fast.commands import data_verbs, run_verbs, tool_verbs, train_verbs
from std_fast.commands.arguments import STOPPED, Parser, Verb, output_lost, parse
from std_fast.runtime.memory import ran_out
from std_fast.runtime.process import INTERRUPTED, STOP_SIGNALS, LogHandler, leave_on_signal, open_streams, say, settle

_ORDER = (
    "convert inspect verify warm train plan report teach eval predict export recipes preview info bench doctor demo"
)
_ALL = {**data_verbs.VERBS, **train_verbs.VERBS, **run_verbs.VERBS, **tool_verbs.VERBS}
VERBS: dict[str, Verb] = {name: _ALL[name] for name in _ORDER.split()}


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; returns the exit code (0 done, 2 the user's mistake, 3 to 5: see commands/arguments.py)."""
    argv = sys.argv[1:] if argv is None else argv
    os.environ["MPLBACKEND"] = "agg"  # a notebook's may not be installed here
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal's encoding lacks is escaped, and no error
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(format="%(message)s", level=logging.WARNING, handlers=[LogHandler(sys.stderr)])
    logging.getLogger("std_fast").setLevel(logging.INFO)
    try:
        with leave_on_signal(STOPPED) if argv[:1] in (["train"], ["teach"]) else contextlib.nullcontext():
            return run(argv)
    except UserError as error:
        say(f"std-fast: {error}")
        return 2
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        what = " ".join(str(error).split()) or "no more to be had"
        say(f"std-fast: memory was short ({what}); use smaller batches or fewer workers")
        return 2
    except BrokenPipeError:  # the reader of our output has left, e.g. `| head`
        return 0
    except OSError as error:
        if error.filename is None:
            raise
        line = one_line(f"{os.fsdecode(error.filename)}: {error.strerror}; make it usable, or name another path")
        say(f"std-fast: {line}")
        return 2
    except KeyboardInterrupt:
        continues = argv[:1] in (["convert"], ["warm"])
        say("std-fast: interrupted" + "; the same command continues" * continues)
        return INTERRUPTED


def entry(argv: list[str] | None = None) -> NoReturn:
    """`main` as a process."""
    open_streams()
    try:
        code = main(argv)
    except SystemExit as end:  # argparse, after --help
        code = end.code if isinstance(end.code, int) else 0
    for signum in STOP_SIGNALS:  # all is saved and said: a late one must not change the exit code
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, signal.SIG_DFL if signum == signal.SIGINT else signal.SIG_IGN)
    lost = settle(sys.stdout)
    if lost is not None and not isinstance(lost, BrokenPipeError):
        say(f"std-fast: {output_lost(lost)}")
        code = code or 2
    settle(sys.stderr)
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
