"""A log on the disk, opened as memory-mapped tensors: columns, groups, and a manifest.

A folder holds one file of plain little-endian values per array, and ``manifest.json``, written
last, with every array's dtype, length and SHA-256. It appears whole or not at all. Nothing in it is
executed, no name in it is used as a path, and what does not fit is refused.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from recclr.data.grouping import GROUPS, grouped
from recclr.data.log import COLUMNS, Csr, EncodedLog, Groups
from recclr.errors import ConfigError, DataError
from recclr.files import fault_point, new_folder, sha256_of, write_json_atomic

FORMAT_VERSION = 1
_MANIFEST = "manifest.json"
_DTYPES = {
    "user_idx": torch.int32,
    "item_idx": torch.int32,
    "timestamp": torch.int64,
    "weight": torch.float32,
    "user_times": torch.int64,
    "item_times": torch.int64,
}
# Fields of Groups, by what their rows are and what their values are.
_CSRS = {
    "user_items": ("num_users", "num_items"),
    "known_items": ("num_users", "num_items"),
    "known_users": ("num_items", "num_users"),
}
for _name in _CSRS:
    _DTYPES |= {f"{_name}.offsets": torch.int64, f"{_name}.values": torch.int32}
_STRETCH = 1 << 22


def write_shards(
    folder: Path, pieces: Iterable[EncodedLog], *, groups: Collection[str] = GROUPS
) -> None:
    """Write a log, piece after piece, and what is made of it by entity.

    Memory is that of a piece, of the counts of users and items, and of 4 M rows at a time
    (``grouping``).

    Args:
        folder: must not exist. pieces: rows of one log, in its order, at least one row in all; on
            any device, each with all of the log's users and items as its numbers of them.
        groups: what is made beside the columns, of ``grouping.GROUPS``. The rest is made in memory
            where it is needed.

    Raises:
        DataError: no rows, indices out of range, weights that are not positive, times that fall,
        or pieces that differ in their columns or sizes. StoreError: ``folder`` exists, or no space.
        ConfigError: no permission, or a big-endian machine. Nothing is left behind.
    """
    if sys.byteorder != "little":
        raise ConfigError("shards are little-endian and this machine is not; keep the log resident")
    with new_folder(folder) as temporary:
        writer = _Writer(temporary)
        try:
            sizes = _write_columns(writer, pieces)
            writer.flush()
            log = _opened(temporary, writer.described(), sizes)
            for name, piece in grouped(log, groups):
                writer.append(name, piece)
        finally:
            writer.close()
        fault_point("shards.columns")
        manifest = {"format": FORMAT_VERSION, **sizes, "arrays": writer.described()}
        write_json_atomic(temporary / _MANIFEST, manifest)


def open_shards(folder: Path, *, verify: bool = True) -> EncodedLog:
    """The log of ``write_shards``, its columns and groups memory-mapped.

    Writing into its tensors never reaches the files.

    Args:
        verify: read every byte and compare it with its digest, and check the range of indices; what
            this process or one that it trusts has just written needs no second reading.

    Raises:
        DataError: a file is missing, damaged, cut short, or of a newer format.
    """
    sizes, arrays = _read_manifest(folder)
    for name, described in arrays.items():
        path = folder / _file(name)
        num_bytes = described["length"] * _DTYPES[name].itemsize
        try:
            found = path.stat().st_size
            whole = found == num_bytes and (not verify or sha256_of(path) == described["sha256"])
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}; write it again") from error
        if not whole:
            raise DataError(
                f"{path} is damaged: expected {num_bytes:,} bytes with the SHA-256 that "
                f"{_MANIFEST} names, found {found:,}; write it again"
            )
    log = _opened(folder, arrays, sizes)
    _check_groups(folder, log)
    if verify:
        for piece in log.stretches():
            _check_piece(piece, str(folder))
        for name, (_, of) in _CSRS.items():
            csr = getattr(log.groups, name)
            for part in () if csr is None else torch.split(csr.values, _STRETCH):
                _check_range(part, sizes[of], f"{folder}: {name}")
    return log


class _Writer:
    """Arrays that grow piece by piece, each in a file of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, BinaryIO] = {}
        self.lengths: dict[str, int] = {}
        self.digests: dict[str, Any] = {}

    def append(self, name: str, piece: Tensor) -> None:
        if name not in self.files:
            self.files[name] = (self.folder / _file(name)).open("xb")
            self.lengths[name], self.digests[name] = 0, hashlib.sha256()
        assert piece.dtype == _DTYPES[name], f"{name} is {piece.dtype}"
        data = piece.cpu().contiguous().numpy().view(np.uint8).data
        self.files[name].write(data)
        self.digests[name].update(data)
        self.lengths[name] += len(piece)

    def flush(self) -> None:
        for file in self.files.values():
            file.flush()

    def described(self) -> dict[str, dict[str, Any]]:
        """The manifest's word on each array."""
        return {
            name: {
                "dtype": _dtype_name(name),
                "length": length,
                "sha256": self.digests[name].hexdigest(),
            }
            for name, length in self.lengths.items()
        }

    def close(self) -> None:
        for file in self.files.values():
            file.close()


