"""Training from stored targets is training with the teachers, to the bit and without them."""

import json
import os
import re
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipelines.errors import UserError
from std_fast import cli
from std_fast.commands.teach import teach
from std_fast.config import recipe as recipes
from std_fast.teachers.epoch_writer import EpochWriter
from std_fast.teachers.target_format import bytes_per_epoch
from std_fast.training import build
from std_fast.training.run import Stopped
from std_fast.training.step import Trainer
from std_fast.training.train import train
from tests.small_runs import RESNET, assert_same_bits, final_tensors, small_recipe, train_until

RUN = {"length": "2 epochs", "eval_every": "9 epochs", "log_every": 4, "save_every": "10 minutes"}
SOFT = {"labels": "soft", "temperature": 2.0, "top_k": 2}


def changed(recipe, **sections):
    return replace(recipe, **{name: replace(getattr(recipe, name), **values) for name, values in sections.items()})


@pytest.fixture(scope="module")
def teachers(image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    for seed in (0, 1):
        run = {"seed": seed, "length": "1 step"}
        train(small_recipe(image_folder, folder / str(seed), data={"val": ""}, student=RESNET, run=run), quiet=True)
    return folder


def recipe_by(teachers, image_folder, out):
    distill = {"mode": "std", "teachers": [{"weights": str(teachers / name)} for name in "01"]}
    return small_recipe(image_folder, out, data={"val": ""}, distill=distill, run=RUN)


@pytest.fixture
def recipe(teachers, image_folder, tmp_path):
    return recipe_by(teachers, image_folder, tmp_path / "live")


def into(recipe, folder, **distill):
    return changed(recipe, run={"out": str(folder)}, distill=distill)


@pytest.mark.parametrize("labels", [{}, SOFT], ids=["hard", "soft"])
def test_stored_targets_give_the_weights_of_running_teachers(recipe, teachers, tmp_path, labels):
    recipe = changed(recipe, distill=labels)
    train(recipe, quiet=True)
    expected = final_tensors(tmp_path / "live")

    store = str(tmp_path / "written")
    train(into(recipe, tmp_path / "first", target_cache=store), quiet=True)  # write-through
    assert_same_bits(final_tensors(tmp_path / "first"), expected)
    targets = teach(into(recipe, "", target_cache=str(tmp_path / "targets")), quiet=True)
    assert targets["epochs"] == 2 and targets["images"] == 48
    assert targets["bytes"] == 2 * bytes_per_epoch(24, 2, 2 if labels else 0)

    def no_teachers(run):
        assert run.parts.teachers is None

    away = teachers.rename(teachers.with_name("away"))
    try:
        for name in ("written", "targets"):
            stored = into(recipe, tmp_path / f"from_{name}", target_cache=str(tmp_path / name))
            train(stored, quiet=True, on_step=no_teachers)
            assert_same_bits(final_tensors(tmp_path / f"from_{name}"), expected)
    finally:
        away.rename(teachers)
    # other runs use them too: another student and optimizer, another batch, hard labels from a store of soft ones
    other = into(
        recipe, tmp_path / "other", target_cache=str(tmp_path / "targets"), labels="hard", temperature=1.0, top_k=0
    )
    other = changed(other, optim={"lr": 2e-3}, student={"drop_path": 0.0}, run={"batch": 12})
    train(other, quiet=True, on_step=no_teachers)


def test_an_interrupted_run_leaves_complete_epochs(recipe, tmp_path):
    """Write-through, stopped within an epoch and resumed, ends with the same files as `teach`."""
    first = into(recipe, tmp_path / "first", target_cache=str(tmp_path / "written"))
    train_until(first, 2)
    assert not list((tmp_path / "written").glob("*.targets"))
    train(first, resume=True, quiet=True)
    teach(into(recipe, "", target_cache=str(tmp_path / "targets")), quiet=True)
    for epoch in (0, 1):
        name = f"epoch-{epoch:05d}.targets"
        assert (tmp_path / "written" / name).read_bytes() == (tmp_path / "targets" / name).read_bytes()


def test_teach_continues_and_rewrites_what_is_damaged(recipe, tmp_path, monkeypatch):
    recipe = into(recipe, tmp_path / "run", target_cache=str(tmp_path / "store"))
    kept, calls = EpochWriter.add, []

    def dies(self, step, words):
        calls.append((self.epoch, step))
        if len(calls) == 6:
            raise KeyboardInterrupt
        kept(self, step, words)

    monkeypatch.setattr(EpochWriter, "add", dies)
    with pytest.raises(KeyboardInterrupt):
        teach(recipe, quiet=True)
    result = teach(recipe, quiet=True)
    assert calls == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (1, 2)] and result["images"] == 8
    assert teach(recipe, quiet=True)["images"] == 0

    path = tmp_path / "store" / "epoch-00001.targets"
    complete = path.read_bytes()
    path.write_bytes(complete[:-1] + b"x")
    with pytest.raises(UserError, match="epoch-00001.targets: its digest does not match"):
        train(recipe, quiet=True)
    assert teach(recipe, quiet=True)["images"] == 24
    assert path.read_bytes() == complete


