"""Which vectors are laid beside those of the model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from recclr.strict import STRICT
from recclr.strict import require_ranges as _check


@dataclass(frozen=True, kw_only=True)
class BlendSettings:
    """Dot products add: vectors of several models laid side by side, each with a weight, are one
    model that any store serves. Weights are chosen on validation.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    spectral: int = 0
    """Dimensions of the spectral solution of the log beside the model; 0 for none."""
    spectral_item_power: float = 0.25
    """By which power of their popularity the items of that solution are scaled: 0.5 ranks by
    popularity as the log does, 0 by taste alone."""
    runs: tuple[str, ...] = ()
    """Folders of finished runs on the same data and split, whose models stand beside this one."""
    weights: tuple[float, ...] = (0.0, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
    """Weights that are tried for each of them, where the model has 1 and all have scores of equal
    spread."""
    seeds: int = 0
    """Further models of the same settings by the seeds that follow; the mean of all their scores is
    that of the model. What one ranks high by chance, the others do not. Each is a training of its
    own."""
    compress: int | None = None
    """Dimensions that the whole is brought back to; None keeps all of them."""

    def __post_init__(self) -> None:
        _check(self, seeds=(0, 100))
        _check(self, spectral=(0, 8192), spectral_item_power=(-2.0, 2.0), compress=(1, 8192))
        if not self.weights or any(not (math.isfinite(w) and w >= 0) for w in self.weights):
            raise ValueError(f"weights must be at least 0, found {list(self.weights)}")
        if self.compress is not None and not self.several:
            raise ValueError(
                "compress needs something beside the model: set spectral, runs or seeds"
            )

    @property
    def several(self) -> bool:
        """Whether more than the model is served."""
        return bool(self.parts or self.seeds)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of what is laid beside the model, in order."""
        return (("spectral",) if self.spectral else ()) + self.runs
