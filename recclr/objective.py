"""Forward pass of one step: candidates, towers, masks, loss.

Of several ranks each takes its part of the rows and encodes its part of the items; batch,
candidates and masks are those of one process, which every rank derives from (seed, step). So is
what dropout hides (``Rows.uniform``), unless a tower of one's own draws by other means.

Shape letters: B positives of a step, C candidates, D dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recclr.batches import Batch
from recclr.data.log import EncodedLog
from recclr.distributed import ALONE, Ranks
from recclr.kernels import total_contrastive_loss
from recclr.known_positives import KnownPositives
from recclr.losses import mean_weights
from recclr.negatives import Candidates, CandidateSampler
from recclr.order import generator
from recclr.parts import Rows
from recclr.settings import LossSettings, NegativesSettings
from recclr.towers import TwoTower

_NEGATIVES, _DROPOUT = 11, 12


@dataclass
class StepStats:
    """What a step reports: loss is a tensor so that reading it, a host sync, stays optional.

    Of several ranks ``loss`` is the part of one, and all parts sum up to the mean over positives;
    ``num_masked`` is likewise its own. ``exchange`` makes both those of the step.
    """

    loss: Tensor
    num_candidates: int
    num_masked: int
    num_rows: int


class Objective:
    """Forward pass of one step: candidates, towers, masks, loss.

    Args:
        log: train rows on the training device. ranks: who shares the step.
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
    ) -> None:
        self.ranks = ranks
        self.loss, self.seed, self.bfloat16 = loss, seed, bfloat16
        self.device = log.device
        self.sampler = CandidateSampler(log, negatives, log_q_strength=loss.log_q_strength)
        self.known_positives = KnownPositives(log, only_own=not loss.mask_known_positives)

    def __call__(self, model: TwoTower, batch: Batch, step: int) -> StepStats:
        candidates = self._candidates(batch, step)
        draws = generator(self.device, self.seed, step, _DROPOUT)
        users = Rows(batch.user_idx, batch.user_at, batch.item_idx, draws)
        wanted = Rows(candidates.item_idx, batch.item_at, None, draws)
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
        mask = self.known_positives.mask(user_idx, item_idx, candidates.candidate_idx)
        loss = total_contrastive_loss(
            queries,
            items if rows is None else items.index_select(0, rows),
            candidates.log_weights,
            (queries * positives).sum(1),
            mean_weights(len(queries), weight, device=self.device, total=total),
            mask,
            second_temperature=self.loss.second_temperature,
        )
        return StepStats(loss, len(candidates.log_weights), len(mask), len(batch.user_idx))

    def _candidates(self, batch: Batch, step: int) -> Candidates:
        if self.loss.kind == "full_softmax":
            return self.sampler.everything(batch.item_idx)
        return self.sampler.draw(
            batch.item_idx,
            generator(self.device, self.seed, step, _NEGATIVES),
            in_batch_counts=None if batch.pool is None else (batch.pool, len(batch.pool)),
        )
