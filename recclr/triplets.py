"""Hard negatives of a finished run as rows in the caller's ids: user, positive, negative."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl
import torch

from recclr.data.prepared import PreparedLog
from recclr.distributed import ALONE, Ranks
from recclr.ids_input import require_ending, write_parts
from recclr.load import load_run, pick_device
from recclr.mining import Miner, Triplets
from recclr.mining_report import MiningReport, Tally
from recclr.settings import MiningSettings


def mine_run(
    run: Path,
    out: Path,
    settings: MiningSettings,
    *,
    seed: int = 0,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> MiningReport:
    """Write the negatives of every (user, item) pair of train, found by the run's best model.

    Each is judged by the score of its own positive, which is that of training: without the bias of
    ``model.popularity_bias``, which served scores have beside it. False negatives are estimated by
    validation, unless the model was refitted on it. Rows are held a block at a time; of several
    ranks each holds those of 4,096 users beside.

    Args:
        out: .parquet, .csv or .jsonl, with user_id, positive_id, negative_id (as read),
            positive_score, negative_score (Float32, larger is better) and rank (Int32 from 1, among
            the items that the user does not have); by user and positive in order of their index,
            then by rank.
        seed: of ``settings.choice``. device: ``auto`` is the first GPU where there is one.
        progress: called with (users done, users).
        ranks: who share the work, and are started here; the first one writes, all report.

    Raises:
        ConfigError: no run folder, an ending that is not known, or no such device.
        CheckpointError: no model yet, or a damaged one. StoreError: no space.
    """
    require_ending(out)
    device = pick_device(ranks.own_device(device))
    config, prepared, model = load_run(run, ranks, device)
    model = model.to(device)
    held_out = None if config.train.refit else prepared.tensors.held_out
    miner = Miner(prepared.tensors.train.to(device), settings, held_out)
    tally = Tally(settings.count, torch.device(device))
    with torch.no_grad():
        # As in training: what is hard is what it scores high, a bias of served scores left out.
        users, items = model.all_embeddings(prepared.tensors.cutoff, ranks)
        blocks = miner.triplets(
            users,
            items,
            temperature=float(model.temperature()),
            keys=(seed,),
            tally=tally,
            progress=progress,
            ranks=ranks,
        )
        if ranks.first:
            write_parts(_frames(blocks, prepared), out)
        else:
            deque(blocks, maxlen=0)
    tally.sum_over(ranks)
    return tally.report()


def _frames(blocks: Iterator[Triplets], prepared: PreparedLog) -> Iterator[pl.DataFrame]:
    for block in blocks:
        rows, columns = (block.item_idx >= 0).nonzero(as_tuple=True)
        ranks = block.ranks[rows, columns].cpu().numpy()
        users = prepared.users.decode(block.user_idx[rows].cpu().numpy())
        positives = prepared.items.decode(block.positive_idx[rows].cpu().numpy())
        negatives = prepared.items.decode(block.item_idx[rows, columns].cpu().numpy())
        yield pl.DataFrame(
            {
                "user_id": users,
                "positive_id": positives,
                "negative_id": negatives,
                "positive_score": block.positive_scores[rows].cpu().numpy(),
                "negative_score": block.scores[rows, columns].cpu().numpy(),
                "rank": pl.Series(ranks, dtype=pl.Int32),
            }
        )
