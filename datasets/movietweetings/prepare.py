"""MovieTweetings, the edition of 2013-11-06: ratings.dat and movies.dat, "::" between fields."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import polars as pl

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fetch import Expected, PrepareError, main, raw_file

_BASE = "https://raw.githubusercontent.com/RodolfoViana/MovieTweetings/gh-pages/latest"
_YEAR = re.compile(r"\((\d{4})\)\s*$")
EXPECTED = {
    "interactions": Expected(
        141_695,
        ("user_id", "item_id", "rating", "timestamp"),
        "04241191da27da19a502488890b6659de58d9d881f2a4ec9460ecee010f19f56",
    ),
    "items": Expected(12_611, ("item_id", "title", "year", "genres")),
}


def parse_ratings(text: bytes) -> pl.DataFrame:
    """user_id, item_id, rating, timestamp, in order of time."""
    rows = [_fields(line, 4, number) for number, line in _lines(text)]
    schema = {
        "user_id": pl.Int32,
        "item_id": pl.Int32,
        "rating": pl.Int8,
        "timestamp": pl.Int64,
    }
    try:
        numbers = [[int(field) for field in row] for row in rows]
    except ValueError as error:
        raise PrepareError(f"ratings.dat: expected whole numbers: {error}") from error
    frame = pl.DataFrame(numbers, schema=schema, orient="row")
    return frame.sort("timestamp", maintain_order=True)


def parse_movies(text: bytes) -> pl.DataFrame:
    """item_id, title, year (from the title), genres (a list, empty where there are none)."""
    rows = []
    for number, line in _lines(text):
        item_id, title, genres = _fields(line, 3, number)
        year = _YEAR.search(title)
        kinds = [genre for genre in genres.split("|") if genre]
        rows.append((int(item_id), title, int(year[1]) if year else None, kinds))
    schema = {
        "item_id": pl.Int32,
        "title": pl.String,
        "year": pl.Int16,
        "genres": pl.List(pl.String),
    }
    return pl.DataFrame(rows, schema=schema, orient="row").sort("item_id")


def build(raw: Path | None) -> dict[str, pl.DataFrame]:
    """Ratings and the movies that were rated; users.dat maps to accounts and is left out."""
    ratings = parse_ratings(raw_file(raw, f"{_BASE}/ratings.dat"))
    movies = parse_movies(raw_file(raw, f"{_BASE}/movies.dat"))
    return {
        "interactions": ratings,
        "items": movies.join(ratings.select("item_id").unique(), on="item_id", how="semi"),
    }


def _lines(text: bytes) -> list[tuple[int, str]]:
    lines = enumerate(text.decode("utf-8").splitlines(), 1)
    return [(number, line) for number, line in lines if line.strip()]


def _fields(line: str, count: int, number: int) -> list[str]:
    fields = line.split("::")
    if len(fields) != count:
        raise PrepareError(f"line {number}: expected {count} fields, found {len(fields)}: {line!r}")
    return fields


if __name__ == "__main__":
    main("movietweetings-2013", build, EXPECTED)
