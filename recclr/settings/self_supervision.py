"""What is learned of entities without any interaction: two views of each, told from all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from recclr.strict import STRICT
from recclr.strict import require_ranges as _check


@dataclass(frozen=True, kw_only=True)
class ViewSettings:
    """NT-Xent on two views of the entities of one tower."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    weight: float = 0.1
    """What the term is multiplied by before it joins the loss of a step."""
    temperature: float = 0.1
    """Divides the cosines of views."""
    batch_size: int = 1024
    """Entities of a step, at most; each has all others as negatives."""
    distribution: Literal["uniform", "batch", "popularity"] = "uniform"
    """Who is drawn: everybody of the catalogue (or of the users) alike and each once, rows of the
    step's own batch, or in proportion to train counts. Uniform draws reach those without any
    interaction, which the main loss never teaches."""
    dropout: float = 0.2
    """Rate at which each part of the tower (id, feature, history) is hidden in a view, beside the
    rate that it has of its own."""
    projection: int = 64
    """Width of the hidden and of the last layer of a small network between the tower and the term;
    0 for none. It is no part of the model that is served."""

    def __post_init__(self) -> None:
        _check(
            self,
            weight=(1e-6, 1e3),
            temperature=(1e-4, 1e4),
            batch_size=(2, 1 << 24),
            dropout=(0.0, 0.95),
            projection=(0, 65_536),
        )


@dataclass(frozen=True, kw_only=True)
class SelfSupervisionSettings:
    """Terms of the loss that need no interaction."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    item: ViewSettings | None = None
    user: ViewSettings | None = None

    def __post_init__(self) -> None:
        if self.item is None and self.user is None:
            raise ValueError(
                "self_supervision names no tower: set item = {} or user = {}, or leave it out"
            )
