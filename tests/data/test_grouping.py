"""Rows by entity, made in small passes, against loops over the whole log."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import recclr.data.grouping as grouping
from recclr.data.log import EncodedLog

NUM_USERS, NUM_ITEMS = 7, 5
ORIGIN_S = 1_700_000_000
events = st.lists(
    st.tuples(st.integers(0, NUM_USERS - 1), st.integers(0, NUM_ITEMS - 1), st.integers(0, 9)),
    min_size=1,
    max_size=40,
)


def log_of(rows, *, timed=True):
    rows = sorted(rows, key=lambda row: row[2])
    users, items, seconds = (torch.tensor(column) for column in zip(*rows, strict=True))
    timestamp = seconds + ORIGIN_S if timed else None
    return EncodedLog(users.int(), items.int(), NUM_USERS, NUM_ITEMS, timestamp=timestamp)


def joined(log, wanted=grouping.GROUPS):
    found = {}
    for name, piece in grouping.grouped(log, wanted):
        found.setdefault(name, []).append(piece)
    return {name: torch.cat(pieces) for name, pieces in found.items()}


def rows_of(found, name):
    offsets, values = found[f"{name}.offsets"].tolist(), found[f"{name}.values"].tolist()
    return [values[start:stop] for start, stop in pairwise(offsets)]


@given(rows=events, length=st.sampled_from([1, 3, 8, 1 << 22]))
@settings(max_examples=120, deadline=None)
def test_groups_are_those_of_a_loop_whatever_the_length_of_a_pass(rows, length):
    log = log_of(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouping, "_ROWS", length)
        found = joined(log)
    pairs = list(zip(log.user_idx.tolist(), log.item_idx.tolist(), strict=True))
    seconds = (log.timestamp - log.timestamp[0]).tolist()
    span = seconds[-1] + 2
    users, items = range(NUM_USERS), range(NUM_ITEMS)
    assert rows_of(found, "user_items") == [[i for u, i in pairs if u == user] for user in users]
    assert rows_of(found, "known_items") == [
        sorted({i for u, i in pairs if u == user}) for user in users
    ]
    assert rows_of(found, "known_users") == [
        sorted({u for u, i in pairs if i == item}) for item in items
    ]
    timed = list(zip(pairs, seconds, strict=True))
    assert found["user_times"].tolist() == sorted(u * span + s for (u, _), s in timed)
    assert found["item_times"].tolist() == sorted(i * span + s for (_, i), s in timed)


@given(rows=events, length=st.integers(1, 50))
@settings(max_examples=80, deadline=None)
def test_a_pass_keeps_few_rows_and_all_passes_keep_each_once(rows, length):
    own = log_of(rows).user_idx
    counts = torch.bincount(own, minlength=NUM_USERS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouping, "_ROWS", length)
        found = list(grouping._stretches(own, counts))
    assert [low for low, _, _ in found] == [0, *(high for _, high, _ in found[:-1])]
    assert found[-1][1] == NUM_USERS
    for low, high, kept in found:
        assert len(kept) <= length or high == low + 1
        assert kept.tolist() == [row for row, user in enumerate(own.tolist()) if low <= user < high]
    # No pass that could have been spared: two neighbours together are too long.
    sizes = [len(kept) for _, _, kept in found]
    assert all(a + b > length for a, b in pairwise(sizes))


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ((), set()),
        (("known",), {"known_items", "known_users"}),
        (("user_items",), {"user_items"}),
        (("user_times",), {"user_times"}),
        (("item_times", "known"), {"item_times", "known_items", "known_users"}),
    ],
)
def test_nothing_is_made_that_is_not_wanted(wanted, names):
    found = joined(log_of([(0, 1, 2), (3, 4, 5)]), wanted)
    assert {name.partition(".")[0] for name in found} == names


@given(rows=events, length=st.sampled_from([1, 3, 100]))
def test_items_of_users_are_those_of_one_sort(rows, length):
    log = log_of(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouping, "_ROWS", length)
        found = grouping.user_items(log)
    expected = log.user_items()
    assert torch.equal(found.offsets, expected.offsets)
    assert torch.equal(found.values, expected.values)
    assert found.values.dtype == torch.int32
    none = grouping.user_items(log.rows(slice(0, 0)))
    assert none.offsets.tolist() == [0] * (NUM_USERS + 1)
    assert not len(none.values)


def test_without_time_there_are_no_times():
    found = joined(log_of([(0, 1, 2), (3, 4, 5)], timed=False))
    assert not {"user_times", "item_times"} & found.keys()
    assert {"user_items.values", "known_items.values"} <= found.keys()


def test_keys_that_would_overflow_are_left_out():
    one = torch.zeros(2, dtype=torch.int32)
    log = EncodedLog(one, one, 1 << 20, 3, timestamp=torch.tensor([0, 1 << 42]))
    found = joined(log)
    assert "user_times" not in found
    assert found["item_times"].tolist() == [0, 1 << 42]


def test_the_range_of_time():
    assert grouping.time_range(torch.tensor([5, 5, 9])) == (5, 6)
    assert grouping.time_range(torch.empty(0, dtype=torch.int64)) == (0, 2)
