"""Download with limits, and the check that decides: a digest of the rows, not of the archive.

Mirrors repack archives; the rows stay. A digest over the sorted rows accepts every packing of the
right data and nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import polars as pl

MAX_BYTES = 200 << 20
TIMEOUT_S = 60


class PrepareError(Exception):
    """Ends a prepare script with one message and exit code 3."""


@dataclass(frozen=True)
class Expected:
    """What a table must be: its number of rows, its columns, and the ``digest`` of these.

    Without a digest (features, which editions spell differently) rows and columns are all.
    """

    rows: int
    columns: tuple[str, ...]
    digest: str | None = None


def digest(frame: pl.DataFrame) -> str:
    """SHA-256 over the rows as tab-separated text, sorted: independent of order and of types."""
    rows = sorted("\t".join(map(str, row)) for row in frame.iter_rows())
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def require(frame: pl.DataFrame, expected: Expected, name: str) -> None:
    """Refuse a table that is not the published one.

    Raises:
        PrepareError: another number of rows, a column missing, or other rows.
    """
    if frame.height != expected.rows:
        raise PrepareError(f"{name}: expected {expected.rows:,} rows, found {frame.height:,}")
    lacking = [column for column in expected.columns if column not in frame.columns]
    if lacking:
        raise PrepareError(f"{name}: expected columns {lacking}, found {frame.columns}")
    if expected.digest is None:
        return
    found = digest(frame.select(expected.columns))
    if found != expected.digest:
        raise PrepareError(
            f"{name}: the rows differ from the published ones (digest {found[:12]}, expected "
            f"{expected.digest[:12]}); the source holds another edition"
        )


def fetch(url: str, max_bytes: int = MAX_BYTES) -> bytes:
    """The body behind an https address.

    Raises:
        PrepareError: no network, no such page, not https all the way, or more than ``max_bytes``.
    """
    _require_https(url)
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
            _require_https(response.url)
            body: bytes = response.read(max_bytes + 1)
    except (urllib.error.URLError, TimeoutError, OSError) as error:
        raise PrepareError(
            f"cannot fetch {url}: {error}; download it by hand and give --raw FOLDER"
        ) from error
    if len(body) > max_bytes:
        raise PrepareError(f"{url} is larger than {max_bytes:,} bytes; refused")
    return body


def _require_https(url: str) -> None:
    if not url.startswith("https://"):
        raise PrepareError(f"refusing {url}: only https is fetched")


def raw_file(raw: Path | None, url: str) -> bytes:
    """A source file: from the folder of files downloaded by hand, or from the network."""
    if raw is None:
        return fetch(url)
    path = raw / url.rsplit("/", 1)[1]
    if not path.is_file():
        raise PrepareError(f"{path} is missing; download it from {url}")
    return path.read_bytes()


def write_table(frame: pl.DataFrame, path: Path) -> None:
    """Write zstd Parquet beside its place and rename it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    frame.write_parquet(temporary, compression="zstd")
    os.replace(temporary, path)


def data_folder(name: str) -> Path:
    """Where a prepared set lives: under ``RECCLR_DATA``, by default ../shared/data."""
    return Path(os.environ.get("RECCLR_DATA") or "../shared/data") / name


def main(
    name: str,
    build: Callable[[Path | None], dict[str, pl.DataFrame]],
    expected: dict[str, Expected],
) -> None:
    """Run a prepare script: verify what is there, or build, verify and write it.

    Args:
        name: folder of the set. build: raw folder or None -> tables by name.
        expected: of every table that ``build`` gives.
    """
    parser = argparse.ArgumentParser(description=f"Prepare {name}.")
    parser.add_argument("--out", type=Path, default=data_folder(name), help="folder to write")
    parser.add_argument("--raw", type=Path, help="folder with the source files, for no network")
    arguments = parser.parse_args()
    try:
        _prepare(arguments.out, arguments.raw, build, expected)
    except (PrepareError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(3)
    except (ValueError, KeyError, zipfile.BadZipFile, pl.exceptions.PolarsError) as error:
        # Whatever a parser trips over: a page of a proxy, half an archive, another format.
        reason = f"{type(error).__name__}: {error}"
        print(f"error: these are not the files of {name}: {reason}", file=sys.stderr)
        sys.exit(3)


def _prepare(
    out: Path,
    raw: Path | None,
    build: Callable[[Path | None], dict[str, pl.DataFrame]],
    expected: dict[str, Expected],
) -> None:
    paths = {table: out / f"{table}.parquet" for table in expected}
    if all(path.is_file() for path in paths.values()):
        for table, wanted in expected.items():
            require(pl.read_parquet(paths[table]), wanted, table)
        print(f"{out} is there, and verified")
        return
    tables = build(raw)
    for table, wanted in expected.items():
        require(tables[table], wanted, table)
    for table, path in paths.items():
        write_table(tables[table], path)
        print(f"{path}: {tables[table].height:,} rows")
