"""A trained run as embeddings for a store."""

from __future__ import annotations

from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

from recclr.config import Config, dump_toml
from recclr.data.prepared import PreparedLog
from recclr.export import EmbeddingBundle, ExportReport, export_embeddings, parse_target
from recclr.files import write_json_atomic
from recclr.run_folder import read_json
from recclr.topk import EmbeddingRanker

__all__ = ["ExportReport", "bundle_of", "ship"]

_EXPORTS = "exports.json"


def ship(
    prepared: PreparedLog,
    ranker: EmbeddingRanker,
    target: str,
    *,
    run: Path | None,
    config: Config,
    name: str = "catalogue",
) -> ExportReport:
    """Export both towers' embeddings, verified, and note it in the run.

    Args:
        target: ``lancedb:DIR`` or ``parquet:DIR``; relative to ``run`` where that is given, else
            to the working folder.
        run: the run folder, which then keeps a record in exports.json.

    Raises:
        ConfigError: the target or the name. StoreError: the store failed, or holds something else
        than was sent; what it showed before is untouched.
    """
    parsed = parse_target(target)
    if run is not None:
        parsed = type(parsed)(parsed.kind, str(run / parsed.location))
    report = export_embeddings(bundle_of(prepared, ranker, config, name), str(parsed))
    if run is not None:
        path = run / _EXPORTS
        earlier = read_json(path)["exports"] if path.exists() else []
        write_json_atomic(path, {"exports": [*earlier, asdict(report)]})
    return report


def bundle_of(
    prepared: PreparedLog, ranker: EmbeddingRanker, config: Config, name: str
) -> EmbeddingBundle:
    """The ranker's vectors under their raw ids; its last user vector serves unknown users."""
    return EmbeddingBundle(
        name=name,
        item_ids=prepared.items.ids,
        item_vectors=ranker.item_vectors.float().contiguous(),
        user_ids=prepared.users.ids,
        user_vectors=ranker.user_vectors[:-1].float().contiguous(),
        unknown_user=ranker.user_vectors[-1].float().contiguous(),
        similarity=config.model.similarity,
        facts={
            "cutoff": prepared.tensors.cutoff,
            "seed": config.seed,
            "config_sha256": sha256(dump_toml(config).encode()).hexdigest(),
            "train_rows": len(prepared.tensors.train),
        },
    )
