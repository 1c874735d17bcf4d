"""Masked pairs against a set of all train interactions."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recclr.data.log import EncodedLog
from recclr.known_positives import KnownPositives


def case(seed, num_users, num_items, num_rows, batch_size, num_candidates):
    draws = torch.Generator().manual_seed(seed)
    users = torch.randint(num_users, (num_rows,), generator=draws)
    items = torch.randint(num_items, (num_rows,), generator=draws)
    log = EncodedLog(users.int(), items.int(), num_users, num_items)
    rows = torch.randint(num_rows, (batch_size,), generator=draws)
    candidates = torch.randperm(num_items, generator=draws)[:num_candidates]
    return log, users[rows], items[rows], candidates


def brute(log, user_idx, candidates):
    known = set(zip(log.user_idx.tolist(), log.item_idx.tolist(), strict=True))
    return {
        (row, column)
        for row, user in enumerate(user_idx.tolist())
        for column, item in enumerate(candidates.tolist())
        if (user, item) in known
    }


def pairs(mask):
    assert torch.equal(mask.rows, mask.rows.sort().values)
    return set(zip(mask.rows.tolist(), mask.columns.tolist(), strict=True))


@given(
    seed=st.integers(0, 10_000),
    num_users=st.integers(1, 12),
    num_items=st.integers(1, 15),
    num_rows=st.integers(1, 60),
    batch_size=st.integers(1, 17),
    num_candidates=st.integers(0, 15),
)
@settings(max_examples=150, deadline=None)
def test_both_walks_find_every_known_pair_and_no_other(
    seed, num_users, num_items, num_rows, batch_size, num_candidates
):
    log, user_idx, positives, candidates = case(
        seed, num_users, num_items, num_rows, batch_size, num_candidates
    )
    known = KnownPositives(log)
    expected = brute(log, user_idx, candidates)
    assert pairs(known._from_rows(user_idx, candidates)) == expected
    assert pairs(known._from_candidates(user_idx, candidates)) == expected
    # The tables between calls are clean again: the same question gives the same answer.
    assert pairs(known.mask(user_idx, positives, candidates)) == expected


def test_the_positive_itself_is_always_masked():
    log, user_idx, positives, _ = case(1, 5, 9, 30, 7, 0)
    candidates = torch.arange(9)
    found = pairs(KnownPositives(log).mask(user_idx, positives, candidates))
    assert {(row, item) for row, item in enumerate(positives.tolist())} <= found


def test_only_own_masks_nothing_but_the_rows_positive():
    log, user_idx, positives, _ = case(2, 3, 9, 40, 11, 0)
    candidates = torch.tensor([8, 1, 4])
    found = pairs(KnownPositives(log, only_own=True).mask(user_idx, positives, candidates))
    places = {8: 0, 1: 1, 4: 2}
    assert found == {
        (row, places[item]) for row, item in enumerate(positives.tolist()) if item in places
    }
