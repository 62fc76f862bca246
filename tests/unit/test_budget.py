"""The ledger and the clock, on a clock of the test's own: where seconds go, and where the learning rate lands."""

import json
import random
import subprocess
import sys
import time

import pytest

from pipelines.errors import UserError
from std_fast.config import recipe as recipes
from std_fast.config.recipe import Recipe
from std_fast.config.schema import from_dict
from std_fast.runtime.budget import (
    CLOSING,
    PARTS,
    Clock,
    Heartbeat,
    Ledger,
    duration_in_words,
    earlier,
    in_words,
    process_seconds,
    productive_seconds,
)
from std_fast.training.schedule import build_schedule


class Time:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def pass_by(self, seconds):
        self.now += seconds


def test_a_process_counts_its_own_imports():
    code = """
import time
began = time.perf_counter()
from std_fast.runtime.budget import process_seconds
print(time.perf_counter() - began, process_seconds())
"""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imports, found = map(float, done.stdout.split())
    assert imports < found < time.perf_counter() - began
    first, began = process_seconds(), time.perf_counter()
    assert process_seconds() - first == pytest.approx(time.perf_counter() - began, abs=0.5)


@pytest.fixture
def clock_time():
    return Time()


def recipe_of(length, warmup="5 %", **run):
    return from_dict(Recipe, {"run": {"length": length, "batch": 8, **run}, "optim": {"warmup": warmup}})


def clock_of(length, steps_per_epoch, ledger):
    return Clock(recipes.Duration.parse(length), steps_per_epoch, 8, ledger)


# -- ledger -----------------------------------------------------------------------------------------------------------


def test_every_second_belongs_to_exactly_one_part(clock_time):
    ledger = Ledger(devices=2, already=5.0, now=clock_time)
    clock_time.pass_by(1)
    ledger.switch("train")
    clock_time.pass_by(2)
    with ledger.during("evaluate"):
        clock_time.pass_by(3)
        with ledger.during("data"):
            clock_time.pass_by(4)
        clock_time.pass_by(0.5)
    clock_time.pass_by(8)

    expected = {"start": 6, "train": 10, "evaluate": 3.5, "data": 4}
    assert {part: value for part, value in ledger.read().items() if value} == expected
    assert ledger.held == clock_time.now + 5 == sum(ledger.read().values())
    assert ledger.gpu_hours == pytest.approx(2 * ledger.held / 3600)
    assert productive_seconds(ledger.read()) == 14
    ledger.move(4, "train", "teacher")
    ledger.move(1000, "data", "teacher")  # never more than there is
    assert ledger.read()["teacher"] == 8 and ledger.read()["data"] == 0 and sum(ledger.read().values()) == ledger.held


def test_an_error_inside_a_part_ends_the_part(clock_time):
    ledger = Ledger(now=clock_time)
    with pytest.raises(ZeroDivisionError), ledger.during("checkpoint"):
        clock_time.pass_by(1)
        1 / 0  # noqa: B018
    clock_time.pass_by(1)
    assert ledger.read()["checkpoint"] == ledger.read()["start"] == 1


def test_earlier_hours_count_as_they_were_held(clock_time):
    ledger = Ledger(devices=2, already=1.0, now=clock_time)
    ledger.carry({"train": 100.0, "lost": 10.0})  # GPU-seconds, of one GPU or of many
    assert ledger.gpu_hours * 3600 == pytest.approx(112)
    assert ledger.read()["train"] == 50 and ledger.held == 56


def test_a_duration_has_the_largest_unit_of_which_there_are_two():
    seconds = (1.4, 119.0, 120.0, 7199.0, 7200.0, 172799.0, 37 * 86400.0)
    shown = "1 s, 119 s, 2 minutes, 120 minutes, 2 hours, 48 hours, 37 days"
    assert ", ".join(map(duration_in_words, seconds)) == shown


def test_in_words():
    assert in_words({"train": 75.0, "data": 25.0, "lost": 0.0}) == "train 75.0 s (75 %), data 25.0 s (25 %)"


# -- what is known after a kill ---------------------------------------------------------------------------------------


def beat_of(folder):
    return json.loads((folder / "held.json").read_text())


def test_time_after_the_last_save_of_a_killed_run_is_lost(tmp_path, clock_time):
    ledger = Ledger(devices=2, now=clock_time)
    clock_time.pass_by(10)
    heart = Heartbeat(tmp_path, ledger, every=0.005)
    saved = {"start": 12.0, "train": 3.0}
    clock_time.pass_by(20)
    limit = time.monotonic() + 20
    while beat_of(tmp_path)["gpu_seconds"] != 60:  # by the thread, without being asked
        assert time.monotonic() < limit
    # kill -9: nobody calls stop
    held = earlier(tmp_path, 7, saved)
    assert held["lost"] == 45 and held["train"] == 3 and sum(held.values()) == 60
    assert set(held) == set(PARTS)
    # and of one that has saved nothing
    assert earlier(tmp_path, 0, {})["lost"] == 60
    heart.stop(None)
    assert earlier(tmp_path, 7, saved)["lost"] == 45


