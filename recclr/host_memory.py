"""Exchanges between the ranks of one machine through memory that they share.

Gloo sends what ranks tell each other through sockets and threads of its own: a message of 2 MB
takes 1.4 ms, and a few bytes 0.3 ms where nothing else runs and up to 4 ms, a turn of the
scheduler, where all cores compute. Here a rank writes its block where the others see it, raises a
counter and waits for theirs; what is left is the copy.

A block is written anew two exchanges later. By then all ranks have come to the one in between, so
what was read is read until then.
"""

from __future__ import annotations

import math
import mmap
import os
import secrets
import select
import time
from collections.abc import Callable, Sequence
from ctypes import CDLL
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recclr.kernels import native

if TYPE_CHECKING:
    from recclr.distributed import Ranks

# Of all blocks together. What is larger costs more to copy than to send.
_MOST_MEMORY = 256 << 20
_SMALLEST = 4 << 20
# What one core writes stands in a line of its cache that no other core writes.
_LINE = 64
# Between two looks at whether the others still live.
_LOOK_NS = 50_000_000
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class LateError(RuntimeError):
    """Ranks that did not come in time, by number."""

    def __init__(self, ranks: list[int], timeout_s: float) -> None:
        super().__init__(f"timed out after {timeout_s:g} s")
        self.ranks = ranks


