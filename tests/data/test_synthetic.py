"""The generated log has the properties that its truth promises."""

import numpy as np
import polars as pl
import pytest

import recclr
from recclr.data.synthetic import generate_log
from recclr.errors import ConfigError

DAY_S = 86_400
START_S = 1_735_689_600
TABLES = ("events", "users", "items")
SMALL = {"num_users": 300, "num_items": 400, "num_events": 6_000, "num_days": 60}


@pytest.fixture(scope="module")
def log():
    return generate_log(**SMALL, seed=5)


def item_rows(log, events: pl.DataFrame) -> np.ndarray:
    """Row of ``log.items`` of each event."""
    number = {item: row for row, item in enumerate(log.items["item_id"])}
    return np.array([number[item] for item in events["item_id"]])


def user_rows(log, events: pl.DataFrame) -> np.ndarray:
    number = {user: row for row, user in enumerate(log.users["user_id"])}
    return np.array([number[user] for user in events["user_id"]])


def test_the_same_arguments_give_the_same_bytes(log, tmp_path):
    np.random.seed(123)
    log.write(tmp_path / "first")
    generate_log(**SMALL, seed=5).write(tmp_path / "second")
    generate_log(**SMALL, seed=6).write(tmp_path / "other")
    for name in TABLES:
        first, second, other = (
            (tmp_path / folder / f"{name}.parquet").read_bytes()
            for folder in ("first", "second", "other")
        )
        assert first == second, name
        assert first != other, name


def test_written_tables_read_back_as_a_log_without_complaints(log, tmp_path):
    log.write(tmp_path)
    paths = {name: tmp_path / f"{name}.parquet" for name in TABLES}
    read = recclr.read(**{name: str(path) for name, path in paths.items()})
    assert (len(read), read.num_users) == (log.events.height, log.events["user_id"].n_unique())
    assert read.bad_rows == {}
    assert not [note for note in read.notes if "not in the table" in note]


def test_tables_are_keyed_and_complete(log):
    assert (log.users.height, log.items.height) == (300, 400)
    assert log.users["user_id"].is_unique().all()
    assert log.items["item_id"].is_unique().all()
    for name in ("item_id", "category", "tags", "title"):
        assert log.items[name].null_count() == 0
    assert 0 < log.items["price"].null_count() < 0.1 * log.items.height
    assert set(log.events["event"]) == {"view", "cart", "purchase"}


def test_no_user_takes_an_item_twice(log):
    assert not log.events.select("user_id", "item_id").is_duplicated().any()


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_taken_before_its_launch_nor_by_who_has_not_joined(seed):
    log = generate_log(**SMALL, seed=seed)
    times = log.events["timestamp"].to_numpy()
    assert (times >= log.launch_s[item_rows(log, log.events)]).all()
    joined_s = START_S + DAY_S * log.users["joined"].to_numpy()[user_rows(log, log.events)]
    assert (times >= joined_s).all()


def test_events_are_in_order_of_time_and_inside_the_days(log):
    times = log.events["timestamp"].to_numpy()
    assert (np.diff(times) >= 0).all()
    assert times[0] >= START_S
    assert times[-1] < START_S + 60 * DAY_S
    # No pile-up where late visits were cut off at the end.
    assert (times == times.max()).sum() < 5


def test_visits_lean_to_weekends(log):
    weekday = log.events.select(pl.from_epoch("timestamp").dt.weekday()).to_series()
    saturdays = (weekday == 6).sum()
    others = [(weekday == day).sum() for day in range(1, 6)]
    assert saturdays > 1.3 * max(others)


