"""The README's commands, typed in order in one folder, on files that look like ImageNet's."""

import gzip
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import yaml
from safetensors.torch import save_file

from std_fast import cli
from std_fast.config.files import RECIPES
from tests.archives import devkit_files, tar_bytes
from tests.beton_tools import encoded

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ("n01440764", "n01443537", "n01484850", "n01491361")
ELSEWHERE = ("mamba", "docker", "pip", "sbatch", "make")
"""need conda, a daemon, the network or a cluster: tests/integration/test_examples.py runs the SLURM script"""
SMALL = {
    "data": {"image_size": 32, "backend": "torch", "threads": 1},
    "augment": {"randaugment_n": 1},
    "run": {"batch": 16, "length": "1 epoch", "device": "cpu", "log_every": 1, "keep_checkpoints": 1},
}
MIXER = {"name": "mixer", "options": {"patch_size": 8, "dim": 16, "depth": 3, "token_dim": 8, "channel_dim": 32}}


def jpeg(seed: int) -> bytes:
    return encoded(np.random.default_rng(seed).integers(0, 256, (40, 48, 3), np.uint8), quality=90)


def write_imagenet(folder: Path) -> None:
    """The train tar of tars, the flat validation images and the devkit, of four classes."""
    pytest.importorskip("scipy.io")
    folder.mkdir()
    inner = {}
    for c, wnid in enumerate(CLASSES):
        inner[f"{wnid}.tar"] = tar_bytes({f"{wnid}_{i}.JPEG": jpeg(20 * c + i) for i in range(16)})
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(inner))
    validation = {f"ILSVRC2012_val_{i:08d}.JPEG": jpeg(100 + i) for i in range(1, 17)}
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(validation))
    devkit = devkit_files({wnid: 1 + i for i, wnid in enumerate(CLASSES)}, [1 + i % 4 for i in range(16)])
    (folder / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(gzip.compress(tar_bytes(devkit)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the three files of ImageNet; the two recipes that the README trains stand in it, made small."""
    folder = tmp_path_factory.mktemp("readme")
    write_imagenet(folder / "ilsvrc2012")
    (folder / "photos").mkdir()
    (folder / "photos" / "fish.jpg").write_bytes(jpeg(0))
    teacher = timm.create_model("test_resnet", num_classes=4)
    save_file(teacher.state_dict(), folder / "teacher.safetensors")
    teachers = [{"name": "test_resnet", "weights": "teacher.safetensors"}] * 2
    small = {
        "mixer_s16_std": {"student": MIXER, "distill": {"teachers": teachers}},
        "imagenet": {"student": {"name": "test_resnet", "drop_path": 0.0}},
    }
    for name, sections in small.items():
        base = {"base": str(RECIPES / f"{name}.yaml"), "name": name}
        (folder / name).write_text(yaml.safe_dump({**base, **SMALL, **sections}))
    return folder


def commands() -> list[list[str]]:
    """Words of the README's indented commands, in order."""
    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    lines = re.findall(r"^    (\S.*)$", text, re.M)
    typed = [shlex.split(line, comments=True) for line in lines if re.match(r"(std-fast|torchrun|mkdir) ", line)]
    others = {line.split()[0] for line in lines} - {"std-fast", "torchrun", "mkdir"}
    assert others <= {*ELSEWHERE, "model", "teacher", "plain", "STD"}, "a command that is not typed here"
    return typed


def test_every_line_runs_after_the_one_before_it(folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("WANDB_MODE", "offline")
    shrunk = {"resnet50": "test_resnet", "8": "0.002", "--nproc-per-node": "--nproc-per-node"}
    typed = commands()
    assert len(typed) >= 15
    for words in typed:
        if words[0] == "torchrun":
            words = [word if word != "8" else "2" for word in words]
            words[0:1] = [sys.executable, "-m", "torch.distributed.run"]
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            done = subprocess.run(words, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, (words, done.stderr[-2000:])
            continue
        if words[0] == "mkdir":
            os.mkdir(words[1])
            continue
        if "bench" in words:
            continue  # tests/integration/test_loader_benchmark.py
        if "runs/tracked" in words and importlib.util.find_spec("wandb") is None:
            continue
        words = [shrunk.get(word, word) for word in words[1:]]
        extra = ["--seconds", "1"] if words[0] == "plan" else []
        code = cli.main([*words, *extra])
        assert code == 0, (words, capfd.readouterr().err[-2000:])
    assert Path("mixer/model.safetensors").is_file() and Path("report/report.html").is_file()
