"""The model of a run folder, ready to rank: what every command after training starts from."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from recclr.checkpoint import find_checkpoint
from recclr.config import Config
from recclr.data.log import Prepared
from recclr.data.prepared import PreparedLog
from recclr.errors import CheckpointError, ConfigError
from recclr.keeping import load_weights
from recclr.optim import Table
from recclr.run_folder import read_config
from recclr.sharded_tables import NewTable
from recclr.topk import EmbeddingRanker
from recclr.towers import TwoTower, build_model


def load_run(run: Path) -> tuple[Config, PreparedLog, TwoTower]:
    """Configuration, data and best model of a finished or running run; nothing else is read.

    Raises:
        ConfigError: no run folder. CheckpointError: no model yet, or a damaged one.
    """
    config = read_config(run)
    prepared = PreparedLog.load(run)
    return config, prepared, load_model(config, prepared.tensors, run / "checkpoints")


def load_model(
    config: Config, prepared: Prepared, checkpoints: Path, new_table: NewTable = Table
) -> TwoTower:
    """The model that BEST (or, without evaluations, LAST) names.

    Args:
        new_table: see ``towers.build_model``.

    Raises:
        CheckpointError: there is none, or it does not fit.
    """
    found = find_checkpoint(checkpoints, "BEST") or find_checkpoint(checkpoints, "LAST")
    if found is None:
        raise CheckpointError(f"{checkpoints} holds no checkpoint; has the run trained yet?")
    model = fresh_model(config, prepared, new_table)
    load_weights(model, found.tensors)
    return model.eval()


def ranker_of(model: TwoTower, cutoff: int | None, name: str = "model") -> EmbeddingRanker:
    """The model as it would be served from the cut-off on, on the CPU."""
    users, items = model.all_vectors(cutoff)
    return EmbeddingRanker(
        name,
        users.cpu(),
        items.cpu(),
        similarity=model.similarity,
        num_beside=model.num_served_beside,
    )


def fresh_model(config: Config, prepared: Prepared, new_table: NewTable = Table) -> TwoTower:
    """The model of a configuration before its first step, on the CPU.

    Args:
        new_table: see ``towers.build_model``.
    """
    return build_model(
        prepared,
        user=config.user,
        item=config.item,
        model=config.model,
        loss=config.loss,
        seed=config.seed,
        new_table=new_table,
    )


def pick_device(device: str) -> str:
    """Resolve ``auto``; refuse a GPU that is not there.

    Raises:
        ConfigError: no CUDA device.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"(cpu|cuda)(:\d{1,3})?", device):
        raise ConfigError(f"--device {device!r}: expected auto, cpu, cuda or cuda:N")
    if device.startswith("cuda"):
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(device.partition(":")[2] or 0) >= found:
            what = f"only {found} GPUs" if found else "no GPU"
            raise ConfigError(
                f"--device {device}: PyTorch finds {what} here; use --device cpu or auto"
            )
    return device
