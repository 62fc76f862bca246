"""Every exported file, opened as its user would, targets as the student of the run does."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from pipelines.errors import UserError
from std_fast import cli, create_teachers, export_run
from std_fast.commands import export, export_formats
from std_fast.config.recipe import Recipe, dump
from std_fast.config.schema import from_dict
from std_fast.runtime import checkpoint
from std_fast.training.build import build_student
from tests.unit.test_journal import full_after

ROOT = Path(__file__).resolve().parents[2]
K = 3
NAMES = ["ant", "bee", "cat"]
MIXER = {"name": "mixer", "options": {"patch_size": 8, "dim": 16, "depth": 2}}
CYCLE = {"name": "cyclemlp", "options": {"layers": [1, 2], "embed_dims": [8, 16], "mlp_ratios": [2, 2]}}
TWO = {"mode": "std", "teachers": [{"name": "a"}, {"name": "b"}]}


def make_run(folder, student=MIXER, distill=TWO, size=16, average=False):
    """A run's folder as training leaves it, with weights of some size, and its student."""
    data = {"image_size": size, "eval_crop": {"kind": "center", "fraction": 0.9}}
    recipe = from_dict(Recipe, {"name": "tiny", "student": student, "distill": distill, "data": data})
    model = build_student(recipe, K)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    if average:  # then the raw weights are not what is exported
        tensors |= {f"ema.{name}": t for name, t in model.named_parameters()}
        tensors |= {f"model.{name}": torch.zeros_like(t) for name, t in model.named_parameters()}
    meta = {"step": 7, "recipe": dump(recipe), "num_classes": K, "class_names": NAMES}
    checkpoint.save(folder / "checkpoints" / "step-00000007.safetensors", tensors, meta)
    (folder / "recipe.yaml").write_text(dump(recipe))
    return model.eval()


def images(B, size=16):
    return torch.randn(B, 3, size, size, generator=torch.Generator().manual_seed(B))


def from_timm(name, **kwargs):
    return timm.create_model(name, pretrained=True, **kwargs).eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """All formats that a small distilled Mixer has; the folder, the run's student and the report."""
    folder = tmp_path_factory.mktemp("export")
    student = make_run(folder / "run")
    report = export_run(folder / "run", folder / "out")
    assert sorted(p.name for p in folder.iterdir()) == ["out", "run"]  # no draft is left
    return folder / "out", student, report


def test_the_report_and_the_folder(exported):
    out, student, report = exported
    files = {str(p.relative_to(out)): p.stat().st_size for p in out.rglob("*") if p.is_file()}
    assert report["files"] == files
    assert set(files) == {"README.md", "config.json", "model.safetensors", "model.onnx", "model.pt2"}
    assert set(report["differences"]) == {"timm", "onnx", "pt2"}
    assert all(0 <= report["differences"][name] <= export_formats.TOLERANCE[name] for name in report["differences"])
    assert list(report["left_out"]) == ["class-head"]
    assert (report["architecture"], report["step"], report["predict"]) == ("std_mixer", 7, "mean")
    tensors = load_file(out / "model.safetensors")
    assert student.mine and not any(name.startswith("mine.") for name in tensors)
    assert tensors.keys() == {name for name in student.state_dict() if not name.startswith("mine.")}
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n")
    assert 'import std_fast.registry  # registers the architecture\nimport timm\nmodel = timm.create_model("loc' in card


@torch.no_grad()
@pytest.mark.parametrize("B", [1, 2, 5])
def test_every_file_predicts_the_mean_of_the_students_heads(exported, B):
    import onnxruntime

    out, student, _ = exported
    x = images(B)
    heads = student.outputs(x)
    expected = (heads.class_logits + heads.dist_logits.mean(1)) / 2
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    targets = {
        "timm": from_timm(f"local-dir:{out}")(x),
        "onnx": torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0]),
        "pt2": torch.export.load(out / "model.pt2").module()(x),
    }
    for logits in targets.values():
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_config_says_how_images_are_prepared_and_classes_named(exported):
    out, _, _ = exported
    config = json.loads((out / "config.json").read_text())
    assert config["architecture"] == "std_mixer" and config["num_classes"] == K and config["label_names"] == NAMES
    model = from_timm(f"local-dir:{out}")
    data = timm.data.resolve_model_data_config(model)
    assert tuple(data["input_size"]) == (3, 16, 16) and data["crop_pct"] == 0.9 and data["interpolation"] == "bilinear"
    assert (tuple(data["mean"]), tuple(data["std"])) == (Recipe().augment.mean, Recipe().augment.std)
    assert model.pretrained_cfg["label_names"] == NAMES


