"""MINE: the bound, its split form, who maximises and who minimises, and the corrected gradient."""

import math

import pytest
import torch
import torch.nn.functional as F

from std_fast.method.mine import MutualInformation, StatisticsNetwork, mutual_information, partner_rows


def tokens(B=8, M=2, C=6, P=5, dtype=torch.float64):
    torch.manual_seed(0)
    return (torch.randn(B, M, n, dtype=dtype, requires_grad=True) for n in (C, P))


@pytest.mark.parametrize("rows", [2, 3, 4, 6, 8, 12])
def test_partners_are_other_images_and_not_the_mixing_neighbour(rows):
    index = torch.arange(rows).view(-1, 1)
    partner = partner_rows(index).flatten()
    assert sorted(partner.tolist()) == list(range(rows))
    assert (partner != index.flatten()).all()
    if rows % 4 == 0:
        assert (partner != (index.flatten() ^ 1)).all()  # row XOR 1 shares its content after mixup
        assert (partner // 4 == index.flatten() // 4).all()  # so a shard of a multiple of four holds its partners


def test_split_first_layer_equals_the_network_on_concatenated_pairs():
    psi = StatisticsNetwork(6, 5, width=16).double()
    ts, tc = tokens()
    joint, marginal = psi(ts, tc)
    weight = torch.cat([psi.fc1_s.weight, psi.fc1_c.weight], 1)

    def full(s, c):
        hidden = F.gelu(F.linear(torch.cat([s, c], -1), weight, psi.fc1_s.bias))
        return psi.fc3(F.gelu(psi.fc2(hidden))).squeeze(-1)

    torch.testing.assert_close(joint, full(ts, tc), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(marginal, full(ts, tc[torch.arange(8) ^ 2]), rtol=1e-12, atol=1e-12)
    expected = joint.mean() - marginal.exp().mean().log()
    torch.testing.assert_close(mutual_information(psi, ts, tc), expected, rtol=1e-12, atol=1e-12)


def test_one_backward_pass_trains_both_sides():
    mine = MutualInformation(6, 5, width=16, weight=0.25).double()
    ts, tc = tokens()
    (-mine(ts, tc)).backward()
    plain_ts, plain_tc = (x.detach().requires_grad_() for x in (ts, tc))
    v = mutual_information(mine.psi, plain_ts, plain_tc)
    grads = torch.autograd.grad(v, [plain_ts, plain_tc, *mine.psi.parameters()])
    torch.testing.assert_close(ts.grad, 0.25 * grads[0])  # descending it, the tokens lower V
    torch.testing.assert_close(tc.grad, 0.25 * grads[1])
    for parameter, grad in zip(mine.psi.parameters(), grads[2:], strict=True):
        torch.testing.assert_close(parameter.grad, -grad)  # descending it, psi raises V


def test_moving_average_corrects_the_gradient_and_not_the_value():
    plain = MutualInformation(6, 5, width=16).double()
    corrected = MutualInformation(6, 5, width=16, ema=0.1).double()
    corrected.load_state_dict(plain.state_dict())
    ts, tc = tokens()
    first = corrected(ts, tc)
    torch.testing.assert_close(first, plain(ts, tc))  # the average starts at the first batch's value
    log_average = math.log(7.0)
    corrected.log_average.fill_(log_average)
    value = corrected(ts, tc)
    torch.testing.assert_close(value, plain(ts, tc))
    _, marginal = corrected.psi(ts, tc)
    mean_exp = marginal.exp().mean()
    average = 0.9 * 7.0 + 0.1 * mean_exp.item()
    assert corrected.log_average.item() == pytest.approx(math.log(average))
    (got,) = torch.autograd.grad(value, corrected.psi.fc3.bias)
    (joint_part,) = torch.autograd.grad(corrected.psi(ts, tc)[0].mean(), corrected.psi.fc3.bias)
    (biased,) = torch.autograd.grad(mean_exp, corrected.psi.fc3.bias)
    torch.testing.assert_close(got, joint_part - biased / average)


def test_psi_learns_that_dependent_tokens_are_dependent():
    torch.manual_seed(0)
    mine = MutualInformation(1, 1, width=32, weight=0.0)
    optimizer = torch.optim.Adam(mine.parameters(), lr=5e-3)
    rho = 0.9
    for _ in range(150):
        x = torch.randn(512, 1, 1)
        y = rho * x + math.sqrt(1 - rho**2) * torch.randn(512, 1, 1)
        optimizer.zero_grad()
        (-mine(x, y)).backward()
        optimizer.step()
    x = torch.randn(4096, 1, 1)
    y = rho * x + math.sqrt(1 - rho**2) * torch.randn(4096, 1, 1)
    truth = -0.5 * math.log(1 - rho**2)
    with torch.no_grad():
        assert 0.6 * truth < mine(x, y).item() < 1.15 * truth
        assert mine(x, torch.randn(4096, 1, 1)).item() < 0.2 * truth  # the same network on independent tokens


def test_tokens_of_another_length_are_named():
    with pytest.raises(ValueError, match=r"tokens of lengths \(16, 8\): psi was made for \(dim_s, dim_c\) = \(16, 9\)"):
        MutualInformation(16, 9)(torch.zeros(4, 1, 16), torch.zeros(4, 1, 8))


def test_a_lone_image_has_no_marginal_partner():
    with pytest.raises(ValueError, match="another image"):
        partner_rows(torch.zeros(1, 3))
