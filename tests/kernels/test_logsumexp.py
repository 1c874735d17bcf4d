"""The tiled log-sum-exp against the plain one, and the plain one against a loop."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import recclr.kernels.tiled as tiled
from recclr.errors import ShapeError
from recclr.kernels import PairMask, masked_logsumexp
from recclr.kernels.reference import masked_logsumexp_reference


def problem(seed, num_queries, num_candidates, dim, *, share=0.2, scale=1.0):
    draws = torch.Generator().manual_seed(seed)
    queries = torch.randn(num_queries, dim, generator=draws) * scale
    candidates = torch.randn(num_candidates, dim, generator=draws)
    weights = torch.randn(num_candidates, generator=draws)
    dead = torch.rand(num_queries, num_candidates, generator=draws) < share
    rows, columns = dead.nonzero(as_tuple=True)
    return queries, candidates, weights, PairMask(rows, columns)


def value_and_gradients(function, queries, candidates, weights, mask, upstream):
    leaves = [t.clone().requires_grad_() for t in (queries, candidates, weights)]
    result = function(*leaves, mask)
    # A row without candidates is -inf; its upstream gradient must not matter.
    alive = result > -math.inf
    (torch.where(alive, result, 0.0) * upstream).sum().backward()
    return result.detach(), [leaf.grad for leaf in leaves]


def assert_twins(case, upstream=None):
    queries = case[0]
    if upstream is None:
        upstream = torch.linspace(-1.0, 2.0, len(queries))
    expected, expected_grads = value_and_gradients(masked_logsumexp_reference, *case, upstream)
    found, found_grads = value_and_gradients(masked_logsumexp, *case, upstream)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found_grads, expected_grads, strict=True):
        scale = float(theirs.abs().max().clamp_min(1.0)) if theirs.numel() else 1.0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5 * scale)


@given(
    seed=st.integers(0, 1000),
    num_queries=st.integers(1, 45),
    num_candidates=st.integers(1, 70),
    dim=st.integers(1, 9),
    share=st.sampled_from([0.0, 0.3, 0.97, 1.0]),
    scale=st.sampled_from([1e-4, 1.0, 30.0, 1000.0]),
    keep=st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_tiles_equal_the_plain_twin(seed, num_queries, num_candidates, dim, share, scale, keep):
    case = problem(seed, num_queries, num_candidates, dim, share=share, scale=scale)
    before = dict(tiled._TILE_BYTES), tiled._STORE_BYTES
    try:
        # Tiles of 16 rows, so that there are several; stored and recomputed probabilities.
        tiled._TILE_BYTES["cpu"] = 1
        tiled._STORE_BYTES = 1 << 27 if keep else 0
        assert_twins(case)
    finally:
        tiled._TILE_BYTES.update(before[0])
        tiled._STORE_BYTES = before[1]


def test_plain_twin_equals_a_loop():
    queries, candidates, weights, mask = problem(0, 6, 11, 3)
    dead = set(zip(mask.rows.tolist(), mask.columns.tolist(), strict=True))
    expected = []
    for row in range(6):
        terms = [
            math.exp(float(queries[row] @ candidates[column]) + float(weights[column]))
            for column in range(11)
            if (row, column) not in dead
        ]
        expected.append(math.log(sum(terms)))
    found = masked_logsumexp_reference(queries, candidates, weights, mask)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_gradient_equals_finite_differences():
    queries, candidates, weights, mask = problem(1, 4, 7, 3)

    def total(q, c, w):
        return float(masked_logsumexp_reference(q.double(), c.double(), w.double(), mask).sum())

    leaves = [queries, candidates, weights]
    _, grads = value_and_gradients(masked_logsumexp, *leaves, mask, torch.ones(4))
    for which, leaf in enumerate(leaves):
        for place in range(leaf.numel()):
            step = torch.zeros(leaf.numel(), dtype=torch.float64)
            step[place] = 1e-5
            up = [t.double() for t in leaves]
            down = [t.double() for t in leaves]
            up[which] = up[which] + step.view(leaf.shape)
            down[which] = down[which] - step.view(leaf.shape)
            slope = (total(*up) - total(*down)) / 2e-5
            assert float(grads[which].flatten()[place]) == pytest.approx(slope, abs=1e-4)


def test_a_pair_may_be_masked_twice():
    queries, candidates, weights, _ = problem(2, 5, 8, 3)
    once = PairMask(torch.tensor([1, 3]), torch.tensor([2, 4]))
    twice = PairMask(torch.tensor([1, 1, 3]), torch.tensor([2, 2, 4]))
    assert torch.equal(
        masked_logsumexp(queries, candidates, weights, once),
        masked_logsumexp(queries, candidates, weights, twice),
    )


def test_a_row_without_candidates_is_minus_infinity_and_pulls_at_nothing():
    queries, candidates, weights, _ = problem(3, 3, 6, 2)
    mask = PairMask(torch.ones(6, dtype=torch.int64), torch.arange(6))
    result, grads = value_and_gradients(
        masked_logsumexp, queries, candidates, weights, mask, torch.ones(3)
    )
    assert result[1] == -math.inf
    assert result[[0, 2]].isfinite().all()
    assert torch.equal(grads[0][1], torch.zeros(2))
    assert all(grad.isfinite().all() for grad in grads)


def test_no_candidates_at_all():
    result = masked_logsumexp(torch.randn(4, 3), torch.empty(0, 3), torch.empty(0))
    assert torch.equal(result, torch.full((4,), -math.inf))


def test_a_graph_can_be_walked_twice():
    queries, candidates, weights, mask = problem(4, 20, 33, 5)
    queries.requires_grad_()
    result = masked_logsumexp(queries, candidates, weights, mask).sum()
    (first,) = torch.autograd.grad(result, queries, retain_graph=True)
    (second,) = torch.autograd.grad(result, queries)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


def test_two_graphs_alive_at_once_do_not_share_buffers():
    cases = [problem(seed, 20, 33, 5) for seed in (5, 6)]
    leaves = [case[0].requires_grad_() for case in cases]
    results = [masked_logsumexp(*case).sum() for case in cases]
    both = [torch.autograd.grad(r, leaf)[0] for r, leaf in zip(results, leaves, strict=True)]
    alone = [
        torch.autograd.grad(masked_logsumexp_reference(*case).sum(), leaf)[0]
        for case, leaf in zip(cases, leaves, strict=True)
    ]
    for ours, theirs in zip(both, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("queries", "candidates", "weights"),
    [
        ((4, 3), (5, 2), (5,)),
        ((4,), (5, 4), (5,)),
        ((4, 3), (5, 3), (4,)),
        ((4, 3), (5, 3), (5, 1)),
    ],
)
def test_wrong_shapes_are_refused(queries, candidates, weights):
    with pytest.raises(ShapeError, match="expected"):
        masked_logsumexp(torch.ones(queries), torch.ones(candidates), torch.ones(weights))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_equals_the_plain_twin_on_the_cpu():
    queries, candidates, weights, mask = problem(7, 300, 500, 64)
    expected = masked_logsumexp_reference(queries, candidates, weights, mask)
    found = masked_logsumexp(
        queries.cuda(),
        candidates.cuda(),
        weights.cuda(),
        PairMask(mask.rows.cuda(), mask.columns.cuda()),
    )
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)
