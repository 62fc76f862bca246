"""Micro-batches: loss and gradients are those of one large batch; sizes, refusals, and what a lack of memory does."""

from dataclasses import replace

import pytest
import torch

from pipelines.augment.device import TrainBatch
from pipelines.errors import UserError
from std_fast.config import recipe as recipes
from std_fast.config.recipe import Recipe
from std_fast.config.schema import from_dict
from std_fast.method.losses import targets_from_logits
from std_fast.runtime.distributed import World
from std_fast.runtime.speed import Stopwatch
from std_fast.training.build import build_student, build_trainer
from std_fast.training.micro_batch import MicroBatch, micro_batch_of
from std_fast.training.schedule import StepSettings

B, K, SIZE = 16, 5, 16
STUDENTS = {
    "mixer": {"patch_size": 4, "dim": 16, "depth": 3, "token_dim": 8, "channel_dim": 32},
    "cyclemlp": {"layers": [1, 1, 1, 3], "embed_dims": [8, 8, 16, 16], "mlp_ratios": [2, 2, 2, 2]},
}
MINE_EMA = 0.1


def trainer_of(name: str, size: int = 0, auto: bool = False):
    distill = {
        "mode": "std", "teachers": [{"name": "a"}, {"name": "b"}], "class_share": 0.2,
        "mine": {"weight": 0.1, "ema": MINE_EMA, "width": 16},
    }  # fmt: skip
    recipe = from_dict(Recipe, {
        "data": {"image_size": SIZE},
        "student": {"name": name, "options": STUDENTS[name], "drop_path": 0.2},
        "distill": distill, "run": {"batch": B, "micro_batch": "auto" if auto else size, "compile": "off"},
    })  # fmt: skip
    device = torch.device("cpu")
    return build_trainer(
        recipe, build_student(recipe, K), device, "float32", None, Stopwatch(device), micro_batch_of(recipe)
    )


def batch_of(seed: int = 0) -> TrainBatch:
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(B, 3, SIZE, SIZE, generator=g).to(memory_format=torch.channels_last)
    a, b = torch.randint(K, (2, B), generator=g)
    targets = targets_from_logits(torch.randn(B, 2, K, generator=g))
    return TrainBatch(images, a, b, torch.rand(B, generator=g), torch.arange(32, 32 + B), 3, 0, targets)


def settings(step: int = 1, **changes) -> StepSettings:
    return replace(StepSettings(step, 1e-2, 1e-2, with_mine=True), **changes)


def gradients(trainer) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in trainer.student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("with_mine", [True, False])
def test_loss_and_gradients_are_those_of_one_large_batch(name, size, with_mine, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # the losses, which are computed in float32
    found = []
    for micro in (0, size):
        trainer = trainer_of(name, micro)
        trainer.student.double()
        trainer.student.mine.apply(lambda m: hasattr(m, "log_average") and m.log_average.fill_(-0.3))
        batch = batch_of()
        batch = replace(batch, images=batch.images.double(), lam=batch.lam.double())
        losses = trainer.gradients(batch, settings(with_mine=with_mine))
        averages = {n: b.clone() for n, b in trainer.student.named_buffers() if n.endswith("log_average")}
        found.append((losses, gradients(trainer), averages))
    (at_once, grads, averages), (parts, grads_of_parts, averages_of_parts) = found
    assert (at_once.information is not None) == with_mine
    for one, two in zip(at_once, parts, strict=True):
        assert (one is None and two is None) or one.item() == pytest.approx(two.item(), rel=1e-10)
    assert grads.keys() == grads_of_parts.keys() and len(averages) == 2
    assert any(n.startswith("mine.") for n in grads) == with_mine
    for n, grad in grads.items():
        torch.testing.assert_close(grads_of_parts[n], grad, rtol=1e-10, atol=1e-10)
    for n, average in averages.items():
        torch.testing.assert_close(averages_of_parts[n], average, rtol=1e-10, atol=1e-10)
        assert (average != -0.3) == with_mine


@pytest.mark.parametrize("fails", [1, 2])
def test_a_pass_that_runs_out_of_memory_leaves_nothing_and_is_repeated_in_halves(fails, caplog):
    """In the first or the second micro-batch of 8, when there are gradients already; and again at the same step."""
    expected, trainer = trainer_of("mixer", 4), trainer_of("mixer", auto=True)
    trainer.micro_batch.size = 8
    seen, inner = [], trainer.forward

    def forward(images, *rest):
        seen.append(len(images))
        out = inner(images, *rest)  # MINE's average has moved by now
        if len(images) > 4 and len(seen) == fails:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return out

    trainer.forward = forward
    for step in (1, 2):
        for one in (expected, trainer):
            one.step(batch_of(step), settings(step))
    assert seen == [8] * fails + [4] * 8
    for n, tensor in expected.student.state_dict().items():
        assert torch.equal(tensor, trainer.student.state_dict()[n]), n
    assert "memory ran out with 8 images in a pass; gradients now add up over 4 passes of 4" in caplog.text


@pytest.mark.parametrize("auto", [True, False])
def test_what_halving_cannot_help_is_raised(auto):
    trainer = trainer_of("mixer", 4, auto=auto)

    def forward(images, *_):
        raise torch.OutOfMemoryError(f"{len(images)} images")

    trainer.forward = forward
    with pytest.raises(torch.OutOfMemoryError, match="4 images"):
        trainer.step(batch_of(), settings())
    trainer = trainer_of("mixer", 8, auto=auto)
    trainer.forward = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.step(batch_of(), settings())
    assert trainer.micro_batch.size == (B if auto else 8)


def test_a_trial_of_many_processes_is_agreed_on(monkeypatch):
    """This rank's pass fits, another's does not: both halve, and only a kind of step that fitted is trusted."""
    asked, undone = [], []
    monkeypatch.setattr(World, "any", lambda self, short: asked.append(short) or len(asked) == 1)
    micro = MicroBatch(16, auto=True, world=World(0, 2))

    def call():
        return micro.size

    assert micro.is_trial("mine")
    assert micro.fit(call, lambda: undone.append(micro.size), "mine", 16) == 8
    assert undone == [16] and asked == [False, False] and not micro.is_trial("mine") and micro.is_trial("plain")
    assert micro.fit(call, undone.clear, "mine", 16) == 8 and len(asked) == 2

    def late():
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):  # the other ranks wait for gradients by now
        micro.fit(late, undone.clear, "mine", 16)


