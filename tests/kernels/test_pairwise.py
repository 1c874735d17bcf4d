"""Sums over pairs in tiles against plain PyTorch, and every function against its formula.

Vectors lie on a grid on which float32 dot products are exact, so both twins see the same scores and
stand on the same side of every margin.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recclr.errors import ShapeError
from recclr.kernels import BitMask, PairMask, pairwise
from recclr.kernels.pairwise import total_pair_loss, total_pair_loss_reference
from recclr.pair_losses import Above, Distances, Ranking, Triplet, Unlikely, Within

COSINE, EUCLIDEAN = Distances("cosine"), Distances("euclidean")
FUNCTIONS = {
    "bpr": Ranking(),
    "bce": Unlikely(),
    "ccl": Above(0.3),
    "margin": Within(1.3, COSINE),
    "margin, euclidean": Within(1.6, EUCLIDEAN),
    "all": Triplet(0.4, COSINE, "all", 5),
    "semi_hard": Triplet(0.4, COSINE, "semi_hard", 5),
    "semi_hard, euclidean": Triplet(0.7, EUCLIDEAN, "semi_hard", 5),
    "distance_weighted": Triplet(0.6, COSINE, "distance_weighted", 5),
    "distance_weighted, many dimensions": Triplet(0.6, COSINE, "distance_weighted", 2000),
    "hardest": Triplet(0.9, COSINE, "hardest", 5),
}
EIGHTHS = 8.0


def grid(draws, *shape, scale=1.0):
    return torch.randint(-6, 7, shape, generator=draws) / EIGHTHS * scale


def problem(seed, num_queries, num_candidates, num_own, dim=5, *, share=0.3, scale=1.0):
    draws = torch.Generator().manual_seed(seed)
    dead = torch.rand(num_queries, num_candidates, generator=draws) < share
    own_weights = torch.randn(num_queries, num_own, generator=draws)
    own_weights[torch.rand(num_queries, num_own, generator=draws) < share] = -math.inf
    weights = torch.randn(num_candidates, generator=draws)
    weights[torch.rand(num_candidates, generator=draws) < 0.1] = -math.inf
    return {
        "queries": grid(draws, num_queries, dim, scale=scale),
        "candidates": grid(draws, num_candidates, dim),
        "log_weights": weights,
        "anchors": 0.3 + torch.rand(num_queries, generator=draws),
        "row_weights": torch.rand(num_queries, generator=draws),
        "mask": PairMask(*dead.nonzero(as_tuple=True)),
        "own_scores": grid(draws, num_queries, num_own, scale=scale),
        "own_log_weights": own_weights,
    }


LEAVES = ("queries", "candidates", "anchors", "own_scores")


def with_gradients(loss, case, function, upstream=-1.7):
    leaves = {name: case[name].clone().requires_grad_() for name in LEAVES}
    found = loss(**(case | leaves), function=function)
    if found.requires_grad:
        (found * upstream).backward()
    zero = torch.zeros(())
    return found.detach(), {n: zero if x.grad is None else x.grad for n, x in leaves.items()}


def assert_twins(case, function, other=None):
    found, ours = with_gradients(total_pair_loss, case, function)
    expected, theirs = with_gradients(total_pair_loss_reference, other or case, function)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-6)
    for name in LEAVES:
        size = float(theirs[name].abs().max()) if theirs[name].numel() else 0.0
        torch.testing.assert_close(
            ours[name],
            theirs[name].expand_as(ours[name]),
            rtol=1e-4,
            atol=1e-6 + 1e-5 * size,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@given(
    name=st.sampled_from(sorted(FUNCTIONS)),
    seed=st.integers(0, 1000),
    num_queries=st.integers(1, 23),
    num_candidates=st.integers(0, 41),
    num_own=st.integers(0, 3),
    dim=st.integers(1, 6),
    share=st.sampled_from([0.0, 0.3, 0.97, 1.0]),
    scale=st.sampled_from([2.0**-10, 1.0, 4.0, 2.0**12]),
    bits=st.booleans(),
    rows=st.sampled_from([1, 3, 50]),
)
@settings(max_examples=150)
def test_tiles_equal_the_plain_twin(
    name, seed, num_queries, num_candidates, num_own, dim, share, scale, bits, rows
):
    case = problem(seed, num_queries, num_candidates, num_own, dim, share=share, scale=scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(pairwise._TILE_BYTES, "cpu", 1)
        patch.setattr(pairwise, "_MIN_ROWS", rows)
        given_case = case
        if bits:
            dense = torch.zeros(num_queries, num_candidates, dtype=torch.bool)
            dense[case["mask"].rows, case["mask"].columns] = True
            given_case = case | {"mask": BitMask.from_dense(dense)}
        assert_twins(given_case, FUNCTIONS[name], case)
        if bits:
            assert_twins(given_case, FUNCTIONS[name])


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_rows_without_any_negative_cost_nothing_and_pull_at_nothing(name):
    case = problem(1, 5, 7, 2, share=0.0)
    rows = torch.tensor([1, 3])
    mask = PairMask(rows.repeat_interleave(7), torch.arange(7).repeat(2))
    weights = case["own_log_weights"].clone()
    weights[rows] = -math.inf
    alone = case | {"mask": mask, "own_log_weights": weights}
    _, gradients = with_gradients(total_pair_loss, alone, FUNCTIONS[name])
    for each in ("queries", "anchors", "own_scores"):
        assert gradients[each].isfinite().all()
        assert gradients[each][rows].abs().sum() == 0
    others = torch.tensor([0, 2, 4])
    kept = {
        key: value[others]
        for key, value in case.items()
        if key not in ("candidates", "log_weights", "mask")
    }
    rest = {"candidates": case["candidates"], "log_weights": case["log_weights"], "mask": None}
    found = total_pair_loss(**alone, function=FUNCTIONS[name])
    torch.testing.assert_close(found, total_pair_loss(**kept, **rest, function=FUNCTIONS[name]))
    nothing = {"candidates": torch.empty(0, 5), "log_weights": torch.empty(0), "mask": None}
    empty = {"own_scores": None, "own_log_weights": None}
    assert total_pair_loss(**(case | nothing | empty), function=FUNCTIONS[name]) == 0


def test_what_has_no_pairs_stays_in_the_graph():
    """A rank without rows has collectives in its backward pass, which the others wait for."""
    for num_queries, num_candidates in ((0, 7), (5, 0), (0, 0)):
        case = problem(2, num_queries, num_candidates, 0)
        case["queries"].requires_grad_()
        found = total_pair_loss(**case, function=Ranking())
        found.backward()
        assert found == 0
        assert case["queries"].grad.abs().sum() == 0


def formula(name, function, score, anchor):
    """What a negative costs, in Python's numbers."""
    if name == "bpr":
        return math.log1p(math.exp(score - anchor))
    if name == "bce":
        return math.log1p(math.exp(score))
    if name == "ccl":
        return max(0.0, score - 0.3)
    square = -score if function.distances.similarity == "euclidean" else 2 - 2 * score
    distance = math.sqrt(square) if square > 0 else 1e-4
    if name.startswith("margin"):
        return max(0.0, function.margin - distance) ** 2
    return max(0.0, function.margin + anchor - distance)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_a_function_and_its_slopes_are_those_of_its_formula(name):
    function = FUNCTIONS[name]
    draws = torch.Generator().manual_seed(2)
    euclidean = "euclidean" in name
    scores = torch.rand(9, 31, generator=draws, dtype=torch.float64) * 2 - 1
    scores = (2 * scores - 2.4 if euclidean else scores).requires_grad_()
    anchors = (0.2 + torch.rand(9, 1, generator=draws, dtype=torch.float64)).requires_grad_()
    found = function.value(scores, anchors)
    expected = [
        [formula(name, function, s, a) for s in row]
        for row, a in zip(scores.tolist(), anchors.flatten().tolist(), strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert 0 < (found > 0).sum() < found.numel() or name in ("bpr", "bce")
    by_score, by_anchor = torch.autograd.grad(
        found.sum(), (scores, anchors), materialize_grads=True, allow_unused=True
    )
    ours, by_row = function.slopes(scores.detach(), anchors.detach())
    torch.testing.assert_close(ours, by_score, check_dtype=False)
    by_row = torch.zeros(9, 31) if by_row is None else by_row
    torch.testing.assert_close(by_row.sum(1, keepdim=True), by_anchor, check_dtype=False)


def test_a_loop_over_rows_and_candidates():
    case, function = problem(4, 7, 11, 2), FUNCTIONS["bpr"]
    masked = set(zip(case["mask"].rows.tolist(), case["mask"].columns.tolist(), strict=True))
    total = 0.0
    for b in range(7):
        pairs = [
            (float(case["queries"][b] @ case["candidates"][c]), float(case["log_weights"][c]))
            for c in range(11)
            if (b, c) not in masked
        ]
        pairs += zip(
            case["own_scores"][b].tolist(), case["own_log_weights"][b].tolist(), strict=True
        )
        weights = [math.exp(weight) for _, weight in pairs]
        anchor = float(case["anchors"][b])
        costs = [formula("bpr", function, score, anchor) for score, _ in pairs]
        mean = sum(w * cost for w, cost in zip(weights, costs, strict=True)) / sum(weights)
        total += float(case["row_weights"][b]) * mean
    assert float(total_pair_loss(**case, function=function)) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("name", ["bpr", "all", "semi_hard", "distance_weighted"])
def test_a_weight_is_a_number_of_copies_and_its_unit_does_not_matter(name):
    case = problem(6, 7, 5, 0, share=0.0)
    weights = torch.tensor([0.0, math.log(3), 0.0, -math.inf, math.log(2)])
    copies = torch.tensor([0, 1, 1, 1, 2, 4, 4])
    alone = case | {"mask": None, "log_weights": weights}
    copied = case | {
        "mask": None,
        "candidates": case["candidates"][copies],
        "log_weights": torch.zeros(7),
    }
    found = total_pair_loss(**alone, function=FUNCTIONS[name])
    torch.testing.assert_close(found, total_pair_loss(**copied, function=FUNCTIONS[name]))
    shifted = alone | {"log_weights": weights + 40.0}
    torch.testing.assert_close(found, total_pair_loss(**shifted, function=FUNCTIONS[name]))


class Watched(Ranking):
    """Remembers how many pairs it saw at a time, and whether it was asked for slopes."""

    def __init__(self):
        object.__setattr__(self, "sizes", [])
        object.__setattr__(self, "asked", [])

    def value(self, scores, anchors):
        self.sizes.append(scores.shape)
        return super().value(scores, anchors)

    def slopes(self, scores, anchors):
        self.asked.append(len(scores))
        return super().slopes(scores, anchors)


def test_only_some_rows_of_scores_are_ever_held(monkeypatch):
    monkeypatch.setitem(pairwise._TILE_BYTES, "cpu", 4 * 43 * 100)
    case, function = problem(5, 810, 41, 2), Watched()
    with_gradients(total_pair_loss, case, function)
    assert function.sizes == [(100, 43)] * 8 + [(10, 43)]
    assert function.asked == [100] * 8 + [10]


def test_without_gradients_only_the_value_is_computed():
    case, function = problem(3, 11, 23, 1), Watched()
    found = total_pair_loss(**case, function=function)
    assert not function.asked
    torch.testing.assert_close(found, total_pair_loss_reference(**case, function=Ranking()))
    with torch.no_grad():
        leaf = case | {"queries": case["queries"].clone().requires_grad_()}
        assert torch.equal(total_pair_loss(**leaf, function=function), found)
    assert not function.asked


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"anchors": torch.zeros(6)}, r"anchors float32 \(7,\)"),
        ({"row_weights": torch.zeros(7, dtype=torch.float64)}, "row_weights"),
        ({"own_scores": torch.zeros(7, 1)}, r"own_log_weights \[7, M\]"),
        ({"own_scores": torch.zeros(6, 2), "own_log_weights": torch.zeros(6, 2)}, "M"),
        ({"log_weights": torch.zeros(3)}, "one value per candidate"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(wrong, words):
    with pytest.raises(ShapeError, match=words):
        total_pair_loss(**(problem(0, 7, 11, 2) | wrong), function=Ranking())
