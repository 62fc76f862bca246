"""Crop boxes against torchvision's algorithm, one image at a time, and against its own draws; always inside."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from pipelines import rng
from pipelines.errors import UserError
from pipelines.read.crops import CropSpec, random_resized_crop

SIDES = st.integers(1, 3000) | st.sampled_from([1, 2, 3, 20, 20000, 65500])
SIZES = st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=6)


def torchvision_box(height, width, scale, ratio, uniforms):
    """RandomResizedCrop.get_params with the random numbers given: uniforms[t] = (area, ratio, top, left) of try t."""
    for area, aspect, top, left in uniforms:
        target = height * width * (scale[0] + area * (scale[1] - scale[0]))
        log_ratio = math.log(ratio[0]), math.log(ratio[1])
        aspect_ratio = math.exp(log_ratio[0] + aspect * (log_ratio[1] - log_ratio[0]))
        w = int(round(math.sqrt(target * aspect_ratio)))
        h = int(round(math.sqrt(target / aspect_ratio)))
        if 0 < w <= width and 0 < h <= height:
            return [int(top * (height - h + 1)), int(left * (width - w + 1)), h, w]
    w, h = width, height
    if width / height < min(ratio):
        h = int(round(w / min(ratio)))
    elif width / height > max(ratio):
        w = int(round(h * max(ratio)))
    return [(height - h) // 2, (width - w) // 2, h, w]


@given(SIZES, st.integers(0, 2**40), st.sampled_from([(0.08, 1.0), (0.35, 0.4), (1.0, 1.0)]))
def test_equal_to_torchvision_given_the_same_numbers(sizes, first, scale):
    heights, widths = np.array(sizes).T
    positions = np.arange(first, first + len(sizes))
    boxes = random_resized_crop(heights, widths, 11, 4, positions, scale)
    draws = np.stack([rng.uniform(11, 4, positions, rng.Purpose.CROP, t) for t in range(10)], axis=1).tolist()
    expected = [torchvision_box(h, w, scale, (3 / 4, 4 / 3), u) for (h, w), u in zip(sizes, draws, strict=True)]
    assert boxes.dtype == np.int32
    assert boxes.tolist() == expected


@pytest.mark.parametrize(("height", "width"), [(20, 20000), (20000, 20), (300, 100), (101, 333), (1, 7)])
def test_fallback_is_torchvisions_own(height, width):
    """Asked for the full area and a ratio that the image lacks, every try fails and the answer is certain."""
    expected = RandomResizedCrop.get_params(torch.zeros(1).expand(3, height, width), [1.0, 1.0], [3 / 4, 4 / 3])
    box = random_resized_crop(np.array([height]), np.array([width]), 0, 0, np.array([0]), scale=(1.0, 1.0))
    assert tuple(box[0].tolist()) == expected


def test_boxes_are_what_they_were():
    """Stored targets and runs to be resumed depend on them."""
    boxes = random_resized_crop(np.array([375, 500, 20]), np.array([500, 333, 900]), 0, 0, np.arange(3))
    assert boxes.tolist() == [[132, 197, 242, 190], [289, 69, 132, 158], [0, 436, 20, 27]]


def test_distribution_is_torchvisions():
    """Area, log ratio and place of 4,000 boxes: means and deviations within 5 standard errors of torchvision's."""
    n, height, width = 4000, 375, 500

    def features(boxes):
        top, left, h, w = np.asarray(boxes, np.float64).T
        return np.stack([h * w / (height * width), np.log(w / h), (top + h / 2) / height, (left + w / 2) / width])

    torch.manual_seed(0)
    image = torch.zeros(1).expand(3, height, width)
    theirs = features([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(n)])
    ours = features(random_resized_crop(np.full(n, height), np.full(n, width), 0, 0, np.arange(n)))
    error = theirs.std(axis=1) * math.sqrt(2 / n)
    assert (abs(ours.mean(axis=1) - theirs.mean(axis=1)) < 5 * error).all()
    assert (abs(ours.std(axis=1) - theirs.std(axis=1)) < 5 * error).all()


@given(SIZES, st.sampled_from([CropSpec(), CropSpec("center", fraction=0.01), CropSpec("center", fraction=1.0),
                               CropSpec("full"), CropSpec(ratio=(3.0, 9.0)), CropSpec(ratio=(0.1, 0.2))]))  # fmt: skip
def test_boxes_lie_inside(sizes, spec):
    heights, widths = np.array(sizes).T
    boxes = spec.boxes(heights, widths, 0, 0, np.arange(len(sizes)))
    top, left, h, w = boxes.T
    assert boxes.shape == (len(sizes), 4)
    assert (top >= 0).all() and (left >= 0).all() and (h >= 1).all() and (w >= 1).all()
    assert (top + h <= heights).all() and (left + w <= widths).all()


def test_a_box_belongs_to_its_position():
    heights, widths, positions = np.arange(30, 130), np.arange(160, 60, -1), np.arange(100)
    boxes = random_resized_crop(heights, widths, 1, 2, positions)
    some = np.array([71, 3, 20])
    assert np.array_equal(random_resized_crop(heights[some], widths[some], 1, 2, positions[some]), boxes[some])
    assert (random_resized_crop(heights, widths, 1, 3, positions) != boxes).any(axis=1).all()
    assert (random_resized_crop(heights, widths, 2, 2, positions) != boxes).any(axis=1).all()


@pytest.mark.parametrize(("height", "width"), [(500, 375), (375, 500), (256, 256), (1, 9)])
@pytest.mark.parametrize("fraction", [0.875, 0.95, 1.0])
def test_center_crop_is_timms_up_to_rounding(height, width, fraction):
    """timm: shorter side to floor(224 / fraction), then the central 224: in stored pixels, a central square."""
    size = 224
    magnified = math.floor(size / fraction) / min(height, width)
    spec, none = CropSpec("center", fraction=fraction), np.zeros(1, np.int64)
    top, left, h, w = spec.boxes(np.array([height]), np.array([width]), 0, 0, none)[0].tolist()
    assert h == w and abs(h - size / magnified) <= 0.5 + 0.005 * min(height, width)
    assert abs(top + h / 2 - height / 2) <= 0.5 and abs(left + w / 2 - width / 2) <= 0.5


def test_full_image():
    boxes = CropSpec("full").boxes(np.array([3, 5]), np.array([7, 2]), 0, 0, np.zeros(2, np.int64))
    assert boxes.tolist() == [[0, 0, 3, 7], [0, 0, 5, 2]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "centre"}, "crop.kind: 'centre'.*center"),
        ({"scale": (0.0, 1.0)}, "crop.scale"),
        ({"scale": (0.5, 0.4)}, "crop.scale"),
        ({"scale": (0.5, 1.1)}, "crop.scale"),
        ({"ratio": (0.0, 1.0)}, "crop.ratio"),
        ({"ratio": (2.0, 1.0)}, "crop.ratio"),
        ({"ratio": (1.0, math.inf)}, "crop.ratio"),
        ({"fraction": 0.0}, "crop.fraction"),
        ({"fraction": math.nan}, "crop.fraction"),
    ],
)
def test_impossible_specs_name_the_field(values, message):
    with pytest.raises(UserError, match=message):
        CropSpec(**values)