def test_teach_stops_on_a_signal_and_continues(recipe, tmp_path, monkeypatch):
    recipe = into(recipe, tmp_path / "run", target_cache=str(tmp_path / "store"))
    kept, calls = EpochWriter.add, []

    def signalled(self, step, words):
        calls.append((self.epoch, step))
        kept(self, step, words)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGHUP)

    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_DFL)  # whoever runs the tests may ignore some
    monkeypatch.setattr(EpochWriter, "add", signalled)
    with pytest.raises(Stopped, match=r"stopped in epoch 2; the same command continues .*store"):
        teach(recipe, quiet=True)
    assert teach(recipe, quiet=True)["images"] == 8
    assert calls == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def fifteen(image_folder, to):
    """A data set of 15 of the images."""
    for folder in image_folder.iterdir():
        (to / folder.name).mkdir(parents=True)
        for file in sorted(folder.iterdir())[:5]:
            (to / folder.name / file.name).symlink_to(file)
    return to


def test_all_positions_are_stored_whatever_the_batch(recipe, image_folder, tmp_path):
    """All but a last odd one, which has no neighbour: batches of 4 and of 8 end with places that hold no image."""
    recipe = changed(recipe, data={"train": str(fifteen(image_folder, tmp_path / "data"))}, run={"length": "1 epoch"})
    labels = []
    for batch in (4, 8):
        store = tmp_path / f"store{batch}"
        made = teach(changed(recipe, distill={"target_cache": str(store)}, run={"batch": batch}), quiet=True)
        assert made["images"] == 14 and made["bytes"] == bytes_per_epoch(14, 2)
        labels.append(np.fromfile(store / "epoch-00000.targets", "<u2", 14 * 4)[::2])
    assert (labels[0] == labels[1]).all() and len(set(labels[0])) > 1
    train(changed(recipe, distill={"target_cache": str(store)}, run={"batch": 12}), quiet=True)
    assert not list(store.glob(".*partial"))  # nothing had to be asked


def test_views_are_cycled(recipe, tmp_path, monkeypatch):
    recipe = changed(recipe, distill={"views": 2}, run={"length": "5 epochs"})
    seen = {}

    class Looking(Trainer):
        def step(self, batch, now):
            noted = (batch.images.clone(), batch.epoch, self.stochastic_depth(batch))
            seen.setdefault((now.step - 1) // 3, []).append(noted)
            super().step(batch, now)

    monkeypatch.setattr(build, "Trainer", Looking)
    train(recipe, quiet=True)
    monkeypatch.undo()
    for epoch in range(5):
        for now, before in zip(seen[epoch], seen[epoch % 2], strict=True):
            assert torch.equal(now[0], before[0]) and now[1] == epoch
    assert not torch.equal(seen[0][0][0], seen[1][0][0])
    assert not torch.equal(seen[0][0][2], seen[2][0][2])  # but stochastic depth is drawn anew

    stored = into(recipe, tmp_path / "stored", target_cache=str(tmp_path / "store"))
    assert teach(stored, quiet=True)["epochs"] == 2
    train(stored, quiet=True, on_step=lambda run: pytest.fail("teachers") if run.parts.teachers else None)
    assert_same_bits(final_tensors(tmp_path / "stored"), final_tensors(tmp_path / "live"))
    # written through, the first cycle serves the later ones of the same run
    through = into(recipe, tmp_path / "through", target_cache=str(tmp_path / "written"))
    train(through, quiet=True)
    assert len(list((tmp_path / "written").glob("epoch-*.targets"))) == 2
    assert_same_bits(final_tensors(tmp_path / "through"), final_tensors(tmp_path / "live"))
    # more views than are stored: only the new ones are asked for; fewer: none
    more = changed(stored, distill={"views": 3})
    assert teach(more, quiet=True)["images"] == 24
    for views in (1, 3):
        again = into(
            changed(stored, distill={"views": views}), tmp_path / f"views-{views}", target_cache=str(tmp_path / "store")
        )
        train(again, quiet=True, on_step=lambda run: pytest.fail("teachers") if run.parts.teachers else None)
    # a budget by the clock needs them
    with pytest.raises(UserError, match="run.length: gpu-hours"):
        teach(changed(stored, run={"length": "1 gpu-hours"}, distill={"views": 0}), quiet=True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"run": {"seed": 5}}, "run.seed"),
        ({"data": {"image_size": 20}}, "data.image_size"),
        ({"data": {"backend": "resident"}}, "data.backend"),
        ({"data": {"aug_repeats": 3}}, "data.aug_repeats"),
        ({"augment": {"mixup": 0.5}}, "augment.mixup"),
        ({"augment": {"policy": "three_augment"}}, "augment.policy"),
        ({"data": {"crop": recipes.CropSpec("center", fraction=0.9)}}, "data.crop.fraction"),
        ({"distill": SOFT}, "distill.labels"),
        ({"run": {"precision": "bfloat16"}}, "run.precision"),
    ],
)
def test_a_mismatch_is_refused_with_the_field(recipe, store_of, change, named):
    other = changed(changed(recipe, distill={"target_cache": store_of}), **change)
    with pytest.raises(UserError, match=f"^{named}: the targets in .* set it back"):
        train(other, quiet=True)


