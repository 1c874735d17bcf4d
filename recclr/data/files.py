"""From a path in a config to the data files behind it: variables, folders of shards, globs.

Nothing here trusts the path: links to folders are not followed, the number of entries looked at is
bounded, and what engines leave beside their data (``_SUCCESS``, ``.crc``) is passed over.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from recclr.errors import ConfigError, DataError

MAX_ENTRIES = 100_000
"""Directory entries looked at for one source; a glob such as ``/**`` ends here."""

DEFAULT_VARIABLES = {"RECCLR_DATA": "../shared/data"}
"""What ``${NAME}`` stands for where the environment does not say."""

FORMATS = {
    ".parquet": "parquet",
    ".parq": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}
_EXPECTED = "expected Parquet (.parquet), CSV (.csv, .tsv) or JSON lines (.jsonl, .ndjson)"
_VARIABLE = re.compile(r"\$\{([^{}]*)\}")
_logger = logging.getLogger(__name__)

Pattern = tuple[str, ...]


def expand_path(path: str) -> str:
    """Replace every ``${NAME}`` by the environment variable.

    Raises:
        ConfigError: a variable is neither set nor in ``DEFAULT_VARIABLES``, or the path is empty.
    """

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        found = os.environ.get(name) or DEFAULT_VARIABLES.get(name)
        if not found:
            raise ConfigError(
                f"the path {path!r} needs the environment variable {name!r}, which is not set; "
                f"set it (export {name}=FOLDER) or write the path out"
            )
        return found

    expanded = _VARIABLE.sub(value, path)
    if not expanded or "\0" in expanded:
        raise ConfigError(f"expected a path, found {path!r}")
    return expanded


def closest(word: str, choices: Iterator[str] | list[str]) -> str | None:
    """The choice most like ``word``, regardless of case; None where none comes near."""
    by_lower = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(word.lower(), list(by_lower), n=1, cutoff=0.6)
    return by_lower[near[0]] if near else None


def format_of(path: Path) -> str | None:
    """``parquet``, ``csv`` or ``jsonl``; None for anything else.

    Engines also write Parquet without a suffix, hence the look at the first bytes.
    """
    known = FORMATS.get(path.suffix.lower())
    if known is not None:
        return known
    with path.open("rb") as file:
        return "parquet" if file.read(4) == b"PAR1" else None


def resolve_files(source: str, *, name: str) -> list[Path]:
    """Data files of one source, sorted by path, so that the order never depends on the disk.

    Args:
        source: file, folder (searched in depth) or glob (``*``, ``?``, ``[]``, ``**``).
        name: what the source is, for messages, such as "events".

    Raises:
        ConfigError: an environment variable is not set.
        DataError: nothing is there, or nothing that can be read.
    """
    path = expand_path(source)
    try:
        if os.path.isfile(path):
            return [_readable(Path(path), name)]
        if os.path.isdir(path):
            return _data_files(Path(path), ("**", "*"), name=name, source=path)
        if any(char in path for char in "*?["):
            root, pattern = _split_glob(path)
            return _data_files(root, pattern, name=name, source=path)
    except OSError as error:
        raise DataError(f"{name}: cannot look into {path}: {error.strerror or error}") from error
    raise DataError(_missing(Path(path), name))


def _readable(path: Path, name: str) -> Path:
    if path.stat().st_size == 0:
        raise DataError(f"{name}: the file {path} is empty (0 bytes)")
    if format_of(path) is None:
        raise DataError(f"{name}: the format of {path} is unknown; {_EXPECTED}")
    return path


def _missing(path: Path, name: str) -> str:
    message = f"{name}: there is no file, folder or match at {path}"
    if not path.parent.is_dir():
        return f"{message} (nor is there a folder {path.parent})"
    near = closest(path.name, [entry.name for entry in path.parent.iterdir()])
    return message + (f"; did you mean {near!r}?" if near else "")


def _split_glob(path: str) -> tuple[Path, Pattern]:
    parts = Path(path).parts
    first = next(i for i, part in enumerate(parts) if any(char in part for char in "*?["))
    pattern = parts[first:]
    return Path(*parts[:first]), (*pattern, "*") if pattern[-1] == "**" else pattern


def _data_files(root: Path, pattern: Pattern, *, name: str, source: str) -> list[Path]:
    found = sorted(Path(entry) for entry in _walk(str(root), {pattern}, [0], source))
    formats = {path: format_of(path) for path in found}
    ignored = [path for path in found if formats[path] is None]
    if ignored:
        _logger.warning("%s: %d files in %s are no data", name, len(ignored), source)
    files = [_readable(path, name) for path in found if formats[path] is not None]
    if not files:
        raise DataError(f"{name}: no data file in {source}; {_EXPECTED}, found {len(found)} others")
    other = next((path for path in files if formats[path] != formats[files[0]]), None)
    if other is not None:
        raise DataError(
            f"{name}: {source} mixes formats: {files[0]} and {other}; give one format, for example "
            f"with a glob such as {source.rstrip('/')}/*{files[0].suffix}"
        )
    return files


def _walk(folder: str, states: set[Pattern], looked: list[int], source: str) -> Iterator[str]:
    """Files below ``folder`` that some pattern matches; all patterns advance in one pass."""
    states = states | {state[1:] for state in states if state[0] == "**"}
    with os.scandir(folder) as entries:
        for entry in entries:
            looked[0] += 1
            if looked[0] > MAX_ENTRIES:
                raise DataError(
                    f"{source} holds more than {MAX_ENTRIES:,} entries; give a narrower path"
                )
            if entry.name.startswith(("_", ".")) or entry.name.endswith(".crc"):
                continue
            after = {
                state if state[0] == "**" else state[1:]
                for state in states
                if state[0] == "**" or fnmatchcase(entry.name, state[0])
            }
            if entry.is_dir(follow_symlinks=False):
                after.discard(())
                if after:
                    yield from _walk(entry.path, after, looked, source)
            elif () in after and entry.is_file():
                yield entry.path
