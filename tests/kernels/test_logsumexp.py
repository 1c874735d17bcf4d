"""The tiled log-sum-exp against the plain one, and both against a loop."""

import math
from operator import mul

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import recclr.kernels.tiled as tiled
from recclr.errors import ShapeError
from recclr.kernels import BitMask, PairMask, masked_logsumexp, native
from recclr.kernels.reference import masked_logsumexp_reference

pytestmark = pytest.mark.usefixtures("plain_kernels")


PATHS = ("kept", "recomputed", "kept, shifted by row", "recomputed, by row", "compiled")


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Every way to the probabilities of the backward pass, in tiles of 16 x 16."""
    if request.param == "compiled":
        monkeypatch.setattr(native, "_off", False)
        if native.library() is None:
            pytest.skip(str(native.why_not()))
        return request.param
    monkeypatch.setitem(tiled._TILE_BYTES, "cpu", 1)
    monkeypatch.setitem(tiled._MAX_WIDTH, "cpu", 16)
    monkeypatch.setattr(tiled, "_STORE_BYTES", 1 << 27 if "kept" in request.param else 0)
    if "row" in request.param:
        monkeypatch.setattr(tiled, "_RANGE", -1.0)
    return request.param


def problem(seed, num_queries, num_candidates, dim, *, share=0.2, scale=1.0, repeats=0):
    draws = torch.Generator().manual_seed(seed)
    queries = torch.randn(num_queries, dim, generator=draws) * scale
    candidates = torch.randn(num_candidates, dim, generator=draws)
    weights = torch.randn(num_candidates, generator=draws)
    dead = torch.rand(num_queries, num_candidates, generator=draws) < share
    rows, columns = dead.nonzero(as_tuple=True)
    if repeats and len(rows):
        # Some pairs again, rows still rising.
        again = torch.randint(len(rows), (repeats,), generator=draws)
        order = torch.cat([torch.arange(len(rows)), again]).sort().values
        rows, columns = rows[order], columns[order]
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
    # What two orders of summing a float32 product may differ by, wherever terms cancel.
    rounding = 5e-7 * float(queries.norm(dim=1).max() * case[1].norm(dim=1).max())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 + rounding)
    for ours, theirs in zip(found_grads, expected_grads, strict=True):
        scale = float(theirs.abs().max().clamp_min(1.0)) if theirs.numel() else 1.0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=(2e-5 + rounding) * scale)


@given(
    seed=st.integers(0, 1000),
    num_queries=st.integers(1, 45),
    num_candidates=st.integers(1, 70),
    dim=st.integers(1, 9),
    share=st.sampled_from([0.0, 0.3, 0.97, 1.0]),
    scale=st.sampled_from([1e-4, 1.0, 30.0, 1000.0]),
    repeats=st.sampled_from([0, 5]),
    keep=st.booleans(),
    width=st.sampled_from([16, 32, 2048]),
)
@settings(max_examples=150, deadline=None)
def test_tiles_equal_the_plain_twin(
    seed, num_queries, num_candidates, dim, share, scale, repeats, keep, width
):
    case = problem(
        seed, num_queries, num_candidates, dim, share=share, scale=scale, repeats=repeats
    )
    with pytest.MonkeyPatch.context() as patch:
        # Tiles of 16 rows and of few columns, so that there are several each way.
        patch.setitem(tiled._TILE_BYTES, "cpu", 1)
        patch.setitem(tiled._MAX_WIDTH, "cpu", width)
        patch.setattr(tiled, "_STORE_BYTES", 1 << 27 if keep else 0)
        assert_twins(case)


@given(seed=st.integers(0, 1000), num_queries=st.integers(1, 9), num_candidates=st.integers(1, 70))
@settings(max_examples=40, deadline=None)
def test_bits_hold_any_mask(seed, num_queries, num_candidates):
    draws = torch.Generator().manual_seed(seed)
    hidden = torch.rand(num_queries, num_candidates, generator=draws) < 0.5
    mask = BitMask.from_dense(hidden)
    assert mask.words.dtype == torch.int32
    assert mask.words.shape == (num_queries, math.ceil(num_candidates / 32))
    assert torch.equal(mask.dense(num_candidates), hidden)
    for row in range(num_queries):
        written = [
            int(mask.words[row, column // 32]) >> column % 32 & 1
            for column in range(num_candidates)
        ]
        assert written == hidden[row].int().tolist()


def test_a_mask_of_bits_is_that_of_the_pairs():
    queries, candidates, weights, pairs = problem(3, 13, 70, 5, share=0.4, repeats=5)
    hidden = torch.zeros(13, 70, dtype=torch.bool)
    hidden[pairs.rows, pairs.columns] = True
    hidden[7] = True
    rows, columns = hidden.nonzero(as_tuple=True)
    case = queries, candidates, weights, PairMask(rows, columns)
    bits = queries, candidates, weights, BitMask.from_dense(hidden)
    upstream = torch.linspace(-1.0, 2.0, 13)
    expected, expected_grads = value_and_gradients(masked_logsumexp_reference, *case, upstream)
    for function in (masked_logsumexp_reference, masked_logsumexp):
        found, grads = value_and_gradients(function, *bits, upstream)
        assert torch.equal(found, expected)
        assert all(map(torch.equal, grads, expected_grads))


def loop(queries, candidates, weights, mask):
    """log Σ exp, pair by pair, in double precision."""
    dead = set(zip(mask.rows.tolist(), mask.columns.tolist(), strict=True))
    queries, candidates, weights = queries.tolist(), candidates.tolist(), weights.tolist()
    return [
        math.log(
            math.fsum(
                math.exp(sum(map(mul, query, candidate)) + weight)
                for column, (candidate, weight) in enumerate(zip(candidates, weights, strict=True))
                if (row, column) not in dead
            )
        )
        for row, query in enumerate(queries)
    ]


@pytest.mark.parametrize("function", [masked_logsumexp_reference, masked_logsumexp])
def test_both_twins_equal_a_loop(function):
    case = problem(0, 6, 11, 3)
    torch.testing.assert_close(function(*case), torch.tensor(loop(*case)), rtol=1e-5, atol=1e-5)


def test_gradients_equal_finite_differences_of_the_loop(path):
    *leaves, mask = problem(1, 18, 7, 3)
    upstream = torch.linspace(-1.0, 2.0, 18)
    _, gradients = value_and_gradients(masked_logsumexp, *leaves, mask, upstream)
    exact = [leaf.double() for leaf in leaves]
    step = 1e-5

    def moved(which, place, by):
        shifted = [leaf.clone() for leaf in exact]
        shifted[which].view(-1)[place] += by
        values = torch.tensor(loop(*shifted, mask), dtype=torch.float64)
        return float(values @ upstream.double())

    for which, gradient in enumerate(gradients):
        for place, slope in enumerate(gradient.flatten().tolist()):
            expected = (moved(which, place, step) - moved(which, place, -step)) / (2 * step)
            assert slope == pytest.approx(expected, abs=2e-5)


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


def test_a_candidate_that_every_row_masks_gets_no_gradient_at_all(path):
    queries, candidates, weights, _ = problem(4, 35, 6, 2)
    mask = PairMask(torch.arange(35), torch.full((35,), 3))
    _, grads = value_and_gradients(
        masked_logsumexp, queries, candidates, weights, mask, torch.ones(35)
    )
    assert torch.equal(grads[1][3], torch.zeros(2))
    assert grads[2][3] == 0
    assert (grads[2][[0, 1, 2, 4, 5]] > 0).all()


def test_weights_of_minus_infinity_leave_a_candidate_out(path):
    queries, candidates, weights, mask = problem(6, 35, 17, 3, scale=3.0)
    weights[[2, 16]] = -math.inf
    rest = [at for at in range(17) if at not in (2, 16)]
    kept = torch.isin(mask.columns, torch.tensor(rest))
    columns = torch.searchsorted(torch.tensor(rest), mask.columns[kept])
    expected = masked_logsumexp_reference(
        queries, candidates[rest], weights[rest], PairMask(mask.rows[kept], columns)
    )
    found = masked_logsumexp(queries, candidates, weights, mask)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    nothing = masked_logsumexp(queries, candidates, torch.full((17,), -math.inf), mask)
    assert torch.equal(nothing, torch.full((35,), -math.inf))


@pytest.mark.parametrize(("scale", "by_row"), [(0.5, False), (200.0, True)])
def test_rows_are_shifted_only_where_logits_spread_wide(scale, by_row, monkeypatch):
    shifted = []
    original = tiled._exp
    monkeypatch.setattr(tiled, "_exp", lambda *args: shifted.append(1) or original(*args))
    masked_logsumexp(*problem(7, 9, 21, 4, scale=scale))
    assert bool(shifted) is by_row


def test_no_candidates_at_all():
    result = masked_logsumexp(torch.randn(4, 3), torch.empty(0, 3), torch.empty(0))
    assert torch.equal(result, torch.full((4,), -math.inf))


def test_a_graph_is_walked_twice_while_another_uses_the_buffers(path):
    *leaves, mask = problem(4, 20, 33, 5)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    result = masked_logsumexp(*leaves, mask).sum()
    first = torch.autograd.grad(result, leaves, retain_graph=True)
    other = masked_logsumexp(*problem(5, 20, 33, 5))
    second = torch.autograd.grad(result, leaves)
    assert other.isfinite().all()
    for ours, theirs in zip(first, second, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_graphs_alive_at_once_do_not_share_buffers(path):
    cases = [problem(seed, 20, 33, 5) for seed in (5, 6, 7)]
    leaves = [case[0].requires_grad_() for case in cases]

    def forward(at, function=masked_logsumexp):
        return function(*cases[at]).sum()

    def backward(at, value):
        return torch.autograd.grad(value, leaves[at])[0]

    first, second = forward(0), forward(1)
    found = {1: backward(1, second)}
    third = forward(2)
    found |= {0: backward(0, first), 2: backward(2, third)}
    for at, gradient in found.items():
        expected = backward(at, forward(at, masked_logsumexp_reference))
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_what_a_buffer_held_before_is_not_seen(path, monkeypatch):
    case = problem(8, 21, 30, 4)
    monkeypatch.setattr(tiled, "_pool", [torch.full((700,), math.nan) for _ in range(2)])
    assert_twins(case)


def test_the_pool_stays_small(monkeypatch):
    pool = []
    monkeypatch.setattr(tiled, "_pool", pool)
    for num_queries in (9, 90, 300, 18, 40):
        queries, *rest = problem(1, num_queries, 31, 4)
        masked_logsumexp(queries.requires_grad_(), *rest).sum().backward()
    assert 1 <= len(pool) <= 2


@pytest.mark.parametrize(("width", "held"), [(2048, 25 * 48), (16, 75 * 16), (32, 37 * 32)])
def test_with_recomputation_only_a_tile_is_ever_held(width, held, monkeypatch):
    borrowed = []
    original = tiled.borrow

    def spy(size, device):
        borrowed.append(size)
        return original(size, device)

    monkeypatch.setattr(tiled, "borrow", spy)
    monkeypatch.setattr(tiled, "_STORE_BYTES", 0)
    monkeypatch.setitem(tiled._TILE_BYTES, "cpu", 4 * 48 * 25)
    monkeypatch.setitem(tiled._MAX_WIDTH, "cpu", width)
    queries, *rest = problem(9, 310, 41, 4)
    masked_logsumexp(queries.requires_grad_(), *rest).sum().backward()
    # 41 candidates take 48 columns: one block, three of 16, or a block of 32 and one of 16.
    assert borrowed == [held] * 2


def test_no_query_at_all(path):
    candidates = torch.randn(5, 3).requires_grad_()
    result = masked_logsumexp(torch.empty(0, 3), candidates, torch.zeros(5))
    assert result.shape == (0,)
    result.sum().backward()
    assert torch.equal(candidates.grad, torch.zeros(5, 3))


def test_logits_far_beyond_the_range_of_exp_stay_finite(path):
    queries = torch.tensor([[1e4], [-1e4]]).requires_grad_()
    candidates = torch.tensor([[1.0], [-1.0], [0.5]])
    result = masked_logsumexp(queries, candidates, torch.zeros(3))
    assert result.tolist() == [1e4, 1e4]
    result.sum().backward()
    assert queries.grad.flatten().tolist() == [1.0, -1.0]


def test_not_a_number_is_passed_on_and_not_hidden(path):
    queries = torch.ones(17, 2)
    queries[16, 1] = math.nan
    result = masked_logsumexp(queries, torch.ones(4, 2), torch.zeros(4))
    assert result[:16].isfinite().all()
    assert result[16].isnan()


def test_second_derivatives_are_refused_and_not_dropped(path):
    leaves = [torch.randn(4, 3).requires_grad_(), torch.randn(5, 3).requires_grad_()]
    for leaf in leaves:
        result = masked_logsumexp(*leaves, torch.zeros(5)).sum()
        with pytest.raises(RuntimeError, match="automatic differentiation"):
            torch.autograd.grad(result, leaf, create_graph=True)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_precision_is_refused(which, dtype):
    arguments = [torch.ones(4, 3), torch.ones(5, 3), torch.ones(5)]
    arguments[which] = arguments[which].to(dtype)
    with pytest.raises(ShapeError, match=str(dtype)):
        masked_logsumexp(*arguments)


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
