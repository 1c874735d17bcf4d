"""How large a batch may be: speed and memory of real steps at one size after the other.

Sizes double until the memory would not suffice. On a CPU memory is the peak of the whole process,
on a GPU what its allocator held.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from recclr.config import Config
from recclr.data.log import Prepared
from recclr.fitting import fresh_stepper
from recclr.memory import available_bytes, forget_peak, held_bytes, peak_bytes
from recclr.step_stats import StepStats
from recclr.stepping import Stepper
from recclr.within import RoomError

_FIRST = 256
_LAST = 1 << 20
# What is left to others and to what a step was not seen to need.
_SHARE = 0.8


@dataclass(frozen=True)
class BatchTrial:
    """What one batch size came to.

    Attributes:
        batch_size: rows of a step.
        positives_per_s: over whole steps, the first (on a GPU, all before they are replayed) left
            out.
        peak_bytes: most memory held during them; None where the system does not say.
        duplicate_share: of the first batch, rows whose item an earlier row has.
        masked_share: of its scored pairs, known positives.
    """

    batch_size: int
    positives_per_s: float
    peak_bytes: int | None
    duplicate_share: float = 0.0
    masked_share: float = 0.0


def try_batch_sizes(
    config: Config,
    prepared: Prepared,
    *,
    device: str,
    seconds: float = 1.0,
    memory_bytes: int | None = None,
    on_trial: Callable[[BatchTrial], None] | None = None,
) -> list[BatchTrial]:
    """Train a few steps at 256 rows, 512 and so on, on a model that is thrown away.

    Args:
        seconds: time per size, at least one step after the first.
        memory_bytes: what may be used; by default 80 % of what is free.

    Returns:
        The sizes that ran, rising. The last one is the largest that fits, or the whole log.

    Raises:
        ConfigError: the settings do not fit the log or the model.
    """
    budget = memory_bytes or int(_SHARE * _free_bytes(device))
    most = min(len(prepared.train), _LAST)
    size, trials = min(_FIRST, most), list[BatchTrial]()
    while True:
        try:
            trial = _trial(config, prepared, size, device, seconds)
        except (MemoryError, torch.OutOfMemoryError, RoomError):
            return trials
        if trial.peak_bytes is not None and trial.peak_bytes > budget:
            return trials
        trials.append(trial)
        if on_trial is not None:
            on_trial(trial)
        if size == most or _next_peak(trials) > budget:
            return trials
        size = min(2 * size, most)


def fastest(trials: list[BatchTrial]) -> BatchTrial:
    """The smallest size within 5 % of the highest speed: beyond it a larger batch only costs steps.

    Args:
        trials: at least one.
    """
    best = max(trial.positives_per_s for trial in trials)
    return next(trial for trial in trials if trial.positives_per_s >= 0.95 * best)


def _trial(
    config: Config, prepared: Prepared, size: int, device: str, seconds: float
) -> BatchTrial:
    changes: dict[str, Any] = {"train": replace(config.train, batch_size=size)}
    queue = config.negatives.queue
    if queue is not None:
        # Steps as they are for most of a training: with a queue that is full.
        changes["negatives"] = replace(config.negatives, queue=replace(queue, warmup=0.0))
    stepper = fresh_stepper(config.model_copy(update=changes), prepared, device=device)

    def step(number: int) -> StepStats:
        stats, _ = stepper(number)
        _wait(device)
        return stats

    _forget_peak(device)
    try:
        _fill(stepper)
        # A whole batch, where the last one of an epoch is smaller.
        whole = step(0)
        shares = whole.duplicate_share, whole.masked_share
        first = number = stepper.warm_up(1)
        _wait(device)
        began, num_rows = time.perf_counter(), 0
        while number == first or time.perf_counter() - began < seconds:
            num_rows += step(number).num_rows
            number += 1
    finally:
        stepper.close()
    return BatchTrial(
        size,
        num_rows / (time.perf_counter() - began),
        _peak_bytes(device),
        duplicate_share=shares[0],
        masked_share=shares[1],
    )


def _fill(stepper: Stepper) -> None:
    """Fill the queue, if there is one, with items of a batch and vectors of nothing."""
    queue = stepper.objective.queue
    if queue is None:
        return
    batch = stepper.source.batch(0)
    # To embed them would take as long as all that is measured; a step costs the same.
    vectors = queue.vectors.new_zeros(len(batch.item_idx), queue.vectors.shape[1])
    while queue.num_filled < queue.size:
        queue.push(batch.item_idx, vectors, batch.pool)


def _next_peak(trials: list[BatchTrial]) -> float:
    """What twice the last size will need, if memory goes on growing as it did; 0 if unknown."""
    peaks = [trial.peak_bytes for trial in trials[-2:] if trial.peak_bytes is not None]
    if len(peaks) < 2:
        return 0.0
    # Doubling adds twice what the doubling before added.
    return peaks[1] + 2.0 * max(peaks[1] - peaks[0], 0)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _free_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    available, held = available_bytes(), held_bytes()
    # Without the system's word, no limit but its own.
    return 1 << 62 if available is None or held is None else available + held


def _forget_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    else:
        forget_peak()


def _peak_bytes(device: str) -> int | None:
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    return peak_bytes()
