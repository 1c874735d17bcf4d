"""Candidates of a batch: drawn from every source, merged, each with one log_q.

Shape letters: B positives, N draws, U distinct items to encode, C candidates.

All rows of a batch share the candidates. An item drawn several times, or from several sources, is
one candidate: with c draws and an expected count E under all sources together it enters the
denominator as (c / E)·exp(logit), whose expectation is exp(logit) whatever the mixture. So the sum
over candidates estimates the full softmax (Bengio and Senécal 2008, for a mixture of samplers).

``draw`` gives as many candidates as there are. With ``fixed_shapes`` it gives as many as there can
be, N + B or the whole catalogue: spare places repeat the last item with a log_weight of -inf, which
adds exactly nothing to loss and gradients; so does an item that is only a positive.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recclr.data.log import EncodedLog
from recclr.distinct import counted, padded_distinct
from recclr.errors import ConfigError
from recclr.settings import NegativesSettings, TrainSettings


@dataclass(frozen=True)
class Candidates:
    """What one step scores.

    Attributes:
        item_idx: int64 [U], rising: every item the item tower must encode, once but for ``places``.
        positive_row: int64 [B]: where each positive stands in ``item_idx``.
        candidate_row: int64 [C]: which of ``item_idx`` are candidates; None for all of them.
        log_weights: float32 [C]: log draws - strength · log expected count.
        places: int64 [U] with fixed shapes, where each of ``item_idx`` stands first: spare places
            name the one they repeat, all others themselves. None where all are distinct.
    """

    item_idx: Tensor
    positive_row: Tensor
    candidate_row: Tensor | None
    log_weights: Tensor
    places: Tensor | None = None

    @property
    def candidate_idx(self) -> Tensor:
        """int64 [C]: item index of each candidate."""
        return self.item_idx if self.candidate_row is None else self.item_idx[self.candidate_row]


class CandidateSampler:
    """Draws candidates for the rows of one log.

    Args:
        log: train rows; popularity and log_q come from these only.
        settings: sources and their sizes.
        log_q_strength: 1 for the full correction, 0 for none.
        fixed_shapes: see above; nothing then waits for a GPU.
    """

    def __init__(
        self,
        log: EncodedLog,
        settings: NegativesSettings,
        *,
        log_q_strength: float = 1.0,
        fixed_shapes: bool = False,
    ) -> None:
        self.fixed_shapes = fixed_shapes
        self.settings = settings
        self.strength = log_q_strength
        self.num_items, self.num_rows = log.num_items, len(log)
        counts = log.item_counts()
        self.counts = counts.float()
        if settings.popularity is not None:
            # Only items of train: one that is never expected must not be drawn by a rounding error.
            self.drawable = counts.nonzero().squeeze(1)
            power = counts[self.drawable].double().pow(settings.popularity.alpha)
            self.cumulative = power.cumsum(0) / power.sum()
            self.share = torch.zeros(log.num_items, device=counts.device)
            self.share[self.drawable] = (power / power.sum()).float()

    def draw(
        self,
        positives: Tensor,
        generator: torch.Generator,
        *,
        in_batch_counts: tuple[Tensor, int] | None = None,
    ) -> Candidates:
        """Candidates for a batch.

        Args:
            positives: int64 [B] item of each row.
            generator: on the device of the log.
            in_batch_counts: (items of the rows that the batch was drawn from, their number), when
                that is not the whole log.
        """
        drawn = self._draws(generator, positives.device)
        num_draws = len(drawn)
        merged = torch.cat([drawn, positives])
        places = None
        if self.fixed_shapes:
            found = padded_distinct(merged, self.num_items)
            item_idx, inverse, places = found.values, found.inverse(), found.places
        else:
            item_idx, inverse = torch.unique(merged, return_inverse=True)
        draws = counted(inverse if self.settings.in_batch else inverse[:num_draws], len(item_idx))
        expected = self._expected(item_idx, len(positives), in_batch_counts)
        candidate_row = None
        if not self.settings.in_batch and not self.fixed_shapes:
            candidate_row = draws.nonzero().squeeze(1)
            draws, expected = draws[candidate_row], expected[candidate_row]
        # Nobody drew a spare place, and log 0 is the weight it needs.
        log_weights = draws.log() - self.strength * expected.log()
        return Candidates(item_idx, inverse[num_draws:], candidate_row, log_weights, places)

    def positive_log_weights(
        self, item_idx: Tensor, batch_size: int, in_batch_counts: tuple[Tensor, int] | None
    ) -> Tensor:
        """Minus strength · log expected count: what classic logQ adds to the logit of a positive.

        Args:
            item_idx: int64 of any shape. batch_size, in_batch_counts: as ``draw`` has them.
        """
        expected = self._expected(item_idx.reshape(-1), batch_size, in_batch_counts)
        return -self.strength * expected.log().view(item_idx.shape)

    def everything(self, positives: Tensor) -> Candidates:
        """All items as candidates: the full softmax."""
        item_idx = torch.arange(self.num_items, device=positives.device)
        return Candidates(
            item_idx, positives, None, torch.zeros(len(item_idx), device=item_idx.device)
        )

    def _draws(self, generator: torch.Generator, device: torch.device) -> Tensor:
        """int64 [N]: uniform draws, then draws by popularity."""
        parts = []
        if self.settings.uniform:
            size = (self.settings.uniform,)
            parts.append(torch.randint(self.num_items, size, generator=generator, device=device))
        if self.settings.popularity is not None:
            size = (self.settings.popularity.count,)
            points = torch.rand(size, generator=generator, device=device, dtype=torch.float64)
            # A point above the last sum (rounding) would name a place past the end.
            places = torch.searchsorted(self.cumulative, points, right=True)
            parts.append(self.drawable[places.clamp(max=len(self.drawable) - 1)])
        if not parts:
            return torch.empty(0, dtype=torch.int64, device=device)
        return torch.cat(parts)

    def _expected(
        self, item_idx: Tensor, batch_size: int, in_batch_counts: tuple[Tensor, int] | None
    ) -> Tensor:
        """Expected count of each item under all sources together, float32 [U].

        In-batch: given that a row is in the batch, the other B - 1 are a uniform sample of the
        other n - 1 rows, so an item of count n_j that is not the row's positive is expected
        (B - 1)·n_j / (n - 1) times.
        """
        expected = torch.zeros(len(item_idx), device=item_idx.device)
        if self.settings.uniform:
            expected += self.settings.uniform / self.num_items
        if self.settings.popularity is not None:
            expected += self.settings.popularity.count * self.share[item_idx]
        if self.settings.in_batch:
            if in_batch_counts is None:
                counts, num_rows = self.counts[item_idx], self.num_rows
            else:
                pool, num_rows = in_batch_counts
                counts = counted(pool.long(), self.num_items)[item_idx]
            expected += (batch_size - 1) / max(num_rows - 1, 1) * counts
        return expected.clamp_min(1e-12)


def require_negatives(
    settings: NegativesSettings, log: EncodedLog, *, batch_size: int | None = None
) -> None:
    """Refuse a configuration that leaves every row without any negative.

    Args:
        settings, log: as the sampler gets them.
        batch_size: rows of a step, where it is known.

    Raises:
        ConfigError: only in-batch negatives and one row, or no source that reaches a second item.
    """
    only_in_batch = settings.uniform == 0 and settings.popularity is None
    num_rows = min(len(log), batch_size or len(log))
    if only_in_batch and num_rows < 2:
        raise ConfigError(
            f"in-batch negatives need batches of at least 2 rows, found {num_rows}; raise "
            "train.batch_size, or add negatives.uniform or more data"
        )
    reached = log.num_items if settings.uniform else int((log.item_counts() > 0).sum())
    if reached < 2:
        raise ConfigError(
            f"negatives need at least 2 items to choose from, found {reached} (in-batch negatives "
            "and popularity reach items with train rows, uniform reaches the catalogue); add "
            "negatives.uniform or more data"
        )


def lost_negatives(settings: NegativesSettings, train: TrainSettings) -> str | None:
    """What plain accumulation costs, in words; None where it costs nothing."""
    if train.accumulate == 1 or not settings.in_batch:
        return None
    size = train.batch_size * train.accumulate
    return (
        f"train.accumulate = {train.accumulate} makes updates of {size:,} rows, but each row meets "
        f"the in-batch negatives of its own {train.batch_size:,} only; for those of all rows set "
        f"train.batch_size = {size} and train.chunk_size = {train.batch_size}, accumulate = 1"
    )
