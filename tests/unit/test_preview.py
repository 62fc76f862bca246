"""The contact sheet shows the right pixels in the right cells."""

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.augment.device import Augment, TrainBatch
from pipelines.augment.preview import CELL, GAP, LINE, contact_sheet, denormalise
from pipelines.augment.spec import AugmentSpec
from pipelines.errors import UserError


def images(count, size):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8))


def as_mixed(pixels, spec, lam):
    labels = torch.arange(len(pixels))
    normalised = Augment(spec, 0).normalise_only(pixels)
    return TrainBatch(normalised, labels, labels.flip(0), lam, labels, 0, 0)


def test_bytes_are_drawn_as_they_are_enlarged_by_an_integer_factor(tmp_path):
    pixels = images(5, 40)
    contact_sheet(pixels, tmp_path / "sheet.png", columns=3)
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    cell = 3 * 40
    assert cell >= CELL and sheet.shape == (2 * (cell + GAP) + GAP, 3 * (cell + GAP) + GAP, 3)
    top, left = GAP + (cell + GAP), GAP + (cell + GAP)  # the fifth image: second row, second column
    wanted = pixels[4].permute(1, 2, 0).numpy().repeat(3, axis=0).repeat(3, axis=1)
    assert np.array_equal(sheet[top : top + cell, left : left + cell], wanted)
    assert (sheet[top:, left + cell :] == 255).all()


def test_a_mixed_batch_is_denormalised_and_captioned(tmp_path):
    pixels, spec = images(4, 100), AugmentSpec(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.1))
    mixed = as_mixed(pixels, spec, torch.tensor([1.0, 0.25, 0.5, 0.0]))
    assert torch.equal(denormalise(mixed.images, spec), pixels)
    names = ["ant", "bee", "cat", "a name far too long for its cell in any font"]
    contact_sheet(mixed, tmp_path / "sheet.png", columns=2, spec=spec, class_names=names)
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    row = 100 + GAP + LINE
    assert sheet.shape == (2 * row + GAP, 2 * (100 + GAP) + GAP, 3)
    assert np.array_equal(sheet[GAP : GAP + 100, GAP : GAP + 100], pixels[0].permute(1, 2, 0).numpy())
    captions = sheet[GAP + 100 : GAP + 100 + LINE]
    ant, bee = captions[:, GAP : GAP + 100], captions[:, 2 * GAP + 100 : 2 * GAP + 200]
    assert 0 < (ant < 128).sum() < (bee < 128).sum()  # `ant` is not mixed, `bee 0.25 cat` is
    assert (sheet[:, -GAP:] == 255).all()


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot write the contact sheet .*nowhere/sheet.png: No such file"):
        contact_sheet(images(1, 8), tmp_path / "nowhere" / "sheet.png")
