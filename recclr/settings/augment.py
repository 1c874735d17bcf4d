"""What training hides, drops and blurs of a tower, beyond the rates of its single parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from recclr.strict import STRICT
from recclr.strict import require_ranges as _check

_MOST = 0.95


@dataclass(frozen=True, kw_only=True)
class AugmentSettings:
    """Augmentation of a whole tower in training; nothing of it happens at inference.

    Parts are named as features are; ``id`` and ``history`` are those parts, unless a feature bears
    the name.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    mode: Literal["independent", "complementary", "correlated"] = "independent"
    """``independent`` hides each group by itself. ``complementary`` hides one random half of all
    parts of a row: the first of two views lacks it, the second lacks the rest. ``correlated`` does
    so with a part drawn at random and those that tell most about it, by mutual information (CFM,
    Yao et al. 2021)."""
    groups: tuple[tuple[str, ...], ...] = ()
    """Parts that are hidden together; a part that no group names stands for itself."""
    dropout: float | tuple[float, ...] = 0.0
    """``independent``: probability that a row lacks a group, one for all groups or one for each.
    Otherwise the probability that a row of a step lacks its half; of two views each always does."""
    share: float = 0.5
    """How many of the parts (groups count as one) are in the half, rounded down; at least one, and
    not all. Not for ``independent``."""
    views_only: bool = False
    """Leave the rows of a step alone, and change only the two views of a self-supervised term:
    holds for ``dropout``, ``dimension_mask`` and ``noise``."""
    dimension_mask: float = 0.0
    """Probability that a coordinate of the embedding is zero for all rows of a step; the others
    are scaled up (CL4CVR, Ouyang et al. 2023)."""
    noise: float = 0.0
    """Length of a random vector, of the signs of the embedding, that is added to it before
    normalisation (SimGCL, Yu et al. 2022)."""
    start: float = 1.0
    """Share of every rate of the tower at the first step of a training: dropout of all kinds, and
    what features and histories lose."""
    end: float = 1.0
    """The share at the last step; in between it changes linearly."""

    def __post_init__(self) -> None:
        _check(self, share=(0.01, 0.99), dimension_mask=(0.0, _MOST), noise=(0.0, 100.0))
        _check(self, start=(0.0, 1.0), end=(0.0, 1.0))
        if self.start == self.end == 0.0:
            raise ValueError(
                "start and end are both 0, so that no rate of the tower would ever act; leave the "
                "rates out instead"
            )
        for rate in self.rates():
            if not (math.isfinite(rate) and 0.0 <= rate <= _MOST):
                raise ValueError(f"dropout must be between 0.0 and {_MOST}, found {rate!r}")
        self._check_groups()
        if self.mode != "independent":
            if isinstance(self.dropout, tuple):
                raise ValueError(
                    f"mode = {self.mode!r} has one dropout, found {list(self.dropout)}; give one "
                    "number, or set mode = 'independent'"
                )
        elif bool(self.groups) != any(self.rates()):
            raise ValueError(
                "mode = 'independent' needs groups and dropout, or neither; found groups = "
                f"{[list(group) for group in self.groups]} and dropout = {self.dropout!r}"
            )

    def _check_groups(self) -> None:
        if not all(self.groups):
            raise ValueError("a group is empty; name the features that are hidden together")
        named = [name for group in self.groups for name in group]
        twice = sorted({name for name in named if named.count(name) > 1})
        if twice:
            raise ValueError(f"groups name {twice} more than once; a feature is in one group")
        if isinstance(self.dropout, tuple) and len(self.dropout) != len(self.groups):
            raise ValueError(
                f"dropout has {len(self.dropout)} rates for {len(self.groups)} groups; give one "
                "for each, or one number for all"
            )

    def rates(self) -> tuple[float, ...]:
        """``dropout`` as a tuple: one for each group where it was given so, else one for all."""
        return self.dropout if isinstance(self.dropout, tuple) else (self.dropout,)

    def rates_of(self, units: Sequence[object]) -> tuple[float, ...]:
        """``dropout`` of each unit under ``independent``."""
        rates = self.rates()
        return rates if len(rates) == len(units) else rates * len(units)

    def hides(self, place: int, names: tuple[str, ...]) -> bool:
        """Whether the rows of a step may lack the part at a place of ``names``."""
        if self.views_only:
            return False
        if self.mode != "independent":
            return any(self.rates())
        units = self.units(names)
        return any(
            place in unit and rate > 0
            for unit, rate in zip(units, self.rates_of(units), strict=True)
        )

    def units(self, names: tuple[str, ...]) -> list[list[int]]:
        """Places in ``names`` (of the parts of a tower) of the parts that are hidden together.

        Raises:
            ValueError: a group names no part, or there are not two halves.
        """
        units = [[self._place(name, names) for name in group] for group in self.groups]
        if self.mode == "independent":
            return units
        grouped = {place for unit in units for place in unit}
        units += [[place] for place in range(len(names)) if place not in grouped]
        if len(units) < 2:
            raise ValueError(
                f"augment.mode = {self.mode!r} needs two parts of which one can be hidden, found "
                f"{len(units)}; add features, or make the groups smaller"
            )
        return units

    def only(self, names: tuple[str, ...]) -> AugmentSettings:
        """What is left of the settings for a tower of some of the parts, those of ``names``."""
        groups = [tuple(n for n in group if _part(n, names) is not None) for group in self.groups]
        rates = self.dropout
        if isinstance(rates, tuple):
            rates = tuple(rate for rate, group in zip(rates, groups, strict=True) if group)
        groups = [group for group in groups if group]
        if self.mode == "independent" and not groups:
            rates = 0.0
        return replace(self, groups=tuple(groups), dropout=rates)

    @staticmethod
    def _place(name: str, names: tuple[str, ...]) -> int:
        part = _part(name, names)
        if part is not None:
            return names.index(part)
        known = ", ".join(part.removeprefix("features.") for part in names)
        raise ValueError(f"augment.groups names {name!r}, which the tower lacks; it has: {known}")


def _part(name: str, names: tuple[str, ...]) -> str | None:
    """The part that goes by a name, if a tower of ``names`` has it."""
    return next((part for part in (f"features.{name}", name) if part in names), None)
