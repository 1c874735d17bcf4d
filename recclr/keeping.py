"""Where the states of a training go, and come from when it is resumed."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recclr.checkpoint import (
    Checkpoint,
    find_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    require_match,
    save_checkpoint,
)
from recclr.distributed import ALONE, LONG_S, Ranks
from recclr.errors import CheckpointError, ConfigError
from recclr.files import read_pointer
from recclr.optimizers import Optimizers
from recclr.sharded_tables import RowShard
from recclr.towers import TwoTower


@dataclass
class Progress:
    """Where a run stands; all of it is in every checkpoint."""

    step: int = 0
    best_step: int = 0
    best_value: float | None = None
    bad_evaluations: int = 0
    evaluations: list[dict[str, Any]] = field(default_factory=list)


def load_weights(model: TwoTower, tensors: dict[str, Tensor]) -> None:
    """Put a checkpoint's weights into a model of the same configuration and data; of sharded tables
    each rank takes its part.

    Args:
        tensors: as ``checkpoint.Checkpoint.tensors``; optimiser state in it is ignored.

    Raises:
        CheckpointError: names or shapes differ, or a weight is not finite; nothing is loaded.
    """
    weights = _named(tensors, "model/")
    own = model.weights() | model.shards()
    require_match(own, weights, "the checkpoint")
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)


class Keeper:
    """Where states go: a folder of checkpoints, or memory for the best weights.

    Of several ranks the first writes, after all have shown that they have the same state. A sharded
    table is sent to it, and stands in the checkpoint as a whole one does, so the CPU memory of the
    first rank has to hold the checkpoint; a resumed one is mapped, and each rank copies its part.

    Args:
        state: what the objective carries from step to step, the same on all ranks; a resumed run
            gets it back in place. Not part of the model.
    """

    def __init__(
        self,
        model: TwoTower,
        optimizers: Optimizers,
        root: Path | None,
        ranks: Ranks = ALONE,
        state: dict[str, Tensor] | None = None,
    ) -> None:
        self.model, self.optimizers, self.root, self.ranks = model, optimizers, root, ranks
        self.state = {} if state is None else state
        self.best: dict[str, Tensor | RowShard] = {}

    def keep(self, progress: Progress, *, best: bool) -> None:
        """Keep this state, as the last and perhaps the best.

        Raises:
            CheckpointError: the ranks' states differ; nothing is written. StoreError: no space.
        """
        if self.root is None:
            if best:
                held = self.model.weights() | self.model.shards()
                with torch.no_grad():
                    self.best = {name: value.clone() for name, value in held.items()}
            return
        tensors = self._everything()
        self._agree(tensors, progress)
        for name, shard in self._shards().items():
            whole = shard.gathered(name)
            if whole is not None:
                tensors[name] = whole
        if self.ranks.first:
            save_checkpoint(self.root, tensors, asdict(progress), best=best)
        # Nobody trains on from a state that may never become durable.
        self.ranks.meet("the checkpoint")

    def _everything(self) -> dict[str, Tensor]:
        """What each rank has whole."""
        weights, state = self.model.weights(), self.optimizers.state_dict()
        tensors = {f"model/{name}": value.detach() for name, value in weights.items()}
        tensors |= {f"optimizers/{name}": value for name, value in state.items()}
        return tensors | {f"objective/{name}": value for name, value in self.state.items()}

    def _shards(self) -> dict[str, RowShard]:
        weights, state = self.model.shards(), self.optimizers.shards()
        shards = {f"model/{name}": shard for name, shard in weights.items()}
        return shards | {f"optimizers/{name}": shard for name, shard in state.items()}

    def _agree(self, tensors: dict[str, Tensor], progress: Progress) -> None:
        if self.ranks.size == 1:
            return
        where = repr((progress.step, progress.best_step, progress.best_value))
        values = {"the weights": digest_of(tensors), "the progress": where}
        self.ranks.agree(values, kind=CheckpointError)

    def begun(self, *, resume: bool) -> Progress:
        """State of the last checkpoint, loaded; a fresh one where there is none; of all ranks.

        Raises:
            ConfigError: without ``resume``, there are checkpoints. CheckpointError: they are
            damaged or of another run, or the ranks start from different weights.
        """
        found = self._found(resume=resume)
        progress = Progress() if found is None else self._loaded(found)
        # The first checkpoint is read from one disk by all, which takes one of them longest.
        self.ranks.meet("the first weights", LONG_S)
        self._agree(self._everything(), progress)
        # Who was killed just after a checkpoint had no time to. Where LAST is damaged, an older one
        # may be the only good one, so nothing is removed.
        if found is not None and self.ranks.first:
            root = found.folder.parent
            if found.folder.name == read_pointer(root / "LAST"):
                prune_checkpoints(root)
        return progress

    def _found(self, *, resume: bool) -> Checkpoint | None:
        if self.root is not None and not resume and any(self.root.glob("step-*")):
            # Pruning, and the fallback from a damaged LAST, would mix up the two runs.
            raise ConfigError(
                f"{self.root} holds checkpoints of an earlier run; resume it, or name a new folder"
            )
        return find_checkpoint(self.root) if self.root is not None and resume else None

    def _loaded(self, found: Checkpoint) -> Progress:
        load_weights(self.model, found.tensors)
        self.optimizers.load_state_dict(_named(found.tensors, "optimizers/"))
        carried = _named(found.tensors, "objective/")
        require_match(self.state, carried, "the checkpoint's state of the objective")
        for name, value in carried.items():
            self.state[name].copy_(value)
        try:
            return Progress(**found.state)
        except TypeError as error:
            raise CheckpointError(f"{found.folder} is of another program: {error}") from error

    def restore_best(self, step: int) -> None:
        if self.root is not None:
            load_weights(self.model, load_checkpoint(self.root / f"step-{step}").tensors)
            return
        held: dict[str, Any] = self.model.weights() | self.model.shards()
        with torch.no_grad():
            for name, value in self.best.items():
                held[name].copy_(value)


def _named(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def digest_of(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names and bytes; safetensors reads the names of a file in any order."""
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
