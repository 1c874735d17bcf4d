"""Embeddings to stores: written whole, verified against exact top-k, then pointed to.

A store is a class with the methods of ``store.Store``; ``targets`` lists them by name.
"""

from recclr.export.bundle import EmbeddingBundle
from recclr.export.publish import ExportReport, export_embeddings
from recclr.export.query import recommend_from_store
from recclr.export.targets import Target, open_store, parse_target
from recclr.export.verify import Verification, verify

__all__ = [
    "EmbeddingBundle",
    "ExportReport",
    "Target",
    "Verification",
    "export_embeddings",
    "open_store",
    "parse_target",
    "recommend_from_store",
    "verify",
]
