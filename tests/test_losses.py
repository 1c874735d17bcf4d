"""Objectives against loops and PyTorch's cross-entropy."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from recclr.errors import ShapeError
from recclr.kernels import masked_logsumexp
from recclr.losses import (
    automatic_temperature,
    contrastive_loss,
    information_bound,
    mean_weights,
)


@pytest.mark.parametrize("scale", [1.0, 3000.0])
def test_infonce_is_cross_entropy_over_positive_and_negatives(scale):
    draws = torch.Generator().manual_seed(0)
    positive = (torch.randn(5, generator=draws) * scale).requires_grad_()
    negatives = (torch.randn(5, 9, generator=draws) * scale).requires_grad_()
    logits = torch.cat([positive[:, None], negatives], 1)
    expected = cross_entropy(logits, torch.zeros(5, dtype=torch.int64), reduction="none")
    found = contrastive_loss(positive, torch.logsumexp(negatives, 1))
    torch.testing.assert_close(found, expected)
    ours, theirs = (
        torch.autograd.grad(loss.sum(), (positive, negatives)) for loss in (found, expected)
    )
    torch.testing.assert_close(ours, theirs)


def test_bsl_raises_the_sum_of_negatives_to_the_second_temperature():
    positive = torch.tensor([0.7, -0.2])
    negatives = torch.tensor([[0.1, -0.4, 0.9], [1.1, 0.3, -2.0]])
    expected = [
        -math.log(math.exp(own) / math.fsum(map(math.exp, others)) ** 1.22)
        for own, others in zip(positive.tolist(), negatives.tolist(), strict=True)
    ]
    found = contrastive_loss(positive, torch.logsumexp(negatives, 1), second_temperature=1.22)
    torch.testing.assert_close(found, torch.tensor(expected))


def test_information_is_what_the_loss_leaves_of_the_choice():
    assert information_bound(math.log(8), 8) == 0.0
    assert information_bound(0.0, 8) == pytest.approx(math.log(8))
    assert information_bound(3.0, 8) < 0


@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_the_bound_holds_and_is_near_where_the_score_is_the_density_ratio(noise):
    """Gaussians x and y = x + noise: their information is log(1 + 1 / noise²) / 2."""
    draws, size = torch.Generator().manual_seed(2), 512
    x = torch.randn(size, generator=draws)
    y = x + noise * torch.randn(size, generator=draws)
    whole = 1 + noise**2
    scores = -((y - x[:, None]) ** 2) / (2 * noise**2) + y**2 / (2 * whole)
    off = scores.masked_fill(torch.eye(size, dtype=torch.bool), -math.inf)
    loss = contrastive_loss(scores.diagonal(), off.logsumexp(1)).mean()
    information = math.log(1 + 1 / noise**2) / 2
    found = information_bound(float(loss), size)
    # The mean over 512 pairs has an error of about 1 / √512.
    assert information - 0.15 < found < information + 0.1


@pytest.mark.parametrize(("second", "expected", "slope"), [(None, 0.0, 0.0), (1.3, -0.7, -1.0)])
def test_a_row_without_negatives(second, expected, slope):
    positive = torch.tensor([0.7], requires_grad=True)
    loss = contrastive_loss(positive, torch.tensor([-math.inf]), second_temperature=second)
    loss.sum().backward()
    assert float(loss.detach()) == pytest.approx(expected)
    assert float(positive.grad) == pytest.approx(slope)


def test_gradient_flows_through_the_kernel_without_nan_where_a_row_has_no_negatives():
    from recclr.kernels import PairMask

    queries = torch.randn(3, 4, requires_grad=True)
    items = torch.randn(5, 4, requires_grad=True)
    mask = PairMask(torch.ones(5, dtype=torch.int64), torch.arange(5))
    for second in (None, 1.2):
        partition = masked_logsumexp(queries, items, torch.zeros(5), mask)
        loss = contrastive_loss((queries * items[:3]).sum(1), partition, second_temperature=second)
        gradients = torch.autograd.grad(loss.mean(), (queries, items))
        assert all(g.isfinite().all() for g in gradients)


def test_weights_of_a_mean():
    loss, device = torch.tensor([1.0, 2.0, 6.0]), torch.device("cpu")
    assert float(loss @ mean_weights(3, None, device=device)) == pytest.approx(3.0)
    uneven = mean_weights(3, torch.tensor([1.0, 1.0, 2.0]), device=device)
    assert float(loss @ uneven) == pytest.approx(3.75)


def test_shapes_must_agree():
    with pytest.raises(ShapeError, match="one length"):
        contrastive_loss(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ShapeError, match="one length"):
        contrastive_loss(torch.zeros(3, 1), torch.zeros(3, 1))


def test_the_automatic_temperature_falls_with_the_catalogue_within_its_bounds():
    sizes = [1, 14, 100, 1007, 3883, 40_981, 10**6, 10**9]
    found = [automatic_temperature(size) for size in sizes]
    assert found == sorted(found, reverse=True)
    assert found[0] == 0.5
    assert found[-1] == 0.05
    assert found[3:6] == pytest.approx([0.199, 0.149, 0.0897], abs=5e-4)
    # A power law: ten times as many items, the same factor anywhere.
    ratios = [automatic_temperature(10 * size) / automatic_temperature(size) for size in (40, 9000)]
    assert ratios == pytest.approx([10**-0.215] * 2)
