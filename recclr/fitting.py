"""The trainer and the evaluation put together: a fresh model, fitted as a configuration says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from recclr.config import Config
from recclr.data.log import Prepared
from recclr.distributed import ALONE, Ranks
from recclr.load import fresh_model, ranker_of
from recclr.sharded_tables import table_maker
from recclr.topk import EmbeddingRanker
from recclr.towers import TwoTower
from recclr.train import FitResult, fit

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
    resume: bool = False,
    stop: Callable[[], bool] | None = None,
    ranks: Ranks = ALONE,
) -> tuple[TwoTower, FitResult]:
    """The model of a configuration after its training, and what the training came to.

    Args:
        judge: metrics on validation of the model as it would be served; None without validation.
        num_steps, checkpoints, resume, device, on_event, stop, ranks: see ``train.fit``, which also
            says what is raised.
    """
    model = fresh_model(config, prepared, table_maker(config.train, ranks, device))

    def evaluate(candidate: TwoTower) -> dict[str, float]:
        assert judge is not None
        return judge(ranker_of(candidate, prepared.cutoff))

    result = fit(
        model,
        prepared.train,
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
    )
    return model, result
