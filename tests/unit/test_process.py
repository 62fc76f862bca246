"""Signals and standard streams, in real processes. They import no torch, so that they start at once."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from std_fast import cli
from std_fast.runtime import process as process_module

ROOT = Path(__file__).resolve().parents[2]
STOPPING = """
import signal, sys, time
from std_fast.runtime.process import stop_on_signal
with stop_on_signal() as asked:
    print("ready", flush=True)
    while len(asked) < 1:
        time.sleep(0.01)
    print(signal.Signals(asked[0]).name, flush=True)
    if "save" in sys.argv:
        time.sleep(60)
"""


def start(code, *words, **more):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def heed():
    """In the child: as started from a terminal, whoever runs the tests."""
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)


def nohup():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGINT", "SIGHUP"])
def test_each_of_them_asks_once(name):
    signum = signal.Signals[name]
    with start(STOPPING, preexec_fn=heed) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signum)
        out, err = process.communicate(timeout=30)
    assert (out, process.returncode) == (f"{signum.name}\n", 0)
    assert ("Ctrl-C again" in err) == (signum == signal.SIGINT)


def test_a_run_under_nohup_outlives_its_terminal():
    with start(STOPPING, preexec_fn=nohup) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=30)[0] == "SIGTERM\n"


def test_a_second_ctrl_c_leaves_at_once():
    with start(STOPPING, "save", preexec_fn=heed) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "SIGINT\n"
        while process.poll() is None:  # one within SAME_PRESS counts as the same
            process.send_signal(signal.SIGINT)
            with_limit(process)
        assert process.returncode == 130


@pytest.mark.parametrize(("environment", "codes"), [({}, [130, 130]), ({"TORCHELASTIC_RUN_ID": "x"}, [130])])
def test_torchrun_passes_a_ctrl_c_on_that_is_the_same(environment, codes, monkeypatch):
    left = []
    monkeypatch.setattr(process_module.os, "_exit", left.append)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    try:
        with process_module.stop_on_signal() as asked:
            for seconds in (0, 1, 9):
                monkeypatch.setattr(process_module.time, "monotonic", lambda seconds=seconds: float(seconds))
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert left == codes and len(asked) == 3


def test_a_signal_outside_of_a_training_says_that_no_step_was_under_way():
    code = (
        "import time\nfrom std_fast.runtime.process import leave_on_signal\nwith leave_on_signal(3):\n"
        "    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    with start(code, preexec_fn=heed) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30)[1] == "\nstd-fast: stopped; no step was under way\n"
        assert process.returncode == 3


def with_limit(process):
    try:
        process.wait(0.1)
    except subprocess.TimeoutExpired:
        pass


def test_a_closed_stream_gives_its_descriptor_to_no_file(tmp_path):
    code = (
        "import os, sys\nfrom std_fast.runtime.process import open_streams\nopen_streams()\n"
        "print('lost', file=sys.stderr)\nos.write(2, b'lost')\n"
        "file = open(sys.argv[1], 'w')\nsys.exit(file.fileno() < 3)"
    )
    with start(code, str(tmp_path / "file"), preexec_fn=lambda: (os.close(0), os.close(2))) as process:
        assert process.communicate(timeout=30) == ("", "") and process.returncode == 0
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.parametrize(("word", "unbuffered"), [("recipes", ""), ("recipes", "1"), ("--help", "")])
def test_output_on_a_full_disk_is_an_error_of_one_line(word, unbuffered):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "std_fast.cli", word]
        done = subprocess.run(command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True)
    line = "std-fast: standard output: cannot be written (No space left on device)\n"
    assert (done.returncode, done.stderr) == (2, line)


def test_a_conversion_whose_report_is_lost_is_complete(image_folder, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "std_fast.cli", "convert", str(image_folder), str(tmp_path / "x.beton")]
        done = subprocess.run(command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and f"what it lost is in {tmp_path}/x.beton.json" in done.stderr


def test_an_error_that_nobody_can_read_keeps_its_exit_code():
    command = [sys.executable, "-m", "std_fast.cli", "trian"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=full, stderr=full)
    assert done.returncode == 2


def test_log_lines_that_cannot_be_written_are_lost_without_a_traceback(monkeypatch):
    """logging would print one for each of them."""
    with open("/dev/full", "w", buffering=1) as full:
        record = cli.logging.LogRecord("std_fast", 30, __file__, 1, "resumed %s", ("run",), None)
        monkeypatch.setattr(sys, "stderr", shown := Shown())
        cli.LogHandler(full).handle(record)
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    assert shown.text == ""
    cli.LogHandler(shown).handle(cli.logging.LogRecord("std_fast", 30, __file__, 1, "%d", ("no number",), None))
    assert "Traceback" in shown.text


class Shown:
    text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_a_project_may_have_a_package_called_pipelines(tmp_path):
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "__init__.py").touch()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "std_fast.cli", "recipes"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_backend_of_a_notebook_is_not_asked_for():
    code = "from std_fast.cli import main; main(['recipes']); import matplotlib as m; assert m.get_backend() == 'agg'"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
