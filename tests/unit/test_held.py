"""Word of a process from before its heavy imports: what is left of it when it is killed, and when it is not."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipelines.errors import UserError
from std_fast.runtime import held
from std_fast.runtime.budget import Heartbeat, Ledger, earlier

ROOT = Path(held.__file__).parents[2]
WAITS = """
import sys, threading
from pathlib import Path
from std_fast.runtime.held import starting
with starting(Path(sys.argv[1])):
    threading.Event().wait()
"""


def files(folder):
    return sorted(folder.glob(".starting-*"))


def begun(folder, until=0.3, **environment):
    """A process that has been held for `until` seconds by its own word; and when it was asked for."""
    began, known = time.monotonic(), set(files(folder))
    child = subprocess.Popen([sys.executable, "-c", WAITS, str(folder)], cwd=ROOT, env=os.environ | environment)
    while not any(float(file.read_text() or 0) >= until for file in files(folder) if file not in known):
        assert child.poll() is None and time.monotonic() < began + 60
        time.sleep(0.01)
    return child, began


def test_a_process_knows_how_long_it_was_held():
    first = held.process_seconds()
    began = time.perf_counter()
    assert 0 < first < 24 * 3600
    assert held.process_seconds() - first == pytest.approx(time.perf_counter() - began, abs=0.5)


def test_a_process_killed_while_it_starts_is_counted(tmp_path):
    """As long as it lived, twice for two GPUs; once only; not while it lives."""
    folder = tmp_path / "runs" / "new"
    one, began = begun(folder)
    two, _ = begun(folder, WORLD_SIZE="2", RANK="0")
    assert held.unheard(folder) == 0  # both live
    one.send_signal(signal.SIGKILL)
    one.wait()
    lived = time.monotonic() - began
    first = held.unheard(folder)
    assert 0.3 <= first <= lived + 0.02
    two.send_signal(signal.SIGKILL)
    two.wait()
    assert held.unheard(folder) >= first + 0.3
    lost = earlier(folder, 0, {})["lost"]
    assert lost == held.unheard(folder)

    ledger = Ledger()
    ledger.carry(earlier(folder, 0, {}))
    heart = Heartbeat(folder, ledger, every=100)
    assert not files(folder) and held.unheard(folder) == 0
    heart.stop(None)
    assert earlier(folder, 0, {})["lost"] == pytest.approx(ledger.held, abs=0.5) and ledger.held >= lost


def test_the_run_takes_over_from_its_own_process(tmp_path):
    with held.starting(tmp_path):
        assert len(files(tmp_path)) == 1
        heart = Heartbeat(tmp_path, Ledger(already=held.process_seconds()), every=100)
        assert not files(tmp_path)
        (thread,) = (thread for thread in threading.enumerate() if thread.name == "std_fast-starting")
        thread.join(60)  # it sees that its file is gone, and does not make it anew
        assert not thread.is_alive() and not files(tmp_path)
    heart.stop(0)
    assert not files(tmp_path)


def test_a_mistake_leaves_nothing_and_a_signal_leaves_the_file(tmp_path):
    with pytest.raises(UserError), held.starting(tmp_path / "runs" / "new"):
        raise UserError("a typing error")
    assert not (tmp_path / "runs").exists()
    with pytest.raises(UserError), held.starting(tmp_path):
        raise UserError("a typing error")
    assert tmp_path.exists() and not files(tmp_path)
    with pytest.raises(SystemExit), held.starting(tmp_path):
        raise SystemExit(3)
    (file,) = files(tmp_path)
    assert float(file.read_text()) <= held.process_seconds()
    file.rename(tmp_path / ".starting-elsewhere-1-2")
    assert held.unheard(tmp_path) > 0


def test_other_ranks_damaged_files_and_folders_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / ".starting-elsewhere-1-2").write_text("what")
    assert held.unheard(tmp_path) == 0
    (tmp_path / "file").write_text("")
    for folder in (None, tmp_path / "file" / "below"):
        with held.starting(folder):
            pass
    monkeypatch.setenv("RANK", "1")
    with held.starting(tmp_path / "new"):
        assert not (tmp_path / "new").exists()
    held.take_over(tmp_path)
    assert not files(tmp_path)


def test_the_command_line_leaves_word_before_torch_is_imported(tmp_path):
    """And knows the folder from the recipe, its base and what the command line changes."""
    (tmp_path / "mine.yaml").write_text("base: digits_mixer\nrun: {out: 'runs/{name}-{seed}'}\n")
    code = (
        "import sys; from std_fast import cli; from std_fast.commands import train_verbs; "
        "train_verbs.train_recipe = lambda args: print('torch' in sys.modules) or "
        "sys.exit(7); cli.main(['train', 'mine.yaml', '--run.seed', '3'])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (7, "False\n"), done.stderr
    assert len(files(tmp_path / "runs" / "mine-3")) == 1
