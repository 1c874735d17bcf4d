"""Pairs against a double loop over histories, and what is known to a query."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recclr.co_interactions import co_interactions, last_items
from recclr.data.log import EncodedLog
from recclr.errors import DataError
from recclr.settings import PairSettings

DAY_S = 86_400


def log_of(seed, num_rows, *, num_users=4, num_items=6, timed=True, weighted=False):
    draws = torch.Generator().manual_seed(seed)
    times = torch.randint(20 * DAY_S, (num_rows,), generator=draws).sort().values
    return EncodedLog(
        torch.randint(num_users, (num_rows,), generator=draws).int(),
        torch.randint(num_items, (num_rows,), generator=draws).int(),
        num_users,
        num_items,
        times if timed else None,
        torch.rand(num_rows, generator=draws) + 0.1 if weighted else None,
    )


def loop(log, settings):
    found = []
    for user in range(log.num_users):
        rows = (log.user_idx == user).nonzero().squeeze(1).tolist()
        for place, first in enumerate(rows):
            for distance, second in enumerate(rows[place + 1 : place + 1 + settings.window]):
                a, b = int(log.item_idx[first]), int(log.item_idx[second])
                weight, later = 0.5 ** (distance / settings.half_life), None
                if log.weight is not None:
                    weight *= float(log.weight[first] * log.weight[second]) ** 0.5
                if log.timestamp is not None:
                    later = int(log.timestamp[second])
                    apart = later - int(log.timestamp[first])
                    if settings.within_d is not None and apart > settings.within_d * DAY_S:
                        continue
                if a != b:
                    found += [(a, b, round(weight, 4), later), (b, a, round(weight, 4), later)]
    return sorted(found, key=repr)


@given(
    seed=st.integers(0, 500),
    num_rows=st.integers(0, 30),
    window=st.integers(1, 7),
    within_d=st.sampled_from([None, 0.5, 4.0]),
    half_life=st.sampled_from([0.5, 2.0, 1e6]),
    timed=st.booleans(),
    weighted=st.booleans(),
)
def test_pairs_are_those_of_a_loop(seed, num_rows, window, within_d, half_life, timed, weighted):
    log = log_of(seed, num_rows, timed=timed, weighted=weighted)
    settings = PairSettings(window=window, within_d=within_d, half_life=half_life)
    expected = loop(log, settings)
    if not expected:
        with pytest.raises(DataError, match="close together"):
            co_interactions(log, settings)
        return
    pairs = co_interactions(log, settings)
    later = [None] * len(pairs) if pairs.timestamp is None else pairs.timestamp.tolist()
    weights = [round(w, 4) for w in pairs.weight.tolist()]
    columns = zip(pairs.user_idx.tolist(), pairs.item_idx.tolist(), weights, later, strict=True)
    assert [row[:2] for row in sorted(columns, key=repr)] == [row[:2] for row in expected]
    assert sorted(weights) == pytest.approx(sorted(row[2] for row in expected), abs=2e-4)
    assert later == ([None] * len(pairs) if not timed else sorted(later))


def test_known_are_all_that_stand_beside_a_query_and_itself():
    pairs = co_interactions(log_of(3, 25), PairSettings(window=2))
    items, users = pairs.to("cpu").known_pairs()
    for query in range(pairs.num_items):
        beside = set(pairs.item_idx[pairs.user_idx == query].tolist())
        assert items.row(query).tolist() == sorted(beside | {query})
        assert users.row(query).tolist() == items.row(query).tolist()


@pytest.mark.parametrize("length", [1, 3, 100])
def test_the_last_items_of_each_user(length):
    log = log_of(5, 23, num_users=6)
    found = last_items(log, length)
    every = log.user_items()
    assert found.num_rows == 6
    for user in range(6):
        assert found.row(user).tolist() == every.row(user).tolist()[-length:]
