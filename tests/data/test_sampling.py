"""Samples that keep every user, nest, and depend on nothing but the rows and the seed."""

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recclr.data.interactions import Log
from recclr.data.sampling import sample_of_users
from recclr.data.split import split_log
from recclr.settings import DataSettings, SplitSettings


def events_of(num_users=40):
    """User u has u + 1 rows, of items that differ."""
    rows = [(user, 7 * place + user % 5) for user in range(num_users) for place in range(user + 1)]
    return pl.DataFrame(rows, schema=["user_id", "item_id"], orient="row")


def kept_rows(events, share, seed=3):
    return set(events.filter(sample_of_users(events, share, seed=seed)).iter_rows())


@given(share=st.floats(1e-6, 1.0), more=st.floats(1e-6, 1.0), seed=st.integers(0, 9))
def test_samples_nest_and_keep_every_user_and_the_share_of_each(share, more, seed):
    events = events_of()
    low, high = sorted((share, more))
    small, large = (kept_rows(events, part, seed) for part in (low, high))
    assert small <= large
    for user in range(40):
        found = sum(row[0] == user for row in small)
        exact = (user + 1) * low
        assert found == 1 or exact - 1 < found < exact + 1
        assert found >= 1


def test_the_whole_is_all_rows_and_a_share_is_met_on_average():
    events = events_of()
    assert kept_rows(events, 1.0) == set(events.iter_rows())
    users = [u for u in range(40) if u >= 20]
    exact = sum(0.3 * (user + 1) for user in users)
    found = [sum(row[0] >= 20 for row in kept_rows(events, 0.3, seed)) for seed in range(30)]
    # A fractional row per user, rounded: deviation of at most half a row each.
    assert sum(found) / 30 == pytest.approx(exact, abs=5 * 0.5 * 20**0.5 / 30**0.5)
    assert kept_rows(events, 0.3, 3) != kept_rows(events, 0.3, 4)


def test_a_row_is_kept_whatever_stands_around_it():
    events = events_of()
    turned = events.sample(fraction=1.0, shuffle=True, seed=1)
    assert kept_rows(turned, 0.4) == kept_rows(events, 0.4)
    some = events.filter(pl.col("user_id") > 17)
    expected = {row for row in kept_rows(events, 0.4) if row[0] > 17}
    assert kept_rows(some, 0.4) == expected


def test_only_train_is_sampled_and_what_is_left_out_is_known_to_be_had():
    frame = events_of().with_columns(pl.int_range(pl.len()).alias("timestamp") + 1_500_000_000)
    frame = frame.sample(fraction=1.0, shuffle=True, seed=5).with_columns(
        pl.int_range(pl.len()).alias("timestamp") + 1_500_000_000
    )
    log = Log(frame, None, None, DataSettings(events="<memory>"))
    whole = split_log(log, SplitSettings(by="time"))
    part = split_log(log, SplitSettings(by="time", train_share=0.25))
    assert whole.left_out is None
    assert whole.had_before("valid") is None
    for name in ("valid", "test"):
        assert getattr(part, name).events.equals(getattr(whole, name).events)
    rows = [set(log.events.iter_rows()) for log in (part.train, part.left_out, whole.train)]
    assert rows[0] | rows[1] == rows[2]
    assert not rows[0] & rows[1]
    assert part.train.num_users == whole.train.num_users
    assert part.train.events["timestamp"].is_sorted()
    assert part.counts["train"]["rows"] == len(part.train)
    assert part.counts["left_out"]["rows"] == len(part.left_out)

    def pairs(log):
        return set(log.events.iter_rows())

    assert pairs(part.had_before("valid")) == rows[1]
    assert pairs(part.had_before("test")) == rows[1] | pairs(part.valid)
    assert pairs(part.had_before("test", refitted=True)) == rows[1]
    assert pairs(whole.had_before("test")) == pairs(whole.valid)
    assert whole.had_before("test", refitted=True) is None
