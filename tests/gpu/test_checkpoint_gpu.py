"""A checkpoint is copied from the GPU beside the steps: nothing waits, and later steps do not change it."""

import pytest
import torch

from std_fast.runtime import checkpoint

pytestmark = pytest.mark.gpu


@pytest.mark.not_rehearsed("compares what kernels computed", ways=("lazy", "compiled"))
def test_a_save_holds_the_moment_and_does_not_wait(tmp_path):
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(), (3,), (7, 5), (16, 8, 1, 1), (1 << 20,)]
    tensors = {f"model.{i}": torch.randn(shape, device="cuda", generator=generator) for i, shape in enumerate(shapes)}
    tensors["model.low"] = torch.ones(5, device="cuda", dtype=torch.bfloat16)
    tensors["model.count"] = torch.arange(3, device="cuda")
    tensors["model.conv"] = torch.randn(4, 3, 2, 2, device="cuda").to(memory_format=torch.channels_last)
    tensors["optim.a:step"] = torch.ones(())  # on the host
    expected = {name: tensor.clone().cpu() for name, tensor in tensors.items()}
    writer = checkpoint.Writer(tmp_path, keep=2)
    meta = {"step": 1, "num_classes": 3, "recipe": ""}
    torch.cuda.set_sync_debug_mode("error")
    try:
        writer.save(1, tensors, meta)
        for tensor in tensors.values():
            tensor.add_(1)  # the next step
    finally:
        torch.cuda.set_sync_debug_mode("default")
    writer.wait()
    _, found, _ = checkpoint.newest(tmp_path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
