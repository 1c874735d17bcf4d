"""A run folder: who may write it, what was read into it, and what it ran on."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import secrets
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

from recclr.config import Config, dump_toml, load_config
from recclr.data.files import expand_path, resolve_files
from recclr.data.prepare import PreparedLog
from recclr.distributed import Ranks
from recclr.errors import CheckpointError, ConfigError, DataError
from recclr.files import (
    clear_errors,
    is_leftover,
    remove_leftovers,
    require_space,
    require_writable,
    write_bytes_atomic,
    write_json_atomic,
)

METRICS, CONFIG, DATA, LOG = "metrics.json", "config.toml", "data.json", "log.jsonl"
MANIFEST = "manifest.json"
# What only the start of a training reads.
_STARTS = ("model.init_from", "distillation.run", "blend.runs")
ENVIRONMENT, REPORT = "environment.json", "report.html"
BLEND, BLEND_VECTORS = "blend.json", "blend.safetensors"
# Folder of the stage that did not see validation, where there is a refit.
SELECTION = "selection"
_LOCK = ".lock"
_LIBRARIES = ("recclr", "torch", "numpy", "polars", "pyarrow", "scikit-learn", "implicit")
_FOOTER_BYTES = 1 << 16
_SHOWN_S = 10.0
# Of how a run is carried out, not of what comes out of it.
_FREE = {
    "data.resident",
    "train.collective_timeout_s",
    "train.compile",
    "train.cuda_graph",
    "train.sharded_tables",
}
# Checkpoints, prepared tensors and exports of a small run; larger ones are told when they fail.
_MIN_BYTES = 200 << 20


def open_run(out: Path, config: Config, *, resume: bool, last: str = METRICS) -> bool:
    """Whether ``out`` can take the run; false if the run there is finished and nothing is to do.

    Makes the folder; writes nothing into it.

    Args:
        last: the file that is written last, whose presence makes a run a finished one.

    Raises:
        ConfigError: the folder holds a finished run, or a run without ``resume``, or other files,
            or another configuration; or it cannot be written. Nothing in it is touched.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; expected a folder")
    finished = (out / last).exists()
    if finished and not resume:
        raise ConfigError(
            f"{out} holds a finished run; choose another --out (finished runs are never "
            "overwritten)"
        )
    stored = out / CONFIG
    if stored.exists():
        if not resume:
            hint = _untrained(out)
            raise ConfigError(f"{out} holds an unfinished run; add --resume to go on with it{hint}")
        require_same_config(stored, config)
    elif out.exists() and not all(_passing(path.name) for path in out.iterdir()):
        raise ConfigError(f"{out} is not empty and holds no run; choose an empty or new folder")
    if finished:
        return False
    require_writable(out)
    require_space(out, _MIN_BYTES)
    return True


def begin_run(out: Path, config: Config, data: dict[str, Any], device: str) -> None:
    """Make ``out``, which ``locked`` holds, the folder of this run: its first files.

    Args:
        data: contents of data.json.

    Raises:
        ConfigError: another run began here in the meantime. StoreError: no space.
    """
    stored = out / CONFIG
    if stored.exists():
        require_same_config(stored, config)
    else:
        # First of all: it is what makes a folder that of a run.
        write_bytes_atomic(stored, dump_toml(config).encode("utf-8"))
    remove_leftovers(out)
    write_json_atomic(out / ENVIRONMENT, environment(device))
    write_json_atomic(out / DATA, data)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the run folder; the kernel lets go of it when this process ends, however it ends.

    Raises:
        ConfigError: another process, or another run of this one, holds it.
    """
    path = out / _LOCK
    with clear_errors(path):
        file = _acquire(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _acquire(path: Path) -> BinaryIO:
    while True:
        file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().decode("utf-8", "replace") or "it is starting"
            file.close()
            raise ConfigError(
                f"{path.parent} is in use by another run ({holder}); wait for it, or choose "
                "another --out"
            ) from None
        except OSError as error:
            # A file system without locks is no reason to refuse the work.
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                file.close()
                raise
        # The one who held it may have removed the file between the two calls.
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            return file
        file.close()


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
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: expected a JSON object")
    return value


def fingerprints(
    config: Config, only: tuple[str, ...] | None = None, *, start: bool = False
) -> dict[str, dict[str, Any]]:
    """Size and a hash of the last 64 kB of every input file; Parquet's footer lies there.

    Args:
        only: of these tables alone. start: also of the weights that ``model.init_from`` names, by
            the manifest that has their hashes, and of the results of other runs that are named;
            whoever judges a model needs them no more.

    Raises:
        DataError: a file is missing or cannot be read.
    """
    sources = {
        "events": config.data.events,
        "users": config.data.users,
        "items": config.data.items,
        "valid_events": config.split.valid_events,
        "test_events": config.split.test_events,
    }
    found = {
        f"{name}: {path}": _fingerprint(path)
        for name, source in sources.items()
        if source and (only is None or name in only)
        for path in resolve_files(source, name=name)
    }
    if start and config.model.init_from is not None:
        manifest = weights_folder(config.model.init_from) / MANIFEST
        found[f"{_STARTS[0]}: {config.model.init_from}"] = _fingerprint(manifest)
    if start and config.distillation is not None:
        run = config.distillation.run
        found[f"{_STARTS[1]}: {run}"] = _fingerprint(Path(expand_path(run)) / METRICS)
    for run in config.blend.runs if start else ():
        found[f"{_STARTS[2]}: {run}"] = _fingerprint(Path(expand_path(run)) / METRICS)
    return found


def weights_folder(init_from: str) -> Path:
    """The folder that ``model.init_from`` names.

    Raises:
        ConfigError: there is none, or it does not hold what ``recclr pretrain-items`` writes.
    """
    folder = Path(expand_path(init_from))
    if not (folder / MANIFEST).is_file():
        raise ConfigError(
            f"model.init_from = {init_from!r}: {folder} holds no {MANIFEST}; expected a folder "
            "that `recclr pretrain-items` has finished"
        )
    return folder


def require_same_inputs(run: Path, prints: dict[str, dict[str, Any]]) -> None:
    """Refuse input files that are not those a run was made from.

    Raises:
        ConfigError: names the files.
    """
    before = read_json(run / DATA).get("inputs", {})
    starts = tuple(f"{name}: " for name in _STARTS)
    started = {n for n in before if n.startswith(starts) and n not in prints}
    names = (before.keys() | prints.keys()) - started
    changed = sorted(n for n in names if before.get(n) != prints.get(n))
    if changed:
        raise ConfigError(
            f"the input files have changed since {run} began: {', '.join(changed)}; restore them, "
            "or start a new run"
        )


def require_shared(out: Path, ranks: Ranks) -> None:
    """Refuse processes that see other disks at ``out``: they could not resume one run.

    Raises:
        ConfigError: names the ranks that do not see what the first one wrote.
    """
    if ranks.size == 1:
        return
    # Of a name that a killed process may leave behind.
    marker = out / ranks.from_first(f".ranks.tmp-{secrets.token_hex(6)}", "the name of a marker")
    if ranks.first:
        write_bytes_atomic(marker, b"recclr\n")
    ranks.meet("the marker on the disk")
    end = time.monotonic() + _SHOWN_S
    # Network disks show new files late.
    while not (seen := marker.exists()) and time.monotonic() < end:
        time.sleep(0.1)
    blind = [r for r, found in enumerate(ranks.gather_json(seen, "the disk")) if not found]
    if ranks.first:
        marker.unlink(missing_ok=True)
    if blind:
        raise ConfigError(
            f"rank {', '.join(map(str, blind))} does not see what rank 0 writes to {out}; give an "
            "--out that all processes share"
        )


def config_digest(config: Config) -> str:
    """SHA-256 of a complete configuration."""
    return hashlib.sha256(dump_toml(config).encode()).hexdigest()


def code_digest() -> str:
    """SHA-256 of recclr's own files and the version of PyTorch."""
    import torch

    found = hashlib.sha256(torch.__version__.encode())
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        found.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return found.hexdigest()


