"""Splits: every row once, no matter the order; cut-offs, counts and refusals."""

from collections import Counter

import polars as pl
import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from recclr.data.reading import read
from recclr.errors import ConfigError, DataError
from recclr.settings import SplitSettings

START = 1_500_000_000

ROW = st.tuples(st.integers(0, 5), st.integers(0, 7), st.integers(0, 20))
ROWS = st.lists(ROW, min_size=1, max_size=40)
SETTINGS = st.one_of(
    st.builds(
        SplitSettings,
        by=st.sampled_from(["time", "random", "items", "auto"]),
        valid=st.sampled_from([0.0, 0.1, 0.3]),
        test=st.sampled_from([0.0, 0.2, 0.4]),
        seed=st.integers(0, 9),
    ),
    st.builds(
        SplitSettings,
        by=st.just("leave_last"),
        valid=st.sampled_from([0, 1, 2]).map(float),
        test=st.sampled_from([0, 1]).map(float),
    ),
)


def log_of(rows, time=True, **settings):
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    frame = frame.with_columns(pl.col("timestamp") + START)
    return read(frame if time else frame.drop("timestamp"), **settings)


def parts_of(split):
    return [part.events.rows() for part in (split.train, split.valid, split.test) if part]


@given(rows=ROWS, settings=SETTINGS, policy=st.sampled_from(["first", "none"]))
@limits(max_examples=200)
def test_parts_partition_the_rows(rows, settings, policy):
    log = log_of(rows, deduplicate=policy)
    try:
        split = log.split(settings)
    except DataError:  # an empty part, which small logs often have
        return
    parts = parts_of(split)
    assert Counter(row for part in parts for row in part) == Counter(log.events.rows())
    assert (split.valid is None) == (settings.valid == 0)
    assert (split.test is None) == (settings.test == 0)
    for part in (split.train, split.valid, split.test):
        if part is not None:
            assert len(part)
            assert part.events["timestamp"].is_sorted()
    if split.by not in ("time", "items"):  # nobody loses the last row that training has of them
        assert split.train.num_users == log.num_users


