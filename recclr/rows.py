"""What a tower is asked for: entities, the moment they are seen at, and where its draws come from.

Shape letters: M rows asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Entities as a tower is asked for them.

    Attributes:
        idx: int64 [M]; at or above the number of entities: unknown.
        at: int64 seconds, scalar or [M]; None in a log without time.
        without: int64 [M] item left out of the row's own history (its target), or None.
        generator: source of dropout; None at inference, when nothing is dropped.
        whole: the rows of a step of which these are a part, or None. places: where these stand
            among them. Draws are made for the whole, so that what is dropped does not depend on the
            number of ranks, nor on that of chunks.
        fixed_shapes: ragged rows are padded to the longest there is, and nothing waits for a GPU.
    """

    idx: Tensor
    at: Tensor | None = None
    without: Tensor | None = None
    generator: torch.Generator | None = None
    whole: Rows | None = None
    places: Tensor | slice | None = None
    fixed_shapes: bool = False

    def part(self, start: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop`` of these, for one of several ranks, or a chunk of its rows."""
        own = slice(start, stop)
        at = self.at if self.at is None or self.at.ndim == 0 else self.at[own]
        without = None if self.without is None else self.without[own]
        if self.whole is None:
            return Rows(self.idx[own], at, without, self.generator, self, own)
        # A part of a part is one of the same whole.
        places = self.places
        if isinstance(places, slice):
            places = slice(places.start + start, min(places.start + stop, places.stop))
        elif places is not None:
            places = places[own]
        return Rows(self.idx[own], at, without, self.generator, self.whole, places)

    def uniform(self, *shape: int) -> Tensor:
        """Draws from [0, 1), float32 [M, *shape]; only where there is a generator."""
        of = self if self.whole is None else self.whole
        size = (len(of.idx), *shape)
        draws = torch.rand(size, generator=self.generator, device=self.idx.device)
        return draws if self.whole is None else draws[self.places]

    def dropped(self, probability: float) -> Tensor | None:
        """Bool [M]: rows whose part is hidden in this step; None for none."""
        if self.generator is None or probability == 0.0:
            return None
        return self.uniform() < probability
