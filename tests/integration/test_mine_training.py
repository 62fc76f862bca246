"""What the regulariser is for: with it, the two tokens of a trained student share less information than without it."""

from dataclasses import replace

import pytest
import torch

from std_fast import recipe as recipes
from std_fast.demo import write_digits
from std_fast.mine import MutualInformation, mutual_information
from std_fast.train import train

STEPS = 90
OVERRIDES = {
    "data.threads": "1",
    "student.options": "{patch_size: 6, dim: 32, depth: 2}",
    "optim.warmup": "10 steps",
    "distill.mine.width": "64",
    "run.batch": "64",
    "run.device": "cpu",
    "run.precision": "float32",
    "run.length": f"{STEPS} steps",
    "run.eval_every": f"{STEPS} steps",
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    return folder


def recipe(name, digits, out, **more):
    fields = OVERRIDES | {"data.train": str(digits / "train"), "run.out": str(out)} | more
    loaded = recipes.load(name, list(fields.items()))
    return replace(loaded, data=replace(loaded.data, val=""))


def estimate(run, steps=300):
    """Mutual information of the student's tokens over training images, by a statistics network of its own.

    It is trained on 768 images and read on 256 others, with the marginal pairs drawn anew each time.
    """
    parts, student = run.parts, run.parts.trainer.student
    images = torch.cat([next(iter(parts.train_loader.epoch(epoch))).images for epoch in range(16)])
    with torch.no_grad():
        taps = student.backbone.forward_taps(parts.augment.normalise_only(images), student.taps)
        token = student.std[-1](taps.features[-1])
    pair = [(t - t.mean(0)) / (t.std(0) + 1e-6) for t in (token.spatial, token.channel)]
    torch.manual_seed(1)
    mine = MutualInformation(*(t.shape[-1] for t in pair), 64)
    optimizer = torch.optim.Adam(mine.parameters(), lr=1e-3)
    for _ in range(steps):
        rows = torch.randperm(768)[:128]
        (-mine(*(t[rows] for t in pair))).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        held_out = [768 + torch.randperm(256) for _ in range(20)]
        return float(torch.stack([mutual_information(mine.psi, *(t[rows] for t in pair)) for rows in held_out]).mean())


def test_the_tokens_share_less_with_the_regulariser_than_without(digits, tmp_path):
    teacher = tmp_path / "teacher"
    few = {"run.length": "20 steps", "run.eval_every": "20 steps", "run.out": str(teacher)}
    train(recipe("digits_teacher", digits, teacher, **{k: v for k, v in few.items()}, **{"student.options": "{}"}), quiet=True)
    found = {}
    for kind, weight in (("off", "1e-12"), ("on", "1.0")):
        values = found[kind] = {}

        def look(run, values=values):
            if run.step in (1, STEPS):
                values[run.step] = estimate(run)

        fields = {"distill.teachers.0.weights": str(teacher), "distill.mine.weight": weight}
        train(recipe("digits_std", digits, tmp_path / kind, **fields), quiet=True, on_step=look)
    print(found)