def test_a_run_that_saved_and_ended_has_lost_nothing(tmp_path, clock_time):
    ledger = Ledger(now=clock_time)
    heart = Heartbeat(tmp_path, ledger, every=100)
    clock_time.pass_by(20)
    saved = ledger.read()
    with ledger.during("checkpoint"):
        clock_time.pass_by(5)  # writing it, known only afterwards
    heart.stop(7)
    heart.stop(None)  # a second call changes nothing
    held = earlier(tmp_path, 7, saved)
    assert held["checkpoint"] == 5 and held["lost"] == 0 and sum(held.values()) == 25
    older = earlier(tmp_path, 6, {"start": 15.0})  # the newest checkpoint was damaged
    assert older["lost"] == 10


def test_without_a_heartbeat_the_checkpoint_counts(tmp_path, caplog):
    assert earlier(tmp_path, 7, {"train": 5.0})["train"] == 5
    assert not caplog.records
    for damaged in ("", "[]", '{"gpu_seconds": "x"}', '{"gpu_seconds": 9, "step": 7}'):
        (tmp_path / "held.json").write_text(damaged)
        assert sum(earlier(tmp_path, 7, {"train": 5.0}).values()) == 5
        assert "held.json: cannot be read" in caplog.records.pop().getMessage()


# -- the clock --------------------------------------------------------------------------------------------------------


def test_a_training_by_steps_ends_at_its_last_step(clock_time):
    clock = clock_of("3 epochs", 10, Ledger(now=clock_time))
    assert clock.steps == 30 and clock.read() == 0
    assert [clock.progress(step) for step in (3, 30)] == [0.1, 1.0]
    assert clock.fits("evaluate") and not clock.done(29) and clock.done(30)


class Training:
    """A training as the loop of run.py runs it, on the test's clock. Seconds: `step()` gives those of each step."""

    def __init__(self, hours, step, time, start=2.0, evaluation=0.5, save=0.3, eval_every=200, devices=1, earlier=None):
        self.time, self.step = time, step
        self.evaluation, self.save, self.began = evaluation, save, time.now
        self.ledger = Ledger(devices, now=time)
        self.ledger.carry(earlier or {})
        self.clock = clock_of(f"{hours} gpu-hours", 100, self.ledger)
        recipe = recipe_of(f"{hours} gpu-hours", eval_every=f"{eval_every} steps")
        self.schedule = build_schedule(recipe, self.clock, 100)
        self.schedule.peak_lr, self.schedule.min_lr = 1.0, 0.01
        self.hours, self.rates, self.evaluations = hours, [], 0
        time.pass_by(start)

    def evaluate(self, part="evaluate"):
        with self.ledger.during(part):
            before = self.time.now
            self.time.pass_by(self.evaluation() if callable(self.evaluation) else self.evaluation)
        self.clock.cost("evaluate", self.time.now - before)
        self.evaluations += 1

    def run(self, steps=None):
        """To the end, or killed after `steps`."""
        self.evaluate("start")
        self.ledger.switch("train")
        self.clock.share, number = self.clock.read(), 0
        while not self.clock.done(number):
            if number == steps:
                return self
            now = self.schedule.at(number + 1)
            self.rates.append(now.lr)
            seconds = self.step()
            with self.ledger.during("data"):
                self.time.pass_by(seconds / 4)
            self.time.pass_by(seconds * 3 / 4)
            number += 1
            if now.evaluate:
                self.evaluate()
            if number == 1:
                self.clock.cost("checkpoint", self.save)
            self.clock.share = self.clock.read()
        with self.ledger.during("checkpoint"):
            self.time.pass_by(self.save)
        self.time.pass_by(CLOSING)
        return self

    @property
    def share(self):
        """Of the budget, spent in the end."""
        return self.ledger.gpu_hours / self.hours


def steady(seconds):
    return lambda: seconds


def throttled(seconds, seed=0):
    """Every tenth step or so waits for a slow disk."""
    dice = random.Random(seed)
    return lambda: seconds * dice.uniform(0.8, 1.2) + (dice.uniform(0, 20 * seconds) if dice.random() < 0.1 else 0)


