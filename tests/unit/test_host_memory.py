"""What a step on a CPU needs of the host's memory, before it is begun."""

from dataclasses import replace

import pytest
import torch

from pipelines.errors import UserError
from std_fast import create_student
from std_fast.training import host_memory
from std_fast.training.build import build_student
from std_fast.training.host_memory import check_host_memory, saved_bytes
from std_fast.training.micro_batch import micro_batch_of
from tests.small_runs import CYCLE, RESNET, small_recipe

SMALL = {"patch_size": 8, "dim": 16, "depth": 3}


@pytest.mark.parametrize(("name", "options"), [("mixer", SMALL), ("resmlp", SMALL), ("cyclemlp", CYCLE)])
def test_the_count_is_what_autograd_keeps(name, options):
    student = create_student(name, 10, 32, **options)
    own = {t.untyped_storage().data_ptr() for t in student.state_dict().values()}
    own |= {t.untyped_storage().data_ptr() for t in student.buffers()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        student(torch.randn(4, 3, 32, 32))
    assert saved_bytes(student, 32) == sum(t.untyped_storage().nbytes() for t in kept.values()) / 4


@pytest.mark.parametrize("student", [{}, RESNET])
def test_what_does_not_fit_is_refused_with_a_size_that_does(student, tmp_path, monkeypatch):
    recipe = small_recipe(tmp_path, tmp_path / "run", student=student, run={"batch": 64})
    built = build_student(recipe, 10)
    pixels = 3 * 16 * 16 * 64 * (recipe.data.ahead + 4)
    free = int(pixels + 40 * saved_bytes(built, 16))
    monkeypatch.setattr(host_memory, "free_memory", lambda device: free)
    with pytest.raises(UserError, match=r"run.batch: 64 images of 16 px need .*; set run.micro_batch to 16, lower"):
        check_host_memory(recipe, built, micro_batch_of(recipe), "float32")
    fits = replace(recipe, run=replace(recipe.run, micro_batch=16))
    check_host_memory(fits, built, micro_batch_of(fits), "float32")
    monkeypatch.setattr(host_memory, "free_memory", lambda device: pixels)
    with pytest.raises(UserError, match="are free; lower run.batch or data.image_size"):
        check_host_memory(fits, built, micro_batch_of(fits), "float32")
