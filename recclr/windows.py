"""Rows of coming steps read ahead by a thread, for logs whose columns lie in files.

What is read follows from a number alone, so reading may start anywhere and nothing is remembered.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from recclr.data.log import EncodedLog
from recclr.order import permuted

Value = TypeVar("Value")

# An epoch reads every page of the log at most so many times, and a window is 1 / 64 of the rows ...
_WINDOWS = 64
# ... between what is worth a pass and what may be held twice (80 bytes a row while it is read).
_LEAST_ROWS, _MOST_ROWS = 1 << 18, 1 << 22
# PyTorch's loops over fewer elements stay in the thread that calls them, so that reading does not
# start a second team of threads beside the one that trains.
_SERIAL = 1 << 14


class Ahead(Generic[Value]):
    """Values of a function of 0, 1, 2, …, each worked out by a thread while the last is used.

    At most two are held: the one in use and the next.

    Args:
        read: gives the value of a number, in the thread; must not depend on earlier calls.
    """

    def __init__(self, read: Callable[[int], Value]) -> None:
        self._read = read
        self._number: int | None = None
        self._value: Value | None = None
        self._thread: _Reader[Value] | None = None

    def get(self, number: int) -> Value:
        """The value of ``number``; quick for the last number and for the one after it.

        Raises:
            Whatever ``read`` raised; asking again tries again.
        """
        if number != self._number or self._value is None:
            if self._thread is None or self._number is None or number != self._number + 1:
                self.close()
                self._thread = _Reader(self._read, number)
            self._number = number
            try:
                self._value = self._thread.next()
            except BaseException:
                self.close()
                raise
        return self._value

    def close(self) -> None:
        """End the thread, after what it is reading now; ``get`` starts another."""
        if self._thread is not None:
            self._thread.end()
        self._thread = self._number = self._value = None


class _Reader(Generic[Value]):
    """A thread that works out the values from ``first`` on, one before it is asked for."""

    def __init__(self, read: Callable[[int], Value], first: int) -> None:
        self._room = threading.Semaphore(1)
        self._ended = threading.Event()
        self._done: SimpleQueue[tuple[Value | None, BaseException | None]] = SimpleQueue()
        work = (read, first)
        # A program that never closes it ends all the same.
        self._thread = threading.Thread(target=self._work, args=work, daemon=True, name="windows")
        self._thread.start()

    def next(self) -> Value:
        value, error = self._done.get()
        if error is not None:
            raise error
        self._room.release()
        assert value is not None
        return value

    def end(self) -> None:
        self._ended.set()
        self._room.release()
        self._thread.join()

    def _work(self, read: Callable[[int], Value], number: int) -> None:
        while True:
            self._room.acquire()
            if self._ended.is_set():
                return
            try:
                self._done.put((read(number), None))
            except BaseException as error:
                self._done.put((None, error))
                return
            number += 1


def window_length(num_rows: int, batch_size: int) -> int:
    """Positions of a window: whole batches, about 1/64 of the rows within bounds."""
    wanted = min(max(num_rows // _WINDOWS, _LEAST_ROWS), _MOST_ROWS)
    return batch_size * max(1, wanted // batch_size)


def permuted_rows(log: EncodedLog, start: int, stop: int, *keys: int) -> EncodedLog:
    """Rows at positions ``start`` to ``stop`` of a keyed permutation (``order``), in memory.

    They are read in the order of the files, so that each page is read once, and put back.
    """
    positions = torch.arange(start, stop)
    rows = torch.cat(
        [permuted(part, len(log), *keys) for part in torch.split(positions, _SERIAL)]
    ).numpy()
    by_place = np.argsort(rows)
    places = rows[by_place]

    def read(column: Tensor) -> Tensor:
        # NumPy's loops hold neither the interpreter's lock nor a team of threads.
        values = np.empty(len(rows), column.numpy().dtype)
        values[by_place] = column.numpy().take(places)
        return torch.from_numpy(values)

    return log.with_columns(read)
