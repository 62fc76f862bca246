"""RandAugment for a batch against PIL as timm applies it, one image after the other."""

import random
import re

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from timm.data import auto_augment

from pipelines.augment import randaugment as ra
from pipelines.augment.randaugment import Op

FILL = (124, 116, 104)
TIMM = auto_augment._RAND_INCREASING_TRANSFORMS
# Largest difference of a value and largest share of values that differ: the table in pipelines/augment/randaugment.py.
EXACT, ROUNDED, BLENDED, RESAMPLED = (0, 0.0), (1, 0.01), (1, 0.003), (1, 0.03)
TOLERANCE = dict.fromkeys(Op, EXACT)
TOLERANCE |= {Op.AUTO_CONTRAST: ROUNDED}
TOLERANCE |= dict.fromkeys((*ra.ENHANCED, Op.SHARPNESS), BLENDED)
TOLERANCE |= dict.fromkeys(ra.GEOMETRIC, RESAMPLED)


def pictures(count: int, height: int, width: int) -> torch.Tensor:
    """uint8 [count, 3, H, W]: waves with noise, of narrow and full range, some with flat parts, one of one colour."""
    draw = np.random.default_rng(5)
    y, x = np.mgrid[:height, :width] / max(height, width)
    out = []
    for i in range(count):
        waves = [np.sin(draw.uniform(1, 9) * x + draw.uniform(1, 9) * y + draw.uniform(0, 6)) for _ in range(3)]
        low, high = ((0, 255), (90, 140), (-120, 300))[i % 3]
        image = low + (high - low) * (np.stack(waves) + 1) / 2 + draw.normal(0, 4, (3, height, width))
        out.append(np.full_like(image, 77) if i == 3 else image)
    return torch.from_numpy(np.clip(np.stack(out), 0, 255).astype(np.uint8))


def to_pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def by_timm(monkeypatch, image: torch.Tensor, op: int, level: float, sign: float) -> torch.Tensor:
    """What timm's own operation makes of an image [3, H, W], the coin for its sign held."""
    monkeypatch.setattr(random, "random", lambda: 0.9 if sign < 0 else 0.1)
    timms = auto_augment.AugmentOp(
        TIMM[op], prob=1.0, magnitude=level, hparams={"img_mean": FILL, "interpolation": Image.Resampling.BILINEAR}
    )
    return torch.from_numpy(np.array(timms(to_pil(image)))).permute(2, 0, 1)


def one(images, op, level, sign):
    """One operation on every image."""
    fill = torch.tensor(FILL, dtype=torch.uint8)
    return ra.apply_pair(images, [(op, ra.amounts(op, level, sign, *images.shape[2:]))], fill)


def parameters(count: int, op: int | None = None, seed: int = 0):
    """op [count], level in 0..10 (Pillow 13 refuses posterize with no bits left, which is level 10), sign."""
    draw = np.random.default_rng(seed)
    ops = draw.integers(0, ra.NUM_OPS + 1, count) if op is None else np.full(count, int(op))
    level = np.concatenate(([0.0, 9.0, 9.9], draw.uniform(0, 10, count)))[:count]
    return torch.from_numpy(ops), torch.from_numpy(level), torch.from_numpy(draw.choice([-1.0, 1.0], count))


def test_operations_are_timms_in_timms_order():
    names = [re.sub("Increasing|Rel$", "", name).lower() for name in TIMM]
    assert names == [op.name.replace("_", "").lower() for op in Op]
    assert sorted([*ra.TABLED, *ra.ENHANCED, Op.SHARPNESS, *ra.GEOMETRIC]) == list(Op)


@pytest.mark.parametrize("size", [(32, 32), (21, 30), (2, 5)])
@pytest.mark.parametrize("op", Op, ids=lambda op: op.name)
def test_one_operation_agrees_with_pil(monkeypatch, op, size):
    images = pictures(24, *size)
    ops, level, sign = parameters(24, op, seed=op)
    ours = one(images, ops, level, sign).int()
    wanted = torch.stack(
        [by_timm(monkeypatch, images[i], op, level[i].item(), sign[i].item()) for i in range(24)]
    ).int()
    difference = (ours - wanted).abs()
    largest, share = TOLERANCE[op]
    assert difference.max() <= largest
    assert (difference > 0).double().mean() <= share
    assert size == (2, 5) or (wanted != images).any()


def test_posterize_at_level_ten_is_black():
    """Older Pillows give black for posterize with no bits left, and so do we; Pillow 13 raises in timm."""
    ten = torch.full((4,), 10.0, dtype=torch.float64)
    assert one(pictures(4, 8, 8), torch.full((4,), Op.POSTERIZE.value), ten, ten.sign()).max() == 0


def test_a_skipped_operation_changes_nothing():
    images = pictures(8, 16, 16)
    _, level, sign = parameters(8)
    assert torch.equal(one(images, torch.full((8,), ra.NO_OP), level, sign), images)


def test_a_pair_is_its_operations_one_after_the_other():
    """Bytes are equal for all pairs but two geometric operations, which are resampled once."""
    pairs = [(a, b) for a in range(ra.NUM_OPS + 1) for b in range(ra.NUM_OPS + 1)]
    images = pictures(len(pairs), 19, 16)
    a, b = (torch.tensor(side) for side in zip(*pairs, strict=True))
    _, level_a, sign_a = parameters(len(pairs), seed=1)
    _, level_b, sign_b = parameters(len(pairs), seed=2)
    fill = torch.tensor(FILL, dtype=torch.uint8)
    both = [(a, ra.amounts(a, level_a, sign_a, 19, 16)), (b, ra.amounts(b, level_b, sign_b, 19, 16))]
    together = ra.apply_pair(images, both, fill)
    in_turn = one(one(images, a, level_a, sign_a), b, level_b, sign_b)
    equal = (together == in_turn).flatten(1).all(1)
    twice = ra._is_any(a, ra.GEOMETRIC) & ra._is_any(b, ra.GEOMETRIC)
    assert equal[~twice].all() and twice.sum() == 25
    # Twice resampled is the blurrier, but it is the same picture with the same frame.
    framed = (together == fill[:, None, None]).all(1) == (in_turn == fill[:, None, None]).all(1)
    assert framed[twice].double().mean() > 0.98
    assert (together[twice].int() - in_turn[twice].int()).abs().double().mean() < 3