@torch.no_grad()
def test_timm_takes_the_folder_from_the_hub_and_for_other_classes(exported, monkeypatch):
    out, student, _ = exported
    # the one step that needs a network: the hub's client hands out files by name
    monkeypatch.setattr(timm.models._hub, "hf_hub_download", lambda repo_id, filename, **_: str(out / filename))
    torch.testing.assert_close(from_timm("hf-hub:somebody/student")(images(2)), student(images(2)))
    other = from_timm(f"local-dir:{out}", num_classes=8)
    assert other(images(2)).shape == (2, 8)
    assert torch.equal(other.std[0].token_s, student.std[0].token_s)


@torch.no_grad()
def test_a_student_with_a_shape_of_timms_gives_its_class_head_to_timm(tmp_path):
    student = make_run(tmp_path / "run", {"name": "resmlp_s12"}, size=32)
    report = export_run(tmp_path / "run", tmp_path / "out", ("class-head",))
    assert set(report["files"]) == {"README.md", "class-head/config.json", "class-head/model.safetensors"}
    plain = from_timm(f"local-dir:{tmp_path / 'out' / 'class-head'}")
    assert type(plain) is timm.models.mlp_mixer.MlpMixer
    x = images(2, 32)
    torch.testing.assert_close(plain(x), student.outputs(x).class_logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "student, distill, size, architecture",
    [
        (CYCLE, {**TWO, "assign": [[0, 1], [0, 1]], "taps": [1, 2]}, 32, "std_cyclemlp"),
        ({"name": "resmlp", "options": MIXER["options"]}, {**TWO, "tokens": "deit"}, 16, "std_resmlp"),
        (MIXER, {**TWO, "tokens": "spatial", "predict": "distill"}, 16, "std_mixer"),
        (MIXER, {**TWO, "token_mlp_ratio": [0.5, 1.0]}, 16, "std_mixer"),
        (MIXER, {"mode": "none"}, 16, "std_mixer"),
        ({"name": "test_resnet"}, {"mode": "none"}, 32, "test_resnet"),
    ],
)
def test_timm_builds_every_kind_again(tmp_path, student, distill, size, architecture):
    original = make_run(tmp_path / "run", student, distill, size)
    assert export_run(tmp_path / "run", tmp_path / "out", ("timm",))["architecture"] == architecture
    x = images(2, size)
    torch.testing.assert_close(from_timm(f"local-dir:{tmp_path / 'out'}")(x), original(x))


@torch.no_grad()
def test_the_moving_average_and_the_chosen_head_are_exported(tmp_path):
    student = make_run(tmp_path / "run", average=True)
    assert export_run(tmp_path / "run", tmp_path / "out", ("timm",), predict="class")["predict"] == "class"
    x = images(2)
    torch.testing.assert_close(from_timm(f"local-dir:{tmp_path / 'out'}")(x), student.outputs(x).class_logits)


@torch.no_grad()
def test_an_exported_student_can_teach(exported):
    out, student, _ = exported
    teachers = create_teachers([str(out)], K, image_size=16)
    assert torch.equal(teachers(images(4)).labels[:, 0], student(images(4)).argmax(-1))


