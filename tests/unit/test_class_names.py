"""Class names where weights meet data: evaluation, data.val, student.weights. Equal, mapped, or refused by name."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipelines.convert.job import ConvertSettings, convert
from pipelines.errors import UserError
from pipelines.read.source import open_source
from std_fast.commands.export import export_run
from std_fast.runtime import checkpoint
from std_fast.teachers.classes import DataClasses, class_in_words, relabel, select_classes
from std_fast.training.build import build, build_student, open_val_loader
from std_fast.training.evaluate import evaluate_run
from tests.small_runs import small_recipe, store_run

LETTERS = ("a", "b", "c", "d")
COUNTED = tuple(map(str, range(11)))
TEN_AND_ONE = tuple(sorted(map(str, range(11))))  # 0 1 10 2 3 ...: a folder's order


def data(names, labels, number=None):
    return SimpleNamespace(
        class_names=names and list(names), labels=np.array(labels), num_classes=number or len(names), num_samples=3
    )


@pytest.mark.parametrize(
    ("model", "names", "labels", "expected"),
    [
        (LETTERS, LETTERS, [0, 3, 1], [0, 3, 1]),
        (LETTERS, "dcba", [0, 3, 1], [3, 0, 2]),
        (LETTERS, "bd", [0, 1, 1], [1, 3, 3]),
        (LETTERS, ("a", "z", "d"), [0, 2, 2], [0, 3, 3]),  # no image of the class that the model lacks
        (LETTERS, None, [0, 3, 1], [0, 3, 1]),
        (LETTERS, ("0", "1", "3"), [0, 1, 2], [0, 1, 3]),
        (LETTERS, ("00", "02"), [0, 1, 1], [0, 2, 2]),
        (TEN_AND_ONE, ("0", "1", "10"), [0, 1, 2], [0, 1, 2]),
        (TEN_AND_ONE, tuple(map(str, range(11))), [0, 2, 10], [0, 3, 2]),
        (TEN_AND_ONE, ("01", "02", "10"), [0, 1, 2], [1, 3, 2]),
        (11, tuple(f"{n:02}" for n in range(11)), [0, 2, 10], [0, 2, 10]),
        (11, COUNTED, [0, 2, 10], [0, 2, 10]),  # a model without names: its classes are numbers
        (LETTERS, COUNTED, [0, 2, 3], [0, 2, 3]),  # classes without images
        (COUNTED, tuple("klmnopqrstu"), [0, 2, 10], [0, 2, 10]),
        (9, ("1", "8"), [0, 1, 1], [1, 8, 8]),  # also in the order of text
        (("\u00e5", "z"), ("z", "a\u030a"), [0, 1, 1], [1, 0, 0]),  # an accent in macOS's normal form
        (4, LETTERS, [0, 3, 1], [0, 3, 1]),  # as many: taken to be the same
        (4, None, [0, 2, 1], [0, 2, 1]),
        (("n01440764", "n02102040_springer"), ("English springer", "tench"), [0, 1, 1], [1, 0, 0]),
    ],
)
def test_labels_become_the_models(model, names, labels, expected):
    number, known = (model, None) if isinstance(model, int) else (len(model), tuple(model))
    source = data(names, labels, None if names else max(labels) + 1)
    relabel(source, DataClasses(number, known), "val", "the run")
    assert source.labels.tolist() == expected


@pytest.mark.parametrize(
    ("model", "names", "labels", "complaint"),
    [
        (LETTERS, "ax", [0, 1, 0], "val: the run lacks the class 'x' of the data (1 of 2 such), it has 'a', 'b', 'c'"),
        (LETTERS, ("0", "4"), [0, 1, 0], "val: the run lacks the class '4' of the data"),
        (4, "ab", [0, 1, 0], "val: has 2 classes, the run 4, and the run has no class names by which to match them"),
        (2, LETTERS, [0, 1, 3], "val: has 4 classes, the run 2, and the run has no class names"),
        (LETTERS, None, [0, 4, 3], "val: has 5 classes, the run 4, and val has no class names"),
        (2, None, [0, 4, 3], "val: has 5 classes, the run 2, and val has no class names"),
        (("tench", "b"), ("n01440764", "n01440764_tench"), [0, 1, 0], "and another class of the data mean one class"),
        (11, ("1", "10"), [0, 1, 1], "10 may be number 10 of the run, or number 2, as in the order of text; convert"),
        (11, TEN_AND_ONE, [0, 2, 3], "10 may be number 10 of the run, or number 2, as in the order of text; convert"),
        (TEN_AND_ONE, "klmnopqrstu", [0, 2, 10], "val: the classes of the run are numbers: 10 may be number 10 of the"),
    ],
)
def test_a_class_that_the_model_lacks_is_named(model, names, labels, complaint):
    number, known = (model, None) if isinstance(model, int) else (len(model), tuple(model))
    with pytest.raises(UserError) as caught:
        relabel(data(names, labels, None if names else 5), DataClasses(number, known), "val", "the run")
    assert complaint in str(caught.value)


# -- commands ---------------------------------------------------------------------------------------------------------


def pictures(folder, classes):
    """Six images of each class, in a colour of its own."""
    from PIL import Image

    for i, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for k in range(6):
            Image.fromarray(np.full((16, 16, 3), (i * 67 % 256, i * 31 % 256, 9 * k), np.uint8)).save(
                folder / name / f"{k}.png"
            )
    return folder


def make_recipe(train, val, **student):
    return small_recipe(train, "run", data={"val": str(val)}, student=student)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of classes a to d with random weights, its data, and how many images of each class it predicts right."""
    folder = tmp_path_factory.mktemp("names")
    recipe = make_recipe("", pictures(folder / "all", LETTERS))
    torch.manual_seed(2)
    tensors = {f"model.{name}": torch.randn_like(t) for name, t in build_student(recipe, 4).state_dict().items()}
    store_run(folder / "run", recipe, tensors, 4, list(LETTERS))
    return folder


