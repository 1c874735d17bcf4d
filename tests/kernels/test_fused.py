"""The loss with its gradient in one pass against the composition of its parts."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from recclr.kernels import PairMask, fused, masked_logsumexp, tiled, total_contrastive_loss
from recclr.kernels.reference import masked_logsumexp_reference
from recclr.losses import contrastive_loss, contrastive_slopes

pytestmark = pytest.mark.usefixtures("plain_kernels")

NAMES = ("queries", "candidates", "positive_logits")


def problem(seed, num_queries, num_candidates, dim, *, share=0.2, scale=1.0):
    draws = torch.Generator().manual_seed(seed)
    queries = torch.randn(num_queries, dim, generator=draws) * scale
    candidates = torch.randn(num_candidates, dim, generator=draws)
    weights = torch.randn(num_candidates, generator=draws)
    positives = torch.randn(num_queries, generator=draws) * scale
    row_weights = torch.rand(num_queries, generator=draws)
    dead = torch.rand(num_queries, num_candidates, generator=draws) < share
    mask = PairMask(*dead.nonzero(as_tuple=True))
    return queries, candidates, weights, positives, row_weights, mask


def composed(queries, candidates, weights, positives, row_weights, mask, *, second_temperature):
    partition = masked_logsumexp_reference(queries, candidates, weights, mask)
    loss = contrastive_loss(positives, partition, second_temperature=second_temperature)
    return (loss * row_weights).sum()


def with_gradients(function, case, second_temperature, upstream, **options):
    leaves = [case[place].clone().requires_grad_() for place in (0, 1, 3)]
    queries, candidates, positives = leaves
    loss = function(
        queries,
        candidates,
        case[2],
        positives,
        *case[4:],
        second_temperature=second_temperature,
        **options,
    )
    (loss * upstream).backward()
    return loss.detach(), [leaf.grad for leaf in leaves]


@given(
    seed=st.integers(0, 1000),
    num_queries=st.integers(1, 45),
    num_candidates=st.integers(1, 70),
    dim=st.integers(1, 9),
    share=st.sampled_from([0.0, 0.3, 0.97, 1.0]),
    scale=st.sampled_from([1e-4, 1.0, 30.0]),
    second_temperature=st.sampled_from([None, 0.7, 1.2]),
    width=st.sampled_from([16, 32, 2048]),
)
@settings(max_examples=150, deadline=None)
def test_value_and_gradients_equal_the_composition(
    seed, num_queries, num_candidates, dim, share, scale, second_temperature, width
):
    case = problem(seed, num_queries, num_candidates, dim, share=share, scale=scale)
    with pytest.MonkeyPatch.context() as patch:
        # Sixteen rows at a time, against several blocks of candidates.
        patch.setitem(tiled._TILE_BYTES, "cpu", 1)
        patch.setitem(tiled._MAX_WIDTH, "cpu", width)
        patch.setattr(tiled, "_ROWS", 1)
        patch.setattr(fused, "_MIN_HEIGHT", 1)
        patch.setattr(fused, "masked_logsumexp", None)  # the other way is not taken
        found, gradients = with_gradients(total_contrastive_loss, case, second_temperature, -1.7)
    expected, slow = with_gradients(composed, case, second_temperature, -1.7)
    largest = float(case[0].norm(dim=1).max() * case[1].norm(dim=1).max())
    rounding = 5e-7 * largest
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=(1e-5 + rounding) * num_queries)
    for name, ours, theirs in zip(NAMES, gradients, slow, strict=True):
        size = float(theirs.abs().max().clamp_min(1.0))
        torch.testing.assert_close(
            ours,
            theirs,
            rtol=1e-4,
            atol=(2e-5 + rounding) * size,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("width", [16, 2048])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 12.0])
def test_bfloat16_rounds_the_gradients_of_both_sides_and_nothing_else(monkeypatch, width, scale):
    """Of two factors with 8 bits each a product is off by at most 2^-7; of sums less remains."""
    monkeypatch.setitem(tiled._MAX_WIDTH, "cpu", width)
    case = problem(8, 300, 70, 9, share=0.2, scale=scale)
    loss, exact = with_gradients(total_contrastive_loss, case, 1.3, -1.7)
    same, rounded = with_gradients(total_contrastive_loss, case, 1.3, -1.7, bfloat16=True)
    assert torch.equal(loss, same)
    assert torch.equal(exact[2], rounded[2])
    for ours, theirs in zip(rounded[:2], exact[:2], strict=True):
        assert ours.dtype == torch.float32
        assert 1e-5 < (ours - theirs).norm() / theirs.norm() < 2**-8


@pytest.mark.parametrize("second_temperature", [None, 1.3])
def test_slopes_are_the_derivatives_of_the_loss(second_temperature):
    draws = torch.Generator().manual_seed(1)
    positives = torch.randn(9, generator=draws).requires_grad_()
    partition = (3 * torch.randn(9, generator=draws)).requires_grad_()
    loss = contrastive_loss(positives, partition, second_temperature=second_temperature)
    expected = torch.autograd.grad(loss.sum(), (positives, partition))
    found = contrastive_slopes(
        positives.detach(), partition.detach(), second_temperature=second_temperature
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("second_temperature", [None, 1.3])
def test_without_negatives_the_partition_has_no_slope(second_temperature):
    nothing = torch.tensor([-math.inf, 0.5])
    by_positive, by_partition = contrastive_slopes(
        torch.tensor([2.0, 0.5]), nothing, second_temperature=second_temperature
    )
    assert by_partition[0] == 0
    assert by_partition[1] > 0
    assert by_positive.isfinite().all()


def test_without_gradients_only_the_value_is_computed(monkeypatch):
    case = problem(3, 11, 23, 4)
    monkeypatch.setattr(fused, "_TotalLoss", None)
    found = total_contrastive_loss(*case)
    torch.testing.assert_close(found, composed(*case, second_temperature=None))


def test_more_candidates_than_rows_of_a_tile_can_hold_take_the_other_way(monkeypatch):
    monkeypatch.setitem(tiled._TILE_BYTES, "cpu", 1)
    taken = []
    monkeypatch.setattr(
        fused,
        "masked_logsumexp",
        lambda *args, **options: taken.append(1) or masked_logsumexp(*args, **options),
    )
    case = problem(4, 70, 23, 4)
    found = with_gradients(total_contrastive_loss, case, None, 1.0)
    assert taken
    expected = with_gradients(composed, case, None, 1.0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_only_some_rows_of_logits_are_ever_held(monkeypatch):
    borrowed = []
    original = fused.borrow

    def spy(size, device):
        borrowed.append(size)
        return original(size, device)

    monkeypatch.setattr(fused, "borrow", spy)
    monkeypatch.setitem(tiled._MAX_WIDTH, "cpu", 16)
    case = problem(5, 810, 41, 4)
    # The rows of a tile, a number of rows that is worth it, and no more than four tiles.
    for room, height in ((600, 600), (300, 512), (100, 400)):
        monkeypatch.setitem(tiled._TILE_BYTES, "cpu", 4 * 48 * room)
        with_gradients(total_contrastive_loss, case, None, 1.0)
        assert borrowed.pop() == height * 48


def test_nothing_to_score_is_a_loss_without_partition():
    queries, _, _, positives, row_weights, _ = problem(6, 5, 7, 3)
    found = total_contrastive_loss(
        queries, torch.empty(0, 3), torch.empty(0), positives.requires_grad_(), row_weights
    )
    assert found == 0
    found.backward()
    assert torch.equal(positives.grad, torch.zeros(5))


@given(
    seed=st.integers(0, 300),
    num_queries=st.integers(1, 37),
    num_candidates=st.integers(1, 41),
    share=st.sampled_from([0.3, 1.0]),
    second_temperature=st.sampled_from([None, 1.2]),
    fast=st.booleans(),
)
@settings(max_examples=80)
def test_negatives_of_a_row_alone_count_as_shared_ones_that_all_others_mask(
    seed, num_queries, num_candidates, share, second_temperature, fast
):
    # Sixteen rows always fit a tile.
    assume(fast or num_queries > 16)
    queries, candidates, weights, positives, row_weights, mask = problem(
        seed, num_queries, num_candidates, 5, share=share
    )
    draws = torch.Generator().manual_seed(seed)
    own = torch.randn(num_queries, 5, generator=draws)
    none = torch.rand(num_queries, generator=draws) < 0.3
    own_weights = torch.randn(num_queries, generator=draws).masked_fill(none, -torch.inf)
    others = (~torch.eye(num_queries, dtype=torch.bool)).nonzero(as_tuple=True)
    wide = PairMask(
        torch.cat([mask.rows, others[0]]), torch.cat([mask.columns, others[1] + num_candidates])
    )
    order = wide.rows.argsort(stable=True)
    wide = PairMask(wide.rows[order], wide.columns[order])
    leaves = [x.clone().requires_grad_() for x in (queries, candidates, positives, own)]
    expected = composed(
        leaves[0],
        torch.cat([leaves[1], leaves[3]]),
        torch.cat([weights, own_weights]),
        leaves[2],
        row_weights,
        wide,
        second_temperature=second_temperature,
    )
    slow = torch.autograd.grad(expected, leaves)
    with pytest.MonkeyPatch.context() as patch:
        if fast:
            patch.setitem(tiled._TILE_BYTES, "cpu", 1)
            patch.setattr(tiled, "_ROWS", 1)
            patch.setattr(fused, "_MIN_HEIGHT", 1)
            patch.setitem(tiled._MAX_WIDTH, "cpu", 16)
            patch.setattr(fused, "masked_logsumexp", None)
        else:
            patch.setattr(fused, "_TotalLoss", None)
            patch.setattr(fused, "_MIN_HEIGHT", 1 << 30)
            patch.setitem(tiled._TILE_BYTES, "cpu", 1)
        found = total_contrastive_loss(
            leaves[0],
            leaves[1],
            weights,
            leaves[2],
            row_weights,
            mask,
            own_partition=(leaves[0] * leaves[3]).sum(1) + own_weights,
            second_temperature=second_temperature,
        )
        ours = torch.autograd.grad(found, leaves)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(ours, slow, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
