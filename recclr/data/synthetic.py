"""A generated log that behaves like a real one, with its truth known.

Items are launched all the time; each has a burst of attention that fades, on top of an evergreen
share. Users arrive over time and come back with a heavy-tailed activity. What a user takes at a
moment is a draw from softmax(taste + log attention) over the items launched by then, without
repeats. Features are noisy views of the planted taste, so that they carry over to new items.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recclr.errors import ConfigError
from recclr.files import write_bytes_atomic

_START_S = 1_735_689_600  # 2025-01-01 00:00 UTC
_DAY_S = 86_400
_DIM = 8
_WORDS_PER_CATEGORY = 40
_CATEGORIES = ("kitchen", "garden", "books", "games", "music", "sports", "tools", "toys", "shoes")
_COUNTRIES = ("AT", "BE", "CZ", "DE", "DK", "ES", "FR", "IT")
# Share of items that are there from the first day.
_FOUNDING = 0.4
_BURST_HALF_LIFE_D = 9.0
_TASTE = 4.0

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SyntheticLog:
    """Tables as a shop would have them, and what they were drawn from.

    Attributes:
        events: user_id, item_id, timestamp (seconds UTC), event (view, cart or purchase), by time.
        users: user_id, country, joined (days). items: item_id, category, tags, price, title.
        user_taste: float64 [num_users, 8]. item_taste: float64 [num_items, 8].
        launch_s: int64 [num_items], seconds UTC before which an item cannot be taken.
        evergreen, burst: float64 [num_items], parts of an item's attention.
    """

    events: pl.DataFrame
    users: pl.DataFrame
    items: pl.DataFrame
    user_taste: Floats
    item_taste: Floats
    launch_s: NDArray[np.int64]
    evergreen: Floats
    burst: Floats

    def attention(self, at_s: int) -> Floats:
        """Planted popularity of every item at a moment, float64 [num_items]; 0 before launch."""
        return _attention(self.launch_s, self.evergreen, self.burst, at_s)

    def write(self, folder: Path) -> None:
        """events.parquet, users.parquet and items.parquet.

        Raises:
            ConfigError: no permission. StoreError: no space.
        """
        import io

        for name in ("events", "users", "items"):
            buffer = io.BytesIO()
            getattr(self, name).write_parquet(buffer, compression="zstd")
            write_bytes_atomic(folder / f"{name}.parquet", buffer.getvalue())


def generate_log(
    *,
    num_users: int = 4_000,
    num_items: int = 2_500,
    num_events: int = 120_000,
    num_days: int = 120,
    seed: int = 0,
) -> SyntheticLog:
    """Generate a log; the same arguments give the same bytes.

    Args:
        num_events: visits; one whose user would take an item again gives no row, so that there
            are fewer rows, about a fifth fewer at these sizes.
        num_days: from 2025-01-01 on; at least 10.

    Raises:
        ConfigError: fewer than 20 users, 40 items, 200 events or 10 days.
    """
    given = {"num_users": num_users, "num_items": num_items, "num_events": num_events}
    least = {"num_users": 20, "num_items": 40, "num_events": 200}
    for name, value in (given | {"num_days": num_days}).items():
        if value < least.get(name, 10):
            raise ConfigError(f"{name} must be at least {least.get(name, 10)}, found {value}")
    # One stream per table: a change to one of them leaves the others as they were.
    streams = [np.random.Generator(np.random.PCG64(child)) for child in _children(seed, 4)]
    category, item_taste, launch_s, evergreen, burst = _items(streams[0], num_items, num_days)
    items = _item_table(streams[1], category, item_taste)
    country, user_taste, joined_s = _users(streams[2], num_users, num_days)
    width = len(str(num_users))
    user_ids = np.array([f"u{number:0{width}d}" for number in range(num_users)])
    log = SyntheticLog(
        events=pl.DataFrame(),
        users=pl.DataFrame(
            {
                "user_id": user_ids,
                "country": np.array(_COUNTRIES)[country],
                "joined": (joined_s - _START_S) // _DAY_S,
            }
        ),
        items=items,
        user_taste=user_taste,
        item_taste=item_taste,
        launch_s=launch_s,
        evergreen=evergreen,
        burst=burst,
    )
    users, times = _visits(streams[3], joined_s, num_events, num_days)
    user_idx, item_idx, when = _choices(streams[3], log, users, times)
    events = pl.DataFrame(
        {
            "user_id": user_ids[user_idx],
            "item_id": items["item_id"].to_numpy()[item_idx],
            "timestamp": when,
            "event": np.array(["view", "cart", "purchase"])[
                streams[3].choice(3, len(when), p=[0.7, 0.1, 0.2])
            ],
        }
    )
    return replace(log, events=events)


def _children(seed: int, count: int) -> list[np.random.SeedSequence]:
    return np.random.SeedSequence(seed).spawn(count)


def _items(
    rng: np.random.Generator, count: int, num_days: int
) -> tuple[NDArray[np.int64], Floats, NDArray[np.int64], Floats, Floats]:
    """Category, taste (its category's and some of its own), launch and attention."""
    category = rng.integers(len(_CATEGORIES), size=count)
    centres = rng.normal(size=(len(_CATEGORIES), _DIM))
    taste = centres[category] + 0.6 * rng.normal(size=(count, _DIM))
    taste /= np.linalg.norm(taste, axis=1, keepdims=True)
    launch_d = np.where(rng.random(count) < _FOUNDING, 0.0, rng.random(count) * num_days)
    evergreen = rng.pareto(1.6, count) * 0.05 + 0.01
    burst = rng.pareto(1.3, count) * 0.6 + 0.05
    return category, taste, _START_S + (launch_d * _DAY_S).astype(np.int64), evergreen, burst


def _attention(launch_s: NDArray[np.int64], evergreen: Floats, burst: Floats, at_s: int) -> Floats:
    age_d = (at_s - launch_s) / _DAY_S
    fading = burst * np.exp2(-np.maximum(age_d, 0.0) / _BURST_HALF_LIFE_D)
    return np.where(age_d >= 0, evergreen + fading, 0.0)


def _item_table(
    rng: np.random.Generator, category: NDArray[np.int64], taste: Floats
) -> pl.DataFrame:
    """Features: the category, tags for the strongest taste, a price by category, a title."""
    count = len(category)
    noisy = taste + 0.25 * rng.normal(size=taste.shape)
    level = 2.0 + 0.3 * np.arange(len(_CATEGORIES))
    price = np.round(np.exp(level[category] + 0.5 * rng.normal(size=count)), 2)
    words = [
        [f"{name}{number:02d}" for number in range(_WORDS_PER_CATEGORY)] for name in _CATEGORIES
    ]
    picks = rng.integers(_WORDS_PER_CATEGORY, size=(count, 3))
    width = len(str(count))
    return pl.DataFrame(
        {
            "item_id": [f"sku-{number:0{width}d}" for number in range(count)],
            "category": np.array(_CATEGORIES)[category],
            "tags": [
                [f"t{axis}{'+' if row[axis] > 0 else '-'}" for axis in np.argsort(-np.abs(row))[:3]]
                for row in noisy
            ],
            "price": pl.Series(price).set(pl.Series(rng.random(count) < 0.03), None),
            "title": [
                " ".join(words[kind][pick] for pick in row)
                for kind, row in zip(category, picks, strict=True)
            ],
        }
    )


def _users(
    rng: np.random.Generator, count: int, num_days: int
) -> tuple[NDArray[np.int64], Floats, NDArray[np.int64]]:
    """Country (a little of the taste is the country's), taste, first day."""
    country = rng.integers(len(_COUNTRIES), size=count)
    centres = rng.normal(size=(len(_COUNTRIES), _DIM))
    taste = 0.5 * centres[country] + rng.normal(size=(count, _DIM))
    taste /= np.linalg.norm(taste, axis=1, keepdims=True)
    joined_d = np.where(rng.random(count) < 0.5, 0.0, rng.random(count) * num_days * 0.98)
    return country, taste, _START_S + (joined_d * _DAY_S).astype(np.int64)


def _visits(
    rng: np.random.Generator, joined_s: NDArray[np.int64], num_events: int, num_days: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Who comes when, by time: few users come often, more come in the evening and at weekends."""
    activity = rng.pareto(1.4, len(joined_s)) + 0.3
    stay_d = (_START_S + num_days * _DAY_S - joined_s) / _DAY_S
    weight = np.minimum(activity, 30.0) * stay_d
    users = rng.choice(len(joined_s), size=num_events, p=weight / weight.sum())
    days = joined_s[users] // _DAY_S + np.floor(rng.random(num_events) * stay_d[users])
    last_day = _START_S // _DAY_S + num_days
    # 1970-01-01 was a Thursday; some of the visits on working days move to the Saturday after.
    weekday = (days + 3) % 7
    saturday = days + 5 - weekday
    moved = (weekday < 5) & (saturday < last_day) & (rng.random(num_events) < 0.15)
    days = np.where(moved, saturday, days)
    # Evenings that run past midnight come round to the morning of their day.
    second = rng.normal(18.0, 4.0, num_events) % 24.0 * 3_600
    times = (days * _DAY_S + second).astype(np.int64)
    order = np.argsort(times, kind="stable")
    return users[order], times[order]


def _choices(
    rng: np.random.Generator,
    log: SyntheticLog,
    users: NDArray[np.int64],
    times: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """An item per visit, a day at a time; visits that would repeat a pair are left out."""
    user_parts, item_parts, time_parts = [], [], []
    first = int(times[0]) // _DAY_S
    for day in range(first, int(times[-1]) // _DAY_S + 1):
        low, high = np.searchsorted(times, [day * _DAY_S, (day + 1) * _DAY_S])
        if low == high:
            continue
        # Attention as the day began: an item launched during it is found from the next day on.
        attention = log.attention(max(day * _DAY_S, _START_S))
        open_items = np.flatnonzero(attention)
        liking = np.exp(_TASTE * (log.user_taste[users[low:high]] @ log.item_taste[open_items].T))
        edges = np.cumsum(liking * attention[open_items], axis=1)
        draws = rng.random(high - low) * edges[:, -1]
        user_parts.append(users[low:high])
        item_parts.append(open_items[(edges[:, :-1] <= draws[:, None]).sum(1)])
        time_parts.append(times[low:high])
    user_idx, item_idx = np.concatenate(user_parts), np.concatenate(item_parts)
    keys: NDArray[Any] = user_idx * len(log.launch_s) + item_idx
    _, kept = np.unique(keys, return_index=True)
    kept = np.sort(kept)
    return user_idx[kept], item_idx[kept], np.concatenate(time_parts)[kept]
