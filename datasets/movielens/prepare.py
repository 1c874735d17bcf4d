"""MovieLens-100K: u.data, u.user, u.item and u.genre out of ml-100k.zip."""

from __future__ import annotations

import io
import re
import sys
import zipfile
from pathlib import Path

import polars as pl

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fetch import MAX_BYTES, Expected, PrepareError, main, raw_file

_URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
_YEAR = re.compile(r"-(\d{4})$")
_GENRES_FROM = 5
EXPECTED = {
    "interactions": Expected(
        100_000,
        ("user_id", "item_id", "rating", "timestamp"),
        "f7dde5dc55b648d848645090e8e50b34bbf9b56abd8c305bcae44ee5de7a1f06",
    ),
    "users": Expected(943, ("user_id", "age", "gender", "occupation", "zip_code")),
    "items": Expected(1_682, ("item_id", "title", "release_date", "year", "genres")),
}


def parse_ratings(text: str) -> pl.DataFrame:
    """user_id, item_id, rating, timestamp, in order of time."""
    schema = {
        "user_id": pl.Int32,
        "item_id": pl.Int32,
        "rating": pl.Int8,
        "timestamp": pl.Int64,
    }
    rows = [[int(field) for field in line.split("\t")] for line in text.splitlines() if line]
    return pl.DataFrame(rows, schema=schema, orient="row").sort("timestamp", maintain_order=True)


def parse_users(text: str) -> pl.DataFrame:
    """user_id, age, gender, occupation, zip_code."""
    schema = {
        "user_id": pl.Int32,
        "age": pl.Int8,
        "gender": pl.String,
        "occupation": pl.String,
        "zip_code": pl.String,
    }
    rows = []
    for line in filter(None, text.splitlines()):
        user, age, *rest = line.split("|")
        rows.append([int(user), int(age), *rest])
    return pl.DataFrame(rows, schema=schema, orient="row")


def parse_items(text: str, genres: str) -> pl.DataFrame:
    """item_id, title, release_date, year, genres (a list)."""
    names = [line.split("|")[0] for line in genres.splitlines() if line]
    rows = []
    for line in filter(None, text.splitlines()):
        fields = line.split("|")
        flags = fields[_GENRES_FROM:]
        if len(flags) != len(names):
            raise PrepareError(f"u.item: expected {len(names)} genre flags, found {len(flags)}")
        year = _YEAR.search(fields[2])
        kinds = [name for name, flag in zip(names, flags, strict=True) if flag == "1"]
        date = fields[2] or None
        rows.append((int(fields[0]), fields[1], date, int(year[1]) if year else None, kinds))
    schema = {
        "item_id": pl.Int32,
        "title": pl.String,
        "release_date": pl.String,
        "year": pl.Int16,
        "genres": pl.List(pl.String),
    }
    return pl.DataFrame(rows, schema=schema, orient="row")


def build(raw: Path | None) -> dict[str, pl.DataFrame]:
    """The three tables from the archive; only the four members needed are read, with a limit."""
    with zipfile.ZipFile(io.BytesIO(raw_file(raw, _URL))) as archive:
        text = {}
        for name in ("u.data", "u.user", "u.item", "u.genre"):
            member = archive.getinfo(f"ml-100k/{name}")
            if member.file_size > MAX_BYTES:
                raise PrepareError(f"{name} unpacks to {member.file_size:,} bytes; refused")
            text[name] = archive.read(member).decode("latin-1")
    return {
        "interactions": parse_ratings(text["u.data"]),
        "users": parse_users(text["u.user"]),
        "items": parse_items(text["u.item"], text["u.genre"]),
    }


if __name__ == "__main__":
    main("ml-100k", build, EXPECTED)
