"""STD from somebody else's code."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import std_fast
from pipelines.errors import UserError
from std_fast import TeacherSpec, create_student, create_teachers, distillation_loss

K, SIZE = 4, 16
TINY = dict(image_size=SIZE, patch_size=4, dim=16, depth=3)


def images(B=4):
    return torch.randn(B, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


class Classifier(nn.Module):
    """Somebody's own: it knows nothing of timm."""

    def __init__(self, classes=K):
        super().__init__()
        self.fc = nn.Linear(3, classes)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


def test_all_public_names_are_there_and_no_others():
    for name in std_fast.__all__:
        assert getattr(std_fast, name).__module__.split(".")[0] in ("std_fast", "pipelines")
        assert name in dir(std_fast)
    promised = {"create_student", "create_teachers", "distillation_loss", "mutual_information", "STDModule"}
    assert promised <= set(std_fast.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        std_fast.no_such_name  # noqa: B018
    from std_fast.runtime import checkpoint

    assert checkpoint.KEY


@pytest.mark.parametrize("tokens", ["both", "spatial", "channel", "none", "deit"])
def test_a_student_in_a_loop_of_ones_own(tokens):
    torch.manual_seed(0)
    student = create_student("mixer", K, tokens=tokens, mine_weight=0.1, **TINY).train()
    teachers = create_teachers([Classifier(), Classifier()], K, image_size=SIZE)
    x, labels = images(), torch.arange(4) % K
    out = student(x)
    assert out.dist_logits.shape == (4, 2, K)
    assert len(out.information) == (2 if tokens == "both" else 0)
    loss = 0.5 * F.cross_entropy(out.class_logits, labels)
    loss = loss + 0.5 * distillation_loss(out.dist_logits, teachers(x), student.head_teacher)
    (loss - sum(out.information)).backward()
    assert not [n for n, p in student.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert all(p.grad is None and not p.requires_grad for p in teachers.parameters())
    assert student.eval()(x).shape == (4, K)
    assert student(x[:0]).shape == (0, K)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_student_of_another_dtype_has_mine_too(dtype):
    student = create_student("mixer", 10, 16, mine_weight=0.1, patch_size=8, dim=16, depth=3).to(dtype)
    output = student(torch.randn(4, 3, 16, 16, dtype=dtype))
    assert [v.dtype for v in output.information] == [torch.promote_types(dtype, torch.float32)] * 2
    sum(output.information).backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in student.mine.parameters())


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"num_classes": 0}, "num_classes: 0 must be a whole number, 1 or more"),
        ({"mine_width": 0}, "mine_width: 0 must be a whole number, 1 or more"),
        ({"mine_ema": 1.0}, "mine_ema: 1.0 must be a number, 0 or more, less than 1"),
        ({"token_mlp_ratio": (0.5, 0.0)}, "token_mlp_ratio: .* must be two positive numbers"),
        ({"token_mlp_ratio": 2}, "token_mlp_ratio: 2 must be a list"),
        ({"name": None}, "unknown backbone None"),
        ({"num_classes": "10"}, "num_classes: '10' must be a whole number"),
        ({"image_size": "32"}, "image_size: '32' must be a whole number"),
        ({"drop_path": "0.1"}, "drop_path: '0.1' must be a number"),
        ({"mine_weight": -1}, "mine_weight: -1 must be a number, 0 or more"),
        ({"taps": "12"}, "taps: '12' must be a list"),
        ({"assign": [0, 1]}, "assign.0: 0 must be a list"),
    ],
)
def test_sizes_that_no_student_has(wrong, complaint):
    with pytest.raises(UserError, match=complaint):
        create_student(**{"name": "mixer", "num_classes": 10, "image_size": 16, "patch_size": 8, **wrong})


@pytest.mark.parametrize(
    "wrong", [torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8), torch.zeros(3, SIZE, SIZE), np.zeros((2, 3, 4, 4))]
)
def test_images_of_another_kind_are_named(wrong):
    student, teachers = create_student("mixer", K, **TINY), create_teachers([Classifier()], K, image_size=SIZE)
    for model in (student, student.eval(), teachers):
        with pytest.raises(ValueError, match=r"^images: must be normalised float \[B, .*, H, W\], not "):
            model(wrong)


def test_images_of_another_type_than_the_weights():
    student, wrong = create_student("mixer", K, **TINY), images().bfloat16()
    with pytest.raises(ValueError, match="images: are torch.bfloat16, the weights torch.float32; convert them, or use"):
        student(wrong)
    with torch.autocast("cpu", torch.bfloat16):
        assert student(wrong).class_logits.isfinite().all()


