"""Forward pass of one step: candidates, towers, masks, loss.

Of several ranks each takes its part of the rows and encodes its part of the items; batch,
candidates and masks are those of one process, which every rank derives from (seed, step). So is
what dropout hides (``Rows.uniform``), unless a tower of one's own draws by other means.

Shape letters: B positives of a step, C candidates, D dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from recclr.batches import Batch
from recclr.caching import Embed, embed_in_chunks
from recclr.data.log import EncodedLog
from recclr.distributed import ALONE, Ranks
from recclr.kernels import Mask
from recclr.known_positives import KnownPositives
from recclr.losses import information_bound, mean_weights
from recclr.more_positives import MorePositives, with_items
from recclr.negatives import Candidates, CandidateSampler
from recclr.order import generator, mix
from recclr.parts import Rows
from recclr.scoring import Scored, scored_loss
from recclr.settings import LossSettings, NegativesSettings
from recclr.symmetric import Mirror
from recclr.towers import TwoTower

_NEGATIVES, _DROPOUT, _POSITIVES = 11, 12, 41


@dataclass
class StepStats:
    """What a step reports: tensors so that reading them, a host sync, stays optional.

    Of several ranks ``loss`` is the part of one, and all parts sum up to the mean over positives;
    ``num_masked`` is likewise its own. ``exchange`` makes both those of the step. With fixed shapes
    counts that follow from draws are scalars on the device.

    Attributes:
        num_candidates: of each batch, on average. num_pairs: scored, masked ones included.
        num_rows: positives. num_distinct: of their items, int64 scalar; the others are one
            candidate with one of these, counted as often as it was drawn.
        log_weights: float32 [C] of the candidates (of the last batch) where the loss is plain
            InfoNCE, None elsewhere.
    """

    loss: Tensor
    num_candidates: float | Tensor
    num_pairs: int | Tensor
    num_masked: int | Tensor
    num_rows: int
    num_distinct: Tensor
    log_weights: Tensor | None = None

    @property
    def information(self) -> float | None:
        """What a query tells of its positive, in nats: see ``information_bound``.

        Masked pairs are counted as if they were like all others. None for a loss of which no bound
        follows. Waits for a GPU.
        """
        if self.log_weights is None:
            return None
        negatives = float(self.log_weights.exp().sum()) * (1 - self.masked_share)
        return information_bound(float(self.loss.detach()), 1 + negatives)

    @property
    def masked_share(self) -> float:
        """Share of the scored pairs that are known positives, in [0, 1]. May wait for a GPU."""
        return int(self.num_masked) / max(int(self.num_pairs), 1)

    @property
    def duplicate_share(self) -> float:
        """Share of the rows whose item an earlier row has; as in-batch negatives they add nothing.

        Waits for a GPU.
        """
        return 1.0 - int(self.num_distinct) / max(self.num_rows, 1)


class Objective:
    """Forward pass of one step: candidates, towers, masks, loss.

    Args:
        log: train rows on the training device. ranks: who shares the step.
        bfloat16: towers, and the products of the loss as ``total_contrastive_loss`` has it.
        chunk_size: rows that a tower encodes at once, at most; None for all.
        fixed_shapes: shapes follow from that of the batch alone, and nothing waits for a GPU, so
            that a step can be captured as a CUDA graph. For one rank, and without chunks.
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
        ranks: Ranks = ALONE,
        fixed_shapes: bool = False,
    ) -> None:
        self.ranks, self.chunk_size, self.fixed_shapes = ranks, chunk_size, fixed_shapes
        self.loss, self.seed, self.bfloat16 = loss, seed, bfloat16
        self.device = log.device
        self.sampler = CandidateSampler(
            log, negatives, log_q_strength=loss.log_q_strength, fixed_shapes=fixed_shapes
        )
        self.known_positives = KnownPositives(log, only_own=not loss.mask_known_positives)
        self.more_positives: MorePositives | None = None
        if loss.positives > 1:
            lists = self.known_positives.user_items
            self.more_positives = MorePositives(lists, loss.positives - 1)
        self.mirror: Mirror | None = None
        if loss.symmetric > 0:
            self.mirror = Mirror(log, loss, ranks=ranks, bfloat16=bfloat16)
        # What steps leave for later ones: kept in checkpoints, by tensors that stay the same ones.
        self.state: dict[str, Tensor] = {}
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
        return found[0] if len(found) == 1 else _joined(found)

    def __call__(
        self, model: TwoTower, batch: Batch, number: int, *, total: float | Tensor | None = None
    ) -> StepStats:
        """Forward pass of one batch.

        Args:
            number: of the batch, which keys its draws; with fixed shapes ``prepare`` is told it,
                and this is not looked at.
            total: weight of the rows of all batches of the step, where there are more.
        """
        candidates = self._candidates(batch, number)
        positives, more_row = batch.item_idx, None
        if self.more_positives is not None:
            positives = self.more_positives.draw(batch, self._draws(number, _POSITIVES))
            candidates, more_row = with_items(candidates, positives[:, 1:])
        positive_log_weights = self._positive_log_weights(positives, batch)
        draws, fixed = self._draws(number, _DROPOUT), self.fixed_shapes
        users = Rows(batch.user_idx, batch.user_at, positives, draws, fixed_shapes=fixed)
        wanted = Rows(candidates.item_idx, batch.item_at, None, draws, fixed_shapes=fixed)
        if candidates.places is not None:
            # A spare place is what it repeats in all, in what dropout hides as well: the same rows
            # of tables are touched as without it.
            wanted = replace(wanted, whole=wanted, places=candidates.places)
        user_idx, item_idx, weight = batch.user_idx, batch.item_idx, batch.weight
        positive_row = candidates.positive_row
        shared = self.ranks.size > 1
        if shared:
            own = slice(*self.ranks.part(len(user_idx)))
            total = batch.total() if total is None else total
            users = users.part(own.start, own.stop)
            wanted = wanted.part(*self.ranks.part(len(wanted.idx)))
            user_idx, item_idx, positive_row = user_idx[own], item_idx[own], positive_row[own]
            weight, more_row, positive_log_weights = (
                None if each is None else each[own]
                for each in (weight, more_row, positive_log_weights)
            )
        queries = self._embed(model.embed_users, users, len(batch.user_idx))
        items = self._embed(model.embed_items, wanted, len(candidates.item_idx))
        # Loss in float32 whatever the towers compute in.
        queries, items = queries.float(), items.float()
        if shared:
            counts = self.ranks.counts(len(candidates.item_idx))
            items = self.ranks.gather_rows(items, counts, "item embeddings")
        mask, num_masked, num_candidates = self._masked(user_idx, item_idx, candidates)
        rows = candidates.candidate_row
        scored = Scored(
            queries,
            items,
            model.temperature(),
            user_idx,
            item_idx,
            positive_row,
            items if rows is None else items.index_select(0, rows),
            candidates.log_weights,
            mask,
            mean_weights(len(queries), weight, device=self.device, total=total),
            more_row=more_row,
            positive_log_weights=positive_log_weights,
        )
        loss = scored_loss(scored, self.loss, bfloat16=self.bfloat16)
        if self.mirror is not None:
            loss = torch.lerp(loss, self.mirror.loss(scored, batch), self.loss.symmetric)
        num_rows = len(batch.user_idx)
        return StepStats(
            loss,
            num_candidates,
            num_rows * num_candidates,
            num_masked,
            num_rows,
            _num_distinct(candidates),
            candidates.log_weights if self.loss.is_plain else None,
        )

    def _masked(
        self, user_idx: Tensor, item_idx: Tensor, candidates: Candidates
    ) -> tuple[Mask, int | Tensor, int | Tensor]:
        """Known positives among the candidates, how many these are, and how many candidates."""
        known, weights = self.known_positives, candidates.log_weights
        if not self.fixed_shapes:
            mask = known.mask(user_idx, item_idx, candidates.candidate_idx)
            return mask, len(mask), len(weights)
        alive, places = weights > -torch.inf, candidates.places
        if places is not None:
            places = torch.where(alive.index_select(0, places), places, -1)
        bits, num_masked = known.bits(user_idx, item_idx, candidates.item_idx, places)
        return bits, num_masked, alive.sum()

    def _embed(self, embed: Embed, rows: Rows, num_rows: int) -> Tensor:
        """Embeddings of this rank's ``rows``, a part of ``num_rows``, in as many chunks as all."""
        num_chunks = 1
        if self.chunk_size is not None and num_rows:
            num_chunks = -(-max(self.ranks.counts(num_rows)) // self.chunk_size)

        def embed_mixed(rows: Rows) -> Tensor:
            # Entered here, since the backward pass of chunks runs outside.
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
                return embed(rows)

        return embed_in_chunks(embed_mixed, rows, num_chunks)

    def _candidates(self, batch: Batch, number: int) -> Candidates:
        if self.loss.kind == "full_softmax":
            return self.sampler.everything(batch.item_idx)
        return self.sampler.draw(
            batch.item_idx,
            self._draws(number, _NEGATIVES),
            in_batch_counts=_in_batch_counts(batch),
        )

    def _positive_log_weights(self, positives: Tensor, batch: Batch) -> Tensor | None:
        """What moves the logits of positives, [B] or [B, P], in the classic form: [B, P]."""
        if self.loss.log_q == "corrected":
            return None
        # -1, where a row has fewer, takes the place of any item.
        positives = positives.view(len(positives), -1).clamp(min=0)
        return self.sampler.positive_log_weights(positives, len(positives), _in_batch_counts(batch))


def _in_batch_counts(batch: Batch) -> tuple[Tensor, int] | None:
    """Items of the rows that a batch is drawn from, and their number; None for the whole log."""
    return None if batch.pool is None else (batch.pool, len(batch.pool))


def _num_distinct(candidates: Candidates) -> Tensor:
    """Distinct items among the positives, int64 scalar."""
    seen = torch.zeros_like(candidates.item_idx)
    return seen.index_fill_(0, candidates.positive_row, 1).sum()


def _joined(found: list[StepStats]) -> StepStats:
    """The batches of a step as one."""
    return StepStats(
        torch.stack([stats.loss for stats in found]).sum(),
        sum(stats.num_candidates for stats in found) / len(found),
        sum(stats.num_pairs for stats in found),
        sum(stats.num_masked for stats in found),
        sum(stats.num_rows for stats in found),
        torch.stack([stats.num_distinct for stats in found]).sum(),
        found[-1].log_weights,
    )
