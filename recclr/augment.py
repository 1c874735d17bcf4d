"""What training changes of a tower as a whole: parts hidden together, and blurred embeddings.

Each part draws its own dropout; here is decided who is hidden together, for all parts of a row at
once, and in two views of a row so that the one may lack what the other shows.

Shape letters: M rows asked for, D embedding dimension, U units (groups of parts, or single ones).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from recclr.data.log import FeatureColumn
from recclr.mutual_information import mutual_information
from recclr.rows import Rows
from recclr.settings import AugmentSettings


class Augmentation(nn.Module):
    """Draws what one tower lacks in training.

    Args:
        names: of the tower's parts, in order.
        columns: the feature column of each part, None where it has none; looked at for
            ``correlated`` only, once.

    Attributes:
        units: places in ``names`` of the parts that are hidden together.
        alone: whether units are hidden each by itself, and not one half of them.
        halves: bool [U, U], for ``correlated``: row s is what is hidden with unit s.
    """

    halves: Tensor | None

    def __init__(
        self,
        settings: AugmentSettings,
        names: Sequence[str],
        columns: Sequence[FeatureColumn | None],
    ) -> None:
        super().__init__()
        self.settings, self.names = settings, tuple(names)
        self.units, self.alone = settings.units(self.names), settings.mode == "independent"
        self.size = max(1, min(int(settings.share * len(self.units)), len(self.units) - 1))
        halves = None
        if settings.mode == "correlated":
            halves = correlated_halves(mutual_information(columns), self.units, self.size)
        self.register_buffer("halves", halves, persistent=False)

    @property
    def ramps(self) -> bool:
        """Whether the rates change while training goes on."""
        return self.settings.start != self.settings.end

    def scaled(self, rows: Rows) -> Rows:
        """The rows with the share of all rates that holds at this point of the training."""
        start, end = self.settings.start, self.settings.end
        share = start + (end - start) * rows.progress
        return rows if share == rows.share else replace(rows, share=share)

    def hidden(self, rows: Rows) -> dict[str, Tensor]:
        """Which rows lack which part, bool [M] by the part's name; no name where none could.

        The views 0 and 1 of the same rows, drawn from one state of their generators, lack disjoint
        parts that together are all parts, but for ``independent``, where each draws for itself.
        """
        if rows.generator is None:
            return {}
        drawn = self._independent(rows) if self.alone else self._halved(rows)
        if drawn is None:
            return {}
        return {
            self.names[place]: drawn[:, number]
            for number, unit in enumerate(self.units)
            for place in unit
        }

    def _independent(self, rows: Rows) -> Tensor | None:
        if not self.units or self._spared(rows):
            return None
        rates = self.settings.rates_of(self.units)
        drawn = rows.uniform(len(self.units))
        return torch.stack([drawn[:, n] < rate * rows.share for n, rate in enumerate(rates)], 1)

    def _halved(self, rows: Rows) -> Tensor | None:
        """Bool [M, U]: the half that a row, or a view of it, lacks."""
        (dropout,) = self.settings.rates()
        if rows.view is None and (dropout == 0.0 or self._spared(rows)):
            return None
        drawn = rows.uniform(len(self.units), shared=True)
        if self.halves is not None:
            # The unit that draws the least is as good as one drawn at random.
            half = self.halves[drawn.argmin(1)]
        else:
            half = drawn.argsort(1).argsort(1) < self.size
        if rows.view is None:
            return half & (rows.uniform() < dropout * rows.share)[:, None]
        return half if rows.view == 0 else ~half

    def blurred(self, embeddings: Tensor, rows: Rows) -> Tensor:
        """Embeddings [M, D], not normalised, with coordinates masked and noise added."""
        settings = self.settings
        if rows.generator is None or self._spared(rows):
            return embeddings
        width = embeddings.shape[1]
        rate = settings.dimension_mask * rows.share
        if settings.dimension_mask > 0:
            embeddings = embeddings * (rows.step_uniform(width) >= rate) / (1 - rate)
        if settings.noise > 0:
            length = settings.noise * rows.share
            direction = normalize(rows.uniform(width), dim=1)
            embeddings = embeddings + length * direction * embeddings.sign()
        return embeddings

    def _spared(self, rows: Rows) -> bool:
        return self.settings.views_only and rows.view is None


def augmentation(
    settings: AugmentSettings, names: Sequence[str], columns: Sequence[FeatureColumn | None]
) -> Augmentation | None:
    """What the settings ask for; None where that is nothing."""
    return None if settings == AugmentSettings() else Augmentation(settings, names, columns)


def correlated_halves(information: Tensor, units: Sequence[Sequence[int]], size: int) -> Tensor:
    """For each unit, which units are hidden with it: itself and those that tell most about it.

    Args:
        information: float64 [K, K] of all parts; of two units counts that of their closest parts.
        size: units hidden, itself among them. Of equals, those that come first.

    Returns:
        bool [U, U], with ``size`` in each row.
    """
    between = torch.stack(
        [
            torch.stack([information[one][:, other].max() for other in units])
            for one in ([*unit] for unit in units)
        ]
    )
    between.fill_diagonal_(torch.inf)
    closest = between.sort(dim=1, descending=True, stable=True).indices[:, :size]
    return torch.zeros(len(units), len(units), dtype=torch.bool).scatter_(1, closest, True)
