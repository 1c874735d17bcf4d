"""The divergence from a teacher's softmax in tiles, against plain PyTorch and scikit's entropy."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import entropy

from recclr.errors import ShapeError
from recclr.kernels import native, native_softmax, pairwise
from recclr.kernels.distilled import total_distillation_loss, total_distillation_loss_reference

LEAVES = ("queries", "candidates")
PAIRS = (LEAVES, ("teacher_queries", "teacher_candidates"))


pytestmark = pytest.mark.usefixtures("both_kernels")


def problem(seed, num_queries, num_candidates, dim=5, teacher_dim=3, *, share=0.1, scale=1.0):
    draws = torch.Generator().manual_seed(seed)
    weights = torch.randn(num_candidates, generator=draws)
    weights[torch.rand(num_candidates, generator=draws) < share] = -math.inf
    return {
        "queries": scale * torch.randn(num_queries, dim, generator=draws),
        "candidates": torch.randn(num_candidates, dim, generator=draws),
        "teacher_queries": scale * torch.randn(num_queries, teacher_dim, generator=draws),
        "teacher_candidates": torch.randn(num_candidates, teacher_dim, generator=draws),
        "log_weights": weights,
        "row_weights": torch.rand(num_queries, generator=draws),
    }


def with_gradients(loss, case, upstream=-1.7):
    leaves = {name: case[name].clone().requires_grad_() for name in LEAVES}
    found = loss(**(case | leaves))
    if found.requires_grad:
        (found * upstream).backward()
    return found.detach(), [
        torch.zeros_like(x) if x.grad is None else x.grad for x in leaves.values()
    ]


def assert_twins(case):
    found, ours = with_gradients(total_distillation_loss, case)
    double = {name: value.double() for name, value in case.items()}
    expected, theirs = with_gradients(total_distillation_loss_reference, double)
    if not min(len(case[name]) for name in LEAVES):
        assert float(found) == float(expected) == 0.0
        return
    # A score is off by some roundings of itself, its share by as much of the whole, and a gradient
    # by that times a vector.
    off = 4e-7 * max(float((case[a] @ case[b].T).abs().max()) for a, b in PAIRS)
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-6 + 9 * off)
    longest = max(float(case[name].abs().max()) for name in LEAVES)
    for one, another in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), another, rtol=1e-4, atol=2e-6 + 9 * off * longest)


@given(
    seed=st.integers(0, 1000),
    num_queries=st.integers(0, 40),
    num_candidates=st.integers(0, 23),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_value_and_gradients_are_those_of_plain_pytorch(
    seed, num_queries, num_candidates, share, scale
):
    case = problem(seed, num_queries, num_candidates, share=share, scale=scale)
    assert_twins(case)


@pytest.mark.parametrize("tile_bytes", [1, 3000, 1 << 21])
def test_tiles_of_any_height_give_the_same(monkeypatch, tile_bytes):
    monkeypatch.setitem(pairwise._TILE_BYTES, "cpu", tile_bytes)
    monkeypatch.setattr(pairwise, "_MIN_ROWS", 7)
    assert_twins(problem(3, 61, 29))


@pytest.mark.parametrize(("threads", "rows", "width"), [(1, 200, 97), (2, 333, 64), (3, 25, 700)])
def test_any_number_of_threads_and_any_cut_give_the_same(monkeypatch, threads, rows, width):
    monkeypatch.setattr(native_softmax, "threads_for", lambda work: threads)
    monkeypatch.setattr(native_softmax, "_FLOATS", 1 << 15)
    assert_twins(problem(4, rows, width, dim=33, teacher_dim=70))


def test_rows_too_wide_for_the_cache_go_to_the_twin(monkeypatch):
    case = problem(6, 50, 2000)
    kernels = native.library()
    if kernels is not None:
        monkeypatch.setattr(native_softmax, "_FLOATS", 1 << 14)
        assert native_softmax.distilled(*case.values(), kernels=kernels) is None
    assert_twins(case)


def test_one_row_is_the_relative_entropy_that_scipy_has():
    case = problem(8, 1, 17) | {"row_weights": torch.ones(1)}
    weights = case["log_weights"].double().exp()
    shares = [
        (weights * (case[one].double() @ case[other].double().T).squeeze(0).exp()).numpy()
        for one, other in (("teacher_queries", "teacher_candidates"), LEAVES)
    ]
    expected = entropy(*(share[share > 0] for share in shares))
    assert expected > 0.1
    assert float(total_distillation_loss(**case)) == pytest.approx(expected, rel=1e-5)


def test_large_scores_stand_beside_what_takes_no_part():
    case = problem(9, 3, 6)
    candidates = torch.stack([torch.ones(6), torch.arange(6.0)], 1)
    # The fifth has the largest score by far, and no weight.
    candidates[5, 1] = 9e4
    weights = torch.tensor([0.0] * 5 + [-math.inf])
    shifts = torch.tensor([[-4e4, 1.0]] * 3), torch.tensor([[0.0, 1.0]] * 3)
    found = [
        with_gradients(
            total_distillation_loss,
            case | {"queries": queries, "candidates": candidates, "log_weights": weights},
        )
        for queries in shifts
    ]
    # A constant in all scores of a row changes nothing but their roundings.
    assert float(found[0][0]) == pytest.approx(float(found[1][0]), rel=1e-2)
    torch.testing.assert_close(found[0][1][0][:, 1], found[1][1][0][:, 1], rtol=2e-2, atol=1e-2)


def test_who_ranks_as_the_teacher_pays_nothing_and_moves_no_more():
    case = problem(2, 23, 31, dim=4)
    told = {"teacher_queries": case["queries"], "teacher_candidates": case["candidates"]}
    found, grads = with_gradients(total_distillation_loss, case | told)
    assert float(found.abs()) < 1e-6
    assert max(float(grad.abs().max()) for grad in grads) < 1e-6
    # A constant in all scores of a row, or in all log-weights, changes nothing.
    shifted = case | {"log_weights": case["log_weights"] + 7.0}
    one, other = (with_gradients(total_distillation_loss, each) for each in (case, shifted))
    torch.testing.assert_close((one[0], *one[1]), (other[0], *other[1]), rtol=1e-4, atol=1e-6)


def test_shapes_that_do_not_belong_together_are_refused():
    case = problem(1, 4, 6)
    for name, value in (
        ("teacher_queries", torch.zeros(3, 3)),
        ("teacher_candidates", torch.zeros(6, 2)),
        ("teacher_candidates", torch.zeros(6, 3, dtype=torch.float64)),
        ("row_weights", torch.zeros(5)),
        ("log_weights", torch.zeros(5)),
    ):
        with pytest.raises(ShapeError):
            total_distillation_loss(**(case | {name: value}))
