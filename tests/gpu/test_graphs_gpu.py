"""Teachers as a CUDA graph answer as they do without."""

import pytest
import torch

from std_fast.runtime import checkpoint
from std_fast.teachers.graphs import ReplayedTeachers
from std_fast.training.build import build_teachers
from std_fast.training.run import train

pytestmark = pytest.mark.gpu


def images(rows, seed):
    torch.manual_seed(seed)
    return torch.randn(rows, 3, 16, 16, device="cuda").contiguous(memory_format=torch.channels_last)


def test_replays_are_the_teachers(at):
    """Two shapes in any order; an answer stays what it was when the next replay comes; in any stream."""
    teachers = build_teachers(at(), 3, torch.device("cuda", 0))
    replayed = ReplayedTeachers(teachers)
    batches = [images(rows, seed) for seed, rows in enumerate((8, 8, 4, 8, 4))]
    expected = [teachers(batch) for batch in batches]
    found = [replayed(batch) for batch in batches]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found += [replayed(batch) for batch in batches]
    torch.cuda.synchronize()
    for one, two in zip(expected * 2, found, strict=True):
        assert torch.equal(one.labels, two.labels) and torch.equal(one.confidence, two.confidence)
    assert len(replayed._captured) == 2


def test_weights_changed_in_place_are_seen(at):
    teachers = build_teachers(at(), 3, torch.device("cuda", 0))
    replayed, batch = ReplayedTeachers(teachers), images(8, 0)
    replayed(batch)
    for parameter in teachers.parameters():
        parameter.mul_(-0.5)
    assert torch.equal(replayed(batch).confidence, teachers(batch).confidence)


@pytest.mark.parametrize("compile", ["off", "inductor"])
def test_a_run_with_captured_teachers_beside_the_student(at, compile):
    plain = at("plain", compile=compile)
    captured = at("captured", compile=compile, cuda_graphs="teachers", overlap="on")
    for recipe in (plain, captured):
        train(recipe, quiet=True)
    one, two = (checkpoint.newest(checkpoint.Path(r.run.out) / "checkpoints")[1] for r in (plain, captured))
    for name, tensor in one.items():
        assert torch.equal(tensor.nan_to_num(), two[name].nan_to_num()), name
