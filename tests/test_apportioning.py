"""Which items a rank embeds: what its rows name, and nothing else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recclr.apportioning import each_for_itself, is_lookup, most_needed, needed
from recclr.distributed import Ranks
from recclr.negatives import Candidates
from recclr.optim import Table
from recclr.parts import IdPart
from recclr.towers import Tower


def id_part(num_items=9):
    table = Table(num_items + 1, 4, std=0.1, generator=torch.Generator())
    return IdPart(table, torch.ones(num_items, dtype=torch.bool), dropout=0.0, trains_unknown=False)


def tower(parts, mlp=()):
    return Tower(parts, 4, mlp=mlp, dropout=0.0)


@st.composite
def steps(draw):
    """Items, which of them are candidates, and what some rows name."""
    num_items = draw(st.integers(1, 12))
    places = st.integers(0, num_items - 1)
    chosen = sorted(draw(st.sets(places)))
    rows = draw(st.integers(0, 5))
    positives = draw(st.lists(places, min_size=rows, max_size=rows))
    width = draw(st.integers(0, 3))
    or_none = st.one_of(places, st.just(-1))
    more = draw(st.lists(or_none, min_size=rows * width, max_size=rows * width))
    return num_items, chosen, positives, more, width


@given(steps())
def test_what_is_left_names_the_same_items_and_no_other(step):
    num_items, chosen, positives, more, width = step
    item_idx = 100 + 3 * torch.arange(num_items)
    weights = torch.arange(len(chosen)).float()
    candidates = Candidates(
        item_idx, torch.tensor([0]), torch.tensor(chosen, dtype=torch.int64), weights
    )
    named = (
        torch.tensor(positives, dtype=torch.int64),
        None,
        torch.tensor(more, dtype=torch.int64).view(len(positives), width),
    )
    places, fewer, (positive_row, own_row, more_row) = needed(candidates, named)
    wanted = {*chosen, *positives, *(place for place in more if place >= 0)}
    assert places.tolist() == sorted(wanted)
    assert torch.equal(fewer.item_idx, item_idx[places])
    assert torch.equal(fewer.candidate_idx, candidates.candidate_idx)
    assert torch.equal(fewer.log_weights, weights)
    assert fewer.item_idx[positive_row].tolist() == item_idx[named[0]].tolist()
    assert own_row is None
    assert more_row.shape == named[2].shape
    for before, after in zip(more, more_row.reshape(-1).tolist(), strict=True):
        assert after == -1 if before == -1 else fewer.item_idx[after] == item_idx[before]
    alone = Ranks(0, 1)
    assert len(places) <= most_needed(alone, len(positives), candidates, named)


def test_where_all_are_candidates_all_are_left():
    candidates = Candidates(torch.tensor([3, 5, 8]), torch.tensor([1, 2]), None, torch.zeros(3))
    named = torch.tensor([2]), torch.tensor([[0, 1]]), None
    places, fewer, same = needed(candidates, named)
    assert places.tolist() == [0, 1, 2]
    assert fewer is candidates
    assert same is named


@pytest.mark.parametrize(
    ("size", "num_candidates", "lookup", "expected"),
    [
        (1, 1, True, False),  # nobody to share with
        (2, 50, False, True),
        (2, 51, False, False),  # more than the 50 rows of a rank
        (4, 10_000, True, True),
        (5, 10_000, True, False),
        (5, 20, True, True),
    ],
)
def test_few_candidates_or_a_look_up_are_embedded_by_each_rank(
    size, num_candidates, lookup, expected
):
    of = tower({"id": id_part()}, mlp=() if lookup else (8,))
    assert is_lookup(of) == lookup
    for rank in range(size):
        assert each_for_itself(Ranks(rank, size), 100, num_candidates, of) == expected


def test_a_tower_of_more_than_an_id_is_no_look_up():
    assert not is_lookup(tower({"id": id_part(), "other": id_part()}))
    assert not is_lookup(torch.nn.Linear(2, 2))
