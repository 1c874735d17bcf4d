"""Whether the steps of a training can be captured as a CUDA graph (``graphs``), and why not.

Everything in a step must have a shape that is known beforehand and must be known never to read a
value from the device. What has no such shape by itself is padded or becomes a mask of bits, within
limits on what that takes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from recclr.distributed import Ranks
from recclr.errors import ConfigError
from recclr.graphs import graph_event
from recclr.kernels.logsumexp import why_not_triton
from recclr.optim import Table
from recclr.parts import BagPart, CategoryPart, DensePart, HistoryPart, IdPart, StatisticsPart
from recclr.settings import LossSettings, NegativesSettings, TrainSettings
from recclr.statistics import TimeIndex
from recclr.towers import ResidualBlock, Tower, TwoTower
from recclr.watching import OnEvent

_MAX_MASK_BYTES = 256 << 20
_MAX_PADDED_BYTES = 1 << 30
# Modules whose shapes follow from those of their input, and that never read a value.
_FIXED = (TwoTower, Tower, ResidualBlock, Table, TimeIndex, IdPart, CategoryPart, DensePart)
_FIXED_TYPES = {*_FIXED, BagPart, HistoryPart, StatisticsPart}
_FIXED_TYPES |= {nn.Linear, nn.LayerNorm, nn.GELU, nn.Sequential, nn.ModuleList}


def plan_graph(
    model: TwoTower,
    *,
    loss: LossSettings,
    negatives: NegativesSettings,
    train: TrainSettings,
    batch_size: int,
    device: torch.device,
    ranks: Ranks,
    emit: OnEvent,
) -> bool:
    """Whether the steps of a training are to be captured; on a GPU, says why not.

    Args:
        batch_size: rows of a full step. emit: told why not; of success ``StepGraph`` tells.

    Raises:
        ConfigError: ``train.cuda_graph`` is true and something stands against it.
    """
    if train.cuda_graph is False:
        return False
    reason = _why_not(model, loss, negatives, train, batch_size, device, ranks)
    if reason is None:
        return True
    if train.cuda_graph is True:
        raise ConfigError(
            f'train.cuda_graph = true, but {reason}; set it to "auto" to train without'
        )
    if device.type == "cuda":
        emit(graph_event(reason))
    return False


def _why_not(
    model: TwoTower,
    loss: LossSettings,
    negatives: NegativesSettings,
    train: TrainSettings,
    batch_size: int,
    device: torch.device,
    ranks: Ranks,
) -> str | None:
    """What stands against capturing steps, in words for a person; None for nothing."""
    if device.type != "cuda":
        return f"training is on {device.type}"
    if ranks.size > 1:
        return "several processes share each step, and tell each other of it through the host"
    if train.chunk_size is not None or train.accumulate > 1:
        return "train.chunk_size and train.accumulate run a tower several times in a step"
    if loss.top_k is not None or loss.symmetric > 0 or loss.positives > 1:
        return "loss.top_k, symmetric and positives make shapes that differ from step to step"
    for name, module in model.named_modules():
        if type(module) not in _FIXED_TYPES:
            return f"{name} is a {type(module).__name__}, of which nothing is known"
    reason = why_not_triton(_dim_of(model))
    if reason is not None:
        return reason
    num_candidates = model.num_items
    if loss.kind != "full_softmax":
        popularity = 0 if negatives.popularity is None else negatives.popularity.count
        num_candidates = min(num_candidates, batch_size + negatives.uniform + popularity)
    if batch_size * num_candidates // 8 > _MAX_MASK_BYTES:
        return (
            f"one bit for each of {batch_size:,} rows and {num_candidates:,} candidates takes more "
            f"than {_MAX_MASK_BYTES:,} bytes"
        )
    padded = _padded_bytes(model, batch_size, num_candidates)
    if padded > _MAX_PADDED_BYTES:
        return (
            f"lists or histories, padded to the longest, would take {padded:,} bytes, more than "
            f"{_MAX_PADDED_BYTES:,}"
        )
    return None


def _padded_bytes(model: TwoTower, batch_size: int, num_items: int) -> int:
    """Of the largest tensor that padding makes: what is looked up, or gradients of its rows."""
    dim, found = _dim_of(model), [0]

    def walk(parts: Iterable[nn.Module], num_rows: int) -> None:
        for part in parts:
            if isinstance(part, BagPart):
                num_values = num_rows * part.longest
                touched = min(num_values, part.table.num_rows)
                found.append(max(8 * num_values, 4 * dim * touched))
            if isinstance(part, HistoryPart):
                found.append(4 * dim * num_rows * part.longest)
                walk(part.item_parts, num_rows * part.longest)

    for tower, num_rows in ((model.user_tower, batch_size), (model.item_tower, num_items)):
        if isinstance(tower, Tower):
            walk(tower.parts, num_rows)
    return max(found)


def _dim_of(model: TwoTower) -> int:
    """Embedding dimension, which every part of a tower adds up in."""
    part = next(m for m in model.modules() if isinstance(m, (Table, DensePart, StatisticsPart)))
    return part.dim if isinstance(part, Table) else len(part.missing)
