"""Stage, verify, flip: nobody sees an export before it was compared with the trainer."""

from __future__ import annotations

import time
from dataclasses import dataclass

from recclr.export.bundle import EmbeddingBundle
from recclr.export.targets import STORES, parse_target
from recclr.export.verify import Verification, verify


@dataclass(frozen=True)
class ExportReport:
    """What was exported where, and how it was verified.

    Attributes:
        version: follows from the content. num_bytes: of the store's files. seconds: of all.
    """

    target: str
    name: str
    version: str
    num_items: int
    num_users: int
    embedding_dim: int
    num_bytes: int
    seconds: float
    verification: Verification

    def __str__(self) -> str:
        return (
            f"{self.target} {self.name}: {self.num_items:,} items and {self.num_users:,} users of "
            f"{self.embedding_dim} dimensions, version {self.version}, "
            f"{self.num_bytes / 1e6:,.1f} MB in {self.seconds:.1f} s; verified: every vector "
            f"read back, {self.verification.num_queries} golden queries equal exact top-k"
        )


def export_embeddings(bundle: EmbeddingBundle, target: str) -> ExportReport:
    """Write a bundle to a store, verify it there, then show it.

    What the store showed before stays until the new version is verified.

    Args:
        target: ``lancedb:DIR`` or ``parquet:DIR``.

    Raises:
        ConfigError: the target, or no permission. StoreError: no space, the store failed, or what
        it holds is not what was sent; nothing new is shown then.
    """
    began = time.perf_counter()
    parsed = parse_target(target)
    store = STORES[parsed.kind].create(parsed.location, bundle.name)
    try:
        store.stage(bundle)
        verification = verify(store, bundle)
    except BaseException:
        store.discard()
        raise
    store.flip()
    return ExportReport(
        target=str(parsed),
        name=bundle.name,
        version=bundle.version,
        num_items=len(bundle.item_ids),
        num_users=len(bundle.user_ids),
        embedding_dim=bundle.embedding_dim,
        num_bytes=store.size_bytes(),
        seconds=time.perf_counter() - began,
        verification=verification,
    )
