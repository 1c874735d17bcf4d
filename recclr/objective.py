"""Forward pass of one step: candidates, towers, masks, loss.

Of several ranks each takes its part of the rows and encodes its part of the items; batch,
candidates and masks are those of one process, which every rank derives from (seed, step). So is
what dropout hides (``Rows.uniform``), unless a tower of one's own draws by other means.

Shape letters: B positives of a step, C candidates, D dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from recclr.batches import Batch
from recclr.data.log import EncodedLog
from recclr.distributed import ALONE, Ranks
from recclr.kernels import Mask, total_contrastive_loss
from recclr.known_positives import KnownPositives
from recclr.losses import mean_weights
from recclr.negatives import Candidates, CandidateSampler
from recclr.order import generator, mix
from recclr.parts import Rows
from recclr.settings import LossSettings, NegativesSettings
from recclr.towers import TwoTower

_NEGATIVES, _DROPOUT = 11, 12


@dataclass
class StepStats:
    """What a step reports: loss is a tensor so that reading it, a host sync, stays optional.

    Of several ranks ``loss`` is the part of one, and all parts sum up to the mean over positives;
    ``num_masked`` is likewise its own. ``exchange`` makes both those of the step. With fixed shapes
    both counts are scalars on the device, for the same reason.
    """

    loss: Tensor
    num_candidates: int | Tensor
    num_masked: int | Tensor
    num_rows: int


class Objective:
    """Forward pass of one step: candidates, towers, masks, loss.

    Args:
        log: train rows on the training device. ranks: who shares the step.
        fixed_shapes: shapes follow from that of the batch alone, and nothing waits for a GPU, so
            that a call can be captured as a CUDA graph. For one rank.
    """

    def __init__(
        self,
        log: EncodedLog,
        loss: LossSettings,
        negatives: NegativesSettings,
        *,
        seed: int,
        bfloat16: bool = False,
        ranks: Ranks = ALONE,
        fixed_shapes: bool = False,
    ) -> None:
        self.ranks, self.fixed_shapes = ranks, fixed_shapes
        self.loss, self.seed, self.bfloat16 = loss, seed, bfloat16
        self.device = log.item_idx.device
        self.sampler = CandidateSampler(
            log, negatives, log_q_strength=loss.log_q_strength, fixed_shapes=fixed_shapes
        )
        self.known_positives = KnownPositives(log, only_own=not loss.mask_known_positives)
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

    def __call__(self, model: TwoTower, batch: Batch, step: int) -> StepStats:
        """The step; with fixed shapes that of the last ``prepare``, whatever ``step`` says."""
        candidates = self._candidates(batch, step)
        draws = self._draws(step, _DROPOUT)
        fixed = self.fixed_shapes
        users = Rows(batch.user_idx, batch.user_at, batch.item_idx, draws, fixed_shapes=fixed)
        wanted = Rows(candidates.item_idx, batch.item_at, None, draws, fixed_shapes=fixed)
        if candidates.places is not None:
            # A spare place is what it repeats in all, in what dropout hides as well: the same rows
            # of tables are touched as without it.
            wanted = replace(wanted, whole=wanted, places=candidates.places)
        user_idx, item_idx, weight = batch.user_idx, batch.item_idx, batch.weight
        positive_row, total = candidates.positive_row, None
        shared = self.ranks.size > 1
        if shared:
            own = slice(*self.ranks.part(len(user_idx)))
            total = float(len(user_idx)) if weight is None else weight.sum()
            users = users.part(own.start, own.stop)
            wanted = wanted.part(*self.ranks.part(len(wanted.idx)))
            user_idx, item_idx, positive_row = user_idx[own], item_idx[own], positive_row[own]
            weight = None if weight is None else weight[own]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            queries = model.embed_users(users)
            items = model.embed_items(wanted)
        # Loss in float32 whatever the towers compute in.
        queries, items = queries.float() / model.temperature(), items.float()
        if shared:
            counts = self.ranks.counts(len(candidates.item_idx))
            items = self.ranks.gather_rows(items, counts, "item embeddings")
        positives = items.index_select(0, positive_row)
        rows = candidates.candidate_row
        mask, num_masked, num_candidates = self._masked(user_idx, item_idx, candidates)
        loss = total_contrastive_loss(
            queries,
            items if rows is None else items.index_select(0, rows),
            candidates.log_weights,
            (queries * positives).sum(1),
            mean_weights(len(queries), weight, device=self.device, total=total),
            mask,
            second_temperature=self.loss.second_temperature,
        )
        return StepStats(loss, num_candidates, num_masked, len(batch.user_idx))

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

    def _candidates(self, batch: Batch, step: int) -> Candidates:
        if self.loss.kind == "full_softmax":
            return self.sampler.everything(batch.item_idx)
        return self.sampler.draw(
            batch.item_idx,
            self._draws(step, _NEGATIVES),
            in_batch_counts=None if batch.pool is None else (batch.pool, len(batch.pool)),
        )
