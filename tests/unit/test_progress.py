"""Progress away from a terminal: few lines, the first two and the last always among them."""

import os
import pty
import re
import select
import sys

import pytest

from std_fast.runtime.metrics import STDERR, Progress
from std_fast.runtime.write_faults import WriteFaults


@pytest.mark.parametrize(
    ("total", "seconds", "printed"),
    [
        (1000, 1000.0, [1, *range(2, 1000, 10), 1000]),  # 1 image/s: every 10 s
        (1000, 100.0, [1, *range(2, 1000, 50), 1000]),  # every 5 %, which takes 5 s
        (1000, 4.0, [1, 2, 252, 502, 752, 1000]),  # never more than one a second
        (0, 1000.0, [1, *range(2, 1000, 10)]),  # the total is unknown
    ],
)
def test_lines_printed(total: int, seconds: float, printed: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    progress = Progress("converted", total, "images", clock=lambda: now[0])
    for done in range(1, 1001):
        now[0] = done * seconds / 1000
        progress.note(done, "converting")
    lines = capsys.readouterr().err.splitlines()
    assert [int(line.split()[1].split("/")[0].replace(",", "")) for line in lines] == printed
    assert lines[0] == f"converted 1/{total:,} images  converting"


def test_a_line_after_a_silence(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    progress = Progress("hour", 0.5, "", clock=lambda: now[0])
    for step in range(1, 12):
        now[0] = 5.0 * step
        progress.update(step / 100, f"step {step}")
        if step == 2:
            progress.note(step / 100, "loss 1.0")  # at 10 s
    shown = ["hour 0.02/0.5  loss 1.0", "hour 0.07/0.5  step 7"]  # more than 20 s later
    assert capsys.readouterr().err.splitlines() == shown


def test_in_80_columns_the_note_is_cut_and_the_step_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = pty.openpty()
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    with open(writer, "w", buffering=1) as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        progress = Progress("step", 1_281_167, "")
        progress.note(123_456, "loss 6.9078  lr 1.00e-03  0.412 images/s  " + "student 30.4 %  " * 5)
        progress.close()
        shown = b""
        while select.select([reader], [], [], 0)[0]:
            shown += os.read(reader, 1 << 16)
    os.close(reader)
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode()))
    last = [line.rstrip() for line in lines if line.strip()][-1]
    assert last.startswith("step 123,456/1,281,167 ") and "loss 6.9078" in last and len(last) <= 80, shown


def test_quiet_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    Progress("converted", 10, "images", quiet=True).note(10, "done")
    assert capsys.readouterr().err == ""


def test_a_reader_that_has_left_is_counted_and_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    faults = WriteFaults()
    with open(writer, "w", buffering=1) as pipe:
        monkeypatch.setattr(sys, "stderr", pipe)
        progress = Progress("step", 2, "", faults=faults)
        progress.note(1, "loss 1.0")
        progress.note(2, "loss 0.5")
        progress.say("the end")
        progress.close()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # what is in the buffer
    assert faults.counts == {STDERR: 3}
    assert [r.message for r in caplog.records if "Broken pipe" in r.message] == [caplog.records[0].message]


def test_a_terminal_that_is_gone_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a lost ssh session: its bar is written by a thread too."""
    reader, writer = pty.openpty()
    faults = WriteFaults()
    with open(writer, "w", buffering=1) as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        progress = Progress("step", 2, "", faults=faults)
        os.close(reader)
        progress.update(1)
        progress.note(1, "loss 1.0")
        progress.say("step 1: top-1 50 %")
        progress.close()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)
    assert faults.counts[STDERR] > 0
