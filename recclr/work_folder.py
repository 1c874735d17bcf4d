"""The folder of many trainings: begun once for declared work, gone on with for the same work only.

``config.toml`` is the configuration that all trainings start from, ``declared.json`` everything
else that has a say in what comes out. Whatever is found finished is not done again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recclr.config import Config, dump_toml
from recclr.errors import ConfigError
from recclr.files import (
    is_leftover,
    remove_leftovers,
    require_writable,
    write_bytes_atomic,
    write_json_atomic,
)
from recclr.run_folder import CONFIG, changed_keys, locked, read_json, what_of

DECLARED = "declared.json"
RUNNING = "running"


@contextmanager
def work_folder(
    out: Path,
    config: Config,
    declared: Callable[[], Mapping[str, Any]],
    *,
    finished: str,
    resume: bool,
) -> Iterator[bool]:
    """Hold ``out`` for the work that is declared.

    Args:
        declared: JSON values that the result follows from, beside the configuration; called once
            the folder is known to be free, and only where there is something to do.
        finished: name of the file that is written last.

    Yields:
        Whether there is anything to do: false for finished work that is resumed.

    Raises:
        ConfigError: the folder holds such work already and ``resume`` is false, or other work, or
            other files; or it cannot be written, or another process holds it.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; expected a folder")
    begun = (out / DECLARED).exists()
    if begun and not resume:
        state = "finished work" if (out / finished).exists() else "unfinished work"
        raise ConfigError(f"{out} holds {state}; add --resume to go on with it, or choose another")
    if not begun and out.exists() and not all(map(_passing, out.iterdir())):
        raise ConfigError(f"{out} is not empty and holds no such work; choose an empty or new one")
    existed = out.exists()
    require_writable(out)
    try:
        with locked(out):
            wanted = {"config": what_of(config), **declared()}
            # As JSON gives it back: tuples are arrays there.
            wanted = json.loads(json.dumps(wanted))
            if (out / DECLARED).exists():
                _refuse_changes(out, read_json(out / DECLARED), wanted)
            else:
                write_bytes_atomic(out / CONFIG, dump_toml(config).encode("utf-8"))
                write_json_atomic(out / DECLARED, wanted)
            yield not (out / finished).exists()
            if (out / finished).exists():
                shutil.rmtree(out / RUNNING, ignore_errors=True)
                remove_leftovers(out)
    finally:
        if not existed and not any(out.iterdir()):
            out.rmdir()


def _refuse_changes(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = changed_keys(_flat(before), _flat(now))
    if changed:
        raise ConfigError(
            f"this is not the work that was begun in {out}; resume it with what it was begun with, "
            "or start in another folder:\n" + "\n".join(changed)
        )


def _flat(value: Any, path: str = "") -> dict[str, str]:
    """Dotted key -> value, as text."""
    if not isinstance(value, Mapping) or not value:
        return {path: json.dumps(value)}
    found: dict[str, str] = {}
    for key, part in value.items():
        found |= _flat(part, f"{path}.{key}" if path else str(key))
    return found


def _passing(path: Path) -> bool:
    """Whether a file makes a folder no less empty."""
    return path.name == ".lock" or is_leftover(path.name)