def test_few_users_make_much_of_the_log(log):
    counts = np.sort(log.events["user_id"].value_counts()["count"].to_numpy())[::-1]
    assert counts[: len(counts) // 10].sum() > 0.25 * counts.sum()


def test_attention_is_the_planted_sum_and_nothing_before_launch(log):
    at_s = START_S + 31 * DAY_S + 777
    expected = []
    for launch_s, evergreen, burst in zip(log.launch_s, log.evergreen, log.burst, strict=True):
        age_d = (at_s - launch_s) / DAY_S
        expected.append(evergreen + burst * 0.5 ** (age_d / 9.0) if age_d >= 0 else 0.0)
    np.testing.assert_allclose(log.attention(at_s), expected)
    assert 0 < (log.attention(at_s) == 0).sum() < 400


def popular(log, first_d: int, last_d: int, count: int = 40) -> set[str]:
    day = (pl.col("timestamp") - START_S) // DAY_S
    rows = log.events.filter(day.is_between(first_d, last_d - 1))
    counts = rows["item_id"].value_counts().sort("count", "item_id", descending=True)
    return set(counts["item_id"].head(count))


def test_popularity_drifts(log):
    # Windows of one length: those next to each other share far more of their most popular items.
    near = len(popular(log, 30, 40) & popular(log, 40, 50))
    far = len(popular(log, 0, 10) & popular(log, 50, 60))
    assert near > 1.5 * far


def test_observed_popularity_follows_planted_attention(log):
    last = log.events.filter(pl.col("timestamp") >= START_S + 45 * DAY_S)
    counts = np.bincount(item_rows(log, last), minlength=400)
    planted = np.mean([log.attention(START_S + day * DAY_S) for day in range(45, 60)], axis=0)
    top = np.argsort(-planted)[:40]
    assert counts[top].mean() > 4 * counts.mean()


def test_users_take_what_they_like(log):
    """An event's item beats a random item of the day for its user far more often than not."""
    draws = np.random.default_rng(0)
    rows = log.events.sample(2_000, seed=1)
    taste = log.user_taste[user_rows(log, rows)]
    chosen = (taste * log.item_taste[item_rows(log, rows)]).sum(1)
    wins = []
    for score, user, time in zip(chosen, taste, rows["timestamp"], strict=True):
        other = draws.choice(np.flatnonzero(log.launch_s <= time))
        wins.append(score > user @ log.item_taste[other])
    assert np.mean(wins) > 0.7


def test_choices_follow_the_planted_probabilities():
    # Many users with a visit or two each, so that hardly any visit repeats a pair.
    log = generate_log(num_users=4_000, num_items=150, num_events=3_000, num_days=20, seed=8)
    events = log.events.sample(1_500, seed=3)
    expected = np.zeros(150)
    for user, time in zip(user_rows(log, events), events["timestamp"], strict=True):
        day_began = max(time // DAY_S * DAY_S, START_S)
        weight = np.exp(4.0 * log.item_taste @ log.user_taste[user]) * log.attention(day_began)
        expected += weight / weight.sum()
    observed = np.bincount(item_rows(log, events), minlength=150)
    frequent = expected >= 5
    assert frequent.sum() > 30
    deviations = (observed - expected)[frequent] / np.sqrt(expected[frequent])
    assert np.abs(deviations).max() < 5
    assert np.mean(deviations**2) < 1.8


def test_planted_taste_is_recoverable_from_histories(log):
    counts = log.events["user_id"].value_counts().filter(pl.col("count") >= 20)
    average = log.item_taste[item_rows(log, log.events)].mean(0)
    mine, others = [], []
    for user in sorted(counts["user_id"]):
        rows = log.events.filter(pl.col("user_id") == user)
        estimate = log.item_taste[item_rows(log, rows)].mean(0) - average
        cosines = log.user_taste @ estimate / np.linalg.norm(estimate)
        own = user_rows(log, rows)[0]
        mine.append(cosines[own])
        others.append(np.delete(cosines, own).mean())
    assert len(mine) >= 30
    assert np.median(mine) > 0.7
    assert np.median(mine) > np.median(others) + 0.5


def test_features_carry_taste_to_items_without_events(log):
    """Tags name the sign of strong axes of taste; items of one category are alike."""
    agree = [
        (tag[-1] == "+") == (taste[int(tag[1:-1])] > 0)
        for tags, taste in zip(log.items["tags"], log.item_taste, strict=True)
        for tag in tags
    ]
    assert np.mean(agree) > 0.8
    category = log.items["category"].to_numpy()
    cosines = log.item_taste @ log.item_taste.T
    same = category[:, None] == category[None, :]
    np.fill_diagonal(same, False)
    assert cosines[same].mean() > cosines[category[:, None] != category[None, :]].mean() + 0.3
    words = [title.split() for title in log.items["title"]]
    assert all(w.startswith(c) for c, title in zip(category, words, strict=True) for w in title)


@pytest.mark.parametrize("seed", range(3))
def test_new_items_and_users_arrive_in_the_test_part(seed):
    log = generate_log(**SMALL, seed=seed)
    cut = int(0.9 * log.events.height)
    before, after = log.events[:cut], log.events[cut:]
    for key in ("item_id", "user_id"):
        fresh = ~after[key].is_in(before[key].unique().implode())
        assert fresh.sum() > 0.01 * after.height, key
    new = set(after["item_id"]) - set(before["item_id"])
    assert new <= set(log.items["item_id"])


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("num_users", 19, 20),
        ("num_items", 39, 40),
        ("num_events", 199, 200),
        ("num_days", 9, 10),
        ("num_users", -5, 20),
    ],
)
def test_sizes_too_small_are_refused_by_name(name, value, least):
    with pytest.raises(ConfigError, match=f"{name} must be at least {least}, found {value}"):
        generate_log(**SMALL | {name: value})


def test_the_least_sizes_work():
    log = generate_log(num_users=20, num_items=40, num_events=200, num_days=10, seed=2)
    assert 50 < log.events.height <= 200
    assert log.events.columns == ["user_id", "item_id", "timestamp", "event"]
