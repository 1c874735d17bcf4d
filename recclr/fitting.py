"""The trainer and the evaluation put together: a fresh model, fitted as a configuration says."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from recclr.config import Config
from recclr.data.log import EncodedLog, Prepared
from recclr.data.sharding import rows_for_training, wanted_groups
from recclr.distributed import ALONE, Ranks
from recclr.load import fresh_model, ranker_of
from recclr.sharded_tables import table_maker
from recclr.spectral import start_from_spectral
from recclr.topk import EmbeddingRanker
from recclr.towers import TwoTower
from recclr.train import FitResult, fit
from recclr.within import item_groups

Judge = Callable[[EmbeddingRanker], dict[str, float]]


def fit_model(
    config: Config,
    prepared: Prepared,
    judge: Judge | None,
    *,
    device: str,
    on_event: Callable[[dict[str, Any]], None],
    num_steps: int | None = None,
    checkpoints: Path | None = None,
    workspace: Path | None = None,
    resume: bool = False,
    stop: Callable[[], bool] | None = None,
    ranks: Ranks = ALONE,
) -> tuple[TwoTower, FitResult]:
    """The model of a configuration after its training, and what the training came to.

    Args:
        judge: metrics on validation of the model as it would be served; None without validation.
        workspace: where the rows may be kept in files while the training lasts, as
            ``data.resident`` says; None: they stay in memory.
        num_steps, checkpoints, resume, device, on_event, stop, ranks: see ``train.fit``, which also
            says what is raised.
    """
    log = prepared.train
    rows: AbstractContextManager[EncodedLog] = nullcontext(log)
    if workspace is not None:
        rows = rows_for_training(
            log,
            workspace,
            device=device,
            resident=config.data.resident,
            groups=wanted_groups(log, user=config.user, item=config.item, loss=config.loss),
            ranks=ranks,
            say=lambda text: on_event({"kind": "note", "text": text}),
        )

    def evaluate(candidate: TwoTower) -> dict[str, float]:
        assert judge is not None
        return judge(ranker_of(candidate, prepared.cutoff))

    with rows as log:
        data, new_table = replace(prepared, train=log), table_maker(config.train, ranks, device)
        model = fresh_model(config, data, new_table)
        if config.model.init == "spectral":
            start_from_spectral(model, log, init_std=config.model.init_std, seed=config.seed)
        result = fit(
            model,
            log,
            loss=config.loss,
            negatives=config.negatives,
            train=config.train,
            seed=config.seed,
            evaluate=None if judge is None else evaluate,
            select=config.evaluate.select,
            checkpoints=checkpoints,
            resume=resume,
            num_steps=num_steps,
            device=device,
            on_event=on_event,
            stop=stop,
            ranks=ranks,
            item_group=item_groups(config.negatives, prepared.items),
        )
    return model, result