def right(result):
    return round(result["top1"] * result["images"] / 100)


def test_evaluation_of_other_folders_counts_what_the_runs_own_classes_would(run, tmp_path, monkeypatch):
    """Of the same images, by three routes: all four classes with labels of their own, and each class alone."""
    each = []
    for name in LETTERS:
        shutil.copytree(run / "all" / name, tmp_path / f"only-{name}" / name)
        each.append(right(evaluate_run(run / "run", str(tmp_path / f"only-{name}"))))
    assert sum(each) == right(evaluate_run(run / "run")) and len(set(each)) > 1
    shutil.copytree(run / "all", tmp_path / "subset", ignore=shutil.ignore_patterns("a", "c"))
    assert right(evaluate_run(run / "run", str(tmp_path / "subset"))) == each[1] + each[3]
    for name, number in (("b", "1"), ("d", "3")):
        shutil.copytree(run / "all" / name, tmp_path / "numbered" / number)
    assert right(evaluate_run(run / "run", str(tmp_path / "numbered"))) == each[1] + each[3]
    (tmp_path / "classes.txt").write_text("d\nb\n")
    settings = ConvertSettings(classes=str(tmp_path / "classes.txt"))
    convert(str(tmp_path / "subset"), str(tmp_path / "other.beton"), settings=settings)
    assert open_source(tmp_path / "other.beton").class_names == ["d", "b"]
    assert right(evaluate_run(run / "run", str(tmp_path / "other.beton"))) == each[1] + each[3]
    os.rename(tmp_path / "subset" / "b", tmp_path / "subset" / "zebra")
    with pytest.raises(UserError, match="subset: the run lacks the class 'zebra' of the data"):
        evaluate_run(run / "run", str(tmp_path / "subset"))


def test_validation_data_takes_the_labels_of_the_training_data(run, tmp_path):
    shutil.copytree(run / "all", tmp_path / "subset", ignore=shutil.ignore_patterns("a", "c"))
    parts = build(make_recipe(run / "all", tmp_path / "subset"))
    try:
        assert parts.val_loader.num_classes == 4 and parts.val_loader.source.class_names == list(LETTERS)
        assert [label for batch in parts.val_loader.epoch(0) for label in batch.labels.tolist()][:12] == [1] * 6 + [
            3
        ] * 6
    finally:
        parts.close()
    (tmp_path / "subset" / "b").rename(tmp_path / "subset" / "zebra")
    with pytest.raises(UserError, match=r"data.val .*subset\): data.train lacks the class 'zebra' of the data"):
        build(make_recipe(run / "all", tmp_path / "subset"))
    loader = open_val_loader(make_recipe("", run / "all"), torch.device("cpu"))
    assert loader.num_classes == 4  # without a model: the data's own


