"""Candidates of a batch: drawn from every source, merged, each with one log_q.

Shape letters: B positives, N draws, U distinct items to encode, C candidates, F queued ones, D
dimension.

All rows of a batch share the candidates. An item drawn several times, or from several sources, is
one candidate: with c draws and an expected count E under all sources together it enters the
denominator as (c / E)·exp(logit), whose expectation is exp(logit) whatever the mixture. So the sum
over candidates estimates the full softmax (Bengio and Senécal 2008, for a mixture of samplers).

``draw`` gives as many candidates as there are. With ``fixed_shapes`` it gives as many as there can
be, N + B or the whole catalogue: spare places repeat the last item with a log_weight of -inf, which
adds exactly nothing to loss and gradients; so does an item that is only a positive.

Vectors of earlier steps (``momentum``) are one more source, whose draws are there already. Each
stays a candidate of its own, of weight 1 / E, since it is another vector than that of today. Since
no gradient passes through them, items learn from the other sources alone, under an E of those
(``scoring.loss_with_queue``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from recclr.availability import Availability
from recclr.data.log import EncodedLog
from recclr.distinct import counted, padded_distinct
from recclr.errors import ConfigError
from recclr.kernels.native_rows import unique
from recclr.settings import LossSettings, NegativesSettings, TrainSettings
from recclr.statistics import DAY_S
from recclr.streaming import StreamingShares


@dataclass(frozen=True)
class Queued:
    """Positives of earlier steps.

    Attributes:
        item_idx: int64 [F], repeats allowed. vectors: float32 [F, D], without gradient.
        num_rows: F, also after some were left out.
        counts: float32 [num_items], how often each item was to be expected among them, where that
            is known from the rows around them; None: what the whole stream says.
        log_weights: float32 [F], as those of the other candidates; of ``CandidateSampler.draw``.
        log_weights_without: float32 [C], of the other candidates where these take no part; of it
            too.
    """

    item_idx: Tensor
    vectors: Tensor
    num_rows: int
    counts: Tensor | None = None
    log_weights: Tensor | None = None
    log_weights_without: Tensor | None = None


@dataclass(frozen=True)
class Candidates:
    """What one step scores.

    Attributes:
        item_idx: int64 [U], rising: every item the item tower must encode, once but for ``places``.
        positive_row: int64 [B]: where each positive stands in ``item_idx``.
        candidate_row: int64 [C]: which of ``item_idx`` are candidates; None for all of them.
        log_weights: float32 [C]: log draws - strength · log expected count.
        own_row: int64 [X], where in ``item_idx`` stand what ``draw`` was given as ``own``.
        places: int64 [U] with fixed shapes, where each of ``item_idx`` stands first: spare places
            name the one they repeat, all others themselves. None where all are distinct.
        queued: more candidates, after these; None for none.
    """

    item_idx: Tensor
    positive_row: Tensor
    candidate_row: Tensor | None
    log_weights: Tensor
    places: Tensor | None = None
    own_row: Tensor | None = None
    queued: Queued | None = None

    @property
    def candidate_idx(self) -> Tensor:
        """int64 [C]: item index of each candidate."""
        rows = self.candidate_row
        return self.item_idx if rows is None else self.item_idx.index_select(0, rows)

    def weighted(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors and log_weights of all candidates, [C + F, D] and [C + F].

        Args:
            items: float32 [U, D], embeddings of ``item_idx``.
        """
        rows, queued = self.candidate_row, self.queued
        fresh = items if rows is None else items.index_select(0, rows)
        if queued is None or queued.log_weights is None:
            return fresh, self.log_weights
        vectors = torch.cat([fresh, queued.vectors])
        return vectors, torch.cat([self.log_weights, queued.log_weights])


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
        self.stream = None
        if settings.counts == "streaming":
            self.stream = StreamingShares(log.num_items, log.device)
        powers = None
        if settings.popularity is not None:
            # Only items of train: one that is never expected must not be drawn by a rounding error.
            self.drawable = counts.nonzero().squeeze(1)
            power = counts[self.drawable].double().pow(settings.popularity.alpha)
            self.cumulative = power.cumsum(0) / power.sum()
            self.share = torch.zeros(log.num_items, device=counts.device)
            self.share[self.drawable] = (power / power.sum()).float()
            powers = torch.zeros(log.num_items, dtype=torch.float64, device=counts.device)
            powers[self.drawable] = power
        self.availability: Availability | None = None
        if settings.available:
            lead_s = round(settings.available_lead_d * DAY_S)
            self.availability = Availability(log, powers, lead_s=lead_s)

    def draw(
        self,
        positives: Tensor,
        generator: torch.Generator,
        *,
        in_batch_counts: tuple[Tensor, int] | None = None,
        at: Tensor | None = None,
        queued: Queued | None = None,
        own: Tensor | None = None,
    ) -> Candidates:
        """Candidates for a batch.

        Args:
            positives: int64 [B] item of each row.
            generator: on the device of the log.
            in_batch_counts: (items of the rows that the batch was drawn from, their number), when
                that is not the whole log.
            at: int64 seconds, scalar: the moment of the step, where only items that were available
                are candidates.
            queued: vectors of earlier steps; not at fixed shapes.
            own: int64 [X], items to encode that are no candidates by that; not with fixed shapes.
        """
        drawn = self._draws(generator, positives.device, at)
        num_draws, all_drawn = len(drawn), len(drawn) + len(positives)
        merged = torch.cat([drawn, positives] if own is None else [drawn, positives, own])
        places = None
        if self.fixed_shapes:
            found = padded_distinct(merged, self.num_items)
            item_idx, inverse, places = found.values, found.inverse(), found.places
        else:
            item_idx, inverse = unique(merged)
        num_counted = all_drawn if self.settings.in_batch else num_draws
        draws = counted(inverse[:num_counted], len(item_idx))
        if self.availability is not None:
            draws = draws * self.available(item_idx, at)
            queued = None if queued is None else self._available_of(queued, at)
        expected = self._expected(item_idx, len(positives), in_batch_counts, at, queued)
        candidate_row = None
        some_missing = num_counted < len(merged) or self.availability is not None
        if some_missing and not self.fixed_shapes:
            candidate_row = draws.nonzero().squeeze(1)
            draws, expected = (x.index_select(0, candidate_row) for x in (draws, expected))
        # Nobody drew a spare place, and log 0 is the weight it needs.
        log_weights = draws.log() - self.strength * expected.log()
        if queued is not None:
            of_queued = self._expected(queued.item_idx, len(positives), in_batch_counts, at, queued)
            kept = item_idx if candidate_row is None else item_idx[candidate_row]
            without = self._expected(kept, len(positives), in_batch_counts, at)
            queued = replace(
                queued,
                log_weights=-self.strength * of_queued.log(),
                log_weights_without=draws.log() - self.strength * without.log(),
            )
        positive_row = inverse[num_draws:all_drawn]
        own_row = None if own is None else inverse[all_drawn:]
        return Candidates(
            item_idx, positive_row, candidate_row, log_weights, places, own_row, queued
        )

    def positive_log_weights(
        self,
        item_idx: Tensor,
        batch_size: int,
        in_batch_counts: tuple[Tensor, int] | None,
        at: Tensor | None = None,
        queued: Queued | None = None,
    ) -> Tensor:
        """Minus strength · log expected count: what classic logQ adds to the logit of a positive.

        Args:
            item_idx: int64 of any shape. The others: as ``draw`` has them.
        """
        expected = self._expected(item_idx.reshape(-1), batch_size, in_batch_counts, at, queued)
        return -self.strength * expected.log().view(item_idx.shape)

    def everything(
        self, positives: Tensor, at: Tensor | None = None, own: Tensor | None = None
    ) -> Candidates:
        """All items as candidates, or those available: the full softmax.

        Args:
            at, own: as ``draw`` has them.
        """
        item_idx = torch.arange(self.num_items, device=positives.device)
        weights = torch.zeros(len(item_idx), device=item_idx.device)
        candidate_row = None
        if self.availability is not None:
            alive = self.available(item_idx, at)
            if self.fixed_shapes:
                weights = weights.masked_fill(~alive, -torch.inf)
            else:
                candidate_row = alive.nonzero().squeeze(1)
                weights = weights[candidate_row]
        return Candidates(item_idx, positives, candidate_row, weights, own_row=own)

    def nothing(self, positives: Tensor) -> Candidates:
        """No candidates, for a loss without negatives."""
        item_idx, inverse = unique(positives)
        return Candidates(item_idx, inverse, inverse[:0], torch.empty(0, device=item_idx.device))

    def available(self, item_idx: Tensor, at: Tensor | None) -> Tensor:
        """Bool of the shape of ``item_idx``: which items there were at a moment; all without
        ``negatives.available``.
        """
        if self.availability is None:
            return torch.ones_like(item_idx, dtype=torch.bool)
        assert at is not None, "availability is that of the moment of a time cell"
        return self.availability.of(item_idx, at)

    def _available_of(self, queued: Queued, at: Tensor | None) -> Queued:
        alive = self.available(queued.item_idx, at).nonzero().squeeze(1)
        return replace(queued, item_idx=queued.item_idx[alive], vectors=queued.vectors[alive])

    def _draws(
        self, generator: torch.Generator, device: torch.device, at: Tensor | None = None
    ) -> Tensor:
        """int64 [N]: uniform draws, then draws by popularity."""
        parts, restricted = [], self.availability
        if self.settings.uniform:
            size = self.settings.uniform
            if restricted is None or at is None:
                drawn = torch.randint(self.num_items, (size,), generator=generator, device=device)
            else:
                drawn = restricted.uniform(size, at, generator)
            parts.append(drawn)
        if self.settings.popularity is not None:
            size = self.settings.popularity.count
            if restricted is None or at is None:
                parts.append(self._popular(size, generator, device))
            else:
                parts.append(restricted.popular(size, at, generator))
        if not parts:
            return torch.empty(0, dtype=torch.int64, device=device)
        return torch.cat(parts)

    def _popular(self, size: int, generator: torch.Generator, device: torch.device) -> Tensor:
        points = torch.rand((size,), generator=generator, device=device, dtype=torch.float64)
        # A point above the last sum (rounding) would name a place past the end.
        places = torch.searchsorted(self.cumulative, points, right=True)
        return self.drawable[places.clamp(max=len(self.drawable) - 1)]

    def _expected(
        self,
        item_idx: Tensor,
        batch_size: int,
        in_batch_counts: tuple[Tensor, int] | None,
        at: Tensor | None = None,
        queued: Queued | None = None,
    ) -> Tensor:
        """Expected count of each item under all sources together, float32 [U].

        In-batch: given that a row is in the batch, the other B - 1 are a uniform sample of the
        other n - 1 rows, so an item of count n_j that is not the row's positive is expected
        (B - 1)·n_j / (n - 1) times. Queue: each vector stands for one row of the n that there are,
        or of those around its time cell.
        """
        expected = torch.zeros(len(item_idx), device=item_idx.device)
        self._add_drawn(expected, item_idx, at)
        if self.settings.in_batch and in_batch_counts is not None:
            pool, num_rows = in_batch_counts
            counts = counted(pool.long(), self.num_items)[item_idx]
            expected += (batch_size - 1) / max(num_rows - 1, 1) * counts
        elif self.settings.in_batch and self.stream is not None:
            expected += (batch_size - 1) * self.stream.shares(item_idx)
        elif self.settings.in_batch:
            expected += (batch_size - 1) / max(self.num_rows - 1, 1) * self.counts[item_idx]
        if queued is not None and queued.counts is not None:
            expected += queued.counts[item_idx]
        elif queued is not None and self.stream is not None:
            expected += queued.num_rows * self.stream.shares(item_idx)
        elif queued is not None:
            expected += queued.num_rows / self.num_rows * self.counts[item_idx]
        return expected.clamp_min(1e-12)

    def _add_drawn(self, expected: Tensor, item_idx: Tensor, at: Tensor | None) -> None:
        """Add the expected counts of uniform draws and draws by popularity, in place."""
        uniform, popularity = self.settings.uniform, self.settings.popularity
        if self.availability is None or at is None:
            if uniform:
                expected += uniform / self.num_items
            if popularity is not None:
                expected += popularity.count * self.share[item_idx]
            return
        if uniform:
            expected += uniform * self.availability.uniform_share(item_idx, at)
        if popularity is not None:
            expected += popularity.count * self.availability.popular_share(item_idx, at)


