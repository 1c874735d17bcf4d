"""Gowalla, the fixed split of NGCF and LightGCN: two text files of "user item item …"."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import polars as pl

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fetch import Expected, PrepareError, main, raw_file

_BASE = "https://raw.githubusercontent.com/gusye1234/LightGCN-PyTorch/master/data/gowalla"
_COLUMNS = ("user_id", "item_id")
EXPECTED = {
    "interactions_train": Expected(
        810_128, _COLUMNS, "8f4936212d7a9bc0c8fda288043817a9cb4bd7d9309ead9a9a9f528bef49b4bd"
    ),
    "interactions_test": Expected(
        217_242, _COLUMNS, "163f0243b706ea0aa25db0ee5224ef200c16c14621ff0838b5c56e91bac872c3"
    ),
}


def parse(text: bytes) -> pl.DataFrame:
    """One row per pair from lines "user item item …"; a line with a user alone has none."""
    users, items = [], []
    for number, line in enumerate(text.decode("ascii").splitlines(), 1):
        try:
            user, *rest = (int(part) for part in line.split())
        except ValueError as error:
            raise PrepareError(f"line {number}: expected whole numbers, found {line!r}") from error
        users.extend([user] * len(rest))
        items.extend(rest)
    frame = pl.DataFrame(
        {"user_id": np.array(users, np.int32), "item_id": np.array(items, np.int32)}
    )
    return frame.sort("user_id", "item_id")


def build(raw: Path | None) -> dict[str, pl.DataFrame]:
    """Both tables from the two text files."""
    return {
        f"interactions_{part}": parse(raw_file(raw, f"{_BASE}/{part}.txt"))
        for part in ("train", "test")
    }


if __name__ == "__main__":
    main("gowalla-lightgcn", build, EXPECTED)
