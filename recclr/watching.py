"""What a training says of itself, and what it says when its numbers stop being numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recclr.errors import DivergedError
from recclr.objective import StepStats
from recclr.towers import TwoTower

_LOG_EVERY_S = 2.0

OnEvent = Callable[[dict[str, Any]], None]


class Meter:
    """Logs steps every few seconds and watches for losses that are not finite."""

    def __init__(self, emit: OnEvent, per_epoch: int, num_steps: int) -> None:
        self.emit, self.per_epoch, self.num_steps = emit, per_epoch, num_steps
        self.since, self.rows = time.perf_counter(), 0

    def add(self, stats: StepStats, model: TwoTower, step: int, lr: float) -> None:
        self.rows += stats.num_rows
        now = time.perf_counter()
        if now - self.since < _LOG_EVERY_S and step != 1:
            return
        # Waits for a GPU, once per logged step.
        require_finite(stats.loss, model, step, weights=False)
        self.emit(
            {
                "kind": "step",
                "step": step,
                "num_steps": self.num_steps,
                "epoch": step / self.per_epoch,
                "loss": float(stats.loss.detach()),
                "lr": lr,
                "temperature": float(model.temperature().detach()),
                "positives_per_s": self.rows / max(now - self.since, 1e-9),
                "masked_share": stats.masked_share,
                "duplicate_share": stats.duplicate_share,
                "num_candidates": float(stats.num_candidates),
                "information": stats.information,
            }
        )
        self.since, self.rows = time.perf_counter(), 0


def require_finite(loss: Tensor, model: TwoTower, step: int, *, weights: bool = True) -> None:
    """Look at the loss, and at the weights as well: a gradient may overflow where no loss did."""
    value = loss.item()
    fine = math.isfinite(value)
    broken = _broken(model) if weights or not fine else []
    if fine and not broken:
        return
    what = "the update overflowed" if fine else f"the loss is {value}"
    raise DivergedError(
        f"{what} at step {step}: {_cause(model, broken)}; the last checkpoint is untouched"
    )


def _broken(model: TwoTower) -> list[str]:
    """Names of weights that are not finite, sharded ones as far as this rank holds them."""
    held = model.weights() | {name: shard.local for name, shard in model.shards().items()}
    return [name for name, p in held.items() if not torch.isfinite(p).all()]


def _cause(model: TwoTower, broken: list[str]) -> str:
    """The likeliest reason for a loss that is not finite, in words that name a setting."""
    tables = [name for name in broken if name in {f"{t}.weight" for t in model.tables()}]
    layers = [name for name in broken if name not in tables and name != "log_temperature"]
    if tables and layers:
        return (
            f"embedding table {tables[0]} and layer {layers[0]} are not finite; lower "
            "train.table_lr and train.dense_lr, or set train.clip_norm"
        )
    if tables:
        return f"embedding table {tables[0]} is not finite; lower train.table_lr"
    if layers:
        return f"layer {layers[0]} is not finite; lower train.dense_lr or set train.clip_norm"
    if broken:
        return "the learned temperature is not finite; set loss.temperature to a number"
    if float(model.temperature().detach()) < 0.01:
        return f"the temperature is {float(model.temperature().detach()):.2g}; raise it"
    return "all weights are finite, so a feature or a score overflowed; check numeric features"
