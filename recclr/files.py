"""The one writer: files and folders appear whole or not at all.

Everything is written to a temporary sibling, flushed to the disk, and renamed; a process that is
killed at any point leaves the old version whole. ``RECCLR_FAULT`` lets tests stop the program at
exactly such a point.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from recclr.errors import ConfigError, RecclrError, StoreError

_MARK = ".tmp-"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)
_SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}
_ERRNOS = {"enospc": errno.ENOSPC, "eacces": errno.EACCES, "eio": errno.EIO}
_reached: dict[str, int] = {}


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which becomes ``path`` in one rename when the block ends well.

    Args:
        path: parents are made; what was there is replaced.

    Raises:
        StoreError: no space, or the disk failed. ConfigError: no permission, or not a place for a
        file. Whatever was at ``path`` is untouched then, as when the block raises.
    """
    with new_place(path) as temporary, open(temporary, "xb") as file:
        yield file


@contextmanager
def new_place(path: Path) -> Iterator[Path]:
    """As ``new_file``, for those who open a file by its name: one that nothing has yet, and that
    has to be there when the block ends.
    """
    with clear_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _sibling(path)
        try:
            fault_point("files.write")
            yield temporary
            _fsync(temporary)
            fault_point("files.rename")
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _fsync(path.parent)


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write ``data``, which may be empty, as ``new_file`` does."""
    with new_file(path) as file:
        file.write(data)


def write_json_atomic(path: Path, value: Any) -> None:
    """As ``write_bytes_atomic``; UTF-8, indented, keys in the caller's order.

    Raises:
        ValueError: a NaN or infinity, which is not JSON.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes_atomic(path, (text + "\n").encode())


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary sibling folder to fill, which becomes ``path`` when the block ends well.

    On the way it is flushed to the disk. If the block raises, the folder is removed. What an
    earlier process left behind for the same ``path`` when it was killed is removed at the start.

    Raises:
        StoreError: ``path`` exists already, there is no space, or the disk failed.
        ConfigError: no permission.
    """
    if os.path.lexists(path):
        raise StoreError(f"{path} exists already; a finished folder is never overwritten")
    with clear_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{_escaped(path.name)}{_MARK}*"):
            _remove(left)
        temporary = _sibling(path)
        temporary.mkdir()
        try:
            yield temporary
            _fsync_tree(temporary)
            fault_point("files.folder")
            os.rename(temporary, path)
        except BaseException:
            _remove(temporary)
            raise
        _fsync(path.parent)


def is_leftover(name: str) -> bool:
    """Whether a file or folder of this name was being written when its process was killed."""
    return name.startswith(".") and _MARK in name


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left in ``folder`` and below; nobody may be writing there."""
    for path in list(folder.rglob(f".*{_MARK}*")):
        _remove(path)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_pointer(path: Path) -> str | None:
    """The plain name that a pointer file holds.

    Returns:
        None where there is no such file, or it holds anything else, such as a path out of its
        folder: it was damaged, or not written by recclr.
    """
    try:
        with open(path, "rb") as file:
            name = file.read(1024).decode("utf-8", "replace").strip()
    except OSError:
        return None
    return name if _NAME.fullmatch(name) else None


def write_pointer(path: Path, name: str) -> None:
    """Point ``path`` at ``name`` in one rename.

    Raises:
        ConfigError: ``name`` is not a plain name of letters, digits, '.', '_' and '-'.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{path.name} can only point at a plain name (letters, digits, '.', '_', '-'), "
            f"found {name!r}"
        )
    write_bytes_atomic(path, (name + "\n").encode())


def require_space(path: Path, num_bytes: int) -> None:
    """Refuse early if the disk of ``path`` (which need not exist yet) lacks ``num_bytes``.

    Raises:
        StoreError: too little space.
    """
    place = path.absolute()
    while not place.exists():
        place = place.parent
    with clear_errors(path):
        free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise StoreError(
            f"{path} needs about {num_bytes / 1e6:,.0f} MB, but its disk has "
            f"{free / 1e6:,.0f} MB free; free some space or choose another place"
        )


def require_writable(folder: Path) -> None:
    """Make ``folder`` if need be, and prove that a file can be written there.

    Raises:
        ConfigError: it cannot. StoreError: the disk is full or failing.
    """
    with clear_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = _sibling(folder / "probe")
        try:
            probe.write_bytes(b"recclr")
        finally:
            probe.unlink(missing_ok=True)


@contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of writing at ``path`` into an error that says what to do."""
    try:
        yield
    except RecclrError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _NO_SPACE:
            raise StoreError(
                f"no space left on the disk of {path} ({reason}); nothing that was there has been "
                "changed: free some space and run again"
            ) from error
        if error.errno in _NO_PERMISSION:
            raise ConfigError(
                f"no permission to write {path} ({reason}); choose another place or mend its mode"
            ) from error
        if isinstance(error, NotADirectoryError | FileExistsError | IsADirectoryError):
            raise ConfigError(f"{path} cannot be written: {reason}") from error
        raise StoreError(f"writing {path} failed: {error}") from error


@contextmanager
def with_errno(*kinds: type[Exception]) -> Iterator[None]:
    """Give errors of libraries in Rust, which name the number in their text, to ``clear_errors``.

    Args:
        kinds: what they raise.
    """
    try:
        yield
    except kinds as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number)) from error


def fault_point(name: str) -> None:
    """Fail here if ``RECCLR_FAULT=point:count:action`` says so; for tests of crashes only.

    ``action`` is kill, term, int (signals to this process), or enospc, eacces, eio (an OSError),
    taken when ``point`` is reached for the ``count``-th time in this process.
    """
    fault = os.environ.get("RECCLR_FAULT")
    if not fault:
        return
    point, count, action = fault.rsplit(":", 2)
    if point != name:
        return
    _reached[fault] = _reached.get(fault, 0) + 1
    if _reached[fault] != int(count):
        return
    if action in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[action])
        return
    raise OSError(_ERRNOS[action], os.strerror(_ERRNOS[action]))


def _sibling(path: Path) -> Path:
    """A hidden name nobody can guess beside ``path``; a rename between disks would not be one."""
    return path.with_name(f".{path.name}{_MARK}{secrets.token_hex(6)}")


def _escaped(name: str) -> str:
    """``name`` as a glob pattern that matches itself only."""
    return re.sub(r"([*?\[])", r"[\1]", name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _fsync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            _fsync(Path(root) / name)
        _fsync(Path(root))


def _fsync(path: Path) -> None:
    if path.is_symlink():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
