"""TrivialAugment and 3-Augment for a batch against torchvision and PIL, one image after the other."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import InterpolationMode, v2

from pipelines import rng
from pipelines.augment import policies
from pipelines.augment import randaugment as ra
from pipelines.augment.device import Augment
from pipelines.augment.randaugment import Op
from pipelines.augment.spec import AugmentSpec
from pipelines.read.batch import Batch
from pipelines.rng import Purpose
from tests.unit.test_randaugment import EXACT, FILL, TOLERANCE, pictures, to_pil

TORCHVISIONS = v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR)
NAMES = list(TORCHVISIONS._AUGMENTATION_SPACE)


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def uniforms(count: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(np.random.default_rng(seed).random((4, count))).unbind(0))


def by_torchvision(image: torch.Tensor, name: str, strength: int, sign: float) -> torch.Tensor:
    """What torchvision makes of an image [3, H, W], at the strength that its own table has."""
    values, signed = TORCHVISIONS._AUGMENTATION_SPACE[name]
    table = values(31, *image.shape[1:])
    value = 0.0 if table is None else float(table[strength]) * (sign if signed else 1.0)
    changed = TORCHVISIONS._apply_image_or_video_transform(
        to_pil(image), name, value, interpolation=TORCHVISIONS.interpolation, fill=TORCHVISIONS._fill
    )
    return to_tensor(changed)


def test_operations_are_torchvisions_in_its_order():
    ours = ["identity" if op == ra.NO_OP else Op(op).name.replace("_", "").lower() for op in policies.TRIVIAL_OPS]
    assert ours == [name.lower() for name in NAMES]


@pytest.mark.parametrize("size", [(40, 40), (21, 37)])
@pytest.mark.parametrize("name", NAMES)
def test_trivial_augments_operations_agree_with_torchvision_at_every_strength(name, size):
    op = policies.TRIVIAL_OPS[NAMES.index(name)]
    strength = torch.arange(31).repeat(2)
    sign = torch.tensor([1.0, -1.0]).repeat_interleave(31)
    images, ops = pictures(62, *size), torch.full((62,), int(op))
    amount = policies.trivial_amounts(ops, strength, sign, *size)
    ours = ra.apply_pair(images, [(ops, amount)], torch.zeros(3, dtype=torch.uint8))
    compared = torch.ones(ours.shape, dtype=torch.bool)
    if name.startswith("Translate"):
        compared[strength == 15] = False  # torchvision's int(15.999999)
    if name == "Solarize":
        compared &= images != amount[:, None, None, None]  # a value at the threshold
    wanted = torch.stack([by_torchvision(images[i], name, int(strength[i]), sign[i].item()) for i in range(62)])
    difference = (ours.int() - wanted.int()).abs()[compared]
    largest, share = TOLERANCE.get(op, EXACT)
    assert difference.max() <= largest
    assert (difference > 0).double().mean() <= share
    assert (wanted != images).any() == (name != "Identity")


def test_trivial_augment_draws_every_operation_strength_and_sign_alike():
    count = 62_000
    op, strength, sign = policies.trivial_sample(uniforms(count))
    assert torch.bincount(op, minlength=ra.NUM_OPS + 1)[list(policies.TRIVIAL_OPS)].sum() == count
    drawn = torch.bincount(op)[list(policies.TRIVIAL_OPS)] / count
    assert (drawn * 14 - 1).abs().max() < 0.06
    assert strength.min() == 0 and (torch.bincount(strength) / count * 31 - 1).abs().max() < 0.1
    assert set(sign.tolist()) == {-1.0, 1.0} and abs(sign.mean()) < 0.02


@pytest.mark.parametrize("size", [(32, 32), (20, 29), (2, 5), (1, 1)])
def test_the_blur_is_pils(size):
    images = pictures(40, *size)
    radius = torch.cat((torch.tensor([0.0, 0.1, 1.2247, 1.23, 2.0]).double(), 0.1 + 1.9 * uniforms(35)[0]))
    ours = policies.gaussian_blur(images, radius)
    for i in range(40):
        assert torch.equal(ours[i], to_tensor(to_pil(images[i]).filter(ImageFilter.GaussianBlur(radius[i].item())))), i
    assert torch.equal(ours[0], images[0])


def test_three_augment_is_grayscale_solarize_or_blur_of_pil():
    images, u = pictures(60, 24, 24), uniforms(60)
    ours = policies.three_augment(images, u)
    kinds = (u[0] * 3).long().tolist()
    assert {kinds.count(kind) > 12 for kind in range(3)} == {True}
    for i, kind in enumerate(kinds):
        image = to_pil(images[i])
        wanted = (
            v2.functional.to_grayscale(image, 3),
            ImageOps.solarize(image),
            image.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * u[1][i].item())),
        )[kind]
        assert torch.equal(ours[i], to_tensor(wanted)), kind


@pytest.mark.parametrize("policy", [policies.trivial_augment, policies.three_augment])
def test_compiled_form_runs_all_images_and_gives_the_same_bytes(policy):
    images, u = pictures(64, 16, 16), uniforms(64)
    assert torch.equal(torch.compile(policy, backend="eager", fullgraph=True)(images, u), policy(images, u))


@pytest.mark.parametrize("policy, n, jitter", [
    ("randaugment", 2, 0.0), ("randaugment", 3, 0.3), ("randaugment", 0, 0.3),
    ("trivial_augment", 0, 0.3), ("three_augment", 0, 0.3),
])  # fmt: skip
def test_in_augment_a_policy_stands_between_flip_and_jitter(policy, n, jitter):
    images, positions = pictures(16, 16, 16), torch.arange(100, 116)
    spec = AugmentSpec(policy=policy, randaugment_n=n, color_jitter=jitter, mixup=0.0, cutmix=0.0, erase=0.0)
    augment = Augment(spec, 3)

    def uniform(purpose, draw=0):
        return tuple(rng.uniform(3, 7, positions, purpose, draw).double().unbind(1))

    flipped = uniform(Purpose.FLIP)[0] < 0.5
    wanted = torch.where(flipped[:, None, None, None], images.flip(3), images)
    if policy == "randaugment":
        draws = [uniform(Purpose.RANDAUGMENT, i) for i in range(n)]
        wanted = ra.randaugment(wanted, draws, 9.0, 0.5, torch.tensor(FILL, dtype=torch.uint8))
    else:
        wanted = getattr(policies, policy)(wanted, uniform(Purpose[policy.upper()]))
    if jitter:
        wanted = ra.color_jitter(wanted, uniform(Purpose.JITTER), jitter)
    assert not torch.equal(wanted, images)
    got = augment(Batch(images, positions, positions, positions.numpy(), 7, 0)).images
    assert torch.equal(got, augment.normalise_only(wanted))
