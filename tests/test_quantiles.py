"""Quantiles of a row's scores against sorts of all of them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recclr import quantiles
from recclr.kernels import BitMask, PairMask
from recclr.quantiles import top_k_quantiles, top_k_weights

NUM_ROWS, NUM_ITEMS, DIM = 13, 37, 5
NOTHING = PairMask(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))


def vectors(num_rows, seed):
    return torch.randn(num_rows, DIM, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("room", [1, 1 << 22])
@pytest.mark.parametrize("top_k", [1, 5, NUM_ITEMS - 1, NUM_ITEMS, NUM_ITEMS + 3])
def test_of_all_items_it_is_the_next_after_the_top(monkeypatch, top_k, room):
    monkeypatch.setitem(quantiles._BLOCK_BYTES, "cpu", room)
    queries, items = vectors(NUM_ROWS, 1), vectors(NUM_ITEMS, 2)
    found = top_k_quantiles(queries, items, torch.zeros(NUM_ITEMS), NOTHING, None, top_k=top_k)
    if top_k >= NUM_ITEMS:
        assert found.tolist() == [-math.inf] * NUM_ROWS
        return
    expected = (queries @ items.T).sort(1, descending=True).values[:, top_k]
    torch.testing.assert_close(found, expected)
    # Exactly K items are above it.
    assert ((queries @ items.T > found[:, None] + 1e-6).sum(1) == top_k).all()


@given(
    seed=st.integers(0, 500),
    num_rows=st.integers(1, 9),
    num_candidates=st.integers(0, 23),
    num_own=st.integers(0, 4),
    top_k=st.integers(1, 30),
    share=st.sampled_from([0.0, 0.4, 1.0]),
    bits=st.booleans(),
    ties=st.booleans(),
    room=st.sampled_from([1, 300, 1 << 22]),
)
def test_weighted_masked_and_with_candidates_of_a_row_alone(
    seed, num_rows, num_candidates, num_own, top_k, share, bits, ties, room
):
    draws = torch.Generator().manual_seed(seed)
    queries, items = vectors(num_rows, seed), vectors(num_candidates + 2, seed + 1)
    if ties:
        queries, items = queries.round(), items.round()
    # Halves sum up exactly, so that K is met exactly at times.
    weights = torch.randint(0, 12, (num_candidates,), generator=draws) / 2
    hidden = torch.rand(num_rows, num_candidates, generator=draws) < share
    own = None
    if num_own:
        own_row = torch.randint(len(items), (num_rows, num_own), generator=draws)
        own_weights = torch.randint(0, 5, (num_rows, num_own), generator=draws) / 2
        own = items, own_row, own_weights.log()
    mask = BitMask.from_dense(hidden) if bits else PairMask(*hidden.nonzero(as_tuple=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(quantiles._BLOCK_BYTES, "cpu", room)
        found = top_k_quantiles(
            queries, items[:num_candidates], weights.log(), mask, own, top_k=top_k
        )
    for b in range(num_rows):
        pairs = [
            (float(queries[b] @ items[c]), float(weights[c]))
            for c in range(num_candidates)
            if not hidden[b, c] and weights[c] > 0
        ]
        for m in range(num_own):
            if own_weights[b, m] > 0:
                score = float(queries[b] @ items[own_row[b, m]])
                pairs.append((score, float(own_weights[b, m])))
        # A rounding apart is no difference.
        fine = [t for t, _ in pairs if math.fsum(w for s, w in pairs if s > t + 1e-5) <= top_k]
        expected = min(fine) if math.fsum(w for _, w in pairs) > top_k else -math.inf
        assert float(found[b]) == pytest.approx(expected, abs=2e-5)


def test_only_the_scores_of_a_block_are_held(monkeypatch):
    seen = []
    original = quantiles._weighted_quantiles
    monkeypatch.setattr(
        quantiles,
        "_weighted_quantiles",
        lambda scores, *rest: seen.append(scores.shape) or original(scores, *rest),
    )
    monkeypatch.setitem(quantiles._BLOCK_BYTES, "cpu", 4 * 3 * NUM_ITEMS)
    queries, items = vectors(NUM_ROWS, 1), vectors(NUM_ITEMS, 2)
    top_k_quantiles(queries, items, torch.zeros(NUM_ITEMS), NOTHING, None, top_k=4)
    assert seen == [(3, NUM_ITEMS)] * 4 + [(1, NUM_ITEMS)]


def test_sampled_candidates_estimate_the_number_of_items_above():
    """Where the quantile lies in the whole catalogue: K in the mean, up to the size of a step."""
    num_items, num_draws, top_k = 2000, 400, 40
    queries, items = vectors(NUM_ROWS, 1), vectors(num_items, 2)
    scores = queries @ items.T
    above = torch.zeros(NUM_ROWS)
    for seed in range(60):
        drawn = torch.randint(
            num_items, (num_draws,), generator=torch.Generator().manual_seed(seed)
        )
        drawn, counts = drawn.unique(return_counts=True)
        weights = (counts / (num_draws / num_items)).log()
        found = top_k_quantiles(queries, items[drawn], weights, NOTHING, None, top_k=top_k)
        above += (scores > found[:, None]).sum(1) / 60
    # The quantile is the candidate with which more than K are reached, so 8 of 5 items each are
    # above it, and in the mean there are 8 gaps of 5 items and one of its own above it.
    assert float(above.mean()) == pytest.approx(top_k + num_items / num_draws, rel=0.06)


def test_weights_fall_with_the_distance_to_the_quantile_and_have_no_gradient():
    queries, items = vectors(NUM_ROWS, 1).requires_grad_(), vectors(NUM_ITEMS, 2)
    scores = (queries @ items[:3].T).requires_grad_()
    arguments = queries, items, torch.zeros(NUM_ITEMS), NOTHING, None
    found = top_k_weights(scores, *arguments, top_k=6, temperature=0.5)
    expected = (queries @ items.T).sort(1, descending=True).values[:, 6:7]
    torch.testing.assert_close(found, torch.sigmoid((scores - expected) / 0.5).detach())
    assert not found.requires_grad
    everything = top_k_weights(scores, *arguments, top_k=NUM_ITEMS, temperature=0.5)
    assert (everything == 1).all()
