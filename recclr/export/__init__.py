"""Embeddings into stores that serve them: written beside, verified, then shown to readers."""

from recclr.export.answers import recommend_from_store
from recclr.export.bundle import EmbeddingBundle, ModelFacts, build_bundle
from recclr.export.exporting import ExportReport, export_embeddings, open_store
from recclr.export.store import Destination, Store
from recclr.export.targets import Target, parse_target
from recclr.export.verify import VerificationReport, verify

__all__ = [
    "Destination",
    "EmbeddingBundle",
    "ExportReport",
    "ModelFacts",
    "Store",
    "Target",
    "VerificationReport",
    "build_bundle",
    "export_embeddings",
    "open_store",
    "parse_target",
    "recommend_from_store",
    "verify",
]
