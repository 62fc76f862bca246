"""The batched augmentation against a slow per-image reference, against timm's own boxes, and against its promises."""

import random

import numpy as np
import pytest
import timm.data.mixup
import timm.data.random_erasing
import torch
import torchvision.transforms.v2.functional as TF
from scipy.special import betaincinv
from torch._dynamo.testing import CompileCounter

from pipelines import rng
from pipelines.augment import device
from pipelines.augment.device import (
    ERASE_SHARE,
    Augment,
    beta_table,
    cutmix_boxes,
    erase_boxes,
    inverse_cdf,
    noise_pool,
)
from pipelines.augment.spec import AugmentSpec
from pipelines.errors import UserError
from pipelines.read.batch import Batch
from pipelines.rng import Purpose

SEED = 2**40 + 17
OFF = dict(flip=0.0, shift=0, mixup=0.0, cutmix=0.0, erase=0.0)


def make_batch(rows=16, height=12, width=12, epoch=3, first=64, step=4) -> Batch:
    images = np.random.default_rng(0).integers(0, 256, (first + rows, height, width, 3), dtype=np.uint8)[first:]
    positions = torch.arange(first, first + rows)
    return Batch(
        images=torch.from_numpy(images).permute(0, 3, 1, 2),
        labels=(positions * 7) % 10,
        positions=positions,
        indices=positions.numpy(),
        epoch=epoch,
        step=step,
    )


