"""Stochastic depth that skips what it drops: the function of the scaling kind, the same for any number of ranks."""

import numpy as np
import pytest
import torch

from pipelines import rng
from std_fast.models import build_backbone
from std_fast.models.drop_path import GROUP, branch_draws, kept_rows

STUDENTS = {
    "mixer": {"patch_size": 8, "dim": 16, "depth": 3, "token_dim": 8, "channel_dim": 32},
    "resmlp": {"patch_size": 8, "dim": 16, "depth": 3, "layer_scale": 0.5},
    "cyclemlp": {"layers": [1, 2], "embed_dims": [8, 16], "mlp_ratios": [2, 2], "stem_stride": 2},
}
EPOCH = torch.tensor(3)


def rows_of(rates, positions, epoch=EPOCH):
    return kept_rows(rates)(torch.tensor(rates)[:, None], 7, epoch, positions)


@pytest.mark.parametrize("branches", [1, 6, 24])
def test_draws_are_those_of_the_generator(branches):
    """Branch 4 d + w has word w of draw d: resumed and distributed runs depend on it."""
    positions = torch.tensor([5, 0, 1 << 33])
    draws = [rng.uniform(7, 3, positions.numpy(), rng.Purpose.DROP_PATH, draw) for draw in range(6)]
    expected = np.concatenate(draws, axis=1).T[:branches]
    assert np.array_equal(branch_draws(branches, 7, EPOCH, positions).numpy(), expected)


@pytest.mark.parametrize("family", ["mixer", "resmlp"])
def test_the_rate_is_the_same_in_every_block(family):
    """As student.drop_path's text says; CycleMLP's, which rises, is in test_cyclemlp.py."""
    model = build_backbone(family, 5, 32, drop_path=0.3, **STUDENTS[family])
    assert set(model.drop_rates) == {0.3} and len(model.drop_rates) == 2 * model.depth


@pytest.mark.parametrize("family", STUDENTS)
def test_what_is_skipped_is_what_a_scale_of_nothing_drops(family):
    """Outputs and gradients are those of scales 0 and B / R."""
    torch.manual_seed(0)
    B = 2 * GROUP
    model = build_backbone(family, 5, 32, drop_path=0.3, **STUDENTS[family]).double().train()
    with torch.no_grad():
        for parameter in model.parameters():  # a head of zeros would hide everything
            parameter.add_(0.1 * torch.randn_like(parameter))
    images = torch.randn(B, 3, 32, 32, dtype=torch.float64).to(memory_format=torch.channels_last)
    rows = rows_of(model.drop_rates, torch.arange(B))
    scales = torch.ones(len(rows), B, dtype=torch.float64)
    for branch, kept in enumerate(rows):
        if kept is not None:
            scales[branch] = 0
            scales[branch, kept] = B / len(kept)
    found = []
    for keep in (rows, scales):
        taps = model.forward_taps(images, (1, 2), keep)
        out = torch.cat([taps.logits.flatten(), *[z.flatten() for z in taps.features]])
        found.append([out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))])
    assert (scales == 0).any() and out.abs().max() > 0.1
    for skipped, scaled in zip(*found, strict=True):
        torch.testing.assert_close(skipped, scaled, rtol=1e-10, atol=1e-10)


def test_the_same_number_of_every_group_is_kept_and_any_split_of_the_batch_draws_alike():
    rates, positions = [0.0, 0.1, 0.5, 0.99], torch.arange(4 * GROUP) + 1000
    rows = rows_of(rates, positions)
    assert rows[0] is None
    for rate, kept in zip(rates[1:], rows[1:], strict=True):
        left = GROUP - min(GROUP - 1, round(GROUP * rate))
        assert kept.tolist() == sorted(set(kept.tolist()))
        assert torch.bincount(kept // GROUP, minlength=4).tolist() == [left] * 4
    half = 2 * GROUP
    first, second = rows_of(rates, positions[:half]), rows_of(rates, positions[half:])
    for full, one, other in zip(rows[1:], first[1:], second[1:], strict=True):
        assert torch.equal(full, torch.cat([one, other + half]))
    again = rows_of(rates, positions, EPOCH + 1)
    assert torch.equal(rows_of(rates, positions)[2], rows[2]) and not torch.equal(again[2], rows[2])


def test_every_image_is_left_out_as_often_as_the_rate_says():
    rates, counts = [0.25] * 4, torch.zeros(GROUP)
    for epoch in range(200):
        for kept in rows_of(rates, torch.arange(GROUP), torch.tensor(epoch)):
            counts[kept] += 1
    assert (counts / 800 - 0.75).abs().max() < 0.08  # five deviations


def test_a_list_of_another_length_is_refused():
    model = build_backbone("mixer", 5, 32, drop_path=0.3, **STUDENTS["mixer"])
    with pytest.raises(ValueError, match="keep holds 1 entries, not one for each of 6 branches"):
        model.forward_taps(torch.zeros(2, 3, 32, 32), (), [None])