def _write_columns(writer: _Writer, pieces: Iterable[EncodedLog]) -> dict[str, int]:
    """The columns of all pieces; numbers of rows, users and items."""
    sizes: dict[str, int] = {}
    names: set[str] = set()
    latest: int | None = None
    for number, piece in enumerate(pieces):
        own = {"num_users": piece.num_users, "num_items": piece.num_items}
        present = {name for name, _ in piece.columns()}
        if number == 0:
            sizes, names = {"num_rows": 0, **own}, present
        if present != names or own.items() - sizes.items():
            raise DataError(
                f"piece {number} has {sorted(present)} and {own}, the first one "
                f"{sorted(names)} and {sizes}; all must be pieces of one log"
            )
        _check_piece(piece, f"piece {number}")
        if piece.timestamp is not None and len(piece):
            if latest is not None and int(piece.timestamp[0]) < latest:
                raise DataError(f"piece {number} begins before the end of the piece before it")
            latest = int(piece.timestamp[-1])
        for name, column in piece.columns():
            writer.append(name, column)
        sizes["num_rows"] += len(piece)
    if not sizes.get("num_rows"):
        raise DataError("a log without rows cannot be written as shards")
    return sizes


def _check_piece(piece: EncodedLog, what: str) -> None:
    """Refuse what would read foreign memory, or train on nonsense."""
    for name, column in piece.columns():
        if column.dtype != _DTYPES[name] or column.shape != (len(piece),):
            raise DataError(
                f"{what}: {name} must be {_DTYPES[name]} of shape [{len(piece)}], found "
                f"{column.dtype} of {list(column.shape)}"
            )
    _check_range(piece.user_idx, piece.num_users, f"{what}: user_idx")
    _check_range(piece.item_idx, piece.num_items, f"{what}: item_idx")
    if piece.timestamp is not None and bool((piece.timestamp.diff() < 0).any()):
        raise DataError(f"{what}: timestamp falls; sort the rows by time")
    weight = piece.weight
    if weight is not None and not bool((torch.isfinite(weight) & (weight > 0)).all()):
        raise DataError(f"{what}: weight must be above 0 and finite")


def _check_range(values: Tensor, stop: int, what: str) -> None:
    if len(values):
        least, most = int(values.min()), int(values.max())
        if least < 0 or most >= stop:
            raise DataError(f"{what} reaches from {least} to {most}, expected 0 to {stop - 1}")


def _check_groups(folder: Path, log: EncodedLog) -> None:
    for name in _CSRS:
        csr = getattr(log.groups, name)
        if csr is None:
            continue
        offsets = csr.offsets
        rising = int(offsets[0]) == 0 and bool((offsets.diff() >= 0).all())
        if not rising or int(offsets[-1]) != len(csr.values):
            raise DataError(f"{folder}: the offsets of {name} do not fit; write the shards again")


def _opened(folder: Path, arrays: dict[str, dict[str, Any]], sizes: dict[str, int]) -> EncodedLog:
    mapped = {name: _map(folder, name, of["length"]) for name, of in arrays.items()}
    found: dict[str, Any] = {n: mapped[n] for n in ("user_times", "item_times") if n in mapped}
    for name in _CSRS:
        if f"{name}.offsets" in mapped:
            found[name] = Csr(mapped[f"{name}.offsets"], mapped[f"{name}.values"])
    return EncodedLog(
        num_users=sizes["num_users"],
        num_items=sizes["num_items"],
        mapped_for=torch.device("cpu"),
        groups=Groups(**found),
        **{name: mapped[name] for name in COLUMNS if name in mapped},
    )


def _map(folder: Path, name: str, length: int) -> Tensor:
    path = folder / _file(name)
    try:
        # A private mapping: the file is opened for reading only.
        tensor: Tensor = torch.from_file(str(path), shared=False, size=length, dtype=_DTYPES[name])
    except RuntimeError as error:
        raise DataError(f"{path} cannot be mapped: {error}") from error
    return tensor


def _read_manifest(folder: Path) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
    """Sizes and arrays, every value of them checked."""
    path = folder / _MANIFEST
    try:
        manifest = json.loads(path.read_text("utf-8"))
        version = manifest["format"]
        sizes = {name: manifest[name] for name in ("num_rows", "num_users", "num_items")}
        arrays = dict(manifest["arrays"])
        fits = version != FORMAT_VERSION or _fits(sizes, arrays)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{folder} holds no shards: {_MANIFEST} cannot be read ({error})"
        ) from error
    if version != FORMAT_VERSION:
        raise DataError(f"{path} has format {version!r}; this recclr reads {FORMAT_VERSION}")
    if not fits:
        raise DataError(f"{path} is damaged: its sizes and arrays do not fit; write it again")
    return sizes, arrays


def _fits(sizes: dict[str, Any], arrays: dict[str, Any]) -> bool:
    """Whether all names, types and lengths are those of one log."""
    most = {"num_rows": 1 << 48, "num_users": 1 << 31, "num_items": 1 << 31}
    if not all(type(size) is int and 1 <= size < most[name] for name, size in sizes.items()):
        return False
    if not {"user_idx", "item_idx"} <= arrays.keys() <= _DTYPES.keys():
        return False
    if not all(
        of["dtype"] == _dtype_name(name)
        and type(of["length"]) is int
        and type(of["sha256"]) is str
        and (of["length"] == sizes["num_rows"] or "." in name)
        for name, of in arrays.items()
    ):
        return False
    if "timestamp" not in arrays and {"user_times", "item_times"} & arrays.keys():
        return False
    for name, (of_rows, _) in _CSRS.items():
        parts = [part in arrays for part in (f"{name}.offsets", f"{name}.values")]
        if any(parts) and not (
            all(parts)
            and arrays[f"{name}.offsets"]["length"] == sizes[of_rows] + 1
            and 1 <= arrays[f"{name}.values"]["length"] <= sizes["num_rows"]
        ):
            return False
    # Times of users say where in their items they stand.
    items = arrays.get("user_items.values")
    return items is None or items["length"] == sizes["num_rows"]


def _dtype_name(name: str) -> str:
    return str(_DTYPES[name]).removeprefix("torch.")


def _file(name: str) -> str:
    return f"{name}.bin"