def reference(batch: Batch, spec: AugmentSpec, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """One image after the other, numpy only, written from the docstrings. -> images [B, H, W, 3], lam [B]."""
    stored = batch.images.permute(0, 2, 3, 1).numpy()
    B, H, W, _ = stored.shape

    def uniform(purpose, i, draw=0):
        return rng.uniform(seed, batch.epoch, batch.positions[i : i + 1].numpy(), purpose, draw)[0].astype(np.float64)

    pool = noise_pool(seed, 1 << 20)
    clean = []
    for i in range(B):
        image = stored[i]
        if spec.shift:
            s = spec.shift
            dy, dx = (int(u * (2 * s + 1)) for u in uniform(Purpose.SHIFT, i)[:2])
            image = np.pad(image, ((s, s), (s, s), (0, 0)), mode="reflect")[dy : dy + H, dx : dx + W]
        if uniform(Purpose.FLIP, i)[0] < spec.flip:
            image = image[:, ::-1]
        image = (image / 255.0 - np.array(spec.mean)) / np.array(spec.std)
        gate, share, aspect, offset = uniform(Purpose.ERASE, i)
        if gate < spec.erase:
            y, x = uniform(Purpose.ERASE, i, 1)[:2]
            area = H * W * (0.02 + share * (1 / 3 - 0.02))
            ratio = np.exp(np.log(0.3) + aspect * (np.log(1 / 0.3) - np.log(0.3)))
            h, w = min(round(np.sqrt(area * ratio)), H - 1), min(round(np.sqrt(area / ratio)), W - 1)
            top, left = int(y * (H - h + 1)), int(x * (W - w + 1))
            start = int(offset * (len(pool) - image.size + 1))
            noise = pool[start : start + image.size].reshape(image.shape)
            image[top : top + h, left : left + w] = noise[top : top + h, left : left + w]
        clean.append(image)
    mixed, lams = [], []
    for i in range(B):
        image, partner, lam = clean[i].copy(), clean[i ^ 1], 1.0
        gate, choice, beta = uniform(Purpose.MIX, i)[:3]
        if gate < spec.mix_prob and (spec.mixup or spec.cutmix):
            cut = spec.cutmix > 0 and (spec.mixup == 0 or choice < spec.switch)
            alpha = spec.cutmix if cut else spec.mixup
            cells = 4096
            low = betaincinv(alpha, alpha, int(beta * cells) / cells)
            lam = low + (betaincinv(alpha, alpha, (int(beta * cells) + 1) / cells) - low) * (beta * cells % 1)
            if cut:
                cy, cx = (int(u * n) for u, n in zip(uniform(Purpose.MIX, i, 1), (H, W), strict=False))
                h, w = int(H * np.sqrt(1 - lam)), int(W * np.sqrt(1 - lam))
                box = (slice(max(cy - h // 2, 0), cy + (h + 1) // 2), slice(max(cx - w // 2, 0), cx + (w + 1) // 2))
                image[box] = partner[box]
                lam = 1 - image[box].size / image.size
            else:
                image = lam * image + (1 - lam) * partner
        mixed.append(image)
        lams.append(lam)
    return np.stack(mixed), np.array(lams)


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(OFF),
        dict(OFF, flip=0.5),
        dict(OFF, shift=5),
        dict(OFF, erase=0.6),
        dict(OFF, mixup=0.2),
        dict(OFF, cutmix=1.0),
        dict(OFF, mixup=0.8, cutmix=1.0, mix_prob=0.5, switch=0.3),
        dict(shift=2, erase=0.5, mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2)),
    ],
)
@pytest.mark.parametrize("shape", [(16, 12, 12), (8, 9, 14)])
def test_agrees_with_a_per_image_reference(changes, shape):
    batch, spec = make_batch(*shape), AugmentSpec(**changes)
    mixed = Augment(spec, SEED)(batch)
    images, lam = reference(batch, spec, SEED)
    np.testing.assert_allclose(mixed.images.permute(0, 2, 3, 1).numpy(), images, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(mixed.lam.numpy(), lam, rtol=0, atol=1e-7)
    assert mixed.lam.dtype == torch.float32 and mixed.images.dtype == torch.float32
    assert mixed.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(mixed.labels_a, batch.labels) and torch.equal(mixed.positions, batch.positions)
    partner = np.arange(len(lam)) ^ 1
    assert torch.equal(mixed.labels_b, batch.labels[partner] if spec.mixes else batch.labels)
    assert (mixed.epoch, mixed.step) == (3, 4)


def test_a_sample_does_not_depend_on_the_rest_of_the_batch():
    augment = Augment(AugmentSpec(shift=2, erase=0.5), SEED)
    batch = make_batch(16)
    both = augment(batch)
    for rows in (slice(0, 4), slice(4, 16)):
        part = Batch(
            batch.images[rows], batch.labels[rows], batch.positions[rows], batch.indices[rows], batch.epoch, batch.step
        )
        piece = augment(part)
        assert torch.equal(piece.images, both.images[rows]) and torch.equal(piece.lam, both.lam[rows])


def test_epochs_and_seeds_differ():
    spec = AugmentSpec()
    first = Augment(spec, SEED)(make_batch()).lam
    assert not torch.equal(first, Augment(spec, SEED + 1)(make_batch()).lam)
    assert not torch.equal(first, Augment(spec, SEED)(make_batch(epoch=4)).lam)


@pytest.mark.parametrize("policy", [{"randaugment_n": 2}, {"policy": "trivial_augment"}, {"policy": "three_augment"}])
def test_compiles_once_without_graph_break(policy):
    spec = AugmentSpec(shift=2, erase=0.5, color_jitter=0.2, **policy)
    augment, plain, counter = Augment(spec, SEED), Augment(spec, SEED), CompileCounter()
    augment.compile(backend=counter)  # fullgraph: an .item() or a branch on a tensor would raise here
    for epoch, step in ((0, 0), (0, 1), (1, 0), (2, 5), (299, 1250)):
        batch = make_batch(epoch=epoch, step=step, first=64 + 16 * step)
        mixed, wanted = augment(batch), plain(batch)
        assert torch.equal(mixed.images, wanted.images) and torch.equal(mixed.lam, wanted.lam)
        assert (mixed.epoch, mixed.step) == (epoch, step)
    assert counter.frame_count == 1


def test_cutmix_boxes_are_timms(monkeypatch):
    lam, y, x = torch.rand(3, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    height, width = 32, 20
    ours = torch.stack(cutmix_boxes(lam, y, x, height, width), 1).tolist()
    for i in range(len(lam)):
        centre = iter((int(y[i] * height), int(x[i] * width)))
        monkeypatch.setattr(np.random, "randint", lambda *_, centre=centre, **__: next(centre))
        (top, bottom, left, right), share = timm.data.mixup.cutmix_bbox_and_lam((3, height, width), lam[i].item())
        assert ours[i] == [top, left, bottom, right]
        assert share == 1 - (bottom - top) * (right - left) / (height * width)


def test_erase_boxes_are_timms(monkeypatch):
    share, aspect, y, x = torch.rand(4, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    height, width = 40, 32
    ours = torch.stack(erase_boxes(share, aspect, y, x, height, width), 1).tolist()
    timms = timm.data.random_erasing.RandomErasing(1.0, *ERASE_SHARE, mode="const", device="cpu")
    fitted = 0
    for i in range(len(share)):
        unit, place = iter((share[i].item(), aspect[i].item())), iter((y[i].item(), x[i].item()))
        monkeypatch.setattr(random, "uniform", lambda a, b, unit=unit: a + (b - a) * next(unit))
        monkeypatch.setattr(random, "randint", lambda a, b, place=place: a + int(next(place) * (b - a + 1)))
        image = torch.ones(3, height, width)
        try:
            timms(image)
        except StopIteration:  # the box does not fit and timm asks for another draw: ours is clipped
            top, left, bottom, right = ours[i]
            assert bottom - top == height - 1 or right - left == width - 1
            continue
        top, left, bottom, right = ours[i]
        wanted = torch.ones(3, height, width)
        wanted[:, top:bottom, left:right] = 0
        assert torch.equal(image, wanted)
        fitted += 1
    assert fitted > 380


@pytest.mark.parametrize("alpha, tolerance", [(0.2, 1e-6), (0.8, 2e-5), (1.0, 1e-12), (2.0, 4e-3)])
def test_beta_table_is_the_inverse_distribution_function(alpha, tolerance):
    u = (np.arange(20_000) + 0.31) / 20_000
    ours = inverse_cdf(torch.from_numpy(beta_table(alpha)), torch.from_numpy(u)).numpy()
    assert np.abs(ours - betaincinv(alpha, alpha, u)).max() < tolerance


def test_lam_follows_timms_distribution():
    """Mean and spread of lam over 4096 samples against timm's own draws, mode "elem"."""
    batch = make_batch(rows=4096, height=8, width=8)
    ours = Augment(AugmentSpec(erase=0.0), SEED)(batch).lam.numpy()
    np.random.seed(0)  # noqa: NPY002  timm draws from the global generator
    timms = timm.data.mixup.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, mode="elem", num_classes=10)._mix_elem(
        torch.zeros(4096, 3, 8, 8)
    )
    quantiles = np.linspace(0.05, 0.95, 10)
    np.testing.assert_allclose(np.quantile(ours, quantiles), np.quantile(timms.numpy(), quantiles), atol=0.04)


def test_normalise_only_is_torchvisions():
    images = make_batch().images
    spec = AugmentSpec(mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2))
    ours = Augment(spec, SEED).normalise_only(images)
    wanted = TF.normalize(images.float() / 255, spec.mean, spec.std)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=2e-6)
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_noise_is_standard_normal_and_a_function_of_the_seed():
    pool = noise_pool(SEED, 100_000)
    assert abs(pool.mean()) < 0.01 and abs(pool.std() - 1) < 0.01
    assert abs(np.mean(pool[:-1] * pool[1:])) < 0.01 and 0.0022 < np.mean(np.abs(pool) > 3) < 0.0032
    assert np.array_equal(pool[:999], noise_pool(SEED, 999))
    assert not np.array_equal(pool[:999], noise_pool(SEED + 1, 999))


def test_an_image_larger_than_the_noise_pool_is_filled_from_its_repetition(monkeypatch):
    monkeypatch.setattr(device, "ERASE_SHARE", (0.98, 0.99))
    augment = Augment(AugmentSpec(**dict(OFF, erase=1.0)), SEED)
    augment.noise = augment.noise[:100].clone()
    mixed = augment(make_batch(4))
    erased = torch.isin(mixed.images, augment.noise).float().mean()
    assert erased > 0.6


def test_statistics_of_flip_and_shift():
    """Every shift is as frequent as any other, and half of the images are flipped."""
    rows, size, shift = 5000, 7, 2
    ramp = torch.arange(size * size, dtype=torch.uint8).view(1, 1, size, size).expand(rows, 3, size, size)
    positions = torch.arange(rows)
    batch = Batch(ramp, positions, positions, positions.numpy(), 0, 0)
    spec = AugmentSpec(**dict(OFF, flip=0.5, shift=shift), mean=(0, 0, 0), std=(1, 1, 1))
    images = (Augment(spec, SEED)(batch).images * 255).round().int()[:, 0]
    flipped = images[:, 3, 2] > images[:, 3, 4]
    assert abs(flipped.float().mean() - 0.5) < 0.03
    centre = images[:, 3, 3]
    _, counts = centre.unique(return_counts=True)
    assert len(counts) == 25 and counts.min() > 140 and counts.max() < 265


@pytest.mark.parametrize(
    "changes",
    [
        dict(flip=1.5), dict(flip=float("nan")), dict(flip="half"), dict(shift=-1), dict(shift=1.5), dict(mixup=-0.1),
        dict(cutmix=1000), dict(mix_prob=2), dict(switch=-1), dict(erase=True), dict(mean=0.5),
        dict(policy="autoaugment"), dict(randaugment_n=9), dict(randaugment_n=2.0), dict(randaugment_m=11),
        dict(randaugment_mstd=-0.5), dict(color_jitter=1.5), dict(mean=(123.7, 116.3, 103.5)), dict(std=(0.2, 0.2)),
        dict(std=(0.2, 0.2, 0.0)),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_by_name(changes):
    (name,) = changes
    with pytest.raises(UserError, match=rf"^augment\.{name} must be [^\n]+, not [^\n]+$"):
        AugmentSpec(**changes)


def test_one_policy_at_a_time():
    with pytest.raises(UserError, match=r"augment.randaugment_n must be 0 with augment.policy three_augment, not 2"):
        AugmentSpec(policy="three_augment", randaugment_n=2)


def test_lists_from_yaml_make_a_hashable_spec():
    assert hash(AugmentSpec(mean=[0.5, 0.5, 0.5])) == hash(AugmentSpec(mean=(0.5, 0.5, 0.5)))


def test_shapes_that_cannot_be_augmented_are_refused():
    with pytest.raises(UserError, match="even batch on each device, not 3"):
        Augment(AugmentSpec(), SEED)(make_batch(3))
    with pytest.raises(UserError, match=r"augment\.shift must be smaller than the image \(12x12\), not 12"):
        Augment(AugmentSpec(shift=12), SEED)(make_batch())
    assert len(Augment(AugmentSpec(mixup=0.0, cutmix=0.0), SEED)(make_batch(3)).images) == 3
