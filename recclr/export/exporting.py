"""Export: write, verify, point; and open what was exported."""

from __future__ import annotations

import time
from dataclasses import dataclass

from recclr.errors import StoreError
from recclr.export.bundle import EmbeddingBundle, require_name
from recclr.export.store import Destination, Store
from recclr.export.targets import Target, parse_target
from recclr.export.verify import VerificationReport, verify


@dataclass(frozen=True)
class ExportReport:
    """What stands in a store now.

    Attributes:
        target: ``KIND:DIR``. bytes: on disk. seconds: wall-clock time.
        unchanged: this very version was there already, and was verified again.
    """

    target: str
    name: str
    version: str
    num_items: int
    num_users: int
    embedding_dim: int
    bytes: int
    seconds: float
    unchanged: bool
    verification: VerificationReport

    def __str__(self) -> str:
        checked = self.verification
        return (
            f"{self.target}: {self.name!r} version {self.version}"
            f"{' (there already)' if self.unchanged else ''}, {self.num_items:,} items and "
            f"{self.num_users:,} users in {self.embedding_dim} dimensions, "
            f"{self.bytes / 1e6:,.1f} MB, {self.seconds:.1f} s\n"
            f"verified: all ids and vectors are equal; {checked.num_queries:,} golden queries "
            f"answered as by exact search (top {checked.k}, scores within "
            f"{checked.max_score_difference:.1e})"
        )


def export_embeddings(bundle: EmbeddingBundle, target: str | Target) -> ExportReport:
    """Write a bundle to a store, verify what the store holds, and only then show it to readers.

    Exporting the version that is live already writes nothing and verifies it again.

    Raises:
        ConfigError: the target, or a place that is not ours to write.
        MissingExtraError: the store's library is not installed.
        StoreError: the write failed, or the store holds something else afterwards; readers see
            what they saw before.
    """
    began = time.perf_counter()
    place = parse_target(target)
    destination = place.destination()
    live = _readable(destination, bundle.name)
    unchanged = live is not None and live.manifest.version == bundle.version
    if live is not None and unchanged:
        advice = f"remove {live.home} and export again"
        verification, num_bytes = _verified(live, bundle, advice), live.num_bytes()
    else:
        with destination.staged(bundle) as store:
            advice = "it is not shown to readers, who see what they saw before"
            verification, num_bytes = _verified(store, bundle, advice), store.num_bytes()
    return ExportReport(
        target=str(place),
        name=bundle.name,
        version=bundle.version,
        num_items=len(bundle.item_ids),
        num_users=len(bundle.user_ids),
        embedding_dim=bundle.embedding_dim,
        bytes=num_bytes,
        seconds=time.perf_counter() - began,
        unchanged=unchanged,
        verification=verification,
    )


def open_store(target: str | Target, name: str = "catalogue") -> Store:
    """The live version of exported embeddings, to read and to query.

    Raises:
        ConfigError: the target, the name, or a folder that holds another name.
        StoreError: nothing was exported there, or it is damaged.
    """
    require_name(name)
    place = parse_target(target)
    store = place.destination().live(name)
    if store is None:
        raise StoreError(
            f"{place} holds no exported embeddings named {name!r}; write them with "
            f"recclr export RUN --to {place} --name {name}"
        )
    return store


def _readable(destination: Destination, name: str) -> Store | None:
    """What is live; None also where it is damaged, so that a new export can mend it."""
    try:
        return destination.live(name)
    except StoreError:
        return None


def _verified(store: Store, bundle: EmbeddingBundle, advice: str) -> VerificationReport:
    try:
        return verify(store, bundle)
    except StoreError as error:
        text = str(error)
        raise StoreError(text if text.endswith(advice) else f"{text}; {advice}") from error
