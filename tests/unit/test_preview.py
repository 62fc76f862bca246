"""The contact sheet shows the right pixels in the right cells."""

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.augment.device import Augment, TrainBatch
from pipelines.augment.preview import CELL, contact_sheet, denormalise
from pipelines.augment.spec import AugmentSpec
from pipelines.errors import UserError
from pipelines.sheet import COLUMNS, GAP, LINE, draw_sheet

SPEC = AugmentSpec(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.1))


def images(count, size):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8))


def as_mixed(pixels, lam):
    labels = torch.arange(len(pixels))
    normalised = Augment(SPEC, 0).normalise_only(pixels)
    return TrainBatch(normalised, labels, labels.flip(0), lam, labels, 0, 0)


def test_small_images_are_enlarged_by_an_integer_factor(tmp_path):
    pixels = images(10, 40)
    contact_sheet(as_mixed(pixels, torch.ones(10)), tmp_path / "sheet.png", SPEC)
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    cell = 3 * 40
    row = cell + LINE + GAP
    assert cell >= CELL and sheet.shape == (2 * row + GAP, COLUMNS * (cell + GAP) + GAP, 3)
    top, left = GAP + row, GAP + (cell + GAP)  # the tenth image: second row, second column
    wanted = pixels[9].permute(1, 2, 0).numpy().repeat(3, axis=0).repeat(3, axis=1)
    assert np.array_equal(sheet[top : top + cell, left : left + cell], wanted)
    assert (sheet[top:, left + cell :] == 255).all()


def test_a_mixed_batch_is_denormalised_and_captioned(tmp_path):
    pixels = images(4, 100)
    mixed = as_mixed(pixels, torch.tensor([1.0, 0.25, 0.5, 0.0]))
    assert torch.equal(denormalise(mixed.images, SPEC), pixels)
    names = ["ant", "bee", "猫", "a name far too long for its cell in any font"]
    contact_sheet(mixed, tmp_path / "sheet.png", SPEC, names)
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (GAP + 100 + LINE + GAP, 4 * (100 + GAP) + GAP, 3)
    assert np.array_equal(sheet[GAP : GAP + 100, GAP : GAP + 100], pixels[0].permute(1, 2, 0).numpy())
    captions = sheet[GAP + 100 : GAP + 100 + LINE]
    ant, bee = captions[:, GAP : GAP + 100], captions[:, 2 * GAP + 100 : 2 * GAP + 200]
    assert 0 < (ant < 128).sum() < (bee < 128).sum()  # `ant` is not mixed, `bee 0.25 ?` is
    assert (sheet[:, -GAP:] == 255).all()


def test_a_smaller_image_stands_in_the_middle_of_its_cell(tmp_path):
    draw_sheet([Image.new("RGB", (30, 20)), Image.new("RGB", (10, 20))], ["", ""], tmp_path / "sheet.png")
    black = (np.array(Image.open(tmp_path / "sheet.png")) == 0).all(2)
    left = 2 * GAP + 30 + 10
    assert black[GAP : GAP + 20, left : left + 10].all() and black.sum() == 20 * (30 + 10)


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere/sheet.png: cannot be written .No such file"):
        draw_sheet([Image.new("RGB", (8, 8))], [""], tmp_path / "nowhere" / "sheet.png")