def most_candidates(
    settings: NegativesSettings, loss: LossSettings, num_items: int, batch_size: int
) -> int:
    """How many candidates a batch may have."""
    if loss.kind == "full_softmax":
        return num_items
    popularity = 0 if settings.popularity is None else settings.popularity.count
    queue = 0 if settings.queue is None else settings.queue.size
    return min(num_items, batch_size + settings.uniform + popularity) + queue


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


def require_sources(settings: NegativesSettings, *, time_cells: bool) -> None:
    """Refuse sources that contradict the batches.

    Raises:
        ConfigError: time cells with streaming counts.
    """
    if time_cells and settings.counts == "streaming":
        raise ConfigError(
            "negatives.counts = 'streaming' estimates shares of the whole log, but the batches are "
            "time cells, which are corrected by the rows around each; leave negatives.counts out"
        )


def lost_negatives(
    loss: LossSettings, settings: NegativesSettings, train: TrainSettings
) -> str | None:
    """What plain accumulation costs, in words; None where it costs nothing."""
    if train.accumulate == 1:
        return None
    if loss.kind == "alignment_uniformity":
        what = "is kept apart from the rows"
    elif loss.symmetric > 0:
        what = "meets the users"
    elif settings.in_batch and loss.kind != "full_softmax":
        what = "meets the in-batch negatives"
    else:
        return None
    size = train.batch_size * train.accumulate
    return (
        f"train.accumulate = {train.accumulate} makes updates of {size:,} rows, but each row "
        f"{what} of its own {train.batch_size:,} only; for those of all rows set "
        f"train.batch_size = {size} and train.chunk_size = {train.batch_size}, accumulate = 1"
    )
