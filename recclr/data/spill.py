"""Frames that memory has no room for: written one after another to a file, and mapped as one.

The files have no names and vanish with their last use, also when the process is killed. The pages
of a mapped frame are the system's to drop, so that whoever walks it in stretches holds a stretch.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from recclr.errors import DataError
from recclr.files import clear_errors, with_errno

_STRETCH = 1 << 22
_ALIGNMENT = 64


@dataclass(frozen=True)
class Disk:
    """Where rows lie that do not fit, and how many may be in memory at once.

    Attributes:
        folder: exists. rows: at least 1; what is sorted or compared together has about so many.
    """

    folder: Path
    rows: int

    @property
    def stretch(self) -> int:
        """Rows that are walked together where nothing asks for more."""
        return min(self.rows, _STRETCH)

    def stretches(self, frame: pl.DataFrame, least: int = 0) -> Iterator[pl.DataFrame]:
        """The frame in pieces, in order; one empty piece of an empty frame.

        Args:
            least: rows of a piece but the last, where each costs something that is worth as many.
        """
        rows = max(self.stretch, least)
        yield frame[:rows]
        for start in range(rows, frame.height, rows):
            yield frame[start : start + rows]

    def written(self, frames: Iterable[pl.DataFrame]) -> pl.DataFrame:
        """The frames one after another, from a file; at least one, all of one schema.

        Raises:
            StoreError: no space. ConfigError: no permission.
        """
        spill = Spill(self)
        for frame in frames:
            spill.append(frame)
        return spill.mapped()

    def array(self, length: int, dtype: type[np.generic]) -> NDArray[Any]:
        """Zeros [length] in a file, to be written into."""
        if not length:
            return np.zeros(0, dtype)
        with clear_errors(self.folder), tempfile.TemporaryFile(dir=self.folder) as file:
            # Into a file with holes, a full disk would end the process at some write.
            os.posix_fallocate(file.fileno(), 0, length * np.dtype(dtype).itemsize)
            return np.memmap(file, dtype, "w+", shape=(length,))


class Spill:
    """A file that frames are put into; see ``Disk.written``."""

    def __init__(self, disk: Disk) -> None:
        self._folder = disk.folder
        with clear_errors(disk.folder):
            self._file = tempfile.TemporaryFile(dir=disk.folder)  # noqa: SIM115  (``mapped``)
        self._schema: pl.Schema | None = None
        self._places: list[tuple[int, int]] = []

    def append(self, frame: pl.DataFrame) -> None:
        """Rows after those so far.

        Raises:
            DataError: the columns are of other types. StoreError: no space.
        """
        self._schema = self._schema or frame.schema
        if frame.schema != self._schema:
            raise DataError(
                f"a log that is read in pieces has columns of {dict(self._schema)} in one and of "
                f"{dict(frame.schema)} in another; write them with one type, set data.id_type = "
                "'string', or data.resident = true"
            )
        if frame.height:
            with clear_errors(self._folder), with_errno(OSError):
                # Values that are not aligned in the file are copied into memory.
                self._file.write(bytes(-self._file.tell() % _ALIGNMENT))
                start = self._file.tell()
                # One batch: many make many chunks, each with a cost of its own.
                frame.write_ipc(self._file, record_batch_size=frame.height)
                self._places.append((start, self._file.tell()))

    def mapped(self) -> pl.DataFrame:
        """All rows; nothing more can be appended."""
        assert self._schema is not None
        with self._file as file:
            if not self._places:
                return pl.DataFrame(schema=self._schema)
            with clear_errors(self._folder):
                file.flush()
                view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        whole, frames = pa.py_buffer(view), []
        for start, end in self._places:
            batches = pa.ipc.open_file(pa.BufferReader(whole.slice(start, end - start))).read_all()
            frames.append(pl.DataFrame(pl.from_arrow(batches, rechunk=False)))
        return pl.concat(frames, rechunk=False).cast(self._schema)


def by_stretches(
    frame: pl.DataFrame, change: Callable[[pl.DataFrame], pl.DataFrame], disk: Disk | None
) -> pl.DataFrame:
    """What ``change``, which looks at each row alone, makes of a frame.

    Args:
        disk: where the frame lies, and then what is made of it; None: in memory.
    """
    if disk is None:
        return change(frame)
    return disk.written(change(piece) for piece in disk.stretches(frame))
