"""A complete run on real files: resume to the bit, exact evaluation, stopping, and what a user gets wrong."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines.errors import DataError, UserError
from std_fast import cli
from std_fast.commands.arguments import STOPPED
from std_fast.config import recipe as recipes
from std_fast.runtime import checkpoint, metrics
from std_fast.runtime.distributed import World
from std_fast.runtime.metrics import read_jsonl
from std_fast.training import evaluator, run_log
from std_fast.training.evaluate import evaluate_run
from std_fast.training.existing import finished, unused_beside
from std_fast.training.run import Run, Stopped
from std_fast.training.train import train
from tests.small_runs import assert_same_bits, at, small_recipe, train_until, write_recipe

THREE_EPOCHS = {"length": "3 epochs", "eval_every": "1 epoch", "save_every": "10 minutes"}


@pytest.fixture
def recipe(teacher, image_folder, tmp_path):
    distill = {"mode": "std", "teachers": [{"weights": str(teacher)}] * 2, "mine": {"every": "2 steps", "ema": 0.1}}
    return small_recipe(image_folder, tmp_path / "run", distill=distill, run=THREE_EPOCHS)


def weights(folder):
    _, tensors, meta = checkpoint.newest(folder / "checkpoints")
    return tensors, meta


def test_interrupted_after_any_step_and_resumed_is_bit_identical(recipe, tmp_path):
    complete = train(at(recipe, tmp_path / "complete"), quiet=True)
    expected, _ = weights(tmp_path / "complete")
    assert complete["steps"] == 9 and complete["samples"] == 72
    assert any(name.startswith("ema.") for name in expected) and any(name.endswith("exp_avg_sq") for name in expected)
    for stop_at in (1, 4, 6):  # within an epoch and at its end, before and after a step with MINE
        part = at(recipe, tmp_path / f"part{stop_at}")
        train_until(part, stop_at)
        again = train(part, resume=True, quiet=True)
        assert again["result"] == complete["result"]
        got, _ = weights(tmp_path / f"part{stop_at}")
        assert_same_bits(got, expected)
        steps = [r["step"] for r in read_jsonl(tmp_path / f"part{stop_at}" / "metrics.jsonl") if r["kind"] == "train"]
        assert steps == sorted(set(steps)) and steps[-1] == 9  # nothing is logged twice


@pytest.mark.parametrize("where", ["train", "val"])
def test_data_that_cannot_be_read_any_more_ends_a_run_with_its_steps_saved(recipe, tmp_path, where):
    expected = train(at(recipe, tmp_path / "complete"), quiet=True)["result"]
    shutil.copytree(recipe.data.train, tmp_path / "images")
    recipe = at(recipe, tmp_path / "run")
    recipe = replace(recipe, data=replace(recipe.data, backend="torch", **{where: str(tmp_path / "images")}))
    image = min((tmp_path / "images").rglob("*.*"))
    content = image.read_bytes()

    def break_image(run):
        if run.step == 2:
            image.write_bytes(b"no image") if where == "train" else image.unlink()

    with pytest.raises(DataError) as caught:
        train(recipe, quiet=True, on_step=break_image)
    step = weights(tmp_path / "run")[1]["step"]
    assert step >= 2 and f"step {step} is saved, from which the run continues with --resume" in str(caught.value)
    assert ("--data.on_corrupt skip" in str(caught.value)) is (where == "train")
    image.write_bytes(content)
    assert train(recipe, resume=True, quiet=True)["result"] == expected


def test_data_that_another_rank_cannot_read(recipe):
    """Only rank 0 writes, and where the error comes late it waits in the next step: the message says what is lost."""
    run = SimpleNamespace(step=2, world=World(1, 2), recipe=recipe, agreed=False)
    lost = r"^a.jpg: gone; steps since the newest checkpoint \(run.save_every 10 minutes\) are lost: it continues"
    with pytest.raises(DataError, match=lost), Run._saved_if_data_fails(run):
        raise DataError("a.jpg: gone")


@pytest.mark.parametrize("where", [3, 9])  # in the middle of the training, and in its last evaluation
def test_a_stop_does_not_wait_for_an_evaluation(recipe, tmp_path, capsys, where):
    """Which a scheduler's grace may be too short for; it is made up for when the run goes on."""
    recipe = at(recipe, tmp_path / "part", eval_batch=8)
    complete = train(at(recipe, tmp_path / "complete"), quiet=True)
    shown = []

    def ask(run):
        if run.step == where - 1:
            loader, epoch = run.parts.val_loader, run.parts.val_loader.epoch

            def begun(number):
                with contextlib.closing(epoch(number)) as batches:
                    for batch in batches:
                        shown.append(batch.step)
                        yield batch
                        run.stop_wanted = True

            loader.epoch = begun

    with pytest.raises(Stopped, match="saved in"):
        train(recipe, quiet=True, on_step=ask)
    assert shown == [0, 1]  # the second was there when the stop was wanted
    assert weights(tmp_path / "part")[1]["step"] == where
    with pytest.raises(Stopped, match="in an evaluation; continue"):  # and once more
        with stopping_at_once():
            train(recipe, resume=True, quiet=True)
    with contextlib.suppress(Killed):
        train(recipe, resume=True, quiet=True, on_step=kill)
    assert train(recipe, resume=True, quiet=True)["result"] == complete["result"]
    with pytest.MonkeyPatch.context() as patch:  # it is finished, and not evaluated again
        patch.setattr("std_fast.training.evaluator.evaluate", lambda *_: pytest.fail("evaluates"))
        assert train(recipe, resume=True)["result"] == complete["result"]
    assert f"{tmp_path}/part is complete" in capsys.readouterr().err
    assert_same_bits(*(weights(tmp_path / name)[0] for name in ("complete", "part")))
    kept = ("step", "top1", "loss")
    evaluations = [
        [{key: r[key] for key in kept} for r in read_jsonl(tmp_path / name / "metrics.jsonl") if r["kind"] == "eval"]
        for name in ("complete", "part")
    ]
    assert evaluations[0] == evaluations[1]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("validates", [True, False])
