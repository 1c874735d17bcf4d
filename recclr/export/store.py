"""What every store can do: take a bundle, give it back, and answer queries."""

from __future__ import annotations

from typing import Any, Protocol, Self

import polars as pl
from torch import Tensor

from recclr.export.bundle import EmbeddingBundle


class Store(Protocol):
    """One place that holds embeddings by name.

    ``stage`` writes without showing, ``flip`` shows what was staged in one step, ``discard`` takes
    it away. What was shown before stays readable until the flip.
    """

    @classmethod
    def create(cls, location: str, name: str) -> Self:
        """Make the place ready to write.

        Raises:
            ConfigError: no permission, or something else is there.
        """
        ...

    @classmethod
    def open(cls, location: str, name: str) -> Self:
        """Open what is shown under ``name``.

        Raises:
            StoreError: nothing is there, or it is damaged.
        """
        ...

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest of the bundle that this object reads."""
        ...

    def stage(self, bundle: EmbeddingBundle) -> None:
        """Write a bundle; from then on this object reads what it staged."""
        ...

    def flip(self) -> None:
        """Show what was staged to everybody."""
        ...

    def discard(self) -> None:
        """Take back what was staged."""
        ...

    def items(self) -> tuple[pl.Series, Tensor]:
        """Raw ids [V] and float32 [V, D], in order of item index."""
        ...

    def users(self, ids: pl.Series | None = None) -> tuple[pl.Series, Tensor]:
        """Raw ids and float32 [M, D] of the given users that are there, in any order; or of all."""
        ...

    def search(self, queries: Tensor, k: int) -> list[tuple[pl.Series, Tensor]]:
        """Per query of float32 [Q, D], ids and float32 [at most k] scores, best first.

        Raises:
            StoreError: the store cannot answer.
        """
        ...

    def size_bytes(self) -> int:
        """Bytes that the files of this version take."""
        ...
