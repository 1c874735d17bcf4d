"""The steps that decide which rows of a log count, and what each row weighs.

All work on canonical columns: ``user_id``, ``item_id``, and where there are such ``timestamp``
(Int64 seconds), ``weight`` (Float32), beside columns that start with ``_`` and are dropped at the
end. Rows are in the order of the log: by time where there is one, else as in the files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recclr.data.by_user import ranked_by_user
from recclr.data.files import closest
from recclr.data.pairs import PAIR, Runs, runs_of_pairs
from recclr.errors import ConfigError, DataError

SECONDS_PER_DAY = 86_400
_SMALLEST_WEIGHT = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class StepCount:
    """How many rows one step was given and how many it left."""

    name: str
    rows_in: int
    rows_out: int


class Steps:
    """Counts the rows of each step, after earlier ones, and refuses one that leaves none.

    Args:
        in_pieces: each step is told of piece after piece, and judged by ``refuse_empty``.
    """

    def __init__(self, earlier: Sequence[StepCount] = (), *, in_pieces: bool = False) -> None:
        self._counts = {count.name: count for count in earlier}
        self._settings: dict[str, str] = {}
        self._in_pieces = in_pieces

    @property
    def counts(self) -> list[StepCount]:
        return list(self._counts.values())

    def record(self, name: str, rows_in: int, rows_out: int, *, setting: str) -> None:
        """Note one step.

        Args:
            name: of the step.
            rows_in: rows before.
            rows_out: rows after.
            setting: the setting to loosen, with its value, for the message.

        Raises:
            DataError: rows went in and none came out.
        """
        before = self._counts.get(name, StepCount(name, 0, 0))
        self._counts[name] = StepCount(name, before.rows_in + rows_in, before.rows_out + rows_out)
        self._settings[name] = setting
        if not self._in_pieces:
            self.refuse_empty()

    def refuse_empty(self) -> None:
        """See ``record``."""
        for count in self.counts:
            if count.rows_in and not count.rows_out:
                raise DataError(
                    f"the step '{count.name}' left no rows of {count.rows_in:,}; loosen "
                    f"{self._settings[count.name]}, or check that it names the right column and "
                    "values"
                )


def in_log_order(frame: pl.DataFrame, *, heavy_first: bool) -> pl.DataFrame:
    """Sort by (time, user, item, weight), so that the order of files and rows does not matter.

    Without a time the rows stay as they are. ``heavy_first`` puts the larger weight first among
    rows of one pair at one moment, which is the one that "keep the first" must then find.
    """
    if "timestamp" not in frame.columns:
        return frame
    by = [c for c in ("timestamp", "_fraction", *PAIR, "weight") if c in frame.columns]
    descending = [heavy_first and column == "weight" for column in by]
    return frame.sort(by, descending=descending, maintain_order=True)


def weigh_events(frame: pl.DataFrame, weights: Mapping[str, float]) -> pl.DataFrame:
    """Keep the event types that have a weight, and multiply it into ``weight``.

    Args:
        frame: with ``_event``, the type of each row (any type that casts to text).
        weights: type as text -> weight above 0.
    """
    kinds = frame["_event"].cast(pl.String)
    table = pl.DataFrame(
        {"_event": list(weights), "_factor": list(weights.values())},
        schema={"_event": pl.String, "_factor": pl.Float32},
    )
    kept = frame.with_columns(kinds).join(table, on="_event", how="inner", maintain_order="left")
    weight = pl.col("_factor")
    if "weight" in frame.columns:
        weight = pl.col("weight") * pl.col("_factor")
    return kept.with_columns(weight.cast(pl.Float32).alias("weight")).drop("_factor")


def refuse_unknown_events(frame: pl.DataFrame, weights: Mapping[str, float]) -> None:
    """Refuse rows with ``_event`` none of which is of a type that has a weight.

    Raises:
        DataError: the message names types that there are.
    """
    found = frame["_event"].cast(pl.String).drop_nulls().unique().sort().to_list()
    if not frame.height or set(found) & set(weights):
        return
    near = closest(next(iter(weights)), found)
    raise DataError(
        f"no row is of an event type in data.event_weights = {dict(weights)!r}; the column "
        f"holds {found[:10]!r}" + (f"; did you mean {near!r}?" if near else "")
    )


def deduplicate(
    frame: pl.DataFrame, policy: Literal["first", "last", "sum", "none"]
) -> pl.DataFrame:
    """One row per (user, item), the same whatever the order of the input.

    ``first`` and ``last`` go by time; among rows at the same moment, and in a log without time,
    the largest weight stays. ``sum`` adds the weights (1 each where there are none) and keeps the
    last moment. The frame must be ``in_log_order`` (``heavy_first`` for ``first``).
    """
    if policy == "none":
        return frame
    runs = runs_of_pairs(frame)
    if runs.begins.all() and (policy != "sum" or "weight" in frame.columns):
        return frame
    rows = runs.first if policy == "first" else runs.last
    kept = np.zeros(len(frame), dtype=np.bool_)
    kept[rows] = True
    timeless = "timestamp" not in frame.columns and "weight" in frame.columns
    if policy == "sum" or timeless:
        joined = _joined_weights(frame, runs, np.add if policy == "sum" else np.maximum)
        weight = np.zeros(len(frame), dtype=np.float32)
        # A sum beyond float32 is infinite, and refused in the end (``filter_events``).
        with np.errstate(over="ignore"):
            weight[rows] = joined
        frame = frame.with_columns(pl.Series("weight", weight))
    del runs, rows  # as large as a column each
    return frame.filter(pl.Series(kept))


def _joined_weights(frame: pl.DataFrame, runs: Runs, join: np.ufunc) -> NDArray[np.float64]:
    """One weight per pair, joined in float64; rows weigh 1 each where nothing else is said."""
    if "weight" not in frame.columns:
        weights = np.ones(len(frame))
    else:
        weights = frame["weight"].to_numpy()[runs.order].astype(np.float64)
    if not len(weights):
        return weights
    return np.asarray(join.reduceat(weights, np.flatnonzero(runs.begins)))


def k_core(frame: pl.DataFrame, *, min_per_user: int, min_per_item: int) -> pl.DataFrame:
    """The largest part in which every user and every item has at least so many rows.

    Rows of users and items below their bound go, again and again until none is left below. The
    result may be empty, and does not depend on the order of rows.
    """
    users, items = (frame[column].rank("dense").to_numpy() for column in PAIR)
    (kept,) = core_rows([users], [items], (min_per_user, min_per_item))
    return frame if kept.all() else frame.filter(pl.Series(kept))


def core_rows(
    users: Sequence[NDArray[np.unsignedinteger]],
    items: Sequence[NDArray[np.unsignedinteger]],
    least: tuple[int, int],
) -> list[NDArray[np.bool_]]:
    """The rows of a k-core, as a mask for each of the parts that a log may come in.

    Args:
        users, items: numbers of both in each part. Those of users are a part's own: all rows of a
            user are in one. least: rows of each user, and of each item.
    """
    kept = [np.ones(len(numbers), dtype=np.bool_) for numbers in users]
    before, now = -1, sum(map(len, users))
    while now != before:
        before = now
        if least[0] > 1:
            for mask, numbers in zip(kept, users, strict=True):
                _keep_frequent(mask, numbers, np.bincount(numbers[mask]), least[0])
        if least[1] > 1:
            counts = _counts_in_all(kept, items)
            for mask, numbers in zip(kept, items, strict=True):
                _keep_frequent(mask, numbers, counts, least[1])
        now = sum(int(mask.sum()) for mask in kept)
    return kept


def _keep_frequent(
    mask: NDArray[np.bool_],
    numbers: NDArray[np.unsignedinteger],
    counts: NDArray[np.int64],
    least: int,
) -> None:
    mask[mask] = counts[numbers[mask]] >= least


def _counts_in_all(
    kept: Sequence[NDArray[np.bool_]], numbers: Sequence[NDArray[np.unsignedinteger]]
) -> NDArray[np.int64]:
    size = 1 + max((int(each.max()) for each in numbers if len(each)), default=0)
    counts = np.zeros(size, dtype=np.int64)
    for mask, each in zip(kept, numbers, strict=True):
        counts += np.bincount(each[mask], minlength=size)
    return counts


def cap_users(frame: pl.DataFrame, most: int) -> pl.DataFrame:
    """The last ``most`` rows of each user in log order: the most recent where there is a time."""
    ranked = ranked_by_user(frame)
    return frame.filter(pl.Series(ranked.in_frame(ranked.rows - ranked.place <= most)))


def decay_weights(
    frame: pl.DataFrame, half_life_d: float, *, last: int | None = None
) -> pl.DataFrame:
    """Halve the weight of a row for every ``half_life_d`` days before the last row.

    For train rows only: the last row must be the last that training may know. A weight that
    underflows becomes the smallest float32 above 0, so that no row vanishes.

    Args:
        last: its moment, where the frame is only a stretch of the log.

    Raises:
        ConfigError: the log has no time.
    """
    if "timestamp" not in frame.columns:
        raise ConfigError(
            "data.decay_half_life_d needs a log with times; name their column in "
            "data.columns.timestamp, or leave the decay out"
        )
    end = pl.col("timestamp").max() if last is None else pl.lit(last)
    age_d = (end - pl.col("timestamp")) / SECONDS_PER_DAY
    weight = (-np.log(2) / half_life_d * age_d).exp()
    if "weight" in frame.columns:
        weight = weight * pl.col("weight")
    floored = weight.clip(lower_bound=_SMALLEST_WEIGHT).cast(pl.Float32)
    return frame.with_columns(floored.alias("weight"))
