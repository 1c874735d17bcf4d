"""What other finished runs serve, in the order of this one's ids: to stand beside or to teach it.

Both trust that the other run has never seen what this one is judged on, so its split has to be the
same, of the same files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recclr.blending import Vectors
from recclr.config import Config
from recclr.data.files import expand_path
from recclr.data.prepared import PreparedLog
from recclr.data.vocabulary import Vocabulary
from recclr.errors import ConfigError
from recclr.load import stage_ranker
from recclr.run_folder import DATA, METRICS, SELECTION, read_config, read_json

BLEND_RUNS, TEACHER = "blend.runs", "distillation.run"
# Where things lie, how they are held, and how much a row counts.
_FREE_OF_DATA = ("events", "users", "items", "resident", "decay_half_life_d")
_EXPECTED = "expected the folder of a finished run on the same data and split"


def named_runs(config: Config) -> list[tuple[str, Path]]:
    """Each run that a configuration names, after the key that names it."""
    found = [(BLEND_RUNS, Path(expand_path(run))) for run in config.blend.runs]
    if config.distillation is not None:
        found.append((TEACHER, Path(expand_path(config.distillation.run))))
    return found


def require_runs(config: Config) -> None:
    """Refuse a run that has not ended, or that was judged by other rows, before hours of training.

    Raises:
        ConfigError: a folder holds no finished run, or one of another split.
    """
    for key, run in named_runs(config):
        if not (run / METRICS).exists():
            raise ConfigError(f"{key}: {run} holds no finished run; {_EXPECTED}")
        theirs = read_config(run)
        if _refits(theirs) and not (run / SELECTION).is_dir():
            raise ConfigError(
                f"{key}: {run} was refitted on train + validation, and has lost its folder "
                f"{SELECTION!r}, the stage that did not see validation; {_EXPECTED}"
            )
        own, other = _rows_of(config), _rows_of(theirs)
        odd = sorted(name for name in own if own[name] != other[name])
        if odd:
            raise ConfigError(
                f"{key}: {run} has another {', '.join(odd)}, so it may have learned from rows that "
                f"this run is judged on; {_EXPECTED}"
            )


def require_same_rows(config: Config, inputs: Mapping[str, Any]) -> None:
    """Refuse a run of other files, wherever they lie.

    Args:
        inputs: fingerprints of this run's files.

    Raises:
        ConfigError: names them.
    """
    for key, run in named_runs(config):
        before = read_json(run / DATA).get("inputs", {})
        for role in ("events", "valid_events", "test_events"):
            own, other = (_of_role(prints, role) for prints in (inputs, before))
            if own != other:
                raise ConfigError(f"{key}: {run} was made from other files of {role}; {_EXPECTED}")


def _refits(config: Config) -> bool:
    """As ``checking.refits``, from the configuration alone."""
    return config.train.refit and bool(config.split.valid or config.split.valid_events)


def _rows_of(config: Config) -> dict[str, Any]:
    """What says which rows are learned from, but for where the files lie."""
    found = {f"data.{name}": value for name, value in asdict(config.data).items()}
    found |= {f"split.{name}": value for name, value in asdict(config.split).items()}
    free = {f"data.{name}" for name in _FREE_OF_DATA}
    free |= {"split.valid_events", "split.test_events", "split.train_share"}
    return {name: value for name, value in found.items() if name not in free}


def _of_role(prints: Mapping[str, Any], role: str) -> list[str]:
    return sorted(
        json.dumps(value, sort_keys=True)
        for name, value in prints.items()
        if name.startswith(f"{role}: ")
    )


def with_teacher(prepared: PreparedLog, config: Config, *, of_selection: bool) -> PreparedLog:
    """With the vectors of ``distillation.run``, if there is one.

    Args:
        of_selection: of the stage that did not see validation, where the other run has one.
    """
    if config.distillation is None:
        return prepared
    _, run = named_runs(config)[-1]
    vectors = vectors_of_run(run, prepared, TEACHER, of_selection=of_selection)
    return replace(
        prepared, tensors=replace(prepared.tensors, teacher=(vectors.users, vectors.items))
    )


def vectors_of_run(run: Path, prepared: PreparedLog, key: str, *, of_selection: bool) -> Vectors:
    """What another run serves, in the order of this one's ids; entities it lacks are zero, unknown
    users are served by its unknown user.

    Args:
        key: that names the run.

    Raises:
        ConfigError: no run, or one that shares no item with this.
    """
    selected = run / SELECTION
    folder = selected if of_selection and selected.is_dir() else run
    config, other = read_config(run), PreparedLog.load(folder)
    ranker = stage_ranker(config, other, folder)
    users = _matched(ranker.user_vectors, prepared.users, other.users, run, key)
    items = _matched(ranker.item_vectors, prepared.items, other.items, run, key)
    return Vectors(torch.cat([users, ranker.user_vectors[-1:]]), items)


def _matched(vectors: Tensor, own: Vocabulary, other: Vocabulary, run: Path, key: str) -> Tensor:
    places = torch.from_numpy(other.encode(own.ids)).long()
    known = places >= 0
    if not known.any():
        raise ConfigError(f"{key}: {run} shares no id with this run; {_EXPECTED}")
    found = vectors.new_zeros((len(places), vectors.shape[1]))
    found[known] = vectors[places[known]]
    return found