@given(rows=ROWS, settings=SETTINGS, shuffle=st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(rows, settings, shuffle):
    def split():
        try:
            return parts_of(log_of(rows).split(settings))
        except DataError as error:
            return str(error)

    before = split()
    shuffle.shuffle(rows)
    assert split() == before


@given(rows=ROWS, shuffle=st.randoms(use_true_random=False))
def test_random_splits_without_time_go_by_pair(rows, shuffle):
    def held():
        frame = pl.DataFrame(rows, schema=["user_id", "item_id", "w"], orient="row")
        log = read(frame, deduplicate="none", columns={"weight": "w"}, where={"w": "> 0"})
        split = log.split(SplitSettings(by="random", valid=0.3, test=0.0))
        return Counter(split.valid.events.rows())

    try:
        before = held()
    except DataError:
        return
    shuffle.shuffle(rows)
    assert held() == before


# --- by time --------------------------------------------------------------------------------------


def test_time_cuts_at_the_points_of_rows():
    log = log_of([(i % 7, i, i) for i in range(50)])
    split = log.split()
    assert split.by == "time"
    assert split.cutoffs == {"valid": START + 40, "test": START + 45}
    assert [len(part) for part in parts_of(split)] == [40, 5, 5]
    assert split.train.events["timestamp"].max() < START + 40


def test_shares_that_binary_fractions_miss_still_cut_whole_rows():
    # 5 * (1 - (0.4 + 0.2)) is 1.999...
    split = log_of([(i, i, i) for i in range(5)]).split_by_time(valid=0.4, test=0.2)
    assert [len(part) for part in split] == [2, 2, 1]


def test_rows_of_the_cut_off_moment_all_belong_to_the_later_part():
    seconds = [0, 1, 2, 3, 3, 3, 3, 7, 8, 8]
    split = log_of([(i, i, s) for i, s in enumerate(seconds)]).split(
        SplitSettings(by="time", valid=0.4, test=0.1)
    )
    # Row 6 is at 3 and row 9 at 8: both cut-offs reach back to the first row of their moment.
    assert split.cutoffs == {"valid": START + 3, "test": START + 8}
    assert [len(part) for part in parts_of(split)] == [3, 5, 2]


def test_one_moment_cannot_be_cut():
    log = log_of([(i, i, 5) for i in range(20)])
    with pytest.raises(DataError, match=r"train part is empty .*share one moment.*split.valid"):
        log.split()
    two = log_of([(i, i, int(i > 3)) for i in range(20)])
    with pytest.raises(DataError, match="validation part is empty"):
        two.split()


def test_a_log_without_time_is_not_split_by_time():
    log = log_of([(i, i, i) for i in range(9)], time=False)
    with pytest.raises(DataError, match=r"split.by = 'random'"):
        log.split(SplitSettings(by="time"))
    with pytest.raises(ConfigError, match="leave rows for train"):
        log_of([(1, 1, 1), (2, 2, 2)]).split_by_time(valid=0.5, test=0.5)


def test_unknown_users_and_items_are_counted():
    rows = [(1, 1, 0), (1, 2, 1), (2, 1, 2), (2, 3, 3), (3, 1, 4), (9, 3, 5), (1, 7, 6), (9, 8, 7)]
    split = log_of(rows).split(SplitSettings(by="time", valid=0.25, test=0.25))
    assert split.counts["train"] == {"rows": 4, "users": 2, "items": 3}
    assert split.counts["valid"] == {
        "rows": 2,
        "users": 2,
        "items": 2,
        "unknown_users": 2,
        "rows_of_unknown_users": 2,
        "unknown_items": 0,
        "rows_of_unknown_items": 0,
        "rows_also_before": 0,
        "rows_before_train_end": 0,
    }
    assert split.counts["test"]["rows_of_unknown_users"] == 1
    assert split.counts["test"]["unknown_items"] == 2
    assert split.counts["test_after_refit"]["rows_of_unknown_users"] == 0


def test_repeats_across_the_cut_are_counted():
    rows = [(1, 1, s) for s in range(10)] + [(2, 2, 4)]
    split = log_of(rows, deduplicate="none").split(SplitSettings(by="time", valid=0, test=0.3))
    assert split.counts["test"]["rows_also_before"] == len(split.test) == 4


# --- per user -------------------------------------------------------------------------------------


def test_leave_last_takes_the_last_rows_of_each_user():
    rows = [(1, i, i) for i in range(5)] + [(2, 0, 9), (2, 1, 3)] + [(3, 4, 1)]
    split = log_of(rows).split(SplitSettings(by="leave_last", valid=2.0, test=1.0))
    pairs = [{row[:2] for row in part} for part in parts_of(split)]
    assert pairs == [{(1, 0), (1, 1), (2, 1), (3, 4)}, {(1, 2), (1, 3)}, {(1, 4), (2, 0)}]
    assert split.cutoffs == {}


def test_leave_last_without_time_goes_by_row():
    rows = [(1, 5, 0), (1, 3, 0), (2, 9, 0), (1, 4, 0), (2, 1, 0)]
    split = log_of(rows, time=False).split(SplitSettings(by="leave_last", valid=0, test=1))
    assert split.test.events.rows() == [(1, 4), (2, 1)]


def test_leave_last_wants_whole_numbers():
    log = log_of([(1, 1, 1), (1, 2, 2)])
    with pytest.raises(ConfigError, match=r"split.valid = 0.1 .* whole number"):
        log.split(SplitSettings(by="leave_last"))
    with pytest.raises(DataError, match="no user has rows enough"):
        log.split(SplitSettings(by="leave_last", valid=1, test=1))


def random_rows(num_users=400, per_user=10):
    return [(u, 1000 * u + i, 0) for u in range(num_users) for i in range(per_user)]


def test_random_holds_out_the_share_even_of_short_histories():
    log = log_of(random_rows(2000, 3), time=False)
    split = log.split(SplitSettings(valid=0.1, test=0.1))
    assert split.by == "random"
    # 0.3 rows a user, rounded up or down by chance: 600 of 2,000, give or take 20.5.
    assert 520 < len(split.valid) < 680
    assert 520 < len(split.test) < 680
    # Which of the three rows it is must not depend on its place.
    places = Counter(item % 1000 for _, item in split.valid.events.rows())
    assert min(places.values()) > 140


def test_random_depends_on_the_seed_and_on_nothing_else():
    log = log_of(random_rows(), time=False)
    by_seed = SplitSettings(by="random", seed=3)
    first = parts_of(log.split(by_seed))
    assert parts_of(log.split(SplitSettings(by="random"), seed=3)) == first
    assert parts_of(log.split(by_seed, seed=4)) != first
    # Other users come and go: the rows of the rest stay where they are.
    fewer = log_of(random_rows(200), time=False).split(by_seed)
    assert parts_of(fewer) == [[row for row in part if row[0] < 200] for part in first]


def test_random_splits_string_ids_too():
    log = read(
        pl.DataFrame({"user_id": ["a"] * 10 + ["b"] * 10, "item_id": list("klmnopqrst") * 2})
    )
    split = log.split(SplitSettings(by="random", valid=0.2, test=0.3))
    assert [len(part) for part in parts_of(split)] == [10, 4, 6]


# --- given files ----------------------------------------------------------------------------------


def write(path, rows, time=False, ids=pl.Int64):
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    frame = frame.with_columns(pl.col("timestamp") + START, pl.col("user_id").cast(ids))
    (frame if time else frame.drop("timestamp")).write_parquet(path)
    return str(path)


TRAIN = [(u, i, 10 * i + u) for u in range(6) for i in range(20)]
TEST = [(u, i, 500) for u in range(7) for i in (50, 51)]


@given(rows=ROWS, seed=st.integers(0, 5), time=st.booleans())
def test_items_are_held_out_whole(rows, seed, time):
    log = log_of(rows, time=time, deduplicate="none")
    num_items = log.num_items
    settings = SplitSettings(by="items", valid=0.2, test=0.3, seed=seed)
    num_test, num_valid = -(-num_items * 3 // 10), -(-num_items * 2 // 10)
    if num_test + num_valid >= num_items:
        with pytest.raises(DataError, match="too few items"):
            log.split(settings)
        return
    split = log.split(settings)
    found = [set(part.events["item_id"]) for part in (split.train, split.valid, split.test)]
    assert [len(items) for items in found] == [
        num_items - num_test - num_valid,
        num_valid,
        num_test,
    ]
    assert sum(map(len, found)) == len(set.union(*found))
    assert split.counts["test"]["unknown_items"] == num_test
    assert split.counts["test_after_refit"]["rows_of_unknown_items"] == len(split.test)


def test_which_items_are_held_out_depends_on_the_seed_and_on_no_rows():
    rows = [(user, item, user + item) for user in range(9) for item in range(40)]
    held = [
        set(log_of(some).split(SplitSettings(by="items", seed=seed)).test.events["item_id"])
        for some, seed in ((rows, 0), (rows[:80], 0), (rows, 1))
    ]
    assert held[0] == held[1] != held[2]
    assert len(held[0]) == 4


def test_given_files_cut_validation_from_train(tmp_path):
    train = read(write(tmp_path / "train.parquet", TRAIN, ids=pl.Int32))
    test = write(tmp_path / "test.parquet", TEST)
    split = train.split(SplitSettings(by="given", test_events=test, valid=0.1))
    assert sorted(split.test.events.rows()) == sorted(row[:2] for row in TEST)
    assert (len(split.train), len(split.valid)) == (108, 12)
    assert split.train.num_users == 6
    assert split.train.events["user_id"].dtype == split.test.events["user_id"].dtype == pl.Int64
    assert split.counts["test"]["rows_of_unknown_users"] == 2
    none = train.split(SplitSettings(by="given", test_events=test, valid=0))
    assert none.valid is None
    assert len(none.train) == 120
    with pytest.raises(ConfigError, match=r"split.valid = 5"):
        train.split(SplitSettings(by="given", test_events=test, valid=5))


def test_given_files_with_time_cut_validation_by_time(tmp_path):
    train = read(write(tmp_path / "train.parquet", TRAIN, time=True))
    test = write(tmp_path / "test.parquet", [*TEST, (0, 60, 3)], time=True)
    split = train.split(SplitSettings(by="given", test_events=test, valid=0.1))
    assert split.cutoffs == {"valid": START + 180}
    assert split.train.events["timestamp"].max() < START + 180
    assert split.counts["test"]["rows_before_train_end"] == 1
    timeless = write(tmp_path / "timeless.parquet", TEST)
    with pytest.raises(DataError, match="has no times"):
        train.split(SplitSettings(by="given", test_events=timeless))
    # The other way round, times that train lacks are of no use.
    plain = read(write(tmp_path / "plain.parquet", TRAIN))
    split = plain.split(SplitSettings(by="given", test_events=test))
    assert split.test.events.columns == ["user_id", "item_id"]


def test_given_validation_and_steps_of_held_out_rows(tmp_path):
    settings = {"k_core_user": 5, "max_per_user": 1, "where": {"user_id": "< 5"}}
    train = read(write(tmp_path / "train.parquet", TRAIN), **settings)
    valid = write(tmp_path / "valid.parquet", [(0, 40, 0), (0, 41, 0), (5, 41, 0)])
    test = write(tmp_path / "test.parquet", TEST)
    split = train.split(SplitSettings(by="given", valid_events=valid, test_events=test))
    # Conditions hold for them as well; k-core and caps, which would thin them out, do not.
    assert [len(part) for part in parts_of(split)] == [5, 2, 10]


def test_leaks_are_refused_unless_repeats_are_wanted(tmp_path):
    leaky = write(tmp_path / "leaky.parquet", [*TEST, TRAIN[3]])
    clean = write(tmp_path / "clean.parquet", TEST)
    path = write(tmp_path / "train.parquet", TRAIN)
    with pytest.raises(DataError, match=r"split.test_events: 1 of 15 .*leaky"):
        read(path).split(SplitSettings(by="given", test_events=leaky))
    with pytest.raises(DataError, match=r"split.valid_events: 1 of 15 "):
        read(path).split(SplitSettings(by="given", valid_events=leaky, test_events=clean))
    with pytest.raises(DataError, match=r"split.test_events: 14 of 14 "):
        read(path).split(SplitSettings(by="given", valid_events=clean, test_events=clean))
    split = read(path, deduplicate="none").split(SplitSettings(by="given", test_events=leaky))
    assert split.counts["test_after_refit"]["rows_also_before"] == 1
