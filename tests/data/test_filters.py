"""Weights, duplicates, k-core, caps, decay: against naive loops, and for any order of rows."""

import itertools
import random
import warnings
from collections import Counter

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recclr.data.check import check_events
from recclr.data.clean import filter_events
from recclr.data.filters import (
    cap_users,
    decay_weights,
    k_core,
    refuse_unknown_events,
    weigh_events,
)
from recclr.errors import ConfigError, DataError
from recclr.settings import ColumnSettings, DataSettings

NOW = 1_700_000_000
START = 1_500_000_000

ROW = st.tuples(
    st.integers(0, 4),  # user
    st.integers(0, 6),  # item
    st.integers(0, 3),  # second
    st.sampled_from([0.5, 1.0, 2.0]),  # weight
)
ROWS = st.lists(ROW, min_size=1, max_size=30)


def clean_events(events, settings, **options):
    return filter_events(check_events(events, settings, **options), settings)


def frame_of(rows):
    users, items, seconds, weights = zip(*rows, strict=True)
    return pl.DataFrame(
        {
            "user_id": users,
            "item_id": items,
            "timestamp": [START + s for s in seconds],
            "w": weights,
        }
    )


def settings(**values):
    columns = ColumnSettings(weight="w", timestamp=values.pop("timestamp", "timestamp"))
    return DataSettings(events="x", columns=columns, **values)


def clean(frame, **values):
    return clean_events(frame, settings(**values), now=NOW)


@given(rows=ROWS, users=st.integers(0, 4), items=st.integers(0, 4))
def test_k_core_equals_a_naive_loop(rows, users, items):
    kept = list(rows)
    while True:
        by_user, by_item = Counter(r[0] for r in kept), Counter(r[1] for r in kept)
        stay = [r for r in kept if by_user[r[0]] >= users and by_item[r[1]] >= items]
        if len(stay) == len(kept):
            break
        kept = stay
    core = k_core(frame_of(rows), min_per_user=users, min_per_item=items)
    assert core.equals(frame_of(kept) if kept else frame_of(rows).head(0))


def test_k_core_unravels_a_chain_of_string_ids():
    # Each removal makes the next user too small; only the square at the end survives.
    pairs = [(f"u{i}", f"i{i}") for i in range(50)] + [(f"u{i}", f"i{i + 1}") for i in range(50)]
    square = list(itertools.product(["x", "y"], ["p", "q"]))
    frame = pl.DataFrame([*pairs, *square], schema=["user_id", "item_id"], orient="row")
    core = k_core(frame, min_per_user=2, min_per_item=2)
    assert core.rows() == square


def expected_winners(rows, policy):
    """Pair -> (second, weight), written out from the definition."""
    pairs = {}
    for row in rows:
        pairs.setdefault(row[:2], []).append(row[2:])
    if policy == "sum":
        return {p: (max(s for s, _ in v), sum(w for _, w in v)) for p, v in pairs.items()}
    pick = min if policy == "first" else max
    winners = {}
    for pair, values in pairs.items():
        second = pick(s for s, _ in values)
        winners[pair] = (second, max(w for s, w in values if s == second))
    return winners


@pytest.mark.parametrize("policy", ["first", "last", "sum"])
@given(rows=ROWS, shuffle=st.randoms(use_true_random=False))
def test_duplicates_have_one_winner_in_any_order(policy, rows, shuffle):
    result = clean(frame_of(rows), deduplicate=policy).frame
    found = {(u, i): (t - START, w) for u, i, t, w in result.rows()}
    assert found == expected_winners(rows, policy)
    assert result.height == len(found)
    shuffle.shuffle(rows)
    assert clean(frame_of(rows), deduplicate=policy).frame.equals(result)


@given(rows=ROWS, shuffle=st.randoms(use_true_random=False))
def test_repeats_kept_are_still_in_one_order(rows, shuffle):
    result = clean(frame_of(rows), deduplicate="none").frame
    assert result.height == len(rows)
    assert result["timestamp"].is_sorted()
    shuffle.shuffle(rows)
    assert clean(frame_of(rows), deduplicate="none").frame.equals(result)


@pytest.mark.parametrize("policy", ["first", "last", "sum"])
def test_without_time_the_heaviest_duplicate_stays(policy):
    rows = [(1, 1, 0, 2.0), (1, 2, 0, 0.5), (1, 1, 0, 1.0), (2, 1, 0, 0.5), (1, 1, 0, 0.5)]
    weight = 3.5 if policy == "sum" else 2.0
    expected = {(1, 1, weight), (1, 2, 0.5), (2, 1, 0.5)}
    for seed in range(5):
        random.Random(seed).shuffle(rows)
        result = clean(frame_of(rows), deduplicate=policy, timestamp="").frame
        assert result.columns == ["user_id", "item_id", "weight"]
        assert set(result.rows()) == expected


