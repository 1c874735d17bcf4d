"""One training among many that are compared: on train, judged on validation, never on test.

A training that is stopped, or killed, goes on from its last checkpoint when it is asked for again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from recclr.bootstrap import paired_differences
from recclr.config import Config, with_changes
from recclr.data.log import EncodedLog, Prepared
from recclr.errors import CheckpointError, ConfigError
from recclr.evaluate import Evaluation, EvaluationSet, evaluate, selecting_metrics
from recclr.files import write_bytes_atomic
from recclr.fitting import fit_model
from recclr.load import ranker_of
from recclr.order import permuted
from recclr.run_folder import config_digest
from recclr.settings.judging import SLICES
from recclr.topk import EmbeddingRanker
from recclr.train import FitResult

OnEvent = Callable[[dict[str, Any]], None]
_ROWS = 0x707E
_DIGITS = 16


@dataclass(frozen=True)
class Place:
    """Where trainings happen.

    Attributes:
        running: folder for checkpoints of what is not finished. finished: folder for results.
        device: where models live. stop: asked after every step; true ends with a checkpoint.
    """

    running: Path
    finished: Path
    device: str
    stop: Callable[[], bool]
    on_event: OnEvent


def refuse_blend(key: str, where: str) -> None:
    """Refuse a key of ``[blend]``, which no comparison of single models can tell anything of.

    Raises:
        ConfigError: ``key``, dotted, is one; names ``where`` it was said.
    """
    if key == "blend" or key.startswith("blend."):
        raise ConfigError(
            f"{where}: {key} would change nothing: single models are compared here, and blend lays "
            "finished ones side by side; leave it out"
        )


def left_out(config: Config) -> list[str]:
    """What of a configuration does not take part where single models are compared."""
    if not config.blend.several:
        return []
    return ["single models are compared: what [blend] lays beside them is left out"]


def encoding_of(config: Config) -> Any:
    """What the prepared log follows from: two configurations of equal value can share one."""
    towers = {
        side: {
            name: replace(feature, dropout=0.0, subsample=1.0, jitter=0.0, swap=0.0)
            for name, feature in getattr(config, side).features.items()
        }
        for side in ("user", "item")
    }
    taught_by = None if config.distillation is None else config.distillation.run
    return config.data, config.split, config.train.refit, towers, taught_by


def share_of(log: EncodedLog, share: float, seed: int) -> EncodedLog:
    """``share`` of the rows, at least one, in their order: a keyed draw without replacement.

    A larger share of the same seed holds all rows of a smaller one.
    """
    if share >= 1:
        return log
    ranks = permuted(torch.arange(len(log)), len(log), seed, _ROWS)
    return log.rows((ranks < max(1, round(share * len(log)))).nonzero().squeeze(1))


def train_once(
    config: Config, prepared: Prepared, examples: EvaluationSet, place: Place, *, name: str
) -> tuple[EmbeddingRanker, FitResult]:
    """The best model by ``evaluate.select`` on ``examples``, as it would be served.

    Args:
        name: of a folder in ``place.running``, the same whenever this training is asked for.

    Raises:
        InterruptedTraining: ``place.stop`` said so; the next call goes on. DivergedError,
        ConfigError: as ``train.fit``.
    """

    def judge(ranker: EmbeddingRanker) -> dict[str, float]:
        return selecting_metrics(ranker, examples, config.evaluate)

    folder = place.running / name
    folder.mkdir(parents=True, exist_ok=True)
    model, result = fit_model(
        config,
        prepared,
        judge,
        device=place.device,
        on_event=place.on_event,
        checkpoints=folder / "checkpoints",
        workspace=folder,
        resume=True,
        stop=place.stop,
    )
    return ranker_of(model, prepared.cutoff), result


@dataclass(frozen=True)
class Repeat:
    """One configuration trained with one seed.

    Attributes:
        evaluations: by split ("valid", "test"); per user, they hold ``compared`` metrics only.
        best_step: that was selected. seconds: of the call that finished the training.
    """

    evaluations: dict[str, Evaluation]
    best_step: int
    seconds: float


def compared(config: Config) -> list[str]:
    """The metric of selection, recall and NDCG at its cut-off, each once."""
    k = config.evaluate.select.partition("@")[2]
    return list(dict.fromkeys([config.evaluate.select, f"recall@{k}", f"ndcg@{k}"]))


def repeat(
    config: Config, prepared: Prepared, judged: Mapping[str, EvaluationSet], place: Place
) -> Repeat:
    """Train with ``config.seed`` and judge on every set, or read what an earlier call found.

    Args:
        judged: "valid", which selects the checkpoint, and what else is judged at the end.

    Raises:
        CheckpointError: a finished result is damaged. Else as ``train_once``.
    """
    path = place.finished / f"{config_digest(config)[:_DIGITS]}.safetensors"
    if not path.exists():
        ranker, result = train_once(config, prepared, judged["valid"], place, name=path.stem)
        found = {
            split: evaluate(ranker, examples, ks=config.evaluate.ks, slices=SLICES)
            for split, examples in judged.items()
        }
        done = Repeat(found, result.best_step, result.seconds)
        write_bytes_atomic(path, _packed(done, compared(config)))
    return _unpacked(path)


def with_seed(config: Config, number: int) -> Config:
    """The configuration of the ``number``-th repetition; 0 has its own seed."""
    return with_changes(config, {"seed": config.seed + number})


def averaged(name: str, evaluations: list[Evaluation]) -> Evaluation:
    """Means over seeds, user by user; all on one ``EvaluationSet``."""
    first, count = evaluations[0], len(evaluations)
    return Evaluation(
        name=name,
        metrics={
            part: {m: sum(e.metrics[part][m] for e in evaluations) / count for m in values}
            for part, values in first.metrics.items()
        },
        per_user={
            part: {
                m: torch.stack([e.per_user[part][m] for e in evaluations]).mean(0) for m in values
            }
            for part, values in first.per_user.items()
        },
        counts=first.counts,
    )


def difference(ours: Evaluation, base: Evaluation, config: Config) -> dict[str, Any]:
    """Ours minus base by slice and metric, paired by user; {} without ``num_bootstrap``.

    The interval is over users, of the mean over seeds: it says nothing of other seeds.

    Args:
        ours, base: ``averaged`` over the same seeds.
    """
    if config.evaluate.num_bootstrap < 2:
        return {}
    found: dict[str, Any] = {}
    for part, values in ours.per_user.items():
        columns = torch.stack([value - base.per_user[part][m] for m, value in values.items()], 1)
        rows = paired_differences(
            columns, num_resamples=config.evaluate.num_bootstrap, seed=config.seed
        )
        found[part] = dict(zip(values, rows, strict=True))
    return found


def _packed(done: Repeat, metrics: list[str]) -> bytes:
    tensors: dict[str, Tensor] = {}
    for split, evaluation in done.evaluations.items():
        for part, values in evaluation.per_user.items():
            tensors |= {f"{split}/{part}/{m}": values[m].contiguous() for m in metrics}
    described = {
        "best_step": done.best_step,
        "seconds": done.seconds,
        "compared": metrics,
        "splits": {
            split: {"name": e.name, "metrics": e.metrics, "counts": e.counts}
            for split, e in done.evaluations.items()
        },
    }
    # One text, since several entries would be written in any order.
    packed: bytes = save(tensors, metadata={"repeat": json.dumps(described)})
    return packed


def _unpacked(path: Path) -> Repeat:
    try:
        with safe_open(path, "pt") as file:
            described = json.loads(file.metadata()["repeat"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metrics = described["compared"]
        evaluations = {
            split: Evaluation(
                name=e["name"],
                metrics=e["metrics"],
                per_user={
                    part: {m: tensors[f"{split}/{part}/{m}"] for m in metrics}
                    for part in e["metrics"]
                },
                counts=e["counts"],
            )
            for split, e in described["splits"].items()
        }
        return Repeat(evaluations, int(described["best_step"]), float(described["seconds"]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); remove it, and it is trained again"
        ) from error
