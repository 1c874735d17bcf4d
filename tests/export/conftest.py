from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from recclr import files
from recclr.export import EmbeddingBundle, ModelFacts, build_bundle
from recclr.export.targets import DESTINATIONS

FACTS = ModelFacts("2026-01-02T03:04:05+00:00", "ab" * 32, 1_700_000_000, "0.1")


def ids(kind: str, num: int, first: int) -> pl.Series:
    """Ids that break when they pass through floats or ASCII, in no order."""
    numbers = [first + (7 * row) % num for row in range(num)] if num % 7 else list(range(num))
    if kind == "integer":
        return pl.Series([2**53 + 1 + number for number in numbers], dtype=pl.Int64)
    return pl.Series([f"é {number}" for number in numbers], dtype=pl.String)


@pytest.fixture(scope="session")
def make_bundle() -> Callable[..., EmbeddingBundle]:
    def make(
        *,
        seed: int = 0,
        kind: str = "string",
        num_items: int = 60,
        num_users: int = 37,
        dim: int = 6,
        name: str = "catalogue",
        item_vectors: Tensor | None = None,
        user_vectors: Tensor | None = None,
        unknown_user_vector: Tensor | None = None,
        similarity: str = "cosine",
        **others: object,
    ) -> EmbeddingBundle:
        generator = torch.Generator().manual_seed(seed)
        drawn = [
            normalize(torch.randn(num, dim, generator=generator))
            for num in (num_items, num_users, 1)
        ]
        items = drawn[0] if item_vectors is None else item_vectors
        users = drawn[1] if user_vectors is None else user_vectors
        arguments = {
            "item_ids": ids(kind, len(items), 100),
            "item_vectors": items,
            "user_ids": ids(kind, len(users), 500),
            "user_vectors": users,
            "unknown_user_vector": drawn[2][0]
            if unknown_user_vector is None
            else unknown_user_vector,
            "similarity": similarity,
            "facts": FACTS,
            "name": name,
        }
        return build_bundle(**(arguments | others))

    return make


@pytest.fixture(params=list(DESTINATIONS))
def target(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place of each kind that does not exist yet."""
    return f"{request.param}:{tmp_path / 'deep' / 'store'}"


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets ``RECCLR_FAULT`` and counts from zero; an empty text takes it away."""

    def plan(text: str) -> None:
        monkeypatch.setattr(files, "_reached", {})
        monkeypatch.setenv("RECCLR_FAULT", text)

    return plan