def test_what_cannot_be_had_is_refused_when_asked_for(tmp_path, monkeypatch):
    make_run(tmp_path / "run")
    refusals = [
        (dict(formats=("class-head",)), "class-head cannot be written: timm has no Mixer or ResMLP of this shape"),
        (dict(formats=("tf",)), "'tf' is not one of timm, class-head, onnx, pt2"),
        (dict(predict="best"), "not one of mean, class, distill"),
    ]
    for kwargs, complaint in refusals:
        with pytest.raises(UserError, match=complaint):
            export_run(tmp_path / "run", tmp_path / "out", **kwargs)
    monkeypatch.setattr(export, "ONNX_PACKAGES", ("onnx_that_is_absent",))
    with pytest.raises(UserError, match="pip install onnx_that_is_absent"):
        export_run(tmp_path / "run", tmp_path / "out", ("onnx",))
    monkeypatch.setattr(export, "FORMATS", ("timm", "onnx"))  # by default it is left out, and said so
    report = export_run(tmp_path / "run", tmp_path / "out")
    assert "onnx_that_is_absent not installed" in report["left_out"]["onnx"] and "onnx" not in report["differences"]


def test_a_folder_that_holds_something_is_left_alone(tmp_path, capsys, caplog, monkeypatch):
    make_run(tmp_path / "run")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("")
    for out in ("out", "file", "file/below"):
        with pytest.raises(UserError, match=out):
            export_run(tmp_path / "run", tmp_path / out, ("timm",))
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    with pytest.raises(UserError, match="holds no run"):
        export_run(tmp_path / "nothing", tmp_path / "new")
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "empty"), "--formats", "timm"]) == 0
    assert (tmp_path / "empty" / "model.safetensors").is_file()
    assert caplog.messages == ["writing timm"]
    capsys.readouterr()
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "new"), "--formats", "timm", "--quiet"]) == 0
    assert len(caplog.messages) == 1 and not capsys.readouterr().err


def test_other_outputs_after_writing_are_an_error_and_leave_nothing(tmp_path, monkeypatch):
    make_run(tmp_path / "run")

    def damaged(path, tensors, metadata):
        tensors["std.1.heads.0.bias"] = tensors["std.1.heads.0.bias"] + 1e-5
        save(path, tensors, metadata)

    save = export_formats.write_tensors
    monkeypatch.setattr(export_formats, "write_tensors", damaged)
    with pytest.raises(RuntimeError, match="timm: read back, its logits differ"):
        export_run(tmp_path / "run", tmp_path / "out", ("timm",))

    def full(path, tensors, metadata):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(export_formats, "write_tensors", full)
    with pytest.raises(UserError, match="No space left"):
        export_run(tmp_path / "run", tmp_path / "out", ("timm",))
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def run_apart(folder, code, **environment):
    """A Python of its own, started in `folder`; its exit code and the lines of its standard error."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize("name", ["timm", "onnx", "pt2"])
def test_a_full_disk_ends_every_format_in_one_line(name, tmp_path):
    """A limit on the size of files, as `ulimit -f` sets it."""
    make_run(tmp_path / "run")
    with full_after(9000), pytest.raises(UserError, match="out: cannot be written .* make room"):
        export_run(tmp_path / "run", tmp_path / "out", (name,))
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_without_assertions_programs_are_refused(tmp_path):
    """python -O: torch's tracer raises StopIteration there."""
    make_run(tmp_path / "run")
    code = """
import sys
from std_fast import cli
if cli.main(["export", "run", "out", "--formats", "pt2"]) != 2 or cli.main(["export", "run", "out"]) != 0:
    sys.exit(1)
"""
    exit_code, lines = run_apart(tmp_path, code, PYTHONOPTIMIZE="1")
    assert exit_code == 0, lines
    assert "--formats: pt2 cannot be written: torch cannot trace under python -O" in lines[1]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"README.md", "config.json", "model.safetensors"}


def test_a_diverged_run_is_refused(tmp_path):
    student = make_run(tmp_path / "run")
    tensors, meta = checkpoint.load(tmp_path / "run" / "checkpoints" / "step-00000007.safetensors")
    del meta["digest"]
    tensors["model.backbone.norm.weight"] = torch.full_like(student.backbone.norm.weight, torch.nan)
    checkpoint.save(tmp_path / "run" / "checkpoints" / "step-00000008.safetensors", tensors, {**meta, "step": 8})
    with pytest.raises(UserError, match="diverged"):
        export_run(tmp_path / "run", tmp_path / "out", ("timm",))


def test_logging_levels_are_put_back(exported):
    assert logging.getLogger("onnxscript").level == logging.NOTSET
