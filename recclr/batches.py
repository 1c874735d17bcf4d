"""Which rows make a batch, and the moment its users and items are seen at.

A step's batches follow from (seed, step) alone (``order``), on the device of the log.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from recclr.data.log import EncodedLog
from recclr.errors import ConfigError, DataError
from recclr.order import generator, mix, permuted
from recclr.settings import TrainSettings
from recclr.statistics import DAY_S
from recclr.windows import Ahead, permuted_rows, window_length

# Rows on each side of a time cell that stand for the distribution its rows were drawn from.
POOL_CELLS = 2
# Positions of the permutation that are worked out ahead of their step.
_WINDOW = 1 << 16
_ORDER, _OFFSET, _STALENESS = 1, 2, 3


@dataclass(frozen=True)
class Batch:
    """Rows that are scored against the same candidates.

    Attributes:
        user_idx, item_idx: int64 [B]. weight: float32 [B] or None.
        user_at: int64 seconds [B]: each user's history and statistics are those before it; None
            without time.
        item_at: int64 scalar: likewise for all items of the step; None outside time cells.
        pool: int32 [P] items of the rows around a time cell, from which the expected counts of
            in-batch negatives are estimated; None where the batch is a sample of the whole log.
        user_pool: int32 [P] users of the same rows, where the source was asked for them.
        expected_weight: float32 scalar, the weight of as many rows on average over the log, where
            the batch is no sample of it; None: what its rows have is divided by.
    """

    user_idx: Tensor
    item_idx: Tensor
    weight: Tensor | None
    user_at: Tensor | None
    item_at: Tensor | None
    pool: Tensor | None
    user_pool: Tensor | None = None
    expected_weight: Tensor | None = None

    def total(self) -> float | Tensor:
        """What the losses of the rows, times their weights, are divided by; scalar."""
        if self.expected_weight is not None:
            return self.expected_weight
        return float(len(self.user_idx)) if self.weight is None else self.weight.sum()


class BatchSource:
    """Batches of a log, by step number.

    Without time cells, an epoch is one keyed permutation of all rows. With them, the log (sorted by
    time) is cut into cells of ``batch_size`` neighbouring rows, at an offset that differs by epoch,
    and the order of the cells is permuted: all rows of a step then share one moment, so that items
    can be shown as they stood.

    Args:
        log: train rows, on the training device, or mapped: then a thread reads the rows of coming
            steps, and ``close`` ends it. Sorted by time for time cells.
        settings: batch size, staleness.
        time_cells: see above. user_pools: time cells come with the users of their pool.

    Raises:
        ConfigError: time cells of a log without time. DataError: a log without rows.
    """

    def __init__(
        self,
        log: EncodedLog,
        settings: TrainSettings,
        *,
        seed: int,
        time_cells: bool,
        user_pools: bool = False,
    ) -> None:
        if time_cells and log.timestamp is None:
            raise ConfigError(
                "statistics and 'as_of' ids train on time cells, which need timestamps; "
                "the log has none"
            )
        if not len(log):
            raise DataError("the train log has no rows to make batches of")
        self.log, self.seed, self.time_cells, self.user_pools = log, seed, time_cells, user_pools
        # Rows of a cell are of one time. Divided by what they have themselves, weights that follow
        # time would be gone: an old cell would count as much as a new one.
        self.mean_weight = None
        if time_cells and log.weight is not None:
            self.mean_weight = log.weight.mean(dtype=torch.float64).to(log.device)
        self.batch_size = min(settings.batch_size, len(log))
        self.staleness_s = settings.staleness_d * DAY_S
        whole = math.ceil(len(log) / self.batch_size)
        self.batches_per_epoch = whole + 1 if time_cells and whole > 1 else whole
        self.accumulate = min(settings.accumulate, self.batches_per_epoch)
        self.steps_per_epoch = math.ceil(self.batches_per_epoch / self.accumulate)
        self.window_length = window_length(len(log), self.batch_size)
        self.window = (-1, 0, 0)
        self.order = torch.empty(0, dtype=torch.int64)
        mapped = log.mapped_for is not None
        self._cells = Ahead(self._read_cell) if mapped and time_cells else None
        self._windows = Ahead(self._read_window) if mapped and not time_cells else None

    def step(self, step: int) -> dict[int, Batch]:
        """The batches of a step, counted from 0 over all epochs, by their numbers.

        As many as are accumulated; in the last step of an epoch those that are left.
        """
        first = self.first_batch(step)
        left = self.batches_per_epoch - first % self.batches_per_epoch
        numbers = range(first, first + min(self.accumulate, left))
        return {number: self.batch(number) for number in numbers}

    def first_batch(self, step: int) -> int:
        """Number of the first batch of a step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return epoch * self.batches_per_epoch + position * self.accumulate

    def batch(self, number: int) -> Batch:
        """The batch of a number, counted from 0 over all epochs."""
        stale_s = self._staleness(number)
        if not self.time_cells:
            rows = self._shuffled(*divmod(number, self.batches_per_epoch))
            user_at = None if rows.timestamp is None else rows.timestamp - stale_s
            return _batch(rows, user_at, None, None)
        rows, *pools = self._cell(number) if self._cells is None else self._cells.get(number)
        rows = rows.to(self.log.device)
        pool, *user_pool = (pool.to(self.log.device) for pool in pools)
        assert rows.timestamp is not None
        item_at = rows.timestamp[0] - stale_s
        # With staleness the whole step stands at one frozen moment, as an evaluation does.
        user_at = rows.timestamp if not stale_s else item_at.expand(len(rows))
        mean = self.mean_weight
        expected = None if mean is None else (mean * len(rows)).float()
        return _batch(rows, user_at, item_at, pool, *user_pool, expected_weight=expected)

    def close(self) -> None:
        """End the thread that reads ahead, if there is one; ``batch`` starts another."""
        for ahead in (self._cells, self._windows):
            if ahead is not None:
                ahead.close()

    def _shuffled(self, epoch: int, position: int) -> EncodedLog:
        """Rows of a batch: the epoch's permutation is cut into them."""
        start = position * self.batch_size
        stop = min(start + self.batch_size, len(self.log))
        if self._windows is not None:
            number, first = divmod(start, self.window_length)
            window = self._windows.get(epoch * self._windows_per_epoch() + number)
            return window.rows(slice(first, first + stop - start)).to(self.log.device)
        if self.window[0] != epoch or not self.window[1] <= start < stop <= self.window[2]:
            # Many positions at once: the cost is in the number of calls, not in the rows.
            end = min(start + max(_WINDOW, self.batch_size), len(self.log))
            positions = torch.arange(start, end, device=self.log.device)
            self.order = permuted(positions, len(self.log), self.seed, epoch, _ORDER)
            self.window = (epoch, start, end)
        return self.log.rows(self.order[start - self.window[1] : stop - self.window[1]])

    def _windows_per_epoch(self) -> int:
        return math.ceil(len(self.log) / self.window_length)

    def _read_window(self, number: int) -> EncodedLog:
        """Rows of the positions of a window, counted over all epochs, in memory."""
        epoch, window = divmod(number, self._windows_per_epoch())
        start = window * self.window_length
        stop = min(start + self.window_length, len(self.log))
        return permuted_rows(self.log, start, stop, self.seed, epoch, _ORDER)

    def _cell(self, number: int) -> tuple[EncodedLog, *tuple[Tensor, ...]]:
        """Rows of the cell of a batch, and its pools; views of the log."""
        epoch, position = divmod(number, self.batches_per_epoch)
        size, num_rows = self.batch_size, len(self.log)
        cells = self.batches_per_epoch
        shift = mix(self.seed, epoch, _OFFSET) % size if cells > 1 else 0
        where = torch.tensor([position])
        cell = int(permuted(where, cells, self.seed, epoch, _ORDER))
        start = max(cell * size - shift, 0)
        stop = min((cell + 1) * size - shift, num_rows)
        if start >= stop:
            # The last cell is empty for some offsets; its step takes the newest rows instead.
            start, stop = max(num_rows - size, 0), num_rows
        low, high = max(start - POOL_CELLS * size, 0), min(stop + POOL_CELLS * size, num_rows)
        columns = [self.log.item_idx, *([self.log.user_idx] if self.user_pools else [])]
        return self.log.rows(slice(start, stop)), *(column[low:high] for column in columns)

    def _read_cell(self, number: int) -> tuple[EncodedLog, *tuple[Tensor, ...]]:
        """As ``_cell``, in memory."""
        rows, *pools = self._cell(number)
        return rows.with_columns(torch.clone), *(pool.clone() for pool in pools)

    def _staleness(self, number: int) -> int:
        """Seconds before the event at which a batch sees its entities; uniform, 0 if not set."""
        if self.staleness_s == 0:
            return 0
        draw = torch.rand((), generator=generator("cpu", self.seed, number, _STALENESS))
        return int(draw * self.staleness_s)


def _batch(
    rows: EncodedLog,
    user_at: Tensor | None,
    item_at: Tensor | None,
    pool: Tensor | None,
    user_pool: Tensor | None = None,
    *,
    expected_weight: Tensor | None = None,
) -> Batch:
    users, items = rows.user_idx.long(), rows.item_idx.long()
    return Batch(users, items, rows.weight, user_at, item_at, pool, user_pool, expected_weight)
