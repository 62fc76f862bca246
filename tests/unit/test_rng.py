"""Philox: Random123's known values, bit equality of the twins, the documented layout, no recompilation by epoch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from pipelines import rng
from pipelines.rng import Purpose

ONES = 0xFFFFFFFF
KNOWN_VALUES = [  # Random123, tests/kat_vectors, philox4x32 10
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEEDS = st.integers(-(2**63), 2**64 - 1)
EPOCHS = st.integers(0, ONES)
POSITIONS = st.lists(st.integers(-1, 2**40), min_size=1, max_size=8)
SHORTS = st.integers(0, 2**16 - 1)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_VALUES)
def test_known_values(counter, key, answer):
    assert tuple(int(w[0]) for w in rng.philox4x32(tuple(np.array([c], np.uint64) for c in counter), key)) == answer
    assert tuple(int(w[0]) for w in rng.philox4x32(tuple(torch.tensor([c]) for c in counter), key)) == answer


def plain_philox(counter: list[int], key: list[int]) -> list[int]:
    """Salmon et al. 2011, section 4.3, in Python's unbounded integers."""
    for round_number in range(10):
        if round_number:
            key = [(key[0] + 0x9E3779B9) & ONES, (key[1] + 0xBB67AE85) & ONES]
        high0, low0 = divmod(0xD2511F53 * counter[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * counter[2], 2**32)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
    return counter


@settings(deadline=None)
@given(SEEDS, EPOCHS, POSITIONS, SHORTS, SHORTS)
def test_twins_agree_with_the_documented_layout(seed, epoch, positions, purpose, draw):
    expected = [
        plain_philox([p % 2**32, p % 2**64 >> 32, epoch, purpose + (draw << 16)], [seed % 2**32, seed % 2**64 >> 32])
        for p in positions
    ]
    host = rng.bits(seed, epoch, np.array(positions), purpose, draw)
    device = rng.bits(seed, epoch, torch.tensor(positions), purpose, draw)
    tensor_epoch = rng.bits(seed, torch.tensor(epoch), torch.tensor(positions), purpose, draw)
    assert host.dtype == np.uint32 and device.dtype == torch.int64
    assert host.tolist() == expected
    assert device.tolist() == expected
    assert tensor_epoch.tolist() == expected


@settings(deadline=None)
@given(SEEDS, EPOCHS, POSITIONS)
def test_uniform_is_the_top_24_bits_in_both_twins(seed, epoch, positions):
    host = rng.uniform(seed, epoch, np.array(positions), Purpose.CROP)
    device = rng.uniform(seed, epoch, torch.tensor(positions), Purpose.CROP)
    words = rng.bits(seed, epoch, np.array(positions), Purpose.CROP)
    assert host.dtype == np.float32 and device.dtype == torch.float32
    assert (host.astype(np.float64) * 2**24 == words >> 8).all()
    assert np.array_equal(host, device.numpy())
    assert (host >= 0).all() and (host < 1).all()


def test_many_positions_are_each_their_own():
    """The numpy twin works in chunks: no seam, any shape."""
    n = 2 * rng._CHUNK + 3
    all_at_once = rng.bits(7, 1, np.arange(n), Purpose.MIX)
    assert np.array_equal(all_at_once, rng.bits(7, 1, torch.arange(n), Purpose.MIX).numpy())
    assert np.array_equal(all_at_once[-5:], rng.bits(7, 1, np.arange(n - 5, n), Purpose.MIX))
    grid = rng.bits(7, 1, np.arange(12, dtype=np.int32).reshape(3, 4), Purpose.MIX)
    assert np.array_equal(grid.reshape(12, 4), all_at_once[:12])
    assert rng.bits(7, 1, torch.arange(12).reshape(3, 4), Purpose.MIX).shape == (3, 4, 4)


def test_stored_targets_depend_on_these_numbers():
    names = (
        "ORDER CROP FLIP SHIFT ERASE ERASE_NOISE MIX RANDAUGMENT JITTER DROP_PATH CONVERT_ORDER CONVERT_MODE "
        "TRIVIAL_AUGMENT THREE_AUGMENT"
    )
    assert {p.name: p.value for p in Purpose} == {name: i for i, name in enumerate(names.split())}


def test_compiles_without_breaks_and_once_for_all_epochs():
    counter = CompileCounter()
    position = torch.arange(6)
    draw = torch.compile(
        lambda e: rng.uniform(2**63 + 5, e, position, Purpose.FLIP, 3), backend=counter, fullgraph=True
    )
    for epoch in (0, 1, 2, 300, ONES):
        expected = rng.uniform(2**63 + 5, epoch, position.numpy(), Purpose.FLIP, 3)
        assert np.array_equal(draw(torch.tensor(epoch)).numpy(), expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "bad", [{"purpose": 1 << 16}, {"purpose": -1}, {"draw": 1 << 16}, {"epoch": -1}, {"epoch": 1 << 32}]
)
def test_out_of_range_is_refused(bad):
    arguments = {"epoch": 0, "purpose": 1, "draw": 0} | bad
    for position in (np.arange(2), torch.arange(2)):
        with pytest.raises(ValueError, match="must lie in"):
            rng.bits(0, arguments["epoch"], position, arguments["purpose"], arguments["draw"])


def test_a_tensor_epoch_with_a_host_position_is_refused():
    with pytest.raises(TypeError, match="tensor epoch or draw"):
        rng.uniform(0, torch.tensor(1), np.arange(2), 0)
