"""Makes tests/data/vVERSION: small files of this version, kept so that all later ones must read them.

    python -m tests.data.make

Run it once for each release that changes a format, commit the folder, and never change it again. It holds a beton with
its manifest, a run of STD that was stopped in the middle of an epoch, the answers of its teacher (which itself is not
kept), and what came of the run when it went on: expected.json.
"""

import gzip
import json
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from PIL import Image

from pipelines.convert.job import ConvertSettings, convert
from pipelines.read.image_prep import MIN_PAGE
from std_fast import __version__
from std_fast.commands.teach import teach
from std_fast.config.recipe import Recipe
from std_fast.config.schema import from_dict
from std_fast.training.evaluate import evaluate_run
from std_fast.training.run import Run, Stopped
from std_fast.training.train import train
from tests.beton_tools import pixels

STOP, STEPS = 4, 6  # an epoch has three steps

SMALL = {
    "data": {"train": "images.beton", "val": "images.beton", "image_size": 16, "threads": 1, "backend": "torch"},
    "optim": {"lr": 1e-3, "lr_batch": 0, "warmup": "2 steps", "ema": 0.9, "ema_batch": 8},
    "run": {"batch": 8, "length": f"{STEPS} steps", "log_every": 1, "device": "cpu", "eval_every": "1 epoch"},
}
STUDENT = {"name": "mixer", "options": {"patch_size": 8, "dim": 8, "depth": 2, "token_dim": 4, "channel_dim": 16}}


def make(folder: Path) -> None:
    """Fills a folder; the present one must be it, so that the recipe's paths hold wherever it is copied."""
    with tempfile.TemporaryDirectory() as name:
        for i in range(24):
            path = Path(name) / f"class{i % 3}" / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(pixels(16 + i % 4, 18, i)).save(path)
        convert(
            name,
            "images.beton",
            settings=ConvertSettings(mode="proportion", raw_share=0.2, page_size=MIN_PAGE),
            workers=1,
        )
    plain = {**SMALL, "student": {"name": "test_resnet"}, "run": SMALL["run"] | {"out": "teacher"}}
    train(from_dict(Recipe, plain), quiet=True)
    mine = {"every": "2 steps", "ema": 0.1, "width": 8}
    distill = {
        "mode": "std", "teachers": [{"weights": "teacher"}], "mine": mine, "target_cache": "targets", "labels": "soft",
        "top_k": 2,
    }  # fmt: skip
    recipe = from_dict(Recipe, {**SMALL, "student": STUDENT, "distill": distill, "run": SMALL["run"] | {"out": "run"}})
    teach(recipe)

    def stop(run: Run) -> None:
        run.stop_wanted = run.step == STOP

    try:
        train(recipe, quiet=True, on_step=stop)
    except Stopped:
        pass
    shutil.rmtree("teacher")
    shutil.copytree("run", "whole")
    expected = go_on(recipe, "whole") | {"stopped": evaluate_run(Path("run"))}
    shutil.rmtree("whole")
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree("run/tensorboard", ignore_errors=True)
    Path("run/.lock").unlink(missing_ok=True)
    beton = Path("images.beton")  # mostly the padding of its first page
    Path("images.beton.gz").write_bytes(gzip.compress(beton.read_bytes(), mtime=0))
    beton.unlink()


def go_on(recipe: Recipe, out: str) -> dict:
    """Resumes the stopped run that lies in `out`; what it comes to."""
    summary = train(replace(recipe, run=replace(recipe.run, out=out)), resume=True, quiet=True)
    return {key: summary[key] for key in ("steps", "samples", "parameters", "result")}


if __name__ == "__main__":
    target = Path(__file__).resolve().parent / f"v{__version__}"
    if target.exists():
        sys.exit(f"{target}: is there already, and is not to be changed; raise the version first")
    target.mkdir()
    os.chdir(target)
    make(target)
    print(target, sum(path.stat().st_size for path in target.rglob("*") if path.is_file()), "bytes")
