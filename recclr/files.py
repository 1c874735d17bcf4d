"""The one writer: a file or a folder appears whole, durable and under its name, or not at all.

Everything is written to a temporary sibling, fsynced, and renamed; the parent folder is fsynced
after the rename, so that a power cut cannot leave a name without its bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recclr.errors import ConfigError, StoreError

_TEMPORARY = ".tmp-"
_fault_counts: dict[str, int] = {}


def fault_point(name: str) -> None:
    """Do what the environment asks for at a named point; nothing in normal use.

    ``RECCLR_FAULT=point:count:action`` makes the count-th pass through ``point`` either ``kill``
    the process (SIGKILL), send it ``term`` or raise ``enospc``. For tests of crash safety.
    """
    wanted = os.environ.get("RECCLR_FAULT")
    if not wanted:
        return
    point, _, rest = wanted.partition(":")
    if point != name:
        return
    count, _, action = rest.partition(":")
    _fault_counts[name] = _fault_counts.get(name, 0) + 1
    if _fault_counts[name] != int(count):
        return
    if action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.kill(os.getpid(), signal.SIGTERM if action == "term" else signal.SIGKILL)


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` in one rename.

    Raises:
        StoreError: no space or no permission; ``path`` is as it was.
    """
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                fault_point("files.write")
                file.flush()
                os.fsync(file.fileno())
            # mkstemp makes private files; results of a run are as public as their folder.
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_json_atomic(path: Path, value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Replace ``path`` by readable JSON; NaN and infinities are refused (ValueError)."""
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_bytes_atomic(path, text.encode("utf-8"))


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary sibling of ``path`` to fill; it takes the name when the block ends well.

    Raises:
        StoreError: ``path`` exists, no space, or no permission; nothing of it is left.
    """
    with _explained(path):
        if path.exists():
            raise StoreError(f"{path} exists already; choose another name or remove it")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY}{path.name}-", dir=path.parent))
        try:
            yield temporary
            for inner, _, names in os.walk(temporary):
                for name in names:
                    _sync_file(Path(inner) / name)
                sync_folder(Path(inner))
            temporary.chmod(0o777 & ~_umask())
            temporary.rename(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_folder(path.parent)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_pointer(path: Path, name: str) -> None:
    """Make ``path`` name a sibling; readers see the old or the new name."""
    write_bytes_atomic(path, f"{name}\n".encode())


def read_pointer(path: Path) -> str | None:
    """The sibling that ``path`` names, or None where there is no pointer or it is not a name."""
    try:
        name = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return name if name and Path(name).name == name and name not in (".", "..") else None


def require_space(path: Path, num_bytes: int) -> None:
    """Refuse early what would not fit.

    Raises:
        StoreError: the disk of ``path`` (or of its nearest existing parent) has less room.
    """
    folder = path
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise StoreError(
            f"{path}: needs about {num_bytes / 1e6:,.0f} MB, the disk has {free / 1e6:,.0f} MB "
            "left; free some space or choose another folder"
        )


def require_writable(folder: Path) -> None:
    """Create ``folder`` if need be, and prove that a file can be written there.

    Raises:
        ConfigError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=_TEMPORARY, dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"cannot write to {folder}: {error.strerror or error}; choose another folder "
            "or change its permissions"
        ) from error


def sync_folder(folder: Path) -> None:
    """Make renames within ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    # The mask can only be read by setting it.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn the system's refusal into a message that says what to do."""
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: "no space is left on the disk; free some and run again with --resume",
            errno.EDQUOT: "the disk quota is used up; free some space",
            errno.EACCES: "no permission; choose another folder or change its permissions",
            errno.EPERM: "no permission; choose another folder or change its permissions",
            errno.EROFS: "the file system is read-only; choose another folder",
        }
        if error.errno not in reasons:
            raise
        raise StoreError(f"cannot write {path}: {reasons[error.errno]}") from error