def test_two_geometric_operations_are_pils_resampling_by_their_product():
    images = pictures(12, 24, 24)
    fill = torch.zeros(3, dtype=torch.uint8)
    rotate, shear = (
        ra.affine(drawn[0], ra.amounts(*drawn, 24, 24), 24, 24)
        for drawn in (parameters(12, Op.ROTATE, seed=1), parameters(12, Op.SHEAR_X, seed=2))
    )
    ours = ra.warp(images, [rotate, shear], fill)
    inside = ra.warp(torch.full_like(images, 255), [rotate, shear], fill) == 255
    bottom = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    for i in range(12):
        first, second = (torch.cat((m[i], bottom[None])) for m in (rotate, shear))
        product = (first @ second)[:2].flatten().tolist()
        wanted = to_pil(images[i]).transform((24, 24), Image.Transform.AFFINE, product, Image.Resampling.BILINEAR)
        wanted = torch.from_numpy(np.array(wanted)).permute(2, 0, 1)
        assert (ours[i].int() - wanted.int()).abs()[inside[i]].max() <= 1


def test_randaugment_against_sequences_of_pil(monkeypatch):
    """n = 3 (a pair and one more). A difference can grow in a later table, so a few values may differ by more."""
    images, count = pictures(60, 16, 16), 60
    uniforms = [tuple(torch.from_numpy(np.random.default_rng(s).random((4, count))).unbind(0)) for s in range(3)]
    ours = ra.randaugment(images, uniforms, 8.0, 0.5, torch.tensor(FILL, dtype=torch.uint8))
    sampled = [ra.sample(u, 8.0, 0.5) for u in uniforms]
    differing, compared = 0, 0
    for i in range(count):
        steps = [(int(op[i]), level[i].item(), sign[i].item()) for op, level, sign in sampled if op[i] != ra.NO_OP]
        if sum(op in ra.GEOMETRIC for op, _, _ in steps) > 1:
            continue
        wanted = images[i]
        for step in steps:
            wanted = by_timm(monkeypatch, wanted, *step)
        differing += ((ours[i].int() - wanted.int()).abs() > 2).sum().item()
        compared += wanted.numel()
    assert compared > 40 * 768 and differing / compared < 0.01


def test_sampling_is_timms():
    u = tuple(torch.from_numpy(np.random.default_rng(0).random((4, 60_000))).unbind(0))
    op, level, sign = ra.sample(u, 9.0, 0.5)
    counts = torch.bincount(op, minlength=ra.NUM_OPS + 1)
    assert len(counts) == ra.NUM_OPS + 1 and abs(counts[-1] / 60_000 - 0.5) < 0.01
    assert (counts[:-1] / 2000 - 1).abs().max() < 0.08
    draws = np.clip(np.random.default_rng(1).normal(9.0, 0.5, 60_000), 0, 10)
    np.testing.assert_allclose(
        np.quantile(level, (0.1, 0.5, 0.9, 0.99)), np.quantile(draws, (0.1, 0.5, 0.9, 0.99)), atol=0.02
    )
    assert abs(sign.mean()) < 0.02 and set(sign.tolist()) == {-1.0, 1.0}
    assert (ra.sample(u, 7.0, 0.0)[1] == 7.0).all()


def test_color_jitter_is_torchvisions_on_pil():
    images, count = pictures(48, 16, 16), 48
    u = tuple(torch.from_numpy(np.random.default_rng(0).random((4, count))).unbind(0))
    ours = ra.color_jitter(images, u, 0.4)
    apply = (TF.adjust_saturation, TF.adjust_contrast, TF.adjust_brightness)
    orders = [(0, 1, 2), (0, 2, 1), (1, 2, 0), (1, 0, 2), (2, 0, 1), (2, 1, 0)]
    assert set(orders) == {order for i in range(count) for order in [orders[int(u[0][i] * 6)]]}
    for i in range(count):
        wanted = to_pil(images[i])
        for which in orders[int(u[0][i] * 6)]:
            wanted = apply[which](wanted, 0.6 + 0.8 * u[1 + which][i].item())
        difference = (ours[i].int() - torch.from_numpy(np.array(wanted)).permute(2, 0, 1).int()).abs()
        assert difference.max() <= 2 and (difference > 0).double().mean() < 0.02


def test_compiled_form_runs_all_images_and_gives_the_same_bytes():
    """Compiled code sends every image through every operation, eager CPU code only those that need it."""
    images = pictures(64, 16, 16)
    uniforms = [tuple(torch.from_numpy(np.random.default_rng(s).random((4, 64))).unbind(0)) for s in range(2)]
    fill = torch.tensor(FILL, dtype=torch.uint8)

    def both(images):
        return ra.color_jitter(ra.randaugment(images, uniforms, 9.0, 0.5, fill), uniforms[0], 0.4)

    compiled = torch.compile(both, backend="eager", fullgraph=True)
    assert torch.equal(compiled(images), both(images))
