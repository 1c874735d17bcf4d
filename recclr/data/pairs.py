"""Rows of one (user, item): found by a hash of both ids and one sort, and never taken on trust.

A table of pairs by their ids costs a random access to memory for each row, which is most of the
time of reading a large log. A sort of 64-bit hashes reads memory in order; where two pairs share a
hash, which is seen, pairs are numbered exactly instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recclr.data.spill import Disk

PAIR = ("user_id", "item_id")


@dataclass(frozen=True, eq=False)
class Runs:
    """Rows sorted by pair; those of one pair stand together, in the order they came in.

    Attributes:
        order: uint32 or uint64 [n], rows of the frame.
        begins: bool [n], where in ``order`` another pair begins. A byte a row, where the places
            of pairs would be eight.
    """

    order: NDArray[np.unsignedinteger]
    begins: NDArray[np.bool_]

    @property
    def first(self) -> NDArray[np.unsignedinteger]:
        """The first row of each pair, [pairs]."""
        return self.order[self.begins]

    @property
    def last(self) -> NDArray[np.unsignedinteger]:
        """The last row of each pair, [pairs]."""
        return self.order[np.append(self.begins[1:], np.True_)[: len(self.order)]]


def runs_of_pairs(frame: pl.DataFrame) -> Runs:
    """The rows of each pair.

    Args:
        frame: with ``user_id`` and ``item_id`` without nulls; may be empty.
    """
    runs = _runs(_hashes(frame))
    return runs if _are_pairs(frame, runs) else _runs(_numbers(frame))


def rows_in(held: pl.DataFrame, known: pl.DataFrame, disk: Disk | None = None) -> pl.DataFrame:
    """The rows of ``held`` whose pair is in ``known``, which may be much the larger.

    Args:
        held, known: with ``user_id`` and ``item_id`` of the same types. disk: where ``known`` lies,
            if not in memory.
    """
    return held.join(rows_near(held, known, disk), on=PAIR, how="semi", maintain_order="left")


def rows_near(held: pl.DataFrame, known: pl.DataFrame, disk: Disk | None = None) -> pl.DataFrame:
    """Pairs of ``known``, of which ``held`` may have some: all that it has, and few others.

    Args:
        held, known, disk: see ``rows_in``.
    """
    assert held.select(PAIR).schema == known.select(PAIR).schema
    keys = _hashes(held).unique().to_frame()
    found = []
    # Each join makes a table of all keys.
    for rows in [known] if disk is None else disk.stretches(known, keys.height):
        pairs = rows.select(PAIR)
        found.append(pairs.with_columns(_hashes(pairs)).join(keys, on="key", how="semi"))
    return pl.concat(found).drop("key")


def _hashes(frame: pl.DataFrame) -> pl.Series:
    return frame.select(pl.struct(PAIR).hash().alias("key")).to_series()


def _numbers(frame: pl.DataFrame) -> pl.Series:
    return frame.select(pl.struct(PAIR).rank("dense").alias("key")).to_series()


def _runs(keys: pl.Series) -> Runs:
    order = keys.to_frame().select(pl.arg_sort_by("key", maintain_order=True)).to_series()
    rows = order.to_numpy()
    in_order = keys.to_numpy()[rows]
    begins = np.ones(len(rows), dtype=np.bool_)
    np.not_equal(in_order[1:], in_order[:-1], out=begins[1:])
    return Runs(rows, begins)


def _are_pairs(frame: pl.DataFrame, runs: Runs) -> bool:
    """Whether all rows of each run are of one pair."""
    places = np.flatnonzero(~runs.begins)
    mine, before = (frame.select(PAIR)[pl.Series(runs.order[at])] for at in (places, places - 1))
    return all(bool((mine[name] == before[name]).all()) for name in PAIR)
