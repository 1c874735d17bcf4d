"""From a fitted model to a store: the bundle of a run, exported, and written down in the run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from recclr import __version__
from recclr.config import Config, dump_toml
from recclr.data.prepared import PreparedLog
from recclr.errors import ShapeError, StoreError
from recclr.export import (
    EmbeddingBundle,
    ExportReport,
    ModelFacts,
    build_bundle,
    export_embeddings,
    parse_target,
)
from recclr.files import write_json_atomic
from recclr.topk import EmbeddingRanker

__all__ = ["ExportReport", "ship"]

EXPORTS = "exports.json"


def ship(
    prepared: PreparedLog,
    ranker: EmbeddingRanker,
    target: str,
    *,
    run: Path | None,
    config: Config,
    name: str = "catalogue",
) -> ExportReport:
    """Export both towers' embeddings and verify what the store holds.

    Args:
        prepared: the ids behind the rows of ``ranker``.
        target: ``KIND:DIR``; a relative DIR is taken from ``run``, or without one from the
            working folder.
        run: run folder whose ``exports.json`` gets an entry, one per target, name and version.

    Raises:
        ConfigError: the target or the name. StoreError: the store refused, or holds something
        else afterwards.
    """
    place = parse_target(target)
    bundle = _bundle(prepared, ranker, config, name)
    if run is None:
        return export_embeddings(bundle, place)
    # Read before anything is written: a damaged list is no reason to export and then fail.
    earlier = _read_exports(run / EXPORTS)
    report = export_embeddings(bundle, place.under(run))
    entry = asdict(report) | {"target": str(place), "created": bundle.facts.created}
    write_json_atomic(run / EXPORTS, [*_others(earlier, entry), entry])
    return report


def _bundle(
    prepared: PreparedLog, ranker: EmbeddingRanker, config: Config, name: str
) -> EmbeddingBundle:
    expected = (len(prepared.users) + 1, len(prepared.items))
    found = (len(ranker.user_vectors), len(ranker.item_vectors))
    if found != expected:
        raise ShapeError(
            f"the ranker is not of this data: expected {expected} user and item vectors, found "
            f"{found}"
        )
    return build_bundle(
        item_ids=prepared.items.ids,
        item_vectors=ranker.item_vectors,
        user_ids=prepared.users.ids,
        user_vectors=ranker.user_vectors[:-1],
        unknown_user_vector=ranker.user_vectors[-1],
        # With a bias of items among their coordinates, the score is neither cosine nor distance.
        similarity="dot" if config.model.popularity_bias else config.model.similarity,
        name=name,
        facts=ModelFacts(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            config_sha256=hashlib.sha256(dump_toml(config).encode()).hexdigest(),
            train_cutoff=prepared.tensors.cutoff,
            recclr=__version__,
        ),
    )


def _read_exports(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read: {error}; remove it and export again") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise StoreError(f"{path} is no list of exports; remove it and export again")
    return entries


def _others(entries: list[dict[str, Any]], entry: dict[str, Any]) -> list[dict[str, Any]]:
    """All but those that the new entry repeats, as a resumed run does."""
    keys = ("target", "name", "version")
    new = [entry[key] for key in keys]
    return [old for old in entries if [old.get(key) for key in keys] != new]
