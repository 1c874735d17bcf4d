"""How the held-out rows of a log relate to the rows before them: what is new, what repeats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl

from recclr.data.interactions import Log
from recclr.data.pairs import PAIR, rows_near


def overlaps(train: Log, valid: Log | None, test: Log | None) -> dict[str, dict[str, int]]:
    """Counts of each held-out part, and of its rows against those before; see ``Split.counts``.

    Train, which may be large, is walked once, whatever is held out.
    """
    counts: dict[str, dict[str, int]] = {}
    parts = {name: part for name, part in (("valid", valid), ("test", test)) if part is not None}
    if not parts:
        return counts
    held = pl.concat([part.events.select(PAIR) for part in parts.values()])
    before = _Before.of(train, held)
    for name, part in parts.items():
        counts[name] = sizes(part) | before.against(part.events)
    if valid is not None and test is not None:
        refitted = before.joined(_Before.of(valid, test.events))
        counts["test_after_refit"] = sizes(test) | refitted.against(test.events)
    return counts


def sizes(log: Log) -> dict[str, int]:
    """Rows, and distinct users and items in them."""
    return {"rows": len(log), "users": log.num_users, "items": log.num_items}


@dataclass(frozen=True, eq=False)
class _Before:
    """The rows before held-out ones, as far as these are compared with them.

    Attributes:
        ids: ``user_id`` / ``item_id`` -> distinct ids. pairs: all that held-out rows may have.
        latest: the last second, None without time.
    """

    ids: Mapping[str, pl.Series]
    pairs: pl.DataFrame
    latest: int | None

    @classmethod
    def of(cls, log: Log, held: pl.DataFrame) -> _Before:
        """One pass over the rows, which may be many, for all that is held out."""
        rows = log.events
        ids = {key: rows[key].unique(maintain_order=True) for key in PAIR}
        timed = "timestamp" in rows.columns and len(rows)
        return cls(ids, rows_near(held, rows, log.disk), rows["timestamp"][-1] if timed else None)

    def joined(self, other: _Before) -> _Before:
        """Both, the other being the later."""
        ids = {key: pl.concat([self.ids[key], other.ids[key]]).unique() for key in PAIR}
        times = [time for time in (self.latest, other.latest) if time is not None]
        return _Before(ids, pl.concat([self.pairs, other.pairs]), max(times, default=None))

    def against(self, held: pl.DataFrame) -> dict[str, int]:
        """How held-out rows relate to these."""
        counts = {}
        for key, name in (("user_id", "users"), ("item_id", "items")):
            outside = held.join(self.ids[key].to_frame(), on=key, how="anti")
            counts[f"unknown_{name}"] = outside[key].n_unique()
            counts[f"rows_of_unknown_{name}"] = outside.height
        counts["rows_also_before"] = held.join(self.pairs, on=PAIR, how="semi").height
        if self.latest is not None:
            counts["rows_before_train_end"] = int((held["timestamp"] <= self.latest).sum())
        return counts
