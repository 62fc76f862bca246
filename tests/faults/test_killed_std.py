"""A complete STD training (teachers, MINE, moving average, targets stored on the way and read again) that is killed, or
asked to stop, at random moments of its life: nothing that was done is lost, the end has the undisturbed run's bits.

    STD_FAST_KILLS=50 python -m pytest -s tests/faults/test_killed_std.py

kills fifty times. What is random comes from STD_FAST_SEED.
"""

import functools
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from std_fast.commands.arguments import STOPPED
from std_fast.runtime import checkpoint
from std_fast.runtime.metrics import read_jsonl
from std_fast.training.step import Trainer
from tests.killing import Child, get_ready, kill_again_and_again
from tests.small_runs import assert_same_bits, final_tensors, small_recipe, write_recipe

KILLS = int(os.environ.get("STD_FAST_KILLS", "4"))
STEPS = 18
SEED = int(os.environ.get("STD_FAST_SEED", "0"))


@pytest.fixture(scope="module")
def recipe(image_folder, teacher, tmp_path_factory):
    """Six epochs of two views: the first two ask the teachers and store what they say, the others read it."""
    folder = tmp_path_factory.mktemp("std")
    distill = {"mode": "std", "teachers": [{"weights": str(teacher)}] * 2, "views": 2}
    distill |= {"mine": {"every": "2 steps", "ema": 0.1}, "target_cache": str(folder / "run" / "targets")}
    return small_recipe(
        image_folder, folder / "run", distill=distill, run={"length": "6 epochs", "eval_every": "1 epoch"}
    )


@pytest.fixture(scope="module")
def undisturbed(recipe):
    """Seconds of a process that nobody disturbs, and what it leaves."""
    out = Path(recipe.run.out)
    path = write_recipe(recipe, out.parent / "recipe.yaml")
    get_ready(out.parent)
    began = time.monotonic()
    with Child(["train", path, "--quiet", "--resume"], out.parent / "log") as child:
        assert child.wait() == 0, child.text
    duration = time.monotonic() - began
    left = leavings(out)
    assert len(left[1]) == 2 and len(left[2]) == 9 and any(".psi." in name for name in left[0])
    shutil.rmtree(out)
    return path, duration, left


def leavings(out):
    """Tensors of the last checkpoint, bytes of the targets, steps of the log."""
    targets = {file.name: file.read_bytes() for file in (out / "targets").glob("epoch-*.targets")}
    return final_tensors(out), targets, [r["step"] for r in read_jsonl(out / "metrics.jsonl") if r["kind"] == "train"]


def check_end(out, expected):
    tensors, targets, steps = leavings(out)
    assert_same_bits(tensors, expected[0])
    assert targets == expected[1] and steps == expected[2]
    shutil.rmtree(out)


def test_killed_at_random_moments(recipe, undisturbed):
    path, duration, expected = undisturbed
    out = Path(recipe.run.out)
    reached = []

    def killed():
        saved = checkpoint.listed(out / "checkpoints")
        reached.append(int(saved[-1].stem.removeprefix("step-")) if saved else 0)

    def start():
        return Child(["train", path, "--quiet", "--resume"], out.parent / "log")

    random = np.random.default_rng(SEED)
    seen = kill_again_and_again(start, lambda: check_end(out, expected), KILLS, duration, random, killed)
    first, last = min(seen.moments), max(seen.moments)
    print(
        f"\nseed {SEED}: {KILLS} kills, {first:.2f} to {last:.2f} s after the start of a process "
        f"({duration:.2f} s undisturbed)"
    )
    print(f"newest checkpoint then: step {reached}; {seen.finished} runs came to their end, all with the same bits")
    assert len(seen.moments) == KILLS and seen.finished >= 1


def note_steps(path):
    """From now on every step that is done is noted in the file `path`."""
    kept, fd = Trainer.step, os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)

    def step(self, batch, now):
        kept(self, batch, now)
        os.pwrite(fd, f"{now.step:8}".encode(), 0)

    Trainer.step = step


def test_asked_to_stop_at_random_moments(recipe, undisturbed):
    path, duration, expected = undisturbed
    out = Path(recipe.run.out)
    noted, random, codes = out.parent / "noted", np.random.default_rng(SEED), []
    done = 0
    while len(codes) < KILLS or codes[-1] != 0:
        before = functools.partial(note_steps, str(noted))
        with Child(["train", path, "--quiet", "--resume"], out.parent / "log", before=before) as child:
            if len(codes) < KILLS:
                child.sleep(float(random.uniform(0, duration)))
                child.send(signal.SIGTERM if random.random() < 0.5 else signal.SIGUSR1)
            codes.append(child.wait())
        earlier, done = done, int(noted.read_text() or 0) if noted.exists() else 0
        saved = checkpoint.newest(out / "checkpoints")
        assert (saved[2]["step"] if saved else 0) == done, child.text
        if codes[-1] not in (0, STOPPED):  # no handler yet, and nothing done; or none any more, and all done
            assert codes[-1] in (-signal.SIGTERM, -signal.SIGUSR1) and done in (earlier, STEPS), child.text
        if codes[-1] == 0:
            check_end(out, expected)
            noted.unlink()
            done = 0
    print(f"\nseed {SEED}: exit codes {codes}")