class Message:
    """Parts of what one rank said, taken in the order they were given."""

    def __init__(self, block: Tensor) -> None:
        self.block, self.at = block, 0

    def take(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """The next part; memory that is good as long as the message."""
        length = math.prod(shape) * dtype.itemsize
        part = self.block[self.at : self.at + length].view(dtype).view(shape)
        self.at = _aligned(self.at + length)
        return part


class HostMemory:
    """A block of each rank, seen by all of them.

    Args:
        memory: of ``length_of`` bytes, zero but for its first line, and the same to all ranks.
        pids: processes of the ranks. capacity: bytes of a block, the same on all ranks.
    """

    def __init__(
        self, kernels: CDLL, memory: mmap.mmap, rank: int, pids: Sequence[int], capacity: int
    ) -> None:
        self.kernels, self.rank, self.size, self.capacity = kernels, rank, len(pids), capacity
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        head = _LINE * (1 + self.size)
        self.counters = whole[_LINE:head].view(torch.int64).view(self.size, -1)
        self.blocks = whole[head:].view(2, self.size, capacity)
        self.number = 0
        # Of the machine: ranks may be pinned to a core each.
        self.crowded = self.size > (os.cpu_count() or 1)
        self.watched = [_watched(pid) for pid in pids]

    def gather(
        self, x: Tensor, most: int, *, timeout_s: float, heed: Callable[[], None]
    ) -> list[Tensor]:
        """The block of each rank; memory that is good until the next call.

        Args:
            x: [n, ...] on the CPU. most: rows [most, ...] of each block, the same on all ranks; of
                those beyond the n of its rank nothing is known.
            heed: called now and then while this waits; may raise.

        Raises:
            RuntimeError: another rank has ended. LateError: some did not come in time.
        """
        own = x.contiguous().view(-1).view(torch.uint8)
        self._next()[self.rank, : len(own)].copy_(own)
        blocks, length = self._exchanged(timeout_s, heed), most * row_bytes(x)
        return [block[:length].view(x.dtype).view(most, *x.shape[1:]) for block in blocks]

    def gather_parts(
        self, parts: Sequence[Tensor], *, timeout_s: float, heed: Callable[[], None]
    ) -> list[Message] | int:
        """What each rank has to say, of a length that the others need not know.

        Args:
            parts: without gaps, on the CPU; of any number, dtypes and shapes, which need not be the
                same on all ranks. Other arguments and errors: as ``gather``.

        Returns:
            the message of each rank, good until the next call; or how many bytes a block needs, the
            same on all ranks, where that of one is too small.
        """
        block, end = self._next()[self.rank], _LINE
        places = [
            (end, end := _aligned(end + part.numel() * part.element_size())) for part in parts
        ]
        block[:_LINE].view(torch.int64)[0] = end
        if end <= self.capacity:
            for part, (start, _) in zip(parts, places, strict=True):
                own = part.view(-1).view(torch.uint8)
                block[start : start + len(own)].copy_(own)
        blocks = self._exchanged(timeout_s, heed)
        needed = int(blocks[:, :_LINE].view(torch.int64)[:, 0].max())
        if needed > self.capacity:
            return needed
        return [Message(block[_LINE:]) for block in blocks]

    def arrive(self) -> None:
        """Let the others know that this rank is here; ``wait`` is to follow.

        They may then write over what the exchange before gave.
        """
        self._next()
        self._tell()

    def _next(self) -> Tensor:
        """Blocks of the next exchange, uint8 [size, capacity]; one's own is to be written."""
        self.number += 1
        return self.blocks[self.number % 2]

    def _exchanged(self, timeout_s: float, heed: Callable[[], None]) -> Tensor:
        """The same blocks, once all ranks have written theirs."""
        self._tell()
        self.wait(timeout_s=timeout_s, heed=heed)
        return self.blocks[self.number % 2]

    def _tell(self) -> None:
        self.kernels.recclr_tell(self.counters[self.rank].data_ptr(), self.number)

    def wait(self, *, timeout_s: float, heed: Callable[[], None]) -> None:
        """Go on when all ranks have arrived. Errors: as ``gather``."""
        end = time.monotonic() + timeout_s
        first, stride = self.counters.data_ptr(), self.counters.stride(0)
        while True:
            missing = self.kernels.recclr_await(
                first, self.size, stride, self.number, _LOOK_NS, self.crowded
            )
            if missing < 0:
                return
            heed()
            if _has_ended(self.watched[missing]):
                raise RuntimeError(f"rank {missing} has ended")
            if time.monotonic() > end:
                came = self.counters[:, 0] >= self.number
                raise LateError((~came).nonzero().flatten().tolist(), timeout_s)

    def close(self) -> None:
        """Look after the others no more. The memory goes with the last that holds it."""
        for watched in self.watched:
            if watched is not None:
                os.close(watched)
        self.watched = []


def length_of(size: int, capacity: int) -> int:
    """Bytes for ``size`` ranks and blocks of ``capacity``: lines, then two blocks for each."""
    return _LINE * (1 + size) + 2 * size * capacity


def _aligned(length: int) -> int:
    return -(-length // _LINE) * _LINE


def row_bytes(x: Tensor) -> int:
    """Of one row of ``x``, [n, ...]."""
    return x.shape[1:].numel() * x.element_size()


def capacity_for(size: int, needed: int = 0) -> int | None:
    """Bytes of a block that holds ``needed``; None where that is more than is worth a copy."""
    capacity = _SMALLEST
    while capacity < needed:
        capacity *= 2
    return capacity if 2 * size * capacity <= _MOST_MEMORY else None


def shared_by(ranks: Ranks, capacity: int) -> HostMemory | None:
    """Memory for exchanges, where ranks can share it: one machine, Linux, compiled kernels.

    All ranks must call this, and all get None where one cannot.
    """
    kernels = native.library()
    able = kernels is not None and hasattr(os, "memfd_create") and _BOOT.is_file()
    machine = _BOOT.read_text() if able else None
    told = ranks.gather_json([os.getpid(), machine], "looking for memory to share")
    pids, machines = zip(*told, strict=True)
    if kernels is None or machine is None or any(other != machine for other in machines):
        return None
    memory = mapped_by(ranks, length_of(len(pids), capacity))
    return None if memory is None else HostMemory(kernels, memory, ranks.rank, pids, capacity)


def mapped_by(ranks: Ranks, length: int) -> mmap.mmap | None:
    """So many bytes that all ranks see, zero but for the first line; for ranks of one machine.

    The system has them when this returns: who writes there is not ended for want of memory. All
    ranks must call this, and all get None where one cannot have them.
    """
    token = secrets.token_hex(_LINE // 4)
    fd = _made(length, token) if ranks.first else None
    own = [os.getpid(), fd, token]
    pid, number, token = ranks.from_first(own, "the memory to share")
    memory = None
    if number is not None:
        memory = _mapped(fd, f"/proc/{pid}/fd/{number}", token)
    seen = ranks.gather_json(memory is not None, "sharing memory")
    if fd is not None:
        os.close(fd)
    return memory if all(seen) else None


def room_for(ranks: Ranks, num_bytes: int) -> Tensor | None:
    """As ``mapped_by``, for tensors: uint8 [num_bytes], zero, which starts where a line does."""
    memory = mapped_by(ranks, _LINE + num_bytes)
    return None if memory is None else torch.frombuffer(memory, dtype=torch.uint8)[_LINE:]


def _made(length: int, token: str) -> int | None:
    """A file in memory that begins with the token; None where the system refuses."""
    try:
        fd = os.memfd_create("recclr")
    except OSError:
        return None
    try:
        os.posix_fallocate(fd, 0, length)
        os.pwrite(fd, token.encode(), 0)
    except OSError:
        os.close(fd)
        return None
    return fd


def _mapped(fd: int | None, path: str, token: str) -> mmap.mmap | None:
    """The whole file, if it begins with the token; None where it cannot be had."""
    try:
        # Containers on one machine may have other processes by the same numbers.
        opened = os.open(path, os.O_RDWR | os.O_CLOEXEC) if fd is None else os.dup(fd)
    except OSError:
        return None
    try:
        memory = mmap.mmap(opened, 0)
    except (OSError, ValueError):
        return None
    finally:
        os.close(opened)
    return memory if memory[: len(token)] == token.encode() else None


def _watched(pid: int) -> int | None:
    """What tells the end of a process; None where the system has no such thing."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def _has_ended(watched: int | None) -> bool:
    if watched is None:
        return False
    ready = select.poll()
    ready.register(watched, select.POLLIN)
    return bool(ready.poll(0))
