"""The order of an epoch is a reproducible permutation; samplers cover it exactly, on any number of shards."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import rng
from pipelines.errors import UserError
from pipelines.read.batch import LoaderSpec
from pipelines.read.crops import CropSpec
from pipelines.read.order import BatchSampler, Shard, epoch_order, indices_at, repeated
from pipelines.read.settings import ReadSettings


def samplers(n, local, world, *, shuffle, drop_last):
    return [BatchSampler(n, local * world, Shard(rank, world), 3, shuffle, drop_last) for rank in range(world)]


@pytest.mark.parametrize("n", [1, 2, 17, 40_000])
def test_order_is_a_permutation_sorted_by_philox(n):
    order = epoch_order(n, seed=5, epoch=2)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))
    words = rng.bits(5, 2, np.arange(n), rng.Purpose.ORDER).tolist()
    assert order.tolist() == sorted(range(n), key=lambda i: (words[i][0] << 32) + words[i][1])


def test_order_is_what_it_was():
    """Stored targets and runs to be resumed depend on it."""
    assert epoch_order(10, seed=0, epoch=0).tolist() == [2, 8, 0, 5, 9, 7, 6, 3, 4, 1]


def test_order_changes_with_seed_and_epoch_only():
    first = epoch_order(100, 1, 0)
    assert np.array_equal(first, epoch_order(100, 1, 0))
    assert not np.array_equal(first, epoch_order(100, 1, 1))
    assert not np.array_equal(first, epoch_order(100, 2, 0))
    assert np.array_equal(epoch_order(100, 1, 7, shuffle=False), np.arange(100))


def test_every_permutation_is_equally_likely():
    """Chi-squared over the 24 orders of 4 samples: 23 degrees of freedom, 58 is passed once in 20,000."""
    counts = dict.fromkeys(itertools.permutations(range(4)), 0)
    for epoch in range(2400):
        counts[tuple(epoch_order(4, 0, epoch).tolist())] += 1
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 58


@given(st.integers(1, 200), st.integers(1, 9), st.integers(1, 5))
def test_evaluation_takes_every_position_once_on_equal_steps(n, local, world):
    shards = samplers(n, local, world, shuffle=False, drop_last=False)
    assert len({sampler.steps_per_epoch for sampler in shards}) == 1
    taken = [sampler.positions(step) for sampler in shards for step in range(sampler.steps_per_epoch)]
    assert all(len(part) == local for part in taken)
    positions = np.concatenate(taken)
    assert np.array_equal(np.sort(positions[positions >= 0]), np.arange(n))
    assert len(positions) - n < local * world


@given(st.integers(20, 400), st.sampled_from([2, 4, 6]), st.integers(1, 3))
def test_training_is_the_same_on_any_number_of_shards(n, local, world):
    shards = samplers(n, local, world, shuffle=True, drop_last=True)
    alone = BatchSampler(n, local * world, Shard(), 3, True, True)
    assert alone.steps_per_epoch == n // (local * world)
    for step in range(alone.steps_per_epoch):
        parts = [sampler.positions(step) for sampler in shards]
        assert np.array_equal(np.concatenate(parts), alone.positions(step))
        for part in parts:  # the partner in mixup is the neighbour in the batch
            assert np.array_equal(part ^ 1, part.reshape(-1, 2)[:, ::-1].reshape(-1))
    assert np.array_equal(shards[-1].order(4), epoch_order(n, 3, 4))


@given(st.integers(4, 300), st.integers(2, 5))
def test_repeated_augmentation_repeats_the_first_images_of_the_order_and_never_pairs_one_with_itself(n, repeats):
    order = epoch_order(n, 3, 4)
    found = repeated(order, repeats)
    shown, counts = np.unique(found, return_counts=True)
    assert len(found) == n and set(shown) <= set(order[: 4 * -(-n // (4 * repeats))])
    full = n // (4 * repeats) * 4  # all but those of the last, incomplete chunk
    assert (counts[np.isin(shown, order[:full])] == repeats).all() and counts.max() <= repeats
    positions = np.arange(n // 4 * 4)
    partners = [found[positions ^ mask] for mask in (1, 2)]  # of mixup, and of MINE
    assert all((found[positions] != partner).all() for partner in partners) and (partners[0] != partners[1]).all()


def test_three_repeats_have_three_partners():
    found = repeated(np.arange(36), 3)
    assert found[:12].tolist() == [0, 1, 2, 3, 0, 2, 3, 1, 0, 3, 1, 2]
    for image in range(36 // 3):
        places = np.flatnonzero(found == image)
        assert len(set(found[places ^ 1])) == len(set(found[places ^ 2])) == 3


def test_repeated_augmentation_is_of_training_alone():
    def order(shuffle, aug_repeats):
        return BatchSampler(24, 4, Shard(), 3, shuffle, shuffle, aug_repeats).order(2)

    assert np.array_equal(order(True, 3), repeated(order(True, 1), 3))
    assert np.array_equal(order(False, 3), np.arange(24))


def test_positions_past_the_end_are_refused():
    sampler = BatchSampler(10, 4, Shard(), 0, True, True)
    for step in (-1, 2):
        with pytest.raises(IndexError, match="step"):
            sampler.positions(step)


def test_indices_keep_the_padding():
    order = np.array([2, 0, 1])
    assert indices_at(order, np.array([1, 2, -1])).tolist() == [0, 1, -1]


@pytest.mark.parametrize(
    ("n", "batch", "world", "drop_last", "message"),
    [
        (0, 2, 1, True, "empty"),
        (10, 0, 1, True, "positive multiple"),
        (10, 4, 3, False, "multiple of the number of processes, 3"),
        (10, 3, 1, True, "even on each.*take 4"),
        (60, 6, 2, True, "even on each.*take 8"),
        (10, 16, 1, True, r"^run.batch: 16 is larger than the dataset \(10 samples\): take at most 8"),
        (19, 24, 2, True, r"larger than the dataset \(19 samples\): take at most 16"),  # a multiple of 4 on each
        (7, 8, 2, True, "give at least 8 samples"),
    ],
)
def test_impossible_batches_name_the_fix(n, batch, world, drop_last, message):
    with pytest.raises(UserError, match=message):
        BatchSampler(n, batch, Shard(0, world), 0, True, drop_last)


def test_an_impossible_batch_of_evaluation_names_its_field():
    with pytest.raises(UserError, match="run.eval_batch: 7 must be a positive multiple of the number of processes, 2"):
        BatchSampler(10, 7, Shard(0, 2), 0, False, False)


@pytest.mark.parametrize(("rank", "world"), [(1, 1), (-1, 2), (0, 0)])
def test_impossible_shards(rank, world):
    with pytest.raises(UserError, match="rank"):
        Shard(rank, world)


def spec(**values):
    return LoaderSpec("x.beton", 8, image_size=32, shuffle=True, drop_last=True, crop=CropSpec(), **values)


def test_a_spec_gives_its_sampler():
    assert spec(seed=3, shard=Shard(1, 2)).sampler(50) == BatchSampler(
        50, 8, Shard(1, 2), seed=3, shuffle=True, drop_last=True
    )
    assert spec(aug_repeats=3).sampler(50).aug_repeats == 3


@pytest.mark.parametrize(("field", "value"), [("threads", -1), ("ahead", 0), ("aug_repeats", 0), ("resample", "cubic")])
def test_impossible_loaders_name_the_field(field, value):
    with pytest.raises(UserError, match=field):
        spec(**{field: value})


def test_a_spec_takes_every_setting_that_it_shares_with_the_recipe():
    settings = ReadSettings(
        image_size=40,
        crop=CropSpec("full"),
        resample="area",
        aug_repeats=2,
        threads=3,
        ahead=4,
        on_corrupt="skip",
        corrupt_limit=5,
        hw_decoder_load=0.5,
        one_part=True,
    )
    taken = LoaderSpec("x.beton", 8, shuffle=True, drop_last=True, **settings.shared(resample="bicubic"))
    default = ReadSettings()
    for field in dataclasses.fields(ReadSettings):
        value = getattr(taken, field.name)
        assert value == ("bicubic" if field.name == "resample" else getattr(settings, field.name))
        assert value != getattr(default, field.name) and field.metadata["help"]
