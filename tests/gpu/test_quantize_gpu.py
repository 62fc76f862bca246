"""Teachers in int8 and float8 on a GPU, eager and compiled: their labels are float32's but for a few."""

import importlib.util

import pytest
import timm
import torch
from safetensors.torch import save_file

from pipelines.augment.device import Augment
from std_fast.config.recipe import Recipe
from std_fast.config.schema import from_dict
from std_fast.training.build import build_teachers, make_fast

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed"),
]


@pytest.mark.parametrize("compile", ["off", "inductor"])
@pytest.mark.parametrize("precision", ["int8", "float8"])
def test_labels_are_those_of_float32(tmp_path, precision, compile):
    device = torch.device("cuda", 0)
    if precision == "float8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8")
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=7, img_size=32)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    teacher = {"name": "test_vit", "weights": str(tmp_path / "vit.safetensors"), "image_size": 32}
    found = {}
    for one in ("float32", precision):
        distill = {"mode": "std", "teachers": [teacher | {"precision": one}]}
        recipe = from_dict(Recipe, {"data": {"image_size": 32}, "distill": distill, "run": {"compile": compile}})
        teachers, _ = make_fast(recipe, device, Augment(recipe.augment, 0), build_teachers(recipe, 7, device))
        images = torch.randn(256, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(device)
        found[one] = teachers(images.contiguous(memory_format=torch.channels_last))
    assert (found[precision].labels == found["float32"].labels).float().mean() > 0.9
    torch.testing.assert_close(found[precision].confidence, found["float32"].confidence, rtol=0, atol=0.1)