def test_arguments_that_neither_mine_nor_targets_have():
    for wrong in ({"weight": -1}, {"ema": 1.0}, {"width": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
            std_fast.MutualInformation(4, 4, **wrong)
    with pytest.raises(ValueError, match=r"logits_BMK: must be \[B, M, K\], not \[4, 3\]"):
        std_fast.targets_from_logits(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="temperature: 0.0 must be above 0"):
        std_fast.targets_from_logits(torch.zeros(4, 1, 3), temperature=0.0)


def test_placement_and_plain():
    assert create_student("mixer", K, **TINY).taps == (2, 3)
    assert create_student("mixer", K, teachers=1, taps=[1], **TINY).taps == (1,)
    assert create_student("mixer", K, assign=[[0, 1], [1]], **TINY).head_teacher == (0, 1, 1)
    assert create_student("mixer", K, token_mlp_ratio=(0.5, 1.0), **TINY).std[0].fc1_c.out_features == TINY["dim"]
    plain = create_student("mixer", K, teachers=0, **TINY)
    assert plain.head_teacher == () and plain.train()(images()).dist_logits is None
    with pytest.raises(UserError, match="mixer_s16"):
        create_student("mixer_s17", K)
    with pytest.raises(UserError, match=r"unknown backbone \['mixer'\]; did you mean 'mixer'"):
        create_student(["mixer"], K)
    for wrong in ({"tokens": "bth"}, {"predict": "distil"}, {"teachers": -1}):
        with pytest.raises(UserError, match=f"^{next(iter(wrong))}: "):
            create_student("mixer", K, **TINY, **wrong)
    with pytest.raises(UserError, match="no effect"):
        create_student("mixer", K, tokens="deit", taps=[1], **TINY)


def test_teachers_of_every_kind(tmp_path):
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    trained = timm.create_model("test_resnet", num_classes=K).eval()
    save_file(trained.state_dict(), tmp_path / "r.safetensors")
    spec = TeacherSpec("test_resnet", str(tmp_path / "r.safetensors"), mean=(0.0,) * 3, std=(1.0,) * 3)
    own, x = Classifier(), images()
    teachers = create_teachers([own, spec], K, image_size=SIZE, mean=(0.0,) * 3, std=(1.0,) * 3, temperature=2.0)
    targets = teachers(x)
    with torch.no_grad():
        expected = torch.stack([own(x), trained(x)], 1)
    assert torch.equal(targets.labels, expected.argmax(-1))
    torch.testing.assert_close(targets.log_probs, (expected / 2).log_softmax(-1))
    assert torch.equal(create_teachers([own], K)(x).labels[:, 0], own(x).argmax(-1))
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\ndog\n")
    named = replace(spec, classes=str(tmp_path / "names.txt"))
    normal = dict(image_size=SIZE, mean=(0.0,) * 3, std=(1.0,) * 3)
    some = create_teachers([named], 2, class_names=["dog", "bee"], **normal)
    assert torch.equal(some(x).labels[:, 0], trained(x)[:, [3, 1]].argmax(-1))


def test_teachers_that_cannot_be_had_are_named(tmp_path):
    with pytest.raises(UserError, match="empty"):
        create_teachers([], K)
    with pytest.raises(UserError, match="teachers.1: None must be a name, a folder, a TeacherSpec or a module"):
        create_teachers([Classifier(), None], K)
    with pytest.raises(UserError, match="image_size: '32' must be a whole number"):
        create_teachers([Classifier()], K, image_size="32")
    with pytest.raises(UserError, match=r"teachers.1: a teacher of 7 classes, but the data has 4"):
        many = Classifier(7)
        many.num_classes = 7
        create_teachers([Classifier(), many], K)
    with pytest.raises(UserError, match=r"teachers: one gives logits of shape \[2, 7\], not \[B, 4\]"):
        create_teachers([Classifier(7)], K)(torch.zeros(2, 3, SIZE, SIZE))
    with pytest.raises(UserError, match=r"teachers: give a list"):
        create_teachers("resnet50", K)
    with pytest.raises(UserError, match="temperature: 0 must be a number above 0"):
        create_teachers([Classifier()], K, temperature=0)
    with pytest.raises(UserError, match="holds no run"):
        create_teachers([str(tmp_path)], K)
    with pytest.raises(UserError, match=r"teachers.0.weights"):
        create_teachers([TeacherSpec("test_resnet")], K)


def load_example():
    path = Path(std_fast.__file__).parents[1] / "examples" / "own_loop.py"
    spec = importlib.util.spec_from_file_location("own_loop", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_trains_a_student_on_a_backbone_of_ones_own(capsys):
    teacher, student = load_example().main(steps=120)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{name}: step {step} of 120" for name in ("teacher", "student") for step in (0, 50, 100)]
    assert teacher > 0.8 and student > 0.6  # one in ten by chance


def test_in_the_example_the_teacher_alone_can_teach():
    example = load_example()
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    x = torch.randn(64, 1, 8, 8)
    wrong = torch.zeros(64, dtype=torch.int64)
    _, (backbone, _, std, _) = example.distil(example.Backbone(), [teacher], [(x, wrong)] * 60, 16, 32, 10, alpha=1.0)
    with torch.no_grad():
        agree = (std(backbone(x)).logits[:, 0].argmax(1) == teacher(x).argmax(1)).float().mean()
    assert agree > 0.8