@pytest.fixture(scope="module")
def store_of(teachers, image_folder, tmp_path_factory):
    """Targets of one epoch of `recipe`."""
    folder = tmp_path_factory.mktemp("store") / "targets"
    recipe = recipe_by(teachers, image_folder, folder)
    teach(changed(recipe, distill={"target_cache": str(folder)}, run={"length": "1 epoch"}), quiet=True)
    return str(folder)


def test_other_teachers_and_other_data_are_refused(recipe, teachers, store_of, image_folder, tmp_path):
    recipe = changed(recipe, distill={"target_cache": store_of}, run={"length": "1 epoch"})
    swapped = changed(recipe, distill={"teachers": recipe.distill.teachers[::-1]})
    with pytest.raises(UserError, match=r"distill.teachers.0.weights: .* of other weights"):
        train(swapped, quiet=True)
    one = changed(recipe, distill={"teachers": recipe.distill.teachers[:1]})
    with pytest.raises(UserError, match=r"distill.teachers: .* of 2, this run has 1"):
        train(one, quiet=True)
    smaller = changed(recipe, distill={"teachers": tuple(replace(t, image_size=12) for t in recipe.distill.teachers)})
    with pytest.raises(UserError, match=r"distill.teachers.0.image_size: .* of None, this run has 12"):
        train(smaller, quiet=True)
    fewer = fifteen(image_folder, tmp_path / "fewer")
    with pytest.raises(UserError, match=r"data.train: .* of other data"):
        train(changed(recipe, data={"train": str(fewer)}), quiet=True)
    # epochs that are not stored need the teachers, and the message says so
    away = teachers.rename(teachers.with_name("away"))
    try:
        with pytest.raises(UserError, match=r"distill.teachers.0.* lacks 2 of 3 epochs"):
            train(changed(recipe, run={"length": "3 epochs"}), quiet=True)
        with pytest.raises(UserError, match=r"distill.teachers.0.weights: .* no targets are stored yet"):
            teach(changed(recipe, distill={"target_cache": str(tmp_path / "new")}), quiet=True)
    finally:
        away.rename(teachers)


def test_teach_on_the_command_line(recipe, tmp_path, capsys, caplog):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipes.dump(recipe))
    store = str(tmp_path / "store")
    assert cli.main(["teach", str(path), "--distill.target-cache", store, "--distill.views", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "the teachers run on 24 images in 1 epoch, also where run.length ends within the last" in caplog.text
    assert re.search(r"epoch 0.6667/1  [\d.]+ images/s, about \d+ s left\nepoch 1/1  .* about 0 s left\n", err)
    data = json.loads(out)
    assert data["epochs"] == data["views"] == 1 and data["images"] == 24 and data["bytes"] == bytes_per_epoch(24, 2)
    assert cli.main(["teach", str(path), "--distill.target-cache", store, "--distill.views", "1", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "--distill.views 1" in out and ": 1 epoch, " in out
    assert cli.main(["teach", str(path), "--quiet"]) == 2
    assert "distill.target_cache: is empty" in capsys.readouterr().err
