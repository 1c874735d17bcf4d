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
    """Put a checkpoint's weights into a model of the same configuration and data.

    Args:
        tensors: as ``checkpoint.Checkpoint.tensors``; optimiser state in it is ignored.

    Raises:
        CheckpointError: names or shapes differ, or a weight is not finite; nothing is loaded.
    """
    weights = {
        name.removeprefix("model/"): value
        for name, value in tensors.items()
        if name.startswith("model/")
    }
    own = model.weights()
    require_match(own, weights, "the checkpoint")
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)


class Keeper:
    """Where states go: a folder of checkpoints, or memory for the best weights.

    Of several ranks the first writes, after all have shown that they have the same state.
    """

    def __init__(
        self,
        model: TwoTower,
        optimizers: Optimizers,
        root: Path | None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model, self.optimizers, self.root, self.ranks = model, optimizers, root, ranks
        self.best: dict[str, Tensor] = {}

    def keep(self, progress: Progress, *, best: bool) -> None:
        """Keep this state, as the last and perhaps the best.

        Raises:
            CheckpointError: the ranks' states differ; nothing is written. StoreError: no space.
        """
        if self.root is None:
            if best:
                self.best = {name: value.clone() for name, value in self._weights().items()}
            return
        tensors = self._everything()
        self._agree(tensors, progress)
        if self.ranks.first:
            save_checkpoint(self.root, tensors, asdict(progress), best=best)
        # Nobody trains on from a state that may never become durable.
        self.ranks.meet("the checkpoint")

    def _weights(self) -> dict[str, Tensor]:
        return {f"model/{name}": value.detach() for name, value in self.model.weights().items()}

    def _everything(self) -> dict[str, Tensor]:
        state = self.optimizers.state_dict()
        return {**self._weights(), **{f"optimizers/{name}": v for name, v in state.items()}}

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
        prefix = "optimizers/"
        self.optimizers.load_state_dict(
            {k.removeprefix(prefix): v for k, v in found.tensors.items() if k.startswith(prefix)}
        )
        try:
            return Progress(**found.state)
        except TypeError as error:
            raise CheckpointError(f"{found.folder} is of another program: {error}") from error

    def restore_best(self, step: int) -> None:
        best = self.best
        if self.root is not None:
            best = load_checkpoint(self.root / f"step-{step}").tensors
        load_weights(self.model, best)


def digest_of(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names and bytes; safetensors reads the names of a file in any order."""
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
