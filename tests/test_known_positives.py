"""Masked pairs against a set of all train interactions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recclr.data.log import EncodedLog
from recclr.known_positives import KnownPositives

pytestmark = pytest.mark.usefixtures("both_kernels")


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
    found = set(zip(mask.rows.tolist(), mask.columns.tolist(), strict=True))
    # Each pair once, however often the log has it.
    assert len(found) == len(mask)
    return found


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
    # The second question is about fewer rows and candidates: no table remembers the first.
    for users, items in ((user_idx, candidates), (user_idx[::2], candidates[1::2])):
        expected = brute(log, users, items)
        assert pairs(known._from_rows(users, items)) == expected
        # Room for none of the pairs, for all but one, and for them alone.
        for room in {0, max(len(expected) - 1, 0), len(expected)}:
            assert pairs(known._from_candidates(users, items, room)) == expected
        assert pairs(known.mask(users, positives[: len(users)], items)) == expected


@given(
    seed=st.integers(0, 10_000),
    num_users=st.integers(1, 12),
    num_items=st.integers(1, 45),
    num_rows=st.integers(1, 60),
    batch_size=st.integers(1, 17),
    num_candidates=st.integers(1, 45),
    num_spare=st.integers(0, 5),
    only_own=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_bits_are_the_pairs_whatever_is_repeated(
    seed, num_users, num_items, num_rows, batch_size, num_candidates, num_spare, only_own
):
    log, user_idx, positives, candidates = case(
        seed, num_users, num_items, num_rows, batch_size, min(num_candidates, num_items)
    )
    known = KnownPositives(log, only_own=only_own)
    expected = known.mask(user_idx, positives, candidates)
    padded = torch.cat([candidates, candidates[-1:].expand(num_spare)])
    places = torch.arange(len(padded)).clamp(max=len(candidates) - 1)
    for asked, of in ((padded, places), (candidates, None)):
        bits, count = known.bits(user_idx, positives, asked, of)
        found = bits.dense(len(asked)).nonzero()
        assert set(map(tuple, found.tolist())) == pairs(expected)
        assert int(count) == len(expected)
    # An item that is looked at and is no candidate.
    bits, count = known.bits(user_idx, positives, padded, torch.where(places == 0, -1, places))
    hidden = bits.dense(len(padded))
    assert int(count) == int(hidden.sum()) == sum(column > 0 for _, column in pairs(expected))
    assert not hidden[:, 0].any()


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


def test_a_user_with_several_rows_is_masked_in_each():
    log = EncodedLog(torch.tensor([0, 0, 1]).int(), torch.tensor([2, 4, 3]).int(), 2, 5)
    users, candidates = torch.tensor([0, 1, 0, 0]), torch.tensor([4, 3, 2])
    expected = {(0, 0), (0, 2), (1, 1), (2, 0), (2, 2), (3, 0), (3, 2)}
    known = KnownPositives(log)
    for walk in (known._from_rows, known._from_candidates):
        assert pairs(walk(users, candidates)) == expected


@pytest.mark.parametrize(
    ("candidates", "shorter"), [([0], "_from_rows"), ([1, 2, 3], "_from_candidates")]
)
def test_the_shorter_walk_is_taken(candidates, shorter, monkeypatch):
    # Item 0 has five users; user 0 took items 0 to 3, which is four entries.
    users = torch.tensor([0, 0, 0, 0, 1, 2, 3, 4])
    items = torch.tensor([0, 1, 2, 3, 0, 0, 0, 0])
    known = KnownPositives(EncodedLog(users.int(), items.int(), 5, 6))
    taken = []
    for name in ("_from_rows", "_from_candidates"):
        walk = getattr(known, name)

        def spy(*args, name=name, walk=walk):
            taken.append(name)
            return walk(*args)

        monkeypatch.setattr(known, name, spy)
    known.mask(torch.tensor([0]), torch.tensor([0]), torch.tensor(candidates))
    assert taken == [shorter]
