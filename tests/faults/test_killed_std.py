"""A complete STD training (teachers, MINE, moving average, targets stored on the way and read again) that is killed, or
asked to stop, at random moments of its life: nothing that was done is lost, the end has the undisturbed run's bits.

    STD_FAST_KILLS=50 python -m pytest -s tests/faults/test_killed_std.py

kills fifty times. What is random comes from STD_FAST_SEED.
"""

import functools
import os
import signal

import numpy as np
import pytest

from std_fast.commands.arguments import STOPPED
from std_fast.runtime import checkpoint
from std_fast.training.step import Trainer
from tests.faults.ground import steps_saved
from tests.faults.kills import KilledTraining
from tests.small_runs import small_recipe

KILLS = int(os.environ.get("STD_FAST_KILLS", "4"))
STEPS = 18
SEED = int(os.environ.get("STD_FAST_SEED", "0"))


@pytest.fixture(scope="module")
def training(image_folder, teacher, tmp_path_factory):
    """Six epochs of two views: the first two ask the teachers and store what they say, the others read it."""
    folder = tmp_path_factory.mktemp("std")
    distill = {"mode": "std", "teachers": [{"weights": str(teacher)}] * 2, "views": 2}
    distill |= {"mine": {"every": "2 steps", "ema": 0.1}, "target_cache": str(folder / "run" / "targets")}
    run = {"length": "6 epochs", "eval_every": "1 epoch"}
    made = KilledTraining(small_recipe(image_folder, folder / "run", distill=distill, run=run), folder)
    tensors, targets, steps = made.undisturbed[1]
    assert len(targets) == 2 and len(steps) == 9 and any(".psi." in name for name in tensors)
    return made


def test_killed_at_random_moments(training):
    reached = []
    seen = training.run(KILLS, np.random.default_rng(SEED), lambda: reached.append(steps_saved(training.out)))
    first, last = min(seen.moments), max(seen.moments)
    print(
        f"\nseed {SEED}: {KILLS} kills, {first:.2f} to {last:.2f} s after the start of a process "
        f"({training.undisturbed[0]:.2f} s undisturbed)"
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


def test_asked_to_stop_at_random_moments(training):
    noted, random, codes = training.folder / "noted", np.random.default_rng(SEED), []
    done = 0
    while len(codes) < KILLS or codes[-1] != 0:
        with training.start(functools.partial(note_steps, str(noted))) as child:
            if len(codes) < KILLS:
                child.sleep(float(random.uniform(0, training.undisturbed[0])))
                child.send(signal.SIGTERM if random.random() < 0.5 else signal.SIGUSR1)
            codes.append(child.wait())
        earlier, done = done, int(noted.read_text() or 0) if noted.exists() else 0
        saved = checkpoint.newest(training.out / "checkpoints")
        assert (saved[2]["step"] if saved else 0) == done, child.text
        if codes[-1] not in (0, STOPPED):  # no handler yet, and nothing done; or none any more, and all done
            assert codes[-1] in (-signal.SIGTERM, -signal.SIGUSR1) and done in (earlier, STEPS), child.text
        if codes[-1] == 0:
            training.check_end()
            noted.unlink()
            done = 0
    print(f"\nseed {SEED}: exit codes {codes}")
