"""Where embeddings go: "lancedb:DIR" and the like, and the kinds of stores there are."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from recclr.errors import ConfigError
from recclr.export.lance import LanceDatabase
from recclr.export.parquet import ParquetFolder
from recclr.export.store import Destination

DESTINATIONS: dict[str, Callable[[Path], Destination]] = {
    "lancedb": LanceDatabase,
    "parquet": ParquetFolder,
}


@dataclass(frozen=True)
class Target:
    """A kind of store and its place.

    Attributes:
        kind: a key of ``DESTINATIONS``. location: a folder, which need not exist.
    """

    kind: str
    location: Path

    def __str__(self) -> str:
        return f"{self.kind}:{self.location}"

    def under(self, folder: Path) -> Target:
        """The same with a relative location taken from ``folder``."""
        return replace(self, location=folder / self.location)

    def destination(self) -> Destination:
        return DESTINATIONS[self.kind](self.location)


def parse_target(text: str | Target) -> Target:
    """Read ``KIND:DIR`` or ``KIND://DIR``; "~" is the home folder.

    Raises:
        ConfigError: a kind that is not known, or no folder.
    """
    if isinstance(text, Target):
        return text
    kind, colon, location = text.partition(":")
    if not colon:
        raise ConfigError(
            f"target {text!r}: expected KIND:DIR, for example lancedb:{text or 'store'}; kinds: "
            f"{_kinds()}"
        )
    if kind not in DESTINATIONS:
        close = difflib.get_close_matches(kind.lower(), DESTINATIONS, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]}:{location}?" if close else ""
        raise ConfigError(
            f"target {text!r}: {kind!r} is no kind of store{hint} (kinds: {_kinds()})"
        )
    location = location.removeprefix("//")
    if not location or "\0" in location or "://" in location:
        raise ConfigError(f"target {text!r}: expected a folder after {kind}:, such as {kind}:store")
    return Target(kind, Path(os.path.expanduser(location)))


def _kinds() -> str:
    return ", ".join(sorted(DESTINATIONS))
