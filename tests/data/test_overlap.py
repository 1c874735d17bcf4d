"""Held-out rows against the rows before them: counts written out from their definition."""

import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from recclr.data.overlap import overlaps, sizes
from recclr.data.reading import read

START = 1_500_000_000
ROWS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 7), st.integers(0, 9)), min_size=1, max_size=15
)


def log_of(rows, time):
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    frame = frame.with_columns(pl.col("timestamp") + START)
    return read(frame if time else frame.drop("timestamp"), deduplicate="none")


def expected(held, before, time):
    users, items = {row[0] for row in before}, {row[1] for row in before}
    pairs, latest = {row[:2] for row in before}, max(row[2] for row in before)
    counts = {
        "rows": len(held),
        "users": len({row[0] for row in held}),
        "items": len({row[1] for row in held}),
        "unknown_users": len({row[0] for row in held} - users),
        "rows_of_unknown_users": sum(row[0] not in users for row in held),
        "unknown_items": len({row[1] for row in held} - items),
        "rows_of_unknown_items": sum(row[1] not in items for row in held),
        "rows_also_before": sum(row[:2] in pairs for row in held),
    }
    return counts | ({"rows_before_train_end": sum(r[2] <= latest for r in held)} if time else {})


@given(train=ROWS, valid=st.none() | ROWS, test=st.none() | ROWS, time=st.booleans())
def test_counts_equal_their_definition(train, valid, test, time):
    logs = [None if rows is None else log_of(rows, time) for rows in (train, valid, test)]
    found = overlaps(*logs)
    wanted = {}
    if valid is not None:
        wanted["valid"] = expected(valid, train, time)
    if test is not None:
        wanted["test"] = expected(test, train, time)
    if valid is not None and test is not None:
        wanted["test_after_refit"] = expected(test, train + valid, time)
    assert found == wanted
    assert sizes(logs[0])["rows"] == len(train)
