"""The processes of one run: who they are, what they exchange, and how they end together.

``torchrun`` starts them with one command; each gets a ``Ranks`` and hands it on as an argument.
A process alone is ``ALONE``, rank 0 of 1, which exchanges nothing.

Two channels. Tensors go through collectives with a short time-out, or through memory that ranks
share. Words of a few bytes go through the store that the processes met in (``notices``). A rank
that fails leaves its word there before it closes its connections, so the others, whose collectives
then break, end with its exit code and leave the message to it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store

from recclr.errors import ConfigError, PeerError, RankError, RecclrError
from recclr.host_memory import (
    HostMemory,
    LateError,
    Message,
    capacity_for,
    room_for,
    row_bytes,
    shared_by,
)
from recclr.notices import Notices, late, ranks_named

# For what one process does alone while the others wait: baselines, export.
LONG_S = 24 * 3600.0
JOIN_S = 120.0
# Bytes of each rank that one exchange of a long gather takes: what shared memory holds at first.
_STRETCH = 1 << 22
# By how much of its time a hang may be shown too early.
_SLACK = 0.1


class Ranks:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: number of this process. size: how many there are.
        local_rank: number on this machine, which picks the GPU. local_size: how many are on it.
        timeout_s: of each collective, from ``start`` on.

    Every method but ``part`` and ``own_device`` must be called by all ranks, in one order. ``name``
    says in errors what was going on. They raise ``PeerError`` when another rank failed, and
    ``RankError`` when one was lost or late.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        *,
        local_rank: int = 0,
        local_size: int | None = None,
        store: Store | None = None,
    ) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self.local_size = local_size or size
        self.timeout_s = JOIN_S
        self._store = store
        self.notices = None if store is None else Notices(store, rank, size)
        self._memory: HostMemory | None = None
        self._growth_refused = False
        self._watched_at: float | None = None

    @property
    def first(self) -> bool:
        """Whether this process writes, prints and works alone."""
        return self.rank == 0

    def start(self, device: str, timeout_s: float) -> None:
        """Open the channel of tensors: gloo on a CPU, NCCL beside it on GPUs.

        On the CPUs of one machine most of them then go through memory that the ranks share.
        """
        if self.size == 1:
            return
        self.timeout_s = timeout_s
        self.meet("the start")
        backend = "gloo"
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
            # Waiting in the call is what lets a time-out be an error that can be told.
            os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
            backend = "cpu:gloo,cuda:nccl"
        assert self._store is not None
        with self.operation("the start"):
            dist.init_process_group(
                backend,
                store=PrefixStore("tensors", self._store),
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(seconds=timeout_s),
            )
        capacity = capacity_for(self.size)
        if device == "cpu" and self.local_size == self.size and capacity is not None:
            self._memory = shared_by(self, capacity)

    def own_device(self, device: str) -> str:
        """The device of this rank, from what was asked for all.

        Raises:
            ConfigError: one GPU was named for several processes.
        """
        if self.size == 1 or device == "cpu" or not torch.cuda.is_available():
            return device
        if device in ("auto", "cuda"):
            return f"cuda:{self.local_rank}"
        raise ConfigError(
            f"--device {device}: several processes cannot share one GPU; with auto or cuda each "
            "takes the one of its local rank"
        )

    def part(self, count: int) -> tuple[int, int]:
        """Start and stop of this rank's share of ``count`` rows; empty where there are too few."""
        return self._share(count, self.rank)

    def counts(self, count: int) -> list[int]:
        """Length of every rank's share of ``count`` rows."""
        shares = (self._share(count, rank) for rank in range(self.size))
        return [stop - start for start, stop in shares]

    def _share(self, count: int, rank: int) -> tuple[int, int]:
        return count * rank // self.size, count * (rank + 1) // self.size

    def sum_(self, x: Tensor, name: str) -> Tensor:
        """``x`` summed over ranks, in place; the same bits everywhere."""
        if self.size == 1:
            return x
        # Gloo sums memory in the order it lies in, whatever the strides say.
        dense = x.contiguous()
        if self._shared(dense.numel() * dense.element_size(), dense.device):
            first, *others = self._every(dense.view(1, -1), 1, name)
            dense = first.view_as(x) + others[0].view_as(x)
            for other in others[1:]:
                dense += other.view_as(x)
        else:
            with self.operation(name):
                dist.all_reduce(dense)
        return x if dense is x else x.copy_(dense)

    def gather(self, x: Tensor, counts: Sequence[int], name: str) -> Tensor:
        """Blocks of rows of all ranks, one below the other.

        Args:
            x: [counts[rank], ...]. counts: rows of each rank, known to all; may be 0.

        Returns:
            [Σ counts, ...]. Without gradient: see ``gather_rows``.
        """
        if self.size == 1 or not max(counts):
            return x
        whole = x.new_empty((sum(counts), *x.shape[1:]))
        begins = [stop - count for stop, count in zip(accumulate(counts), counts, strict=True)]
        # In stretches, since what is exchanged is there twice or more while it is.
        height = max(1, _STRETCH // max(1, row_bytes(x)))
        for low in range(0, max(counts), height):
            here = [min(max(count - low, 0), height) for count in counts]
            blocks = self.gather_blocks(x[low : low + height], here, name)
            for begin, count, block in zip(begins, here, blocks, strict=True):
                whole[begin + low : begin + low + count] = block
        return whole

    def gather_blocks(self, x: Tensor, counts: Sequence[int], name: str) -> list[Tensor]:
        """As ``gather``, the block of each rank by itself; good until the next exchange."""
        if self.size == 1 or not max(counts):
            return [x] * self.size
        blocks = self._every(x.contiguous(), max(counts), name)
        return [block[:count] for block, count in zip(blocks, counts, strict=True)]

    def _every(self, x: Tensor, most: int, name: str) -> list[Tensor]:
        """[most, ...] of each rank, the rows beyond its own of any content."""
        if self._shared(most * row_bytes(x), x.device):
            assert self._memory is not None
            with self.operation(name):
                return self._memory.gather(x, most, timeout_s=self.timeout_s, heed=self._heed)
        # One shape for all: collectives of unequal lengths are where others wait for ever.
        padded = x
        if len(x) < most:
            padded = x.new_empty((most, *x.shape[1:]))
            padded[: len(x)] = x
        blocks = list(torch.split(x.new_empty((self.size * most, *x.shape[1:])), most))
        with self.operation(name):
            dist.all_gather(blocks, padded)
        return blocks

    def gather_parts(self, parts: Sequence[Tensor], name: str) -> list[Message] | None:
        """What each rank has to say, of a length that the others need not know; see ``Message``.

        Args:
            parts: any number of tensors on the CPU, without gaps.

        Returns:
            by rank, good until the next exchange; None where ranks share no memory, or too little.
        """
        needed = 0
        while self._shared(needed, torch.device("cpu")):
            assert self._memory is not None
            with self._brief(name):
                found = self._memory.gather_parts(parts, timeout_s=self.timeout_s, heed=self._heed)
            if not isinstance(found, int):
                return found
            needed = found
        return None

    def _shared(self, needed: int, device: torch.device) -> bool:
        """Whether a block goes through the memory that ranks share, which grows up to a limit."""
        memory = self._memory
        if memory is None or device.type != "cpu":
            return False
        if needed > memory.capacity:
            capacity = capacity_for(self.size, needed)
            if capacity is None or self._growth_refused:
                return False
            grown = shared_by(self, capacity)
            if grown is None:
                # What the system refused once is not asked for in every step.
                self._growth_refused = True
                return False
            self._memory = grown
            memory.close()
        return True

    def gather_rows(self, x: Tensor, counts: Sequence[int], name: str) -> Tensor:
        """As ``gather``; the gradient of a row is the sum of what all ranks made of it."""
        if self.size == 1:
            return x
        rows: Tensor = _GatherRows.apply(x, self, tuple(counts), name)  # type: ignore[no-untyped-call]
        return rows

    def gather_json(self, value: Any, name: str) -> list[Any]:
        """A JSON value of each rank, by rank."""
        if self.size == 1:
            return [value]
        data = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
        ones = [1] * self.size
        lengths = self.gather(torch.tensor([len(data)]), ones, name).tolist()
        parts = torch.split(self.gather(data, lengths, name), lengths)
        return [json.loads(bytes(part.tolist())) for part in parts]

    def from_first(self, value: Any, name: str) -> Any:
        """The JSON value of rank 0; what the others give does not matter."""
        return self.gather_json(value if self.first else None, name)[0]

    def agree(self, values: Mapping[str, str], *, kind: type[RecclrError] = ConfigError) -> None:
        """Refuse to go on unless all ranks have the same values.

        Args:
            values: digests by what they are of. kind: the error to raise.
        """
        if self.size == 1:
            return
        every = self.gather_json(dict(values), f"comparing {', '.join(values)}")
        for name in values:
            odd = [rank for rank, other in enumerate(every) if other[name] != every[0][name]]
            if odd:
                raise kind(
                    f"{ranks_named(odd)} and rank 0 do not agree on {name}; every process needs "
                    "the same files, the same command and the same installation"
                )

    def meet(self, name: str, timeout_s: float | None = None) -> None:
        """Go on when all ranks are here; for waits that may be long, such as for rank 0's work.

        Args:
            timeout_s: ``self.timeout_s`` if None.
        """
        if self.size == 1:
            return
        assert self.notices is not None
        with self.operation(name):
            self.notices.meet(name, self.timeout_s if timeout_s is None else timeout_s)

    def room(self, num_bytes: int) -> Tensor | None:
        """Zeros, uint8 [num_bytes], in memory that all ranks see; None where they share none."""
        return None if self._memory is None else room_for(self, num_bytes)

    def wait(self, name: str, meanwhile: Callable[[], None] | None = None) -> None:
        """As ``meet``, for waits within a step: microseconds where ranks share memory.

        Args:
            meanwhile: done before this rank waits, and where they share memory once the others
                know that it is here; it must not look at what an exchange gave before.
        """
        if self._memory is not None:
            self._memory.arrive()
        # Outside of what turns errors of an exchange into those of others.
        if meanwhile is not None:
            meanwhile()
        if self._memory is None:
            self.meet(name)
            return
        with self._brief(name):
            self._memory.wait(timeout_s=self.timeout_s, heed=self._heed)

    def watch(self) -> None:
        """From here on a hang shows where it is: the stack on stderr.

        Until ``unwatch``, a collective, or a wait in memory of more than a moment.
        """
        if self.size == 1 or sys.__stderr__ is None:
            return
        # Each time starts a thread, which costs more than an exchange through memory.
        now = time.monotonic()
        if self._watched_at is None or now - self._watched_at > _SLACK * self.timeout_s:
            faulthandler.dump_traceback_later(self.timeout_s, file=sys.__stderr__)
            self._watched_at = now

    def unwatch(self) -> None:
        """What follows may take longer than a collective, or ends by itself."""
        if self._watched_at is not None:
            faulthandler.cancel_dump_traceback_later()
            self._watched_at = None

    @contextmanager
    def operation(self, name: str) -> Iterator[None]:
        """Exchanges of any kind; what c10d raises in the block becomes an error of ours."""
        self.unwatch()
        with self._brief(name):
            yield

    @contextmanager
    def _brief(self, name: str) -> Iterator[None]:
        """As ``operation``, for what is over before anybody would ask; see ``_heed``."""
        try:
            yield
        except RecclrError:
            raise
        # c10d and its stores raise RuntimeErrors, whose words are for those who know gloo.
        except RuntimeError as error:
            raise self._lost(name, error) from error

    def _heed(self) -> None:
        """Now and then in a wait, which has its own time-out."""
        assert self.notices is not None
        self.unwatch()
        self.notices.heed()

    def _lost(self, name: str, error: RuntimeError) -> RecclrError:
        """What a broken exchange says of the others."""
        assert self.notices is not None
        try:
            self.notices.heed()
            if isinstance(error, LateError):
                return late(error.ranks, name, self.timeout_s)
            if "timed out" in str(error).lower() or "timeout" in str(error).lower():
                return late(self.notices.not_waiting(name), name, self.timeout_s)
        except PeerError as known:
            return known
        except RuntimeError:
            pass  # the store went with its host
        return RankError(
            f"another process was lost during '{name}' ({first_line(error)}); run the command "
            "again (training: with --resume), or start torchrun with --max-restarts"
        )

    def close(self, *, wait: bool) -> None:
        """Close both channels; with ``wait``, once all ranks do."""
        assert self._store is not None
        self.unwatch()
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        with contextlib.suppress(RuntimeError):
            if dist.is_initialized():
                dist.destroy_process_group()
        assert self.notices is not None
        self.notices.leave(wait=wait)


ALONE = Ranks()


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, counts: tuple[int, ...], name: str) -> Tensor:
        ctx.ranks, ctx.counts, ctx.name = ranks, counts, name
        return ranks.gather(x, counts, name)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        ranks, counts = ctx.ranks, ctx.counts
        # All-reduce moves twice the bytes of reduce-scatter, which gloo has for equal parts only.
        whole = ranks.sum_(grad_outputs[0].clone(), f"gradient of {ctx.name}")
        return whole.split(counts)[ranks.rank], None, None, None


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