def test_a_sum_beyond_float32_is_refused_and_warns_nobody():
    rows = [(1, 1, 0, 3e38), (1, 1, 1, 3e38), (2, 1, 0, 1.0)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match="beyond float32"):
            clean(frame_of(rows), deduplicate="sum")


def test_a_sum_without_weights_counts():
    frame = pl.DataFrame({"user_id": [1, 1, 2], "item_id": [5, 5, 5]})
    result = clean_events(frame, DataSettings(events="x", deduplicate="sum")).frame
    assert result.rows() == [(1, 5, 2.0), (2, 5, 1.0)]
    assert result["weight"].dtype == pl.Float32


def test_events_within_a_second_keep_their_order():
    times = [START * 1000 + ms for ms in (900, 100, 500)]
    frame = pl.DataFrame({"user_id": [1, 1, 1], "item_id": [1, 2, 3], "timestamp": times})
    result = clean_events(frame, DataSettings(events="x"), now=NOW).frame
    assert result["item_id"].to_list() == [2, 3, 1]
    assert result.columns == ["user_id", "item_id", "timestamp"]


def test_event_types_weigh_and_others_go():
    frame = pl.DataFrame(
        {"_event": ["view", "buy", None, "ad"], "item_id": [1, 2, 3, 4], "weight": [1.0, 2, 3, 4]}
    )
    weighed = weigh_events(frame, {"buy": 5.0, "view": 0.5})
    assert weighed.select("item_id", "weight").rows() == [(1, 0.5), (2, 10.0)]
    assert weigh_events(frame.drop("weight"), {"ad": 2.0})["weight"].to_list() == [2.0]
    codes = frame.with_columns(_event=pl.Series([1, 2, None, 4]))
    assert weigh_events(codes, {"4": 2.0})["item_id"].to_list() == [4]
    with pytest.raises(DataError, match="did you mean 'buy'"):
        refuse_unknown_events(frame, {"Buyy": 1.0})


def test_caps_keep_the_most_recent():
    frame = pl.DataFrame({"user_id": [1, 2, 1, 1, 2], "item_id": [1, 2, 3, 4, 5]})
    assert cap_users(frame, 2)["item_id"].to_list() == [2, 3, 4, 5]
    assert cap_users(frame, 9).equals(frame)


def test_decay_halves_and_never_reaches_zero():
    day = 86_400
    frame = pl.DataFrame({"timestamp": [START, START + 7 * day, START + 14 * day]})
    assert decay_weights(frame, 7.0)["weight"].to_list() == [0.25, 0.5, 1.0]
    weighted = frame.with_columns(weight=pl.Series([4.0, 1.0, 3.0], dtype=pl.Float32))
    assert decay_weights(weighted, 7.0)["weight"].to_list() == [1.0, 0.5, 3.0]
    tiny = decay_weights(frame, 1e-6)["weight"]
    assert tiny.dtype == pl.Float32
    assert (tiny > 0).all()
    with pytest.raises(ConfigError, match="needs a log with times"):
        decay_weights(frame.drop("timestamp"), 7.0)


def test_steps_are_counted_in_order():
    rows = [(1, 1, 0, 1.0), (1, 1, 1, 1.0), (1, 2, 2, 1.0), (2, 1, 3, 1.0), (2, 2, 3, 1.0)]
    rows += [(3, 9, 0, 1.0), (1, 3, 3, 1.0), (2, 3, 1, 1.0), (2, 4, 2, 0.5)]
    result = clean(
        frame_of(rows), where={"w": ">= 1"}, k_core_user=2, k_core_item=2, max_per_user=2
    )
    assert [(s.name, s.rows_in, s.rows_out) for s in result.steps] == [
        ("where w", 9, 8),
        ("bad_rows", 8, 8),
        ("deduplicate", 8, 7),
        ("k_core", 7, 6),
        ("max_per_user", 6, 4),
    ]
    assert result.frame.select("user_id", "item_id").rows() == [(1, 2), (1, 3), (2, 1), (2, 2)]


@pytest.mark.parametrize(
    ("values", "step"),
    [
        ({"where": {"w": "> 9"}}, "'where w' left no rows of 2; loosen data.where.w = '> 9'"),
        ({"k_core_user": 3}, "'k_core' left no rows of 2; loosen data.k_core_user = 3"),
    ],
)
def test_the_step_that_empties_the_log_is_named(values, step):
    with pytest.raises(DataError) as caught:
        clean(frame_of([(1, 1, 0, 1.0), (2, 2, 0, 1.0)]), **values)
    assert step in str(caught.value)