def test_a_finished_run_that_is_resumed_changes_nothing(recipe, validates, tmp_path, capsys):
    recipe = replace(recipe, run=replace(recipe.run, length="1 steps"))
    recipe = recipe if validates else replace(recipe, data=replace(recipe.data, val=""))
    summary, folder = train(recipe, quiet=True), Path(recipe.run.out)
    before = contents(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("std_fast.training.run.build", lambda *_: pytest.fail("opens data, or builds a model"))
        assert train(recipe, resume=True) == json.loads(json.dumps(summary))
        assert contents(folder) == before
        assert f"{folder} is complete; a longer training is a new run" in capsys.readouterr().err
        path = write_recipe(recipe, tmp_path / "recipe.yaml")
        patch.setitem(sys.modules, "std_fast.training.run", None)  # nor imports what needs torch
        patch.setitem(sys.modules, "std_fast.training.train", None)
        assert cli.main(["train", path]) == 2
        assert f"{folder}: holds a complete run; start a new one" in capsys.readouterr().err
        with pytest.raises(ImportError):
            cli.main(["train", path, "--resume"])
        assert f"{folder} is complete" in capsys.readouterr().err
    assert cli.main(["train", path, "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["result"] == summary["result"]
    assert contents(folder) == before
    newest = folder / "checkpoints" / "step-00000001.safetensors"
    assert finished(recipe, folder)
    os.truncate(newest, newest.stat().st_size - 1)
    assert not finished(recipe, folder)
    newest.write_bytes(before[newest])
    longer = replace(recipe, run=replace(recipe.run, length="4000 steps"))
    write_recipe(longer, folder / "recipe.yaml")
    with pytest.raises(UserError, match=r"was written by another recipe \(run.length differs\)"):
        train(longer, resume=True)
    (folder / "recipe.yaml").unlink()  # and is written anew
    train(recipe, resume=True, quiet=True)
    assert contents(folder) == before
    for wrong in ("[]", json.dumps(summary | {"steps": "1"}), json.dumps(summary | {"result": 5})):
        (folder / "summary.json").write_text(wrong)
        assert train(recipe, resume=True, quiet=True)["result"] == summary["result"]
        assert json.loads((folder / "summary.json").read_text())["steps"] == 1


def test_a_finished_run_without_its_checkpoints_is_neither_overwritten_nor_begun_anew(recipe):
    recipe = replace(recipe, run=replace(recipe.run, length="1 steps"))
    summary, folder = train(recipe, quiet=True), Path(recipe.run.out)
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step-00000000.safetensors").touch()  # an older one that was left
    assert train(recipe, resume=True, quiet=True)["result"] == summary["result"]
    (folder / "checkpoints" / "step-00000000.safetensors").unlink()
    before = contents(folder)
    longer = replace(recipe, run=replace(recipe.run, length="2 steps"))
    for wanted, resume in ((recipe, False), (longer, False), (longer, True)):
        with pytest.raises(UserError, match=f"holds a complete run; start a new one with --run.out {folder}-2$"):
            train(wanted, resume=resume, quiet=True)
    assert contents(folder) == before


def test_a_folder_that_is_cleared_while_its_run_goes_on(recipe, caplog):
    folder = Path(recipe.run.out)
    recipe = replace(recipe, run=replace(recipe.run, length="6 steps", eval_every="0 steps", log_every=1))

    def clear(run):
        if run.step == 3:
            run.folder.writer.wait()
            shutil.rmtree(folder)
            folder.mkdir()

    train(recipe, quiet=True, on_step=clear)
    assert recipes.read_saved(folder) == recipe and "recipe.yaml: is gone" in caplog.text
    assert [r["step"] for r in read_jsonl(folder / "metrics.jsonl") if r["kind"] == "train"] == [4, 5, 6]
    (folder / "recipe.yaml").unlink()
    with pytest.raises(UserError, match=r"another recipe \(optim.lr differs\); resume with .*/recipe.yaml"):
        train(replace(recipe, optim=replace(recipe.optim, lr=1.0)), resume=True, quiet=True)
    assert recipes.read_saved(folder) == recipe


def test_a_folder_that_another_run_takes_is_left_to_it(recipe, tmp_path):
    """The first run's was renamed while it went on."""
    recipe = replace(recipe, data=replace(recipe.data, val=""), run=replace(recipe.run, length="4 steps", log_every=1))
    folder, renamed, left = Path(recipe.run.out), tmp_path / "renamed", []

    def take(run):
        if run.step == 2:
            folder.rename(renamed)
            train(replace(recipe, run=replace(recipe.run, length="1 steps")), quiet=True)
            left.extend(map(contents, (folder, renamed)))

    with pytest.raises(UserError, match="run: another run has begun in it or, if it was removed or renamed"):
        train(recipe, quiet=True, on_step=take)
    assert [*map(contents, (folder, renamed))] == left


class Killed(Exception):
    """Nothing is saved."""


def kill(run):
    raise Killed


@contextlib.contextmanager
def stopping_at_once():
    """Every run finds, when it first looks, that it was asked to stop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("std_fast.training.train.stop_on_signal", lambda: contextlib.nullcontext([signal.SIGTERM]))
        yield


def test_a_run_leaves_what_a_user_needs(recipe):
    summary = train(recipe, quiet=True)
    folder = recipe.run.out
    assert json.loads(open(f"{folder}/summary.json").read())["result"] == summary["result"]
    records = read_jsonl(recipes.Path(folder) / "metrics.jsonl")
    last = [r for r in records if r["kind"] == "train"][-1]
    assert last["lr"] == pytest.approx(recipe.optim.min_lr)
    assert {"loss", "loss_class", "loss_distill", "teacher_weight_0", "images_per_second"} <= last.keys()
    assert "information" in last
    evals = [r for r in records if r["kind"] == "eval"]
    assert [r["step"] for r in evals] == [3, 6, 9]
    assert evals[-1]["images"] == 24 and {"top1_class", "top1_distill", "top1_mean"} <= evals[-1].keys()
    assert recipes.loads(open(f"{folder}/recipe.yaml").read()) == recipe
    assert any(name.startswith("events.out") for name in os.listdir(f"{folder}/tensorboard"))
    parts = summary["seconds"]
    assert summary["gpu_hours"] * 3600 == pytest.approx(sum(parts.values()), rel=0.01)
    again = evaluate_run(recipes.Path(folder))
    assert {k: again[k] for k in ("top1", "loss")} == {k: summary["result"][k] for k in ("top1", "loss")}
    other = f"--run.out {folder}-2"
    with pytest.raises(
        UserError, match=f"a complete run; start a new one with {other}, from .* --student.weights {folder}$"
    ):
        train(recipe, quiet=True)
    os.remove(f"{folder}/summary.json")
    with pytest.raises(UserError, match=f"already holds a run; add --resume .*with {other}$"):
        train(recipe, quiet=True)
    budget = replace(recipe, run=replace(recipe.run, length="1 gpu-hours"))
    with pytest.raises(UserError, match=f"another run.length, so start this one with {other}$"):
        train(budget, quiet=True)
    with pytest.raises(UserError, match=r"another recipe \(optim.lr differs\)"):
        train(replace(recipe, optim=replace(recipe.optim, lr=1.0)), resume=True, quiet=True)
    with pytest.raises(UserError, match=r"another recipe \(optim.lr, run.length differ\)"):
        train(replace(budget, optim=replace(recipe.optim, lr=1.0)), resume=True, quiet=True)


@pytest.mark.parametrize("where", ["build", "Run._start"])
def test_a_run_that_is_refused_was_not_held(recipe, tmp_path, monkeypatch, where):
    def refuse(*_):
        raise UserError("before the first step")

    monkeypatch.setattr(f"std_fast.training.run.{where}", refuse)
    held = tmp_path / "run" / "held.json"
    held.parent.mkdir()
    for before in (None, b'{"gpu_seconds": 60.0}'):  # as a run that was killed leaves
        held.write_bytes(before) if before else None
        with pytest.raises(UserError, match="before the first step"):
            train(recipe, resume=bool(before), quiet=True)
        assert (held.read_bytes() if held.exists() else None) == before


def test_what_is_done_before_the_first_line_is_said(recipe, capsys):
    train(replace(recipe, run=replace(recipe.run, length="1 steps")))
    assert "24 images of 3 classes, 3 steps an epoch; step 1\n" in capsys.readouterr().err


def test_the_folder_that_is_advised_where_one_is_in_use(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    assert unused_beside(Path(".")) == tmp_path / "run-2"
    assert unused_beside(Path("..")) == tmp_path.parent / f"{tmp_path.name}-2"
    assert unused_beside(tmp_path / "run") == tmp_path / "run-2"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_exits_with_its_own_code(recipe, tmp_path, capsys, monkeypatch, signum):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipes.dump(recipe))
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_DFL)  # whoever runs the tests may ignore some
    original = cli_train_with(lambda run: os.kill(os.getpid(), signum) if run.step == 2 else None)
    try:
        assert cli.main(["train", str(path), "--quiet"]) == STOPPED
    finally:
        original()
    assert "step 2, saved" in capsys.readouterr().err
    assert cli.main(["train", str(path), "--quiet", "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 9


@pytest.mark.parametrize(("length", "reported"), [("9 steps", True), ("0.001 gpu-hours", False)])
def test_rate_and_evaluations_are_reported_without_waiting_for_the_log(
    recipe, tmp_path, capsys, monkeypatch, length, reported
):
    monkeypatch.setattr(run_log, "RATE_SECONDS", 0.0)
    monkeypatch.setattr(evaluator, "LINE_SECONDS", -1.0)
    monkeypatch.setattr(metrics, "SILENT_SECONDS", -1.0)
    recipe = at(recipe, tmp_path / "run")
    train(replace(recipe, run=replace(recipe.run, length=length, log_every=100)))
    lines = capsys.readouterr().err.splitlines()
    rates = [line for line in lines if line.endswith(" of training to the end; std-fast plan says what a budget buys")]
    assert bool(rates) is reported and all(
        re.match(r"step 2/9: [\d.]+ images/s, about \d+ s of", line) for line in rates
    )
    assert any(re.fullmatch("step 1/9" if reported else r"hour [\d.]+/0.001  step 1", line) for line in lines)
    evaluated = [at for at, line in enumerate(lines) if re.match(r"step \d+: top-1", line)]
    shown = ["evaluating 24 images", *(f"evaluated {done} of 24 images" for done in (0, 8, 16))]
    assert evaluated and all(lines[at - 4 : at] == shown for at in evaluated)


def test_a_log_that_cannot_be_written_ends_no_training(recipe, tmp_path, monkeypatch):
    """The disk is full from step 2 to step 7; standard error leads to a reader that has left."""
    undisturbed = train(at(recipe, tmp_path / "undisturbed"), quiet=True)
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    reader, writer = os.pipe()
    os.close(reader)

    def fill(run):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10 if 2 <= run.step < 7 else kept[0], kept[1]))

    with open(writer, "w", buffering=1) as gone:
        monkeypatch.setattr(sys, "stderr", gone)
        try:
            summary = train(at(recipe, tmp_path / "run", log_every=1), on_step=fill)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, kept)
            os.dup2(os.open(os.devnull, os.O_WRONLY), writer)
    lost = summary["lost_writes"]
    assert lost["standard error"] >= 5
    assert lost["metrics.jsonl"] == lost["tensorboard"] == 7  # two evaluations among them
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["lost_writes"] == lost
    assert summary["result"] == undisturbed["result"] and undisturbed["lost_writes"] == {}
    logged = [r["step"] for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
    assert logged == [1, 2, 8, 9]


def cli_train_with(on_step):
    """The CLI gives no hook: put one in, and return what takes it out again."""
    from std_fast.training import train as module

    kept = module.train
    module.train = lambda *args, **kw: kept(*args, **kw, on_step=on_step)

    def restore():
        module.train = kept

    return restore


def test_two_runs_into_one_folder(recipe):
    def second(run):
        with pytest.raises(UserError, match="another process is training"):
            train(recipe, quiet=True)
        run.stop_wanted = True

    with pytest.raises(Stopped):
        train(recipe, quiet=True, on_step=second)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--data.train", "/nowhere"], "/nowhere"),
        (["--run.batch", "64"], "batch"),
        (["--student.name", "resnet18", "--student.options", "{}"], "student.name: resnet18 is timm's own"),
        (["--student.options.dimm", "3"], "dimm"),
        (["--distill.teachers.0.weights", "/nowhere.pth"], "/nowhere.pth"),
        (["--data.backend", "resident2"], "data.backend"),
        (["--run.length"], "needs a value"),
        (["loose"], "unrecognized arguments: loose"),
    ],
)
def test_mistakes_end_with_one_line(recipe, tmp_path, capsys, arguments, complaint):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipes.dump(recipe))
    assert cli.main(["train", str(path), "--quiet", *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in lines if line.startswith("std-fast: ")]) == 1
    assert complaint in lines[-1]


def test_a_teacher_of_other_classes_is_refused(recipe, image_folder, tmp_path):
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for name in ("ant", "bee"):
        (fewer / f"small {name}").symlink_to(image_folder / name)
    with pytest.raises(UserError, match="the teacher lacks the class 'small ant' of the data"):
        train(replace(recipe, data=replace(recipe.data, train=str(fewer), val="")), quiet=True)
