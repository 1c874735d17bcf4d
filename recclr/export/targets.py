"""Where to export to: ``kind:location``, and the store behind each kind."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from recclr.errors import ConfigError
from recclr.export.lance import LanceStore
from recclr.export.parquet import ParquetStore
from recclr.export.store import Store

STORES: dict[str, type[Store]] = {"lancedb": LanceStore, "parquet": ParquetStore}


@dataclass(frozen=True)
class Target:
    """A kind of store and a place for it."""

    kind: str
    location: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.location}"


def parse_target(text: str) -> Target:
    """``lancedb:DIR`` or ``parquet:DIR``; two slashes may follow the colon.

    Raises:
        ConfigError: no kind, a kind that is not known, or no place.
    """
    kind, colon, location = text.partition(":")
    if location.startswith("//"):
        location = location[2:]
    if not colon or kind not in STORES:
        close = difflib.get_close_matches(kind, STORES, 1)
        hint = f"; did you mean {close[0]}:?" if close else ""
        expected = " or ".join(f"{name}:DIR" for name in sorted(STORES))
        raise ConfigError(f"store {text!r}: expected {expected}{hint}")
    if not location.strip() or "\0" in location:
        raise ConfigError(f"store {text!r}: a folder must follow the colon")
    return Target(kind, location)


def open_store(target: str, name: str = "catalogue") -> Store:
    """The embeddings that are shown under ``name``, for reading.

    Raises:
        ConfigError: no such kind. StoreError: nothing is there, or it is damaged.
    """
    parsed = parse_target(target)
    return STORES[parsed.kind].open(parsed.location, name)
