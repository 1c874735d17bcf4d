"""What a tower is asked for: entities, the moment they are seen at, and where its draws come from.

Shape letters: M rows asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Entities as a tower is asked for them.

    Attributes:
        idx: int64 [M]; at or above the number of entities: unknown.
        at: int64 seconds, scalar or [M]; None in a log without time.
        without: int64 [M], item left out of the row's own history where that has no time: its
            target; or [M, P], items left out of it in any case: all its positives; or None.
        generator: source of all draws; None at inference, when nothing is drawn.
        whole: the rows of a step of which these are a part, or None. places: where these stand
            among them. Draws are made for the whole, so that what is dropped does not depend on the
            number of ranks, nor on that of chunks.
        fixed_shapes: ragged rows are padded to the longest there is, and nothing waits for a GPU.
            Where ``places`` is a tensor, the whole then counts up to the largest of them only.
        view: 0 or 1 where the same rows are shown in two views, which draw side by side: both must
            start from one state of their generators. None for the rows of a step itself.
        progress: share of the training that is done, in [0, 1].
        share: what every rate is multiplied by, in [0, 1].
        hidden: bool [M], rows whose part is hidden whatever it draws itself, or None.
        hide_rate: at which each part is dropped beside its own rate, as views are made (``views``).
    """

    idx: Tensor
    at: Tensor | None = None
    without: Tensor | None = None
    generator: torch.Generator | None = None
    whole: Rows | None = None
    places: Tensor | slice | None = None
    fixed_shapes: bool = False
    view: int | None = None
    progress: float = 0.0
    share: float = 1.0
    hidden: Tensor | None = None
    hide_rate: float = 0.0

    def part(self, start: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop`` of these, for one of several ranks, or a chunk of its rows."""
        own = slice(start, stop)
        places: Tensor | slice | None = own
        if self.whole is not None:
            # A part of a part is one of the same whole.
            places = self.places
            if isinstance(places, slice):
                places = slice(places.start + start, min(places.start + stop, places.stop))
            elif places is not None:
                places = places[own]
        return self._those(own, places)

    def only(self, places: Tensor) -> Rows:
        """Those of these rows, which are no part of others, that stand at ``places``, int64 [P]."""
        return self._those(places, places)

    def _those(self, own: Tensor | slice, places: Tensor | slice | None) -> Rows:
        """Rows ``own`` of these, at ``places`` of the whole."""
        return replace(
            self,
            idx=self.idx[own],
            at=self.at if self.at is None or self.at.ndim == 0 else self.at[own],
            without=None if self.without is None else self.without[own],
            whole=self if self.whole is None else self.whole,
            places=places,
            hidden=None if self.hidden is None else self.hidden[own],
        )

    def uniform(self, *shape: int, shared: bool = False) -> Tensor:
        """Draws from [0, 1), float32 [M, *shape]; only where there is a generator.

        Args:
            shared: two views get the same.
        """
        return self._own(self._drawn(torch.rand, (self._num_drawn(), *shape), shared))

    def normal(self, *shape: int) -> Tensor:
        """Standard normal draws, float32 [M, *shape]."""
        return self._own(self._drawn(torch.randn, (self._num_drawn(), *shape)))

    def seeds(self) -> Tensor:
        """Of ``order.keyed_uniform``, for rows that draw as often as they are long: int64 [M]."""
        return self._own(self._drawn(partial(torch.randint, 1 << 62), (self._num_drawn(),)))

    def step_uniform(self, *shape: int) -> Tensor:
        """Draws from [0, 1), float32 ``shape``, that all rows of a step share."""
        return self._drawn(torch.rand, shape)

    @property
    def shows_all(self) -> bool:
        """Whether no part is hidden by anything but a rate of its own."""
        return self.hidden is None and self.hide_rate == 0.0

    def dropped(self, probability: float) -> Tensor | None:
        """Bool [M]: rows whose part is hidden in this step; None for none."""
        if self.generator is None or probability == self.hide_rate == 0.0:
            return self.hidden
        rate = probability * self.share
        if self.hide_rate:
            rate = 1.0 - (1.0 - rate) * (1.0 - self.hide_rate)
        drawn = self.uniform() < rate
        return drawn if self.hidden is None else drawn | self.hidden

    def swapped(self, probability: float) -> Rows:
        """These rows, some replaced by rows drawn from the whole step, with their moments."""
        if self.generator is None or probability == 0.0:
            return self
        of = self if self.whole is None else self.whole
        count = torch.full((), len(of.idx), device=self.idx.device)
        if self.fixed_shapes and isinstance(self.places, Tensor):
            count = self.places.max() + 1
        chance, place = self.uniform(2).unbind(1)
        # The product may be rounded up to the count itself.
        others = torch.minimum((place * count).long(), count - 1)
        moved, at = chance < probability * self.share, self.at
        if at is not None and of.at is not None and at.ndim == 1:
            at = torch.where(moved, of.at[others], at)
        return replace(self, idx=torch.where(moved, of.idx[others], self.idx), at=at)

    def _num_drawn(self) -> int:
        return len(self.idx if self.whole is None else self.whole.idx)

    def _drawn(
        self, draw: Callable[..., Tensor], shape: tuple[int, ...], shared: bool = False
    ) -> Tensor:
        """Draws for a whole step: of this view, where there are two."""
        options = {"generator": self.generator, "device": self.idx.device}
        if self.view is None or shared:
            return draw(shape, **options)
        return draw((2, *shape), **options)[self.view]

    def _own(self, draws: Tensor) -> Tensor:
        return draws if self.whole is None else draws[self.places]