def recipe_of(batch: int, micro, **student) -> Recipe:
    return from_dict(Recipe, {"student": student, "run": {"batch": batch, "micro_batch": micro}})


def test_sizes():
    assert micro_batch_of(recipe_of(48, 0)).size == 0
    assert micro_batch_of(recipe_of(48, 8), World(0, 2)).size == 8
    auto, steps = micro_batch_of(recipe_of(240, "auto"), World(0, 2)), []
    while auto.size:
        steps.append(auto.size)
        auto.size = auto._smaller(120)
    assert steps == [120, 60, 24, 12, 4]  # of the divisors of 120 those that are multiples of 4
    for found, size in ((0, 120), (20, 20), (32, 120)):  # 32: found by another number of processes
        auto.size = 120
        auto.resume(found)
        assert auto.size == size


@pytest.mark.parametrize(
    ("recipe", "ranks", "complaint"),
    [
        ((48, 24), 4, "run.micro_batch: 24 must divide the 12 images of each process and be a multiple of 4; take 12"),
        ((48, 16), 2, "run.micro_batch: 16 must divide the 24 images .* take 12"),
    ],
)
def test_what_does_not_divide_a_process_s_share(recipe, ranks, complaint):
    with pytest.raises(UserError, match=complaint):
        micro_batch_of(recipe_of(*recipe), World(0, ranks))


def test_groups_of_subset_stay_together():
    recipe = recipe_of(128, 16, drop_path=0.2, drop_path_mode="subset")
    with pytest.raises(UserError, match="multiple of 32; take 32"):
        micro_batch_of(recipe)


@pytest.mark.parametrize("typed", ["6", "20", "-4"])
def test_a_size_that_never_fits_is_refused(typed):
    with pytest.raises(UserError, match=f"run.micro_batch: {typed} must be a multiple of 4 that divides run.batch 64"):
        recipes.load("mixer_s16_std", [("run.batch", "64"), ("run.micro_batch", typed)])


def test_the_field_as_typed():
    for typed, value in (("auto", "auto"), ("16", 16), ("0", 0)):
        recipe = recipes.load("mixer_s16_std", [("run.batch", "64"), ("run.micro_batch", typed)])
        assert recipe.run.micro_batch == value
        assert recipes.loads(recipes.dump(recipe)) == recipe
    with pytest.raises(UserError, match="run.micro_batch: expected int, got 'half', or write auto"):
        recipes.load("mixer_s16_std", [("run.micro_batch", "half")])
