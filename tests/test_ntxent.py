"""NT-Xent against equation 1 of SimCLR as a double loop, in value and gradient."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recclr.ntxent import nt_xent


def literal(first, second, temperature, entities):
    """Every view against every other one, in float64 and plain Python."""
    views = torch.cat([first, second])
    num_rows, total = len(first), 0.0
    for i in range(2 * num_rows):
        j = (i + num_rows) % (2 * num_rows)
        terms = []
        for k in range(2 * num_rows):
            if k != j and entities[k % num_rows] == entities[i % num_rows]:
                continue
            cosine = views[i] @ views[k] / (views[i].norm() * views[k].norm())
            terms.append((cosine / temperature).exp())
        positive = views[i] @ views[j] / (views[i].norm() * views[j].norm())
        total = total - (positive / temperature - sum(terms).log())
    return total / (2 * num_rows)


def views_of(num_rows, dim, seed):
    draws = torch.Generator().manual_seed(seed)
    # Of any length: the loss looks at angles.
    lengths = 10 ** torch.empty(2, num_rows, 1).uniform_(-2, 2, generator=draws)
    return lengths * torch.randn(2, num_rows, dim, generator=draws)


@given(
    entities=st.lists(st.integers(0, 5), min_size=1, max_size=9),
    dim=st.integers(1, 5),
    temperature=st.sampled_from([0.07, 0.5, 3.0]),
    seed=st.integers(0, 99),
)
def test_value_and_gradients_are_those_of_the_double_loop(entities, dim, temperature, seed):
    both = views_of(len(entities), dim, seed)
    exact = both.double().requires_grad_(True)
    expected = literal(exact[0], exact[1], temperature, entities)
    expected.backward()
    found = both.clone().requires_grad_(True)
    loss = nt_xent(found[0], found[1], temperature, entity_idx=torch.tensor(entities))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), abs=2e-5)
    # Rows are of lengths that differ by 10^4, and their gradients with them.
    lengths = both.norm(dim=2, keepdim=True)
    torch.testing.assert_close(
        found.grad * lengths, (exact.grad * lengths).float(), atol=2e-5, rtol=1e-4
    )


def test_without_entities_every_row_is_another_one():
    first, second = views_of(7, 3, 1)
    told = nt_xent(first, second, 0.2, entity_idx=torch.tensor([4, 9, 1, 0, 3, 8, 2]))
    torch.testing.assert_close(nt_xent(first, second, 0.2), told)


def test_the_views_may_change_places():
    first, second = views_of(7, 3, 2)
    idx = torch.tensor([1, 1, 3, 2, 3, 3, 0])
    one = nt_xent(first, second, 0.2, entity_idx=idx)
    torch.testing.assert_close(nt_xent(second, first, 0.2, entity_idx=idx), one)


def test_the_temperature_has_the_slope_of_finite_differences():
    first, second = views_of(6, 4, 3)
    temperature = torch.tensor(0.4, requires_grad=True)
    nt_xent(first, second, temperature).backward()
    low, high = (float(nt_xent(first, second, 0.4 + by)) for by in (-0.01, 0.01))
    assert float(temperature.grad) == pytest.approx((high - low) / 0.02, rel=5e-3)


@pytest.mark.parametrize("entities", [None, [2, 0, 2, 1, 1, 2, 5, 4, 3, 0, 2]])
@pytest.mark.parametrize("cuts", [(0, 4, 11), (0, 0, 5, 11)])
def test_the_parts_add_up_to_the_whole_in_value_and_gradient(entities, cuts):
    idx = None if entities is None else torch.tensor(entities)
    both = views_of(11, 3, 4).requires_grad_(True)
    whole = nt_xent(both[0], both[1], 0.3, entity_idx=idx)
    (expected,) = torch.autograd.grad(whole, both)
    parts, grads = [], torch.zeros_like(expected)
    for part in itertools.pairwise(cuts):
        parts.append(nt_xent(both[0], both[1], 0.3, entity_idx=idx, part=part))
        grads += torch.autograd.grad(parts[-1], both)[0]
    torch.testing.assert_close(sum(parts), whole)
    lengths = both.detach().norm(dim=2, keepdim=True)
    torch.testing.assert_close(grads * lengths, expected * lengths, atol=1e-6, rtol=1e-5)


def test_closed_forms():
    # M orthogonal entities whose views agree: e / (e + 2 M - 2) at temperature 1.
    unit = torch.eye(5)
    assert float(nt_xent(unit, unit, 1.0)) == pytest.approx(math.log(math.e + 8) - 1, rel=1e-6)
    # All alike: nothing but chance among 2 M - 1.
    same = torch.ones(5, 3)
    assert float(nt_xent(same, 2 * same, 0.1)) == pytest.approx(math.log(9), rel=1e-5)
    # One entity, however often it comes: nothing to tell it from.
    one = torch.zeros(5, dtype=torch.int64)
    assert float(nt_xent(unit, unit.flip(0), 0.1, entity_idx=one)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("num_rows", [0, 1])
def test_too_few_to_tell_apart_cost_nothing(num_rows):
    both = torch.randn(2, num_rows, 3, requires_grad=True)
    for idx in (None, torch.zeros(num_rows, dtype=torch.int64)):
        loss = nt_xent(both[0], both[1], 0.1, entity_idx=idx)
        loss.backward()
        assert float(loss.detach()) == pytest.approx(0, abs=1e-5)
        assert float(both.grad.abs().sum()) < 1e-5


def test_half_precision_comes_out_as_float32():
    first, second = views_of(6, 4, 5).bfloat16()
    loss = nt_xent(first, second, 0.4)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, nt_xent(first.float(), second.float(), 0.4))


@pytest.mark.parametrize("shown", ["distinct", "skewed"])
def test_recomputed_tiles_give_the_same(shown, monkeypatch):
    """As beyond the room for probabilities, where memory does not hold every pair of views."""
    from recclr.kernels import tiled

    draws = torch.Generator().manual_seed(6)
    both = views_of(1500, 6, 7).requires_grad_(True)
    idx = None
    if shown == "skewed":
        idx = (1500 * torch.rand(1500, generator=draws) ** 3).long()
    results = []
    for room in (tiled._STORE_BYTES, 0):
        monkeypatch.setattr(tiled, "_STORE_BYTES", room)
        loss = nt_xent(both[0], both[1], 0.1, entity_idx=idx)
        results.append((loss.detach(), *torch.autograd.grad(loss, both)))
    torch.testing.assert_close(results[0][0], results[1][0])
    lengths = both.detach().norm(dim=2, keepdim=True)
    torch.testing.assert_close(results[0][1] * lengths, results[1][1] * lengths)
