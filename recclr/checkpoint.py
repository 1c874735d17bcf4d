"""Checkpoints: written whole or not at all, hashed, free of pickle.

``checkpoints/step-N/`` holds ``tensors.safetensors``, ``state.json`` and, written last,
``manifest.json`` with the size and SHA-256 of both; none of the tensor formats notices a flipped
bit by itself (reliability.md §1). ``LAST`` and ``BEST`` each name one folder and move only after it
is durable.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor

from recclr.errors import CheckpointError
from recclr.files import (
    fault_point,
    new_folder,
    read_pointer,
    sha256_of,
    write_bytes_atomic,
    write_json_atomic,
    write_pointer,
)
from recclr.sharded_tables import RowShard

FORMAT_VERSION = 1
_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """One verified checkpoint.

    Attributes:
        folder: where it stands. tensors: by name, on the CPU; mapped from the file, so that ranks
            that each take a part of a table do not each hold the whole. state: the JSON part.
    """

    folder: Path
    tensors: dict[str, Tensor]
    state: dict[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of the tensors, as the manifest has it."""
        manifest: dict[str, Any] = json.loads((self.folder / _MANIFEST).read_text("utf-8"))
        return str(manifest["files"][_TENSORS]["sha256"])


def save_checkpoint(
    root: Path,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    best: bool,
    keep: int = 2,
) -> Path:
    """Write ``root/step-N`` (N = ``state["step"]``), point LAST (and BEST) at it, prune old ones.

    Args:
        tensors: any device; written as they are, contiguous.
        state: JSON values, floats finite; "step" among them.
        best: also point BEST at it.
        keep: newest folders to keep besides those pointed at.
    """
    folder = root / f"step-{state['step']}"
    flat = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    data = save_tensors(flat)
    # A run that was killed between the rename and the pointer leaves a folder that BEST may name
    # already; a resumed run arrives at the same bytes, so it stands.
    if not _holds(folder, data, state):
        if folder.exists():
            shutil.rmtree(folder)
        _write(folder, data, state)
    fault_point("checkpoint.renamed")
    # BEST first: a run resumed from LAST has decided already which was the best until then.
    if best:
        write_pointer(root / "BEST", folder.name)
    fault_point("checkpoint.best")
    write_pointer(root / "LAST", folder.name)
    fault_point("checkpoint.last")
    prune_checkpoints(root, keep)
    return folder


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read one checkpoint and verify every byte.

    Raises:
        CheckpointError: a file is missing, damaged, or of a newer format.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text("utf-8"))
        version = int(manifest["format"])
        hashes = {name: str(manifest["files"][name]["sha256"]) for name in (_TENSORS, _STATE)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is no checkpoint: {_MANIFEST} cannot be read") from error
    if not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has checkpoint format {version}; this recclr reads 1 to {FORMAT_VERSION}"
        )
    for name, sha256 in hashes.items():
        _verify(folder / name, sha256)
    try:
        state = json.loads((folder / _STATE).read_bytes())
        return Checkpoint(folder, load_file(folder / _TENSORS), state)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: {error}") from error


def find_checkpoint(root: Path, pointer: Literal["LAST", "BEST"] = "LAST") -> Checkpoint | None:
    """The checkpoint that ``pointer`` names.

    If LAST is damaged, the newest good one takes its place: training goes on from there to the
    same end. Nothing takes the place of BEST, since a model that is not the best would be served.

    Returns:
        None where there is no checkpoint at all, or no BEST.

    Raises:
        CheckpointError: BEST is damaged, or no checkpoint is good; each is named with why.
    """
    if pointer == "BEST":
        return _best(root)
    named = read_pointer(root / pointer)
    folders = sorted(root.glob("step-*"), key=_step_of, reverse=True)
    order = [root / named] if named else []
    order += [folder for folder in folders if folder.name != named]
    reasons = []
    for folder in order:
        try:
            return load_checkpoint(folder)
        except CheckpointError as error:
            reasons.append(str(error))
    if reasons:
        raise CheckpointError("no good checkpoint is left:\n" + "\n".join(reasons))
    return None


def require_match(
    own: Mapping[str, Tensor | RowShard], found: Mapping[str, Tensor], what: str
) -> None:
    """Refuse tensors that do not fit, before any of them is loaded.

    Raises:
        CheckpointError: lists missing, unexpected and mismatched names.
    """
    problems = [f"missing {name}" for name in sorted(own.keys() - found.keys())]
    problems += [f"unexpected {name}" for name in sorted(found.keys() - own.keys())]
    problems += [
        f"{name}: expected {tuple(own[name].shape)}, found {tuple(found[name].shape)}"
        for name in sorted(own.keys() & found.keys())
        if own[name].shape != found[name].shape
    ]
    problems += [
        f"{name} holds values that are not finite"
        for name in sorted(found)
        if found[name].is_floating_point() and not torch.isfinite(found[name]).all()
    ]
    if problems:
        raise CheckpointError(f"{what} does not fit: " + "; ".join(problems))


def _write(folder: Path, data: bytes, state: Mapping[str, Any]) -> None:
    with new_folder(folder) as temporary:
        write_bytes_atomic(temporary / _TENSORS, data)
        fault_point("checkpoint.tensors")
        write_json_atomic(temporary / _STATE, dict(state))
        files = {
            name: {
                "bytes": (temporary / name).stat().st_size,
                "sha256": sha256_of(temporary / name),
            }
            for name in (_TENSORS, _STATE)
        }
        write_json_atomic(temporary / _MANIFEST, {"format": FORMAT_VERSION, "files": files})
        fault_point("checkpoint.manifest")


def _holds(folder: Path, data: bytes, state: Mapping[str, Any]) -> bool:
    try:
        found = load_checkpoint(folder)
    except CheckpointError:
        return False
    return found.state == state and found.digest == hashlib.sha256(data).hexdigest()


def _best(root: Path) -> Checkpoint | None:
    named = read_pointer(root / "BEST")
    if named is not None:
        return load_checkpoint(root / named)
    if (root / "BEST").exists():
        raise CheckpointError(f"{root / 'BEST'} is damaged: it should name one of the folders")
    return None


def _verify(path: Path, sha256: str) -> None:
    try:
        found = sha256_of(path)
    except OSError as error:
        raise CheckpointError(f"{path} is missing or cannot be read: {error.strerror}") from error
    if found != sha256:
        raise CheckpointError(
            f"{path} is damaged (its SHA-256 is not the manifest's); restore the file, or train "
            "again into another folder"
        )


def _step_of(folder: Path) -> int:
    number = folder.name.removeprefix("step-")
    return int(number) if number.isdigit() else -1


def prune_checkpoints(root: Path, keep: int = 2) -> None:
    """Delete all but the newest ``keep`` folders, never one that a pointer names."""
    pinned = {read_pointer(root / "BEST"), read_pointer(root / "LAST")}
    folders = sorted(root.glob("step-*"), key=_step_of, reverse=True)
    for folder in folders[keep:]:
        if folder.name not in pinned:
            shutil.rmtree(folder, ignore_errors=True)