def data_digest(prepared: PreparedLog, inputs: dict[str, dict[str, Any]]) -> dict[str, str]:
    """SHA-256 of what every process has read by itself, by what it is of."""
    train = prepared.tensors.train
    rows = hashlib.sha256()
    for column in (train.user_idx, train.item_idx, train.timestamp, train.weight):
        rows.update(b"-" if column is None else column.contiguous().numpy().data)
    ids = hashlib.sha256()
    for vocabulary in (prepared.users, prepared.items):
        ids.update(json.dumps(vocabulary.ids.to_list()).encode())
    return {
        "the input files": hashlib.sha256(json.dumps(inputs).encode()).hexdigest(),
        "the vocabulary": ids.hexdigest(),
        "the rows of train": rows.hexdigest(),
    }


def _fingerprint(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size - _FOOTER_BYTES))
            digest = hashlib.sha256(file.read()).hexdigest()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}; mend its mode or path"
        ) from error
    return {"bytes": size, "tail_sha256": digest}


def environment(device: str) -> dict[str, Any]:
    """Versions, machine and, where there is one, the git revision of the working folder."""
    import torch

    from recclr.kernels import native

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
        "cpu_kernels": native.description(),
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


def what_of(config: Config) -> dict[str, str]:
    """Dotted key -> value as text, of all keys that have a say in what comes out of a run."""
    return {key: value for key, value in _flat(dump_toml(config)).items() if key not in _FREE}


def changed_keys(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Keys whose values differ, one line each with both values, sorted."""
    return [
        f"{key} = {before.get(key, 'nothing')} there, {now.get(key, 'nothing')} here"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def require_same_config(stored: Path, config: Config) -> None:
    """Refuse to go on in a folder with another configuration than the one it was begun with.

    Raises:
        ConfigError: names the keys that differ, and both values.
    """
    changed = changed_keys(what_of(load_config(stored)), what_of(config))
    if changed:
        raise ConfigError(
            f"the configuration differs from the one in {stored}; resume with that one, or start "
            f"in another folder{_untrained(stored.parent)}:\n" + "\n".join(changed)
        )


def _untrained(out: Path) -> str:
    """For messages: that a folder holds no work, where a run ended before its first checkpoint."""
    # Without data.json, config.toml may be what somebody wrote by hand.
    trained = not (out / DATA).exists() or any(out.rglob("checkpoints"))
    return "" if trained else " (nothing is trained there yet: it may as well be removed)"


def _flat(toml: str) -> dict[str, str]:
    """Dotted key -> value, as text."""
    found: dict[str, str] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict) and value:
            for key, part in value.items():
                walk(part, f"{path}.{key}" if path else key)
        else:
            found[path] = repr(value)

    walk(tomllib.loads(toml), "")
    return found


def _passing(name: str) -> bool:
    """Whether a name in a run folder is a lock or a leftover, which makes it no less empty."""
    return name == _LOCK or is_leftover(name)
