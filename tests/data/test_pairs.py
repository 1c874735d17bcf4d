"""Rows of one pair: against dictionaries, and where every hash is shared."""

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recclr.data import pairs
from recclr.data.pairs import rows_in, rows_near, runs_of_pairs

PAIRS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), max_size=40)
KINDS = [pl.Int64, pl.UInt8, pl.String]


def frame_of(rows, kind=pl.Int64):
    users, items = [u for u, _ in rows], [i for _, i in rows]
    frame = pl.DataFrame({"user_id": users, "item_id": items})
    return frame.with_columns(pl.all().cast(kind)).with_row_index("row")


def by_pair(rows):
    found = {}
    for row, pair in enumerate(rows):
        found.setdefault(pair, []).append(row)
    return found


def check_runs(rows, kind):
    runs = runs_of_pairs(frame_of(rows, kind))
    groups = []
    for row, begins in zip(runs.order.tolist(), runs.begins.tolist(), strict=True):
        if begins:
            groups.append([])
        groups[-1].append(row)
    expected = by_pair(rows)
    assert sorted(groups) == sorted(expected.values())
    assert sorted(runs.first.tolist()) == sorted(group[0] for group in expected.values())
    assert sorted(runs.last.tolist()) == sorted(group[-1] for group in expected.values())


def check_rows_in(held, known, kind):
    mine, theirs = frame_of(held, kind), frame_of(known, kind)
    assert rows_in(mine, theirs)["row"].to_list() == [
        row for row, pair in enumerate(held) if pair in set(known)
    ]
    near = rows_near(mine, theirs)
    assert near.columns == ["user_id", "item_id"]
    shared = theirs.join(mine.drop("row"), on=["user_id", "item_id"], how="semi")
    assert near.join(shared, on=["user_id", "item_id"], how="semi").height == shared.height


@pytest.mark.parametrize("kind", KINDS)
@given(rows=PAIRS)
def test_rows_of_a_pair_stand_together_in_their_order(kind, rows):
    check_runs(rows, kind)


@pytest.mark.parametrize("kind", KINDS)
@given(held=PAIRS, known=PAIRS)
def test_rows_whose_pair_is_known(kind, held, known):
    check_rows_in(held, known, kind)


@pytest.mark.parametrize("kind", KINDS)
@given(rows=PAIRS, known=PAIRS, left=st.sampled_from([0, 1]))
def test_shared_hashes_change_nothing(kind, rows, known, left):
    hashes = pairs._hashes

    def few(frame):
        return (hashes(frame) & left).alias("key")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "_hashes", few)
        check_runs(rows, kind)
        check_rows_in(rows, known, kind)


def test_user_and_item_do_not_change_places():
    runs = runs_of_pairs(frame_of([(1, 2), (2, 1), (1, 1), (2, 2)]))
    assert runs.begins.all()
    assert rows_in(frame_of([(1, 2)]), frame_of([(2, 1)])).is_empty()
