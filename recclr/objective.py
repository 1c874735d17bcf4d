"""Forward pass of one step: candidates, towers, masks, loss.

Of several ranks each takes its part of the rows, and encodes the items that ``apportioning`` gives
it; batch, candidates and masks are those of one process, which every rank derives from (seed,
step). So is what dropout hides (``Rows.uniform``), unless a tower of one's own draws by other
means.

Shape letters: B positives of a step, C candidates, D dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from recclr.apportioning import Named, each_for_itself, most_needed, needed
from recclr.batches import Batch
from recclr.caching import Encoding
from recclr.data.log import Csr, EncodedLog
from recclr.distillation import Teacher
from recclr.distributed import ALONE, Ranks
from recclr.kernels import Mask
from recclr.known_positives import KnownPositives
from recclr.losses import mean_weights
from recclr.momentum import MomentumQueue, mask_repeats
from recclr.more_positives import MorePositives, with_items
from recclr.negatives import Candidates, CandidateSampler, Queued
from recclr.order import generator, mix
from recclr.own_negatives import OwnDraws, OwnNegatives
from recclr.rows import Rows
from recclr.scoring import Scored, loss_with_queue, scored_loss
from recclr.settings import LossSettings, NegativesSettings
from recclr.step_stats import StepStats, joined
from recclr.symmetric import Mirror
from recclr.towers import TwoTower
from recclr.views import SelfSupervision
from recclr.within import SameGroup

_NEGATIVES, _DROPOUT, _OWN, _POSITIVES = 11, 12, 13, 41


class Objective:
    """Forward pass of one step: candidates, towers, masks, loss.

    Args:
        log: train rows on the training device. ranks: who shares the step.
        bfloat16: towers, and the products of the loss as ``total_contrastive_loss`` has it.
        chunk_size: rows that a tower encodes at once, at most; None for all.
        explicit: see ``OwnNegatives``.
        fixed_shapes: shapes follow from that of the batch alone, and nothing waits for a GPU, so
            that a step can be captured as a CUDA graph. For one rank, and without chunks.
        self_supervision: terms of two views, for ``backward`` alone; without fixed shapes.
        item_group: int64 [num_items], what ``negatives.within`` names; None: all are one group. Not
            with fixed shapes.
        queue: what ``negatives.queue`` asks for, made of the model. Not with fixed shapes.
        teacher: whose ranking of the candidates the loss is to come near as well, on the device.
    """

    def __init__(
        self,
        log: EncodedLog,
        loss: LossSettings,
        negatives: NegativesSettings,
        *,
        seed: int,
        bfloat16: bool = False,
        chunk_size: int | None = None,
        explicit: Csr | None = None,
        ranks: Ranks = ALONE,
        fixed_shapes: bool = False,
        self_supervision: SelfSupervision | None = None,
        item_group: Tensor | None = None,
        queue: MomentumQueue | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self.ranks, self.fixed_shapes = ranks, fixed_shapes
        self._embed = Encoding(chunk_size, bfloat16)
        self.loss, self.seed, self.bfloat16 = loss, seed, bfloat16
        self.device = log.device
        self.sampler = CandidateSampler(
            log, negatives, log_q_strength=loss.log_q_strength, fixed_shapes=fixed_shapes
        )
        self.known_positives = KnownPositives(log, only_own=not loss.mask_known_positives)
        # Of the whole training, for rates that change while it goes on; None: they stand still.
        self.num_batches: int | None = None
        self.own = OwnNegatives(
            log, negatives, log_q_strength=loss.log_q_strength, explicit=explicit
        )
        self.more_positives: MorePositives | None = None
        if loss.positives > 1:
            lists = self.known_positives.user_items
            self.more_positives = MorePositives(lists, loss.positives - 1)
        self.mirror: Mirror | None = None
        if loss.symmetric > 0:
            self.mirror = Mirror(log, loss, ranks=ranks)
        # What steps leave for later ones: kept in checkpoints, by tensors that stay the same ones.
        self.state: dict[str, Tensor] = self.own.state()
        self.self_supervision = self_supervision
        if self_supervision is not None:
            self.state |= self_supervision.state()
        self.teacher = teacher
        self.queue = queue
        if queue is not None:
            self.state |= queue.state
        if self.sampler.stream is not None:
            shares = self.sampler.stream.state.items()
            self.state |= {f"stream/{name}": value for name, value in shares}
        self.groups = None if item_group is None else SameGroup(item_group.to(self.device))
        self.draws: dict[int, torch.Generator] = {}
        self.renew_draws()

    def renew_draws(self) -> None:
        """Generators that stay, for a graph that draws from them; ``prepare`` sets them."""
        if self.fixed_shapes:
            self.draws = {key: torch.Generator(self.device) for key in (_NEGATIVES, _DROPOUT)}

    def prepare(self, step: int) -> None:
        """With fixed shapes, make the draws of the next call those of a step."""
        for key, draws in self.draws.items():
            draws.manual_seed(mix(self.seed, step, key))

    def _draws(self, step: int, key: int) -> torch.Generator:
        return self.draws[key] if self.draws else generator(self.device, self.seed, step, key)

    def progress(self, number: int) -> float:
        """Share of the training that is done at a batch, from 0 at the first to 1 at the last."""
        if self.num_batches is None:
            return 0.0
        return min(1.0, number / max(1, self.num_batches - 1))

    def backward(
        self,
        model: TwoTower,
        batches: Mapping[int, Batch],
        check: Callable[[Tensor], None] | None = None,
    ) -> StepStats:
        """Forward and backward passes of all batches of a step.

        Args:
            batches: by number, at least one. The loss is the mean over the positives of all.
            check: gets the loss of a batch before its backward pass.
        """
        total: float | Tensor | None = None
        if len(batches) > 1:
            total = sum(batch.total() for batch in batches.values())
        found = []
        for number, batch in batches.items():
            stats = self(model, batch, number, total=total)
            if check is not None:
                check(stats.loss)
            stats.loss.backward()  # type: ignore[no-untyped-call]
            # Its graph would keep nodes of autograd alive that belong to the stream of this step.
            stats.loss = stats.loss.detach()
            found.append(stats)
        stats = found[0] if len(found) == 1 else joined(found)
        if self.self_supervision is None:
            return stats
        return self._with_views(model, batches, stats, check)

    def _with_views(
        self,
        model: TwoTower,
        batches: Mapping[int, Batch],
        stats: StepStats,
        check: Callable[[Tensor], None] | None,
    ) -> StepStats:
        """Forward and backward passes of the terms of two views, once a step."""
        assert self.self_supervision is not None
        number, batch = next(iter(batches.items()))
        terms = self.self_supervision.terms(
            model, batch, number, self._embed, self.progress(number)
        )
        for name, weight, loss in terms:
            if check is not None:
                check(loss)
            (weight * loss).backward()  # type: ignore[no-untyped-call]
            stats.auxiliary[name] = loss.detach()
            stats.loss = stats.loss + weight * loss.detach()
        return stats

    def __call__(
        self, model: TwoTower, batch: Batch, number: int, *, total: float | Tensor | None = None
    ) -> StepStats:
        """Forward pass of one batch.

        Args:
            number: of the batch, which keys its draws; with fixed shapes ``prepare`` is told it,
                and this is not looked at.
            total: weight of the rows of all batches of the step, where there are more.
        """
        drawn = self._own_draws(batch, number)
        candidates = self._candidates(batch, number, drawn)
        positives, more_row = batch.item_idx, None
        if self.more_positives is not None:
            positives = self.more_positives.draw(batch, self._draws(number, _POSITIVES))
            candidates, more_row = with_items(candidates, positives[:, 1:])
        positive_log_weights = self._positive_log_weights(positives, batch, candidates.queued)
        draws, fixed = self._draws(number, _DROPOUT), self.fixed_shapes
        shown = partial(Rows, generator=draws, fixed_shapes=fixed, progress=self.progress(number))
        users = shown(batch.user_idx, batch.user_at, positives)
        wanted = shown(candidates.item_idx, batch.item_at)
        if candidates.places is not None:
            # A spare place is what it repeats in all, in what dropout hides as well: the same rows
            # of tables are touched as without it.
            wanted = replace(wanted, whole=wanted, places=candidates.places)
        user_idx, item_idx, weight = batch.user_idx, batch.item_idx, batch.weight
        num_rows, num_distinct = len(user_idx), _num_distinct(candidates)
        positive_row, own, ranks = candidates.positive_row, slice(0, num_rows), self.ranks
        own_row, own_log_weights = _own_of(drawn, candidates)
        share = 1.0 if total is None else batch.total() / total
        total = batch.total() if total is None else total
        if ranks.size > 1:
            own = slice(*ranks.part(num_rows))
            users = users.part(own.start, own.stop)
            user_idx, item_idx, positive_row = user_idx[own], item_idx[own], positive_row[own]
            weight, more_row, positive_log_weights, own_row, own_log_weights = (
                None if each is None else each[own]
                for each in (weight, more_row, positive_log_weights, own_row, own_log_weights)
            )
        # Loss in float32 whatever the towers compute in.
        queries = self._embed(model.embed_users, users, max(ranks.counts(num_rows))).float()
        named = positive_row, own_row, more_row
        items, candidates, named = self._items(model, wanted, candidates, named, num_rows)
        positive_row, own_row, more_row = named
        mask, num_masked, num_candidates = self._masked(user_idx, item_idx, candidates)
        vectors, log_weights = candidates.weighted(items)
        scored = Scored(
            queries,
            items,
            model.temperature(),
            user_idx,
            item_idx,
            positive_row,
            vectors,
            log_weights,
            mask,
            mean_weights(len(queries), weight, device=self.device, total=total),
            own_row,
            own_log_weights,
            more_row=more_row,
            positive_log_weights=positive_log_weights,
            similarity=model.similarity,
            ranks=ranks,
            num_rows=num_rows,
            batch_share=share,
        )
        # The lift of distances subtracts large numbers, of which 8 bits would leave nothing.
        bfloat16 = self.bfloat16 and not model.num_lifted
        if candidates.queued is None:
            fresh, loss = scored, scored_loss(scored, self.loss, bfloat16=bfloat16)
        else:
            fresh = self._without_queue(scored, candidates, positives, own, batch)
            loss = loss_with_queue(scored, fresh, self.loss, bfloat16=bfloat16)
        if self.mirror is not None:
            other_way = self.mirror.loss(scored, batch, bfloat16=bfloat16)
            loss = torch.lerp(loss, other_way, self.loss.symmetric)
        auxiliary: dict[str, Tensor] = {}
        if self.teacher is not None:
            every = self.loss.kind == "full_softmax" and self.sampler.availability is None
            told = self.teacher.loss(fresh, None if every else candidates.candidate_idx)
            loss = torch.lerp(loss, told, self.teacher.weight)
            auxiliary["distillation"] = told.detach()
        if self.sampler.stream is not None:
            # After its own correction, which has to be independent of what it was drawn from.
            self.sampler.stream.add(batch.item_idx)
        return StepStats(
            loss,
            num_candidates,
            num_rows * num_candidates,
            num_masked,
            num_rows,
            num_distinct,
            auxiliary,
            log_weights if self.loss.is_plain and not self.own and not auxiliary else None,
        )

    def _items(
        self, model: TwoTower, wanted: Rows, candidates: Candidates, named: Named, num_rows: int
    ) -> tuple[Tensor, Candidates, Named]:
        """Embeddings that this rank's rows score, float32; the candidates, and ``named``, there.

        Args:
            wanted: all items of the step. named: places among them, see ``apportioning.needed``.
            num_rows: of all ranks.
        """
        ranks, num_items = self.ranks, len(wanted.idx)
        if ranks.size == 1:
            return self._embed(model.embed_items, wanted, num_items).float(), candidates, named
        if each_for_itself(ranks, num_rows, len(candidates.log_weights), model.item_tower):
            most = most_needed(ranks, num_rows, candidates, named)
            places, candidates, named = needed(candidates, named)
            own = wanted.only(places)
            return self._embed(model.embed_items, own, most).float(), candidates, named
        counts = ranks.counts(num_items)
        own = wanted.part(*ranks.part(num_items))
        items = self._embed(model.embed_items, own, max(counts)).float()
        return ranks.gather_rows(items, counts, "item embeddings"), candidates, named

    def _without_queue(
        self, scored: Scored, candidates: Candidates, positives: Tensor, own: slice, batch: Batch
    ) -> Scored:
        """What the step scores but for the queue, under the log_q of the other sources.

        Args:
            positives: int64 [B] or [B, P], of all rows. own: those of ``scored``.
        """
        assert candidates.queued is not None
        fresh_weights = candidates.queued.log_weights_without
        assert fresh_weights is not None
        fresh = replace(candidates, queued=None, log_weights=fresh_weights)
        mask, _, _ = self._masked(scored.user_idx, scored.item_idx, fresh)
        vectors, log_weights = fresh.weighted(scored.items)
        positive_log_weights = self._positive_log_weights(positives, batch)
        if positive_log_weights is not None:
            positive_log_weights = positive_log_weights[own]
        return replace(
            scored,
            candidates=vectors,
            log_weights=log_weights,
            mask=mask,
            positive_log_weights=positive_log_weights,
        )

    def _masked(
        self, user_idx: Tensor, item_idx: Tensor, candidates: Candidates
    ) -> tuple[Mask, int | Tensor, int | Tensor]:
        """Known positives among the candidates, how many these are, and how many candidates."""
        known, weights = self.known_positives, candidates.log_weights
        if not self.fixed_shapes:
            candidate_idx, mined = candidates.candidate_idx, self.own.mined
            if candidates.queued is None:
                mask = known.mask(user_idx, item_idx, candidate_idx, also=mined)
            else:
                candidate_idx = torch.cat([candidate_idx, candidates.queued.item_idx])
                mask = mask_repeats(known, user_idx, item_idx, candidate_idx, also=mined)
            if self.groups is None:
                return mask, len(mask), len(candidate_idx)
            limited = self.groups.limit(mask, item_idx, candidate_idx)
            return limited, len(mask), len(candidate_idx)
        alive, places = weights > -torch.inf, candidates.places
        if places is None and self.sampler.availability is not None:
            places = torch.arange(len(weights), device=weights.device)
        if places is not None:
            places = torch.where(alive.index_select(0, places), places, -1)
        bits, num_masked = known.bits(user_idx, item_idx, candidates.item_idx, places)
        return bits, num_masked, alive.sum()

    def _own_draws(self, batch: Batch, number: int) -> OwnDraws | None:
        """For all rows of a batch, on every rank."""
        if not self.own:
            return None
        drawn = self.own.draw(batch.user_idx, batch.item_idx, self._draws(number, _OWN))
        if drawn is None or (self.groups is None and self.sampler.availability is None):
            return drawn
        # What limits shared candidates limits these.
        allowed = self.sampler.available(drawn.item_idx, batch.item_at)
        if self.groups is not None:
            allowed &= self.groups.same(batch.item_idx, drawn.item_idx)
        return replace(drawn, log_weights=drawn.log_weights.masked_fill(~allowed, -torch.inf))

    def _candidates(self, batch: Batch, number: int, drawn: OwnDraws | None = None) -> Candidates:
        own = None if drawn is None else drawn.item_idx.flatten()
        if self.loss.kind == "full_softmax":
            return self.sampler.everything(batch.item_idx, batch.item_at, own)
        if self.loss.kind == "alignment_uniformity":
            return self.sampler.nothing(batch.item_idx)
        return self.sampler.draw(
            batch.item_idx,
            self._draws(number, _NEGATIVES),
            in_batch_counts=_in_batch_counts(batch),
            at=batch.item_at,
            queued=None if self.queue is None else self.queue.queued(number),
            own=own,
        )

    def _positive_log_weights(
        self, positives: Tensor, batch: Batch, queued: Queued | None = None
    ) -> Tensor | None:
        """What moves the logits of positives, [B] or [B, P], in the classic form: [B, P]."""
        if self.loss.log_q == "corrected":
            return None
        # -1, where a row has fewer, takes the place of any item.
        positives = positives.view(len(positives), -1).clamp(min=0)
        return self.sampler.positive_log_weights(
            positives,
            len(positives),
            _in_batch_counts(batch),
            batch.item_at,
            queued,
        )


def _in_batch_counts(batch: Batch) -> tuple[Tensor, int] | None:
    """Items of the rows that a batch is drawn from, and their number; None for the whole log."""
    return None if batch.pool is None else (batch.pool, len(batch.pool))


def _own_of(drawn: OwnDraws | None, candidates: Candidates) -> tuple[Tensor | None, Tensor | None]:
    """Rows among the embedded items, and log weights, of what each row of a batch drew."""
    if drawn is None or candidates.own_row is None:
        return None, None
    return candidates.own_row.view(drawn.item_idx.shape), drawn.log_weights


def _num_distinct(candidates: Candidates) -> Tensor:
    """Distinct items among the positives, int64 scalar."""
    seen = torch.zeros_like(candidates.item_idx)
    return seen.index_fill_(0, candidates.positive_row, 1).sum()
