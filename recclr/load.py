"""The model of a run folder, ready to rank: what every command after training starts from."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from recclr.building import build_model
from recclr.checkpoint import find_checkpoint
from recclr.co_interactions import co_interactions
from recclr.config import Config
from recclr.data.log import EncodedLog, Prepared
from recclr.data.prepared import PreparedLog
from recclr.distributed import ALONE, Ranks
from recclr.errors import CheckpointError, ConfigError
from recclr.files import sha256_of
from recclr.keeping import digest_of, load_weights
from recclr.optim import Table
from recclr.run_folder import BLEND, BLEND_VECTORS, data_digest, read_config, read_json
from recclr.sharded_tables import NewTable
from recclr.siamese import build_siamese
from recclr.topk import EmbeddingRanker
from recclr.towers import TwoTower, saved_weights


def load_run(
    run: Path, ranks: Ranks = ALONE, device: str = "cpu"
) -> tuple[Config, PreparedLog, TwoTower]:
    """Configuration, data and best model of a finished or running run; nothing else is read.

    Args:
        ranks: who share what is done with it, and are started here, to exchange tensors of
            ``device``; the model itself is on the CPU.

    Raises:
        ConfigError: no run folder, or not the same one for all. CheckpointError: no model yet, or
        a damaged one.
    """
    config, prepared = _opened(run, ranks, device)
    model = load_model(config, prepared.tensors, run / "checkpoints")
    _require_same_model(saved_weights(model), ranks)
    return config, prepared, model


def _opened(run: Path, ranks: Ranks, device: str) -> tuple[Config, PreparedLog]:
    """Configuration and data of a run, the same on all ranks, which are started."""
    config = read_config(run)
    ranks.start(device, config.train.collective_timeout_s)
    prepared = PreparedLog.load(run)
    if ranks.size > 1:
        ranks.agree(data_digest(prepared, {}))
    return config, prepared


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


def load_ranker(run: Path, ranks: Ranks = ALONE) -> tuple[Config, PreparedLog, EmbeddingRanker]:
    """Configuration, data, and what the run serves; its model, with what stands beside it.

    Args:
        ranks: who share the embedding, and are started here; all of them get the whole result.

    Raises:
        ConfigError: no run folder, or not the same one for all. CheckpointError: no model yet, or
        a damaged one.
    """
    config, prepared = _opened(run, ranks, "cpu")
    return config, prepared, stage_ranker(config, prepared, run, ranks)


def stage_ranker(
    config: Config, prepared: PreparedLog, folder: Path, ranks: Ranks = ALONE
) -> EmbeddingRanker:
    """What a stage of a run serves, selection or the run itself.

    Args:
        ranks: who share the embedding.

    Raises:
        ConfigError, CheckpointError: as ``load_ranker``.
    """
    if config.blend.several:
        blended = load_blend(folder)
        if blended is None:
            raise CheckpointError(f"{folder} has no {BLEND}; has the run trained to its end?")
        vectors = {"users": blended.user_vectors, "items": blended.item_vectors}
        _require_same_model(vectors, ranks)
        return blended
    model = load_model(config, prepared.tensors, folder / "checkpoints")
    _require_same_model(saved_weights(model), ranks)
    return ranker_of(model, prepared.tensors.cutoff, ranks)


def _require_same_model(model: dict[str, Tensor], ranks: Ranks) -> None:
    """Before each rank embeds a part: parts of two models would make one that nobody trained.

    Raises:
        ConfigError: ranks have different ones.
    """
    if ranks.size > 1:
        ranks.agree({"the model": digest_of(model)})


def load_blend(folder: Path, name: str = "model") -> EmbeddingRanker | None:
    """What a stage serves, None where its folder holds no blend.

    Raises:
        CheckpointError: the file of vectors is missing or not the one that was written.
    """
    if not (folder / BLEND).exists():
        return None
    facts, path = read_json(folder / BLEND), folder / BLEND_VECTORS
    if not path.exists() or sha256_of(path) != facts.get("sha256"):
        raise CheckpointError(
            f"{path} is missing or damaged: expected the vectors that {folder / BLEND} was written "
            "with; remove both and run the same command with --resume"
        )
    held = load_file(path)
    return EmbeddingRanker(name, held["users"], held["items"])


def ranker_of(model: TwoTower, cutoff: int | None, ranks: Ranks = ALONE) -> EmbeddingRanker:
    """The model as it would be served from the cut-off on, on the CPU.

    Args:
        ranks: see ``TwoTower.all_vectors``.
    """
    users, items = model.all_vectors(cutoff, ranks)
    return EmbeddingRanker(
        "model",
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
    if config.model.mode == "item_item":
        return build_siamese(
            prepared,
            item=config.item,
            model=config.model,
            loss=config.loss,
            seed=config.seed,
            new_table=new_table,
        )
    return build_model(
        prepared,
        user=config.user,
        item=config.item,
        model=config.model,
        loss=config.loss,
        seed=config.seed,
        new_table=new_table,
    )


def training_log(config: Config, prepared: Prepared) -> EncodedLog:
    """The rows that steps are made of: those of train, or the pairs of items among them.

    Raises:
        DataError: there are no pairs.
    """
    if config.model.mode == "item_item":
        return co_interactions(prepared.train, config.model.pairs)
    return prepared.train


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
