"""The manifest: everything about exported embeddings but the embeddings, as JSON.

It ends with the SHA-256 of itself, so that a damaged or edited one is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from recclr.errors import StoreError
from recclr.export.bundle import METRIC, EmbeddingBundle, GoldenQueries, ModelFacts

FORMAT_VERSION = 1
_KIND = "recclr embeddings"
_VERSION = re.compile(r"[0-9a-f]{16}")
_TOLERANCE = 1e-6
_ID_TYPES = {
    str(dtype): dtype
    for dtype in (
        *(pl.Int8, pl.Int16, pl.Int32, pl.Int64),
        *(pl.UInt8, pl.UInt16, pl.UInt32, pl.UInt64),
        pl.String,
    )
}


@dataclass(frozen=True, eq=False)
class Manifest:
    """What a reader must know before it reads a vector.

    Attributes:
        name, version, similarity, facts: as in the bundle.
        num_items, num_users, embedding_dim: counts.
        item_id_type, user_id_type: polars types of the raw ids.
        max_item_norm: largest length of an item vector.
        unknown_user_vector: float32 [D]. golden: queries with their answers.
        parts: what the store consists of, by name, for example a file with its SHA-256.
    """

    name: str
    version: str
    similarity: str
    embedding_dim: int
    num_items: int
    num_users: int
    item_id_type: pl.DataType
    user_id_type: pl.DataType
    max_item_norm: float
    unknown_user_vector: Tensor
    golden: GoldenQueries
    facts: ModelFacts
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, bundle: EmbeddingBundle, parts: dict[str, dict[str, Any]]) -> Manifest:
        return cls(
            name=bundle.name,
            version=bundle.version,
            similarity=bundle.similarity,
            embedding_dim=bundle.embedding_dim,
            num_items=len(bundle.item_ids),
            num_users=len(bundle.user_ids),
            item_id_type=bundle.item_ids.dtype,
            user_id_type=bundle.user_ids.dtype,
            max_item_norm=float(_lengths(bundle.item_vectors).max()),
            unknown_user_vector=bundle.unknown_user_vector,
            golden=bundle.golden,
            facts=bundle.facts,
            parts=parts,
        )

    def score_tolerance(self, queries: Tensor) -> Tensor:
        """Scores this close are ties, since float32 sums differ by their order.

        Args:
            queries: float32 [Q, D].

        Returns:
            float64 [Q], in proportion to the largest score that a query can have.
        """
        relative = _TOLERANCE * max(1.0, math.sqrt(self.embedding_dim) / 32)
        return relative * self.max_item_norm * _lengths(queries)

    def to_json(self) -> dict[str, Any]:
        """JSON values, from which ``from_json`` makes an equal manifest, bit for bit."""
        value = {
            "kind": _KIND,
            "format": FORMAT_VERSION,
            "name": self.name,
            "version": self.version,
            "metric": METRIC,
            "similarity": self.similarity,
            "embedding_dim": self.embedding_dim,
            "dtype": "float32",
            "num_items": self.num_items,
            "num_users": self.num_users,
            "item_id_type": str(self.item_id_type),
            "user_id_type": str(self.user_id_type),
            "max_item_norm": self.max_item_norm,
            "model": asdict(self.facts),
            "parts": self.parts,
            "unknown_user_vector": self.unknown_user_vector.tolist(),
            "golden": {
                "k": self.golden.k,
                "user_ids": self.golden.user_ids.to_list(),
                "item_ids": self.golden.item_ids,
                "scores": self.golden.scores.tolist(),
            },
        }
        return value | {"sha256": _digest(value)}

    @classmethod
    def from_json(cls, value: Any) -> Manifest:
        """Raises StoreError for anything that ``to_json`` did not make."""
        try:
            if value["kind"] != _KIND:
                raise ValueError(f"its kind is {value['kind']!r}, expected {_KIND!r}")
            if value["format"] > FORMAT_VERSION:
                raise ValueError(
                    f"it has format {value['format']}, this recclr reads up to {FORMAT_VERSION}; "
                    "update recclr"
                )
            if value["sha256"] != _digest(value):
                raise ValueError("its SHA-256 is not that of its content")
            return cls._from_checked(value)
        except KeyError as error:
            raise StoreError(f"it is no manifest of recclr: it has no {error}") from error
        except (
            TypeError,
            ValueError,
            AttributeError,
            OverflowError,
            pl.exceptions.PolarsError,
        ) as error:
            raise StoreError(f"it is no manifest of recclr, or damaged: {error}") from error

    @classmethod
    def _from_checked(cls, value: dict[str, Any]) -> Manifest:
        # The version becomes part of a path and of a tag.
        if not is_version(value["version"]):
            raise ValueError(f"version {value['version']!r} is not one")
        item_type = _ID_TYPES[value["item_id_type"]]()
        user_type = _ID_TYPES[value["user_id_type"]]()
        golden = value["golden"]
        unknown = torch.tensor(value["unknown_user_vector"], dtype=torch.float32)
        if unknown.shape != (value["embedding_dim"],):
            raise ValueError(f"embedding_dim is {value['embedding_dim']}, not {len(unknown)}")
        return cls(
            name=str(value["name"]),
            version=value["version"],
            similarity=str(value["similarity"]),
            embedding_dim=int(value["embedding_dim"]),
            num_items=int(value["num_items"]),
            num_users=int(value["num_users"]),
            item_id_type=item_type,
            user_id_type=user_type,
            max_item_norm=float(value["max_item_norm"]),
            unknown_user_vector=unknown,
            golden=GoldenQueries(
                user_ids=pl.Series("user_id", golden["user_ids"], dtype=user_type),
                item_ids=golden["item_ids"],
                scores=torch.tensor(golden["scores"], dtype=torch.float32),
            ),
            facts=ModelFacts(**value["model"]),
            parts=dict(value["parts"]),
        )


def is_version(name: str) -> bool:
    """Whether ``name`` looks like the version of a bundle."""
    return _VERSION.fullmatch(name) is not None


def read_manifest(path: Path, advice: str) -> Manifest:
    """The manifest in a file.

    Raises:
        StoreError: the file is missing, damaged or something else; ends with ``advice``.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{path} cannot be read: {error}; {advice}") from error
    try:
        return Manifest.from_json(value)
    except StoreError as error:
        raise StoreError(f"{path}: {error}; {advice}") from error


def _lengths(vectors: Tensor) -> Tensor:
    """float64 [n]; squares of small float32 numbers vanish in float32."""
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float64)
    return lengths


def _digest(value: dict[str, Any]) -> str:
    """SHA-256 of everything but itself; Python writes floats so that they come back equal."""
    rest = {key: entry for key, entry in value.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
