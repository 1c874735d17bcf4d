"""A run folder: who may write it, what was read into it, and what it ran on."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from recclr.config import Config, dump_toml, load_config
from recclr.data.files import resolve_files
from recclr.errors import CheckpointError, ConfigError
from recclr.files import require_space, require_writable, write_bytes_atomic

METRICS, CONFIG, DATA, LOG = "metrics.json", "config.toml", "data.json", "log.jsonl"
_LOCK = ".lock"
_LIBRARIES = ("recclr", "torch", "numpy", "polars", "pyarrow", "scikit-learn", "implicit")
_FOOTER_BYTES = 1 << 16
# Checkpoints, prepared tensors and exports of a small run; larger ones are told when they fail.
_MIN_BYTES = 200 << 20


def open_run(out: Path, config: Config, *, resume: bool) -> bool:
    """Claim ``out`` for a run; false if the run there is finished and there is nothing to do.

    Raises:
        ConfigError: the folder holds a finished run, or a run without ``resume``, or other files,
            or another configuration; or it cannot be written. Nothing in it is touched.
    """
    if (out / METRICS).exists():
        if resume:
            return False
        raise ConfigError(
            f"{out} holds a finished run; choose another --out (finished runs are never "
            "overwritten)"
        )
    stored = out / CONFIG
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; expected a folder")
    if stored.exists():
        if not resume:
            raise ConfigError(f"{out} holds an unfinished run; add --resume to go on with it")
        _refuse_changes(stored, config)
    elif out.exists() and any(path.name != _LOCK for path in out.iterdir()):
        raise ConfigError(f"{out} is not empty and holds no run; choose an empty or new folder")
    require_writable(out)
    require_space(out, _MIN_BYTES)
    if not stored.exists():
        write_bytes_atomic(stored, dump_toml(config).encode("utf-8"))
    return True


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the run folder for this process.

    Raises:
        ConfigError: a living process on this host holds it, or one on another host does.
    """
    path = out / _LOCK
    host = socket.gethostname()
    me = {"pid": os.getpid(), "host": host}
    _remove_stale(path, host)
    try:
        with path.open("x", encoding="utf-8") as file:
            json.dump(me, file)
    except FileExistsError:
        raise ConfigError(
            f"{out} is in use by process {path.read_text('utf-8')}; wait for it, or delete "
            f"{path} if it is gone"
        ) from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def read_config(run: Path) -> Config:
    """The configuration of an existing run.

    Raises:
        ConfigError: ``run`` is no run folder.
    """
    if not (run / CONFIG).is_file():
        raise ConfigError(f"{run} is no run folder: it has no {CONFIG}")
    return load_config(run / CONFIG)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of the run.

    Raises:
        CheckpointError: it is missing or no JSON.
    """
    try:
        value: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return value


def fingerprints(config: Config) -> dict[str, dict[str, Any]]:
    """Size and a hash of the last 64 kB of every input file; Parquet's footer lies there."""
    sources = {
        "events": config.data.events,
        "users": config.data.users,
        "items": config.data.items,
        "valid_events": config.split.valid_events,
        "test_events": config.split.test_events,
    }
    found = {}
    for name, source in sources.items():
        for path in resolve_files(source, name=name) if source else []:
            size = path.stat().st_size
            with path.open("rb") as file:
                file.seek(max(0, size - _FOOTER_BYTES))
                digest = hashlib.sha256(file.read()).hexdigest()
            found[f"{name}: {path}"] = {"bytes": size, "tail_sha256": digest}
    return found


def environment(device: str) -> dict[str, Any]:
    """Versions, machine and, where there is one, the git revision of the working folder."""
    import torch

    versions: dict[str, str | None] = {}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    gpu = torch.cuda.get_device_name() if device.startswith("cuda") else None
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
        "gpu": gpu,
        "versions": versions,
        "git_revision": _git_revision(),
    }


def _git_revision() -> str | None:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _refuse_changes(stored: Path, config: Config) -> None:
    """A resumed run must be the run that was begun."""
    old = stored.read_text("utf-8").splitlines()
    new = dump_toml(config).splitlines()
    if old != new:
        changed = [f"- {line}" for line in old if line not in new]
        changed += [f"+ {line}" for line in new if line not in old]
        raise ConfigError(
            f"the configuration differs from the one {stored} began with; resume with that one, "
            "or start in another folder:\n" + "\n".join(changed)
        )


def _remove_stale(path: Path, host: str) -> None:
    """Drop the lock of a process of this host that is gone."""
    try:
        holder = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return
    if holder.get("host") != host or not isinstance(holder.get("pid"), int):
        return
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        path.unlink(missing_ok=True)
    except PermissionError:
        return