@pytest.mark.parametrize("hours", [0.01, 0.05, 8.0])
@pytest.mark.parametrize("step", [steady(0.02), throttled(0.02)], ids=["steady", "throttled"])
@pytest.mark.parametrize("devices", [1, 8])
def test_a_budget_is_spent_and_the_learning_rate_lands(clock_time, hours, step, devices):
    scale = max(1.0, 20 * hours)  # longer runs have longer steps, so that the test is short
    run = Training(
        hours * devices, lambda: scale * step(), clock_time, start=3.0 * scale, evaluation=0.5 * scale,
        save=0.3 * scale, devices=devices,
    ).run()  # fmt: skip
    assert 0.97 <= run.share <= 1.0
    assert run.rates[-1] == pytest.approx(0.01)
    assert run.rates[0] == 0 < run.rates[1]  # the share of a step is not known before one is timed
    assert max(run.rates) > 0.99  # the warm-up was complete: a long start does not skip it
    peak = run.rates.index(max(run.rates))
    assert 0.02 < peak / len(run.rates) < 0.09
    assert run.rates[:peak] == sorted(run.rates[:peak]) and run.rates[peak:] == sorted(run.rates[peak:], reverse=True)
    assert max(abs(a - b) for a, b in zip(run.rates[peak:], run.rates[peak + 1 :], strict=False)) < 0.08
    assert run.evaluations > 2


def test_a_slow_disk_shortens_the_training_and_nothing_else(clock_time):
    fast = Training(0.01, steady(0.02), clock_time).run()
    slow = Training(0.01, steady(0.1), clock_time).run()
    assert len(slow.rates) < 0.3 * len(fast.rates)
    assert fast.rates[-1] == slow.rates[-1] == pytest.approx(0.01)


def test_a_disk_that_slows_down_on_the_way(clock_time):
    seconds = iter([0.02] * 600 + [0.3] * 1000)
    run = Training(0.01, lambda: next(seconds), clock_time).run()
    assert 0.97 <= run.share <= 1.0 and run.rates[-1] == pytest.approx(0.01)


def test_evaluations_that_grow_slower_are_still_inside(clock_time):
    slower = iter(0.5 + 0.02 * n for n in range(100))
    run = Training(0.01, steady(0.02), clock_time, evaluation=lambda: next(slower), eval_every=100).run()
    assert 0.97 <= run.share <= 1.0


def test_an_evaluation_that_would_overrun_is_left_out(clock_time):
    """The one before the last falls due so late that no time would be left for the last."""
    for eval_every in range(1000, 1500, 13):
        run = Training(0.01, steady(0.02), clock_time, eval_every=eval_every, evaluation=3.0).run()
        assert 0.97 <= run.share <= 1.0, eval_every


@pytest.mark.parametrize("killed_at", [1, 300, 900])
def test_killed_and_resumed_it_lands_inside_the_same_budget(clock_time, tmp_path, killed_at):
    first = Training(0.01, steady(0.02), clock_time)
    heart = Heartbeat(tmp_path, first.ledger, every=100)
    first.run(steps=killed_at)
    saved = {part: value / 2 for part, value in first.ledger.read().items()}  # half of it was after the save
    heart._write({})  # the last beat before the kill
    held = earlier(tmp_path, killed_at // 2, saved)
    assert sum(held.values()) == pytest.approx(first.ledger.held) and held["lost"] > 0
    second = Training(0.01, steady(0.02), clock_time, earlier=held).run()
    heart.stop(None)
    assert 0.97 <= second.share <= 1.0
    assert second.rates[-1] == pytest.approx(0.01)
    if killed_at > 100:  # it continues where it stopped: no second warm-up
        assert second.rates == sorted(second.rates, reverse=True)


def test_a_budget_that_the_start_has_spent_makes_one_step_at_the_final_rate(clock_time):
    run = Training(0.001, steady(0.02), clock_time, start=60.0).run()
    assert run.rates == [pytest.approx(0.01)]


def test_warmup_in_epochs_is_a_share_of_a_budget(clock_time, caplog):
    caplog.set_level("INFO")
    clock = clock_of("1 gpu-hours", 10, Ledger(now=clock_time))
    assert build_schedule(recipe_of("1 gpu-hours", "5 epochs"), clock, 10).warmup == 0.05
    assert "optim.warmup: 5 epochs" in caplog.text


# -- how it is asked for ----------------------------------------------------------------------------------------------


def test_gpu_hours_on_the_command_line():
    from std_fast.commands.arguments import split_overrides

    recipe = recipes.load("digits_mixer", split_overrides(["--budget.gpu-hours", "8"])[1])
    assert recipe.run.length == "8 gpu-hours"
    assert recipes.loads(recipes.dump(recipe)) == recipe
    for wrong in ("eight", "-1", "0", "nan"):
        with pytest.raises(UserError, match="run.length"):
            recipes.load("digits_mixer", split_overrides([f"--budget.gpu_hours={wrong}"])[1])
    with pytest.raises(UserError, match="run.eval_every: write epochs, steps or samples"):
        recipes.load("digits_mixer", [("run.eval_every", "1 gpu-hours")])