def test_heads_of_a_run_take_the_order_of_the_data(run):
    """A permutation and a subset: each class keeps its row; images get the same logits."""
    weights = {"weights": str(run / "run")}
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    recipe = make_recipe("", "", **weights)
    with torch.no_grad():
        same = build_student(recipe, 4, LETTERS).eval()(images)
        assert torch.equal(build_student(recipe, 4).eval()(images), same)
        assert torch.allclose(build_student(recipe, 4, "dbca").eval()(images), same[:, [3, 1, 2, 0]], atol=1e-6)
        assert torch.allclose(build_student(recipe, 2, "db").eval()(images), same[:, [3, 1]], atol=1e-6)
    with pytest.raises(UserError, match=r"run\): the model lacks the class 'z' .*set student.new_head true"):
        build_student(recipe, 4, "abcz")
    fresh = build_student(make_recipe("", "", **weights, new_head=True), 4, "abcz")
    assert fresh.num_classes == 4


@pytest.mark.parametrize("file", ["", "model.safetensors"])
def test_heads_of_an_export_take_the_order_of_the_data(run, tmp_path, file):
    """Its folder, or the file in it, starts a student as the run does."""
    export_run(run / "run", tmp_path / "out", ("timm",))
    exported, own = (make_recipe("", "", weights=str(path)) for path in (tmp_path / "out" / file, run / "run"))
    for names in ("dbca", "db"):
        state = build_student(own, len(names), names).state_dict()
        same = build_student(exported, len(names), names).state_dict()
        assert same.keys() == state.keys() and all(torch.equal(same[name], state[name]) for name in state)
    with pytest.raises(UserError, match="lacks the class 'z' .*set student.new_head true"):
        build_student(exported, 4, "abcz")


def test_a_run_without_class_names(run, tmp_path):
    """Version 0.1.0 stored none for betons without a manifest: as many classes are taken as they are."""
    shutil.copytree(run / "run", tmp_path / "old")
    path = next((tmp_path / "old" / "checkpoints").iterdir())
    tensors, meta = checkpoint.load(path)
    checkpoint.save(path, tensors, {k: v for k, v in meta.items() if k != "digest"} | {"class_names": None})
    assert evaluate_run(tmp_path / "old", str(run / "all")) == evaluate_run(run / "run")
    shutil.copytree(run / "all" / "b", tmp_path / "one" / "b")
    with pytest.raises(UserError, match="one: has 1 classes, the run 4, and the run has no class names"):
        evaluate_run(tmp_path / "old", str(tmp_path / "one"))
    Path(tmp_path / "one" / "b").rename(tmp_path / "one" / "1")
    shutil.copytree(run / "all" / "b", tmp_path / "named" / "b")
    numbered = evaluate_run(tmp_path / "old", str(tmp_path / "one"))
    assert numbered == evaluate_run(run / "run", str(tmp_path / "named"))


def test_numbers_are_said_to_be_those_of_the_models_classes(caplog):
    caplog.set_level("INFO", "std_fast")
    relabel(data(("0", "1", "3"), [0, 1, 2]), DataClasses(4, LETTERS), "val", "the run")
    assert "val: the data's classes are numbers, taken as those of the run: 0 'a', 1 'b', 3 'd'" in caplog.text


def test_classes_of_a_teacher_without_names_are_said(caplog):
    caplog.set_level("INFO", "std_fast")
    assert select_classes("", 4, None, DataClasses(4, LETTERS), "teacher") is None
    said = "teacher: the teacher has no class names; its number n means class n of the data: 0 'a', 1 'b', 2 'c', 3 'd'"
    assert said in caplog.text


def test_words_of_a_class():
    assert [class_in_words(name) for name in ("n01440764", "n00000000", "tench")] == ["tench", "n00000000", "tench"]


def test_numbered_folders_are_the_numbers_of_given_classes(run, tmp_path):
    """`--classes` decides what the numbers mean: the way on where a number may mean two classes."""
    for number, name in enumerate(LETTERS):
        shutil.copytree(run / "all" / name, tmp_path / "folders" / f"{number + 7}")
    (tmp_path / "classes.txt").write_text("".join(f"{name}\n" for name in "stuvwxyabcd"))
    convert(
        str(tmp_path / "folders"),
        str(tmp_path / "d.beton"),
        settings=ConvertSettings(classes=f"{tmp_path}/classes.txt"),
    )
    assert right(evaluate_run(run / "run", str(tmp_path / "d.beton"))) == right(evaluate_run(run / "run"))
    (tmp_path / "folders" / "7").rename(tmp_path / "folders" / "11")
    with pytest.raises(UserError, match="has label 11, but only 11 classes are named"):
        convert(
            str(tmp_path / "folders"),
            str(tmp_path / "e.beton"),
            settings=ConvertSettings(classes=f"{tmp_path}/classes.txt"),
        )
