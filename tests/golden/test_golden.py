"""Golden values: a change that is not meant to change the numbers shows the same losses as before.

After a change that is meant to: `python tests/golden/test_golden.py` writes the new ones; say why in the commit.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.augment.device import Augment
from pipelines.augment.spec import AugmentSpec
from pipelines.read.batch import Batch
from std_fast.config.recipe import Recipe
from std_fast.config.schema import from_dict
from std_fast.method.losses import targets_from_logits
from std_fast.runtime.metrics import Meters
from std_fast.teachers.teacher import autocast
from std_fast.training.build import build_student
from std_fast.training.guard import Guard
from std_fast.training.optim import EMA, build_optimizer
from std_fast.training.schedule import StepSettings
from std_fast.training.step import Objective, Trainer

FILE = Path(__file__).with_name("losses.json")
STUDENTS = {
    "mixer": {"patch_size": 4, "dim": 16, "depth": 3, "token_dim": 8, "channel_dim": 32},
    "resmlp": {"patch_size": 4, "dim": 16, "depth": 3},
    "cyclemlp": {"layers": [1, 1, 1, 3], "embed_dims": [8, 8, 16, 16], "mlp_ratios": [2, 2, 2, 2]},
}
STEPS, B, K, SIZE = 5, 8, 5, 16


def losses(name: str) -> list[list[float]]:
    """Loss, distillation loss, MINE's bound and gradient norm of five steps on noise, from the seed alone.

    Adam's epsilon is large, or it would make full steps of gradients that are nothing but rounding (a bias before a
    norm), and the processor's rounding would decide the losses.
    """
    recipe = from_dict(Recipe, {
        "data": {"image_size": SIZE}, "student": {"name": name, "options": STUDENTS[name], "drop_path": 0.2},
        "distill": {"mode": "std", "mine": {"weight": 0.1}, "teachers": [{"name": "a"}, {"name": "b"}]},
        "optim": {"clip": 1.0, "eps": 1e-4},
    })  # fmt: skip
    student = build_student(recipe, K).train()
    device = torch.device("cpu")
    trainer = Trainer(
        student=student, forward=student, objective=Objective(recipe.distill, 0.1, student.head_teacher),
        optimizer=build_optimizer(student, recipe.optim, device), ema=EMA(student, 0.9), guard=Guard(device),
        meters=Meters(), autocast=lambda: autocast(device, "float32"), clip=1.0, seed=0,
    )  # fmt: skip
    augment = Augment(AugmentSpec(randaugment_n=2, color_jitter=0.2, shift=2), seed=0)
    rows = []
    for step in range(STEPS):
        g = torch.Generator().manual_seed(step)
        images = torch.randint(256, (B, 3, SIZE, SIZE), dtype=torch.uint8, generator=g)
        labels, positions = torch.randint(K, (B,), generator=g), torch.arange(step * B, step * B + B)
        batch = Batch(images.to(memory_format=torch.channels_last), labels, positions, positions.numpy(), 0, step)
        targets = targets_from_logits(torch.randn(B, 2, K, generator=g))
        trainer.step(replace(augment(batch), targets=targets), StepSettings(step + 1, 1e-2, 1e-2, with_mine=True))
        metrics = trainer.meters.read()
        rows.append([metrics[key] for key in ("loss", "loss_distill", "information", "grad_norm")])
    return rows


@pytest.mark.parametrize("name", STUDENTS)
def test_losses_are_those_of_before(name):
    torch.manual_seed(0)
    if torch.nn.init.trunc_normal_(torch.empty(1)).item() != pytest.approx(-0.0089565, rel=1e-4):
        pytest.skip(f"torch {torch.__version__} draws other initial weights (trunc_normal_ changed in 2.14)")
    expected = torch.tensor(json.loads(FILE.read_text(encoding="utf-8"))[name])
    torch.testing.assert_close(torch.tensor(losses(name)), expected, rtol=1e-3, atol=1e-5)


if __name__ == "__main__":
    FILE.write_text(json.dumps({name: losses(name) for name in STUDENTS}, indent=1) + "\n", encoding="utf-8")
