"""Teachers of other classes than the data's: which logits are kept, and what is refused."""

import json
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import ImageNetInfo

from pipelines.augment.device import Augment
from pipelines.errors import UserError
from std_fast import cli
from std_fast.config import recipe as recipes
from std_fast.config.recipe import TeacherSpec
from std_fast.teachers.classes import DataClasses, select_classes
from std_fast.teachers.classifiers import build_classifier
from std_fast.teachers.fingerprint import fingerprint
from std_fast.teachers.teacher import Teacher, Teachers, build_teacher
from std_fast.training.build import build_student, open_train_loader, open_val_loader
from tests.small_runs import store_run

HALF = (0.5, 0.5, 0.5)  # the normalisation of timm's test models
SHAPE = dict(patch_size=8, dim=16, depth=3, token_dim=8, channel_dim=16)
IDS = ImageNetInfo("imagenet-1k").label_names()
SUBSET = [IDS[i] for i in (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)]  # Imagenette's


def build(names: list[str] | None, count: int | None = None, **spec) -> Teacher:
    number = count or len(names or ())
    return build_teacher(TeacherSpec(**spec), number, 32, HALF, HALF, "distill.teachers.0", class_names=names)


def complaint(names: list[str] | None, **spec) -> str:
    with pytest.raises(UserError) as caught:
        build(names, **spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def of_a_thousand(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, str]:
    """A timm model of 1,000 classes with random weights, and their file."""
    torch.manual_seed(1)
    model = timm.create_model("test_resnet", num_classes=1000).eval().requires_grad_(False)
    path = tmp_path_factory.mktemp("weights") / "test_resnet.safetensors"
    save_file(model.state_dict(), path)
    return model, str(path)


@pytest.mark.parametrize("asked", ["", "imagenet-1k"])
def test_a_teacher_of_imagenet_teaches_a_subset_with_exactly_its_logits(of_a_thousand, asked):
    _, weights = of_a_thousand
    images = torch.randn(4, 3, 32, 32)
    every = build(None, count=1000, name="test_resnet", weights=weights)(images)
    teacher = build(SUBSET, name="test_resnet", weights=weights, classes=asked)
    places = [IDS.index(name) for name in SUBSET]
    assert torch.equal(teacher(images), every[:, places])
    targets = Teachers([teacher], temperature=2.0)(images)
    assert torch.equal(targets.labels[:, 0], every[:, places].argmax(1))
    assert torch.equal(targets.log_probs[:, 0], (every[:, places] / 2).log_softmax(1))


def test_all_of_imagenet_in_another_order_is_permuted(of_a_thousand):
    _, weights = of_a_thousand
    images = torch.randn(2, 3, 32, 32)
    ordered = build(IDS, name="test_resnet", weights=weights)
    assert ordered.classes is None
    reverse = build(IDS[::-1], name="test_resnet", weights=weights)
    assert torch.equal(reverse(images), ordered(images).flip(1))


def test_names_in_a_file_and_words_for_wordnet_ids(of_a_thousand, tmp_path):
    """The file's names are the teacher's; ImageNet's words match its ids, except words of two classes."""
    _, weights = of_a_thousand
    names = tmp_path / "names.txt"
    names.write_text("".join(f"class {i}\n" for i in range(998)) + "tench\nn02102040_English_springer\n")
    teacher = build(
        ["English springer", "class 7", "n01440764"], name="test_resnet", weights=weights, classes=f"{names}"
    )
    assert teacher.classes.tolist() == [999, 7, 998]
    data = DataClasses.named(2, ["crane", "church"])
    with pytest.raises(UserError, match=r"lacks the class 'crane' of the data \(1 of 2 such\)"):
        select_classes("imagenet-1k", 1000, None, data, "t")
    both = DataClasses.named(2, ["tench", "n01440764"])
    with pytest.raises(UserError, match="'tench' and another class of the data mean one class"):
        select_classes("imagenet-1k", 1000, None, both, "t")


@pytest.mark.parametrize(
    ("names", "spec", "expected"),
    [
        (["n01440764", "n99999999"], {}, "a teacher of 1000 classes, but the data has 2"),  # not all are ImageNet's
        (["n01440764", "n99999999"], {"classes": "imagenet-1k"}, "the class 'n99999999' of the data (1 of 2 such)"),
        (["tench", "church"], {}, "a teacher of 1000 classes, but the data has 2"),  # words alone choose nothing
        (["0", "1"], {"classes": "imagenet-1k"}, "a teacher of 1000 classes, but the data has 2"),  # no names
        (["n01440764"], {"classes": "imagenet-12k"}, "imagenet-12k names 11821 classes, but the teacher has 1000"),
        (["n01440764"], {"classes": "imagenet"}, "'imagenet' is neither a file of class names nor one of imagenet-12k"),
    ],
)
def test_refusals(of_a_thousand, names, spec, expected):
    assert expected in complaint(names, name="test_resnet", weights=of_a_thousand[1], **spec)


def teachers_with_names(folder, names: list[str]) -> dict[str, dict]:
    """A run and a folder of timm's with the same weights and class names: recipe entries by their kind."""
    torch.manual_seed(0)
    model = build_classifier("mixer", len(names), 32, **SHAPE).eval()
    recipe = recipes.Recipe()
    student = replace(recipe.student, name="mixer", options=SHAPE)
    augment = replace(recipe.augment, mean=HALF, std=HALF)
    recipe = replace(recipe, student=student, augment=augment, data=replace(recipe.data, image_size=32))
    tensors = {f"model.backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    store_run(folder / "run", recipe, tensors, len(names), names)
    hub = timm.create_model("test_resnet", num_classes=len(names))
    timm.models.save_for_hf(hub, folder / "hub", model_config={"label_names": names}, safe_serialization=True)
    assert json.loads((folder / "hub" / "config.json").read_text())["label_names"] == names
    return {"run": {"weights": str(folder / "run")}, "hub": {"weights": str(folder / "hub")}}


@pytest.mark.parametrize("kind", ["run", "hub"])
def test_a_run_or_folder_with_class_names_is_matched_by_them(kind, tmp_path):
    spec = teachers_with_names(tmp_path, ["ant", "bee", "cat", "dog"])[kind]
    images = torch.randn(2, 3, 32, 32)
    same = build(["ant", "bee", "cat", "dog"], **spec)
    assert same.classes is None
    assert torch.equal(build(["dog", "bee"], **spec)(images), same(images)[:, [3, 1]])
    assert "lacks the class 'emu' of the data (1 of 4 such), it has 'ant', 'bee', 'cat'" in complaint(
        ["ant", "bee", "cat", "emu"], **spec
    )
    assert build(None, count=4, **spec).classes is None  # data without names: as many classes are enough


def test_numbers_are_matched_by_their_value_and_refused_where_they_may_mean_two_classes(of_a_thousand, tmp_path):
    by_text = sorted(map(str, range(11)))
    spec = teachers_with_names(tmp_path, by_text)["run"]
    assert build([str(i) for i in range(11)], **spec).classes.tolist() == [by_text.index(str(i)) for i in range(11)]
    assert build(by_text, **spec).classes is None
    nameless = {"name": "test_resnet", "weights": str(tmp_path / "w.safetensors")}
    save_file(timm.create_model("test_resnet", num_classes=11).state_dict(), tmp_path / "w.safetensors")
    assert "10 may be number 10 of the teacher, or number 2" in complaint(by_text, **nameless)
    (tmp_path / "names.txt").write_text("\n".join(by_text))
    assert build(by_text, **nameless, classes=str(tmp_path / "names.txt")).classes is None
    assert build([str(i) for i in range(11)], **nameless).classes is None


@pytest.fixture
def recipe(image_folder):
    recipe = recipes.Recipe()
    teacher = TeacherSpec("test_resnet", weights="none.safetensors")
    return replace(
        recipe,
        data=replace(recipe.data, train=str(image_folder), image_size=32, threads=1, backend="torch"),
        student=replace(recipe.student, name="mixer", options=SHAPE),
        distill=recipes.Distill(teachers=(teacher,)),
        run=replace(recipe.run, batch=8, device="cpu"),
    )


def test_stored_targets_depend_on_the_names_and_not_on_the_first_weights(recipe, tmp_path):
    """Of a file its names count; without any, a store of an earlier version, which lacks the field, is the same."""
    device = torch.device("cpu")
    with open_train_loader(recipe, device) as loader:

        def values(**spec):
            teacher = replace(recipe.distill.teachers[0], **spec)
            return fingerprint(replace(recipe, distill=recipes.Distill(teachers=(teacher,))), loader, "float32")

        one, other = tmp_path / "one.txt", tmp_path / "other.txt"
        one.write_text("a\nb\n")
        other.write_text("a\nb\n")
        assert values(classes=str(one)) == values(classes=str(other)) != values(classes="imagenet-1k") != values()
        other.write_text("b\na\n")
        assert values(classes=str(one)) != values(classes=str(other))
        seeded = replace(recipe, run=replace(recipe.run, init_seed=7))
        assert fingerprint(seeded, loader, "float32") == fingerprint(recipe, loader, "float32")

    def weight(**run):
        student = build_student(replace(recipe, run=replace(recipe.run, **run)), 3)
        return next(p for p in student.parameters() if p.ndim > 1)

    assert not torch.equal(weight(), weight(init_seed=7))
    assert torch.equal(weight(seed=7), weight(init_seed=7))


def test_eval_of_a_teacher_is_its_accuracy_on_the_datas_classes(of_a_thousand, image_folder, tmp_path, capsys):
    """The classes are renamed to ImageNet's; the expected count comes from the logits themselves."""
    for name, wordnet in zip(("ant", "bee", "cat"), SUBSET, strict=False):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / wordnet).symlink_to(image_folder / name)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"data: {{val: {tmp_path / 'data'}, image_size: 32, backend: torch, threads: 1}}\n"
        f"distill: {{mode: std, teachers: [{{name: test_resnet, weights: {of_a_thousand[1]}}}]}}\n"
        "run: {batch: 8, device: cpu}\n"
    )
    assert cli.main(["eval", str(path), "--teacher", "0", "--json", "--data.threads", "2"]) == 0
    result = json.loads(capsys.readouterr().out)
    recipe = recipes.load(str(path))
    loader = open_val_loader(recipe, torch.device("cpu"))
    teacher = build_teacher(
        recipe.distill.teachers[0], 3, 32, recipe.augment.mean, recipe.augment.std, "t", class_names=SUBSET[:3]
    )
    with loader:
        right = sum(
            int((teacher(Augment(recipe.augment, 0).normalise_only(b.images)).argmax(1) == b.labels).sum())
            for b in loader.epoch(0)
        )
    assert result["images"] == 24 and result["top1"] == pytest.approx(100 * right / 24)
    assert cli.main(["eval", str(path), "--teacher", "1"]) == 2
    assert "--teacher: the recipe has 1 teachers, numbered from 0; there is no 1" in capsys.readouterr().err
