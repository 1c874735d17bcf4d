"""Statistics in time: what a log said of a user or an item at a given moment.

One sorted array of (entity, time) keys answers all questions by binary search, so no table over
time is stored: memory is 8 bytes per event, a lookup O(log n).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recclr.data.grouping import MOST_KEYS, time_keys, time_range
from recclr.data.log import EncodedLog
from recclr.errors import ConfigError

DAY_S = 86_400
_NEVER = -(1 << 62)


class TimeIndex(nn.Module):
    """Event times of every entity (all users, or all items), searchable.

    Args:
        entity_idx: integer [n]. timestamp: int64 seconds [n].
        num_entities: rows.
        keys: those of these arguments, where they were made before; ``timestamp`` rises then.

    Attributes:
        keys: int64 [n], rising: entity · span + seconds since the first event of all.
        all_times: int64 seconds [n], rising.
        first_seen: int64 [num_entities]: first event, or a time later than any where there is none.
    """

    keys: Tensor
    all_times: Tensor
    starts: Tensor
    first_seen: Tensor

    def __init__(
        self,
        entity_idx: Tensor,
        timestamp: Tensor,
        num_entities: int,
        *,
        keys: Tensor | None = None,
    ) -> None:
        super().__init__()
        all_times = timestamp.sort().values if keys is None else timestamp
        self.origin, self.span = time_range(all_times)
        if num_entities * self.span >= MOST_KEYS:
            raise ConfigError("the time range of the log is too long for second-exact statistics")
        if keys is None:
            keys = time_keys(entity_idx, timestamp, self.origin, self.span)
        bounds = torch.arange(num_entities + 1, device=keys.device) * self.span
        starts = torch.searchsorted(keys, bounds)
        first_seen = torch.full((num_entities,), 1 << 62, device=keys.device)
        seen = starts.diff() > 0
        first_seen[seen] = keys[starts[:-1][seen]] % self.span + self.origin
        # Buffers, so that they move with the model; never saved, they follow from the log.
        for name, value in (
            ("keys", keys),
            ("all_times", all_times),
            ("starts", starts),
            ("first_seen", first_seen),
        ):
            self.register_buffer(name, value, persistent=False)

    @classmethod
    def of_users(cls, log: EncodedLog) -> TimeIndex:
        return cls(log.user_idx, _times(log), log.num_users, keys=log.groups.user_times)

    @classmethod
    def of_items(cls, log: EncodedLog) -> TimeIndex:
        return cls(log.item_idx, _times(log), log.num_items, keys=log.groups.item_times)

    def rank(self, idx: Tensor, at: Tensor) -> Tensor:
        """Position in ``order`` of the first event of ``idx`` at or after ``at``, int64 [M].

        Args:
            idx: int64 [M], each a known entity. at: int64 seconds [M] or scalar.
        """
        local = (at - self.origin).clamp(0, self.span - 1)
        return torch.searchsorted(self.keys, idx * self.span + local)

    def counts(self, idx: Tensor, at: Tensor, window_s: int | None = None) -> Tensor:
        """Events of ``idx`` strictly before ``at``, within the window before it, int64 [M]."""
        stop = self.rank(idx, at)
        if window_s is None:
            return stop - self.starts[idx]
        return stop - self.rank(idx, at - window_s)

    def totals(self, at: Tensor, window_s: int) -> Tensor:
        """Events of all entities in the window before ``at``, int64, shape of ``at``."""
        at = at.contiguous()
        stop = torch.searchsorted(self.all_times, at)
        return stop - torch.searchsorted(self.all_times, at - window_s)

    def last_seen(self, idx: Tensor, at: Tensor) -> Tensor:
        """Time of the last event strictly before ``at``, int64 [M]; very early where none."""
        if not len(self.keys):
            return torch.full_like(idx, _NEVER)
        stop = self.rank(idx, at)
        some = stop > self.starts[idx]
        times = self.keys[(stop - 1).clamp(min=0)] % self.span + self.origin
        return torch.where(some, times, _NEVER)


def statistics_width(windows_d: Sequence[float], age: bool) -> int:
    """Number of values that ``statistics_at`` gives per entity."""
    return len(windows_d) + (3 if age else 0)


def statistics_at(
    index: TimeIndex, idx: Tensor, at: Tensor, *, windows_d: Sequence[float], age: bool
) -> Tensor:
    """Statistics of entities as they stood at a moment, from events strictly before it.

    Per window: log of (1 + expected share): count in the window against the events of an average
    entity in the same window, so that a busier season does not look like a rise. With ``age``:
    log days since first and since last seen, and a flag for "never seen".

    Args:
        index: events of the train log only.
        idx: int64 [M]; rows at or above the number of entities count as never seen.
        at: int64 seconds, scalar or [M].

    Returns:
        float32 [M, statistics_width], none negative, at most log(1 + number of entities) for
        a window and log(1 + days in the log) for an age.
    """
    num_entities = len(index.first_seen)
    known = idx < num_entities
    rows = torch.where(known, idx, 0)
    columns = []
    for days in windows_d:
        window_s = round(days * DAY_S)
        count = index.counts(rows, at, window_s) * known
        mean = index.totals(at, window_s).clamp(min=1).float() / num_entities
        columns.append(torch.log1p(count / mean))
    if age:
        first = torch.where(known, index.first_seen[rows], 1 << 62)
        never = first >= at
        age_d = torch.where(never, 0, at - first) / DAY_S
        since_d = torch.where(never, 0, at - index.last_seen(rows, at)) / DAY_S
        columns += [torch.log1p(age_d), torch.log1p(since_d), never.float()]
    return torch.stack([column.float() for column in columns], 1)


def _times(log: EncodedLog) -> Tensor:
    if log.timestamp is None:
        raise ConfigError(
            "statistics, recency and 'as_of' ids need timestamps, and the log has none; "
            "name its column in data.columns.timestamp or leave these features out"
        )
    return log.timestamp
