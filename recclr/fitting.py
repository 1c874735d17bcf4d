"""The trainer and the evaluation put together: a fresh model, fitted as a configuration says."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from recclr.blending import Vectors
from recclr.config import Config
from recclr.data.features import FeatureEncoder
from recclr.data.log import EncodedLog, Prepared
from recclr.data.sharding import rows_for_training, wanted_groups
from recclr.distillation import Teacher
from recclr.distributed import ALONE, Ranks
from recclr.errors import ConfigError
from recclr.load import fresh_model, ranker_of, training_log
from recclr.mining import Refresher
from recclr.monitors import Monitor
from recclr.run_folder import weights_folder
from recclr.sharded_tables import table_maker
from recclr.spectral import start_from_spectral, starts_spectral
from recclr.starting import start_from_catalogue
from recclr.stepping import Stepper
from recclr.topk import EmbeddingRanker
from recclr.towers import TwoTower
from recclr.train import FitResult, fit
from recclr.watching import temperature_figures
from recclr.within import item_groups

# Rows that stand for a log on the disk where a few steps are tried.
_SOME_ROWS = 1 << 22

Judge = Callable[[EmbeddingRanker], dict[str, float]]


class _Served:
    """A model as it would be served, made once for both that look at it."""

    def __init__(
        self, judge: Judge, monitor: Monitor | None, cutoff: int | None, ranks: Ranks
    ) -> None:
        self.judge, self.figures_of, self.cutoff, self.ranks = judge, monitor, cutoff, ranks
        self.ranker: EmbeddingRanker | None = None

    def evaluate(self, model: TwoTower) -> dict[str, float]:
        ranker = ranker_of(model, self.cutoff, self.ranks)
        self.ranker = None if self.figures_of is None else ranker
        # Vectors of tables that outgrow the device would as well.
        place = "cpu" if model.shards() else model.log_temperature.device
        return self.judge(ranker.to(place))

    def monitor(self, model: TwoTower) -> dict[str, float]:
        """Of the model that was evaluated last, whose vectors are then let go."""
        assert self.ranker is not None
        assert self.figures_of is not None
        ranker, self.ranker = self.ranker, None
        return self.figures_of(ranker) | temperature_figures(model)


def _teacher(config: Config, prepared: Prepared) -> Teacher | None:
    if config.distillation is None:
        return None
    if prepared.teacher is None:
        raise ConfigError(
            f"distillation: nobody has read {config.distillation.run}; expected data that "
            "other_runs.with_teacher gave its vectors"
        )
    return Teacher.of(Vectors(*prepared.teacher), config.distillation, seed=config.seed)


def fresh_stepper(config: Config, prepared: Prepared, *, device: str) -> Stepper:
    """A fresh model in the hands of its trainer, for steps that nobody keeps.

    Of a log that does not fit in memory they are steps on its last rows.

    Raises:
        ConfigError: the settings do not fit the log, the model or the device.
    """
    if prepared.train.mapped_for is not None:
        some = slice(max(0, len(prepared.train) - _SOME_ROWS), None)
        prepared = replace(prepared, train=prepared.train.rows(some))
    return Stepper(
        fresh_model(config, prepared).to(device).train(),
        training_log(config, prepared).to(device),
        loss=config.loss,
        negatives=config.negatives,
        train=config.train,
        self_supervision=config.self_supervision,
        seed=config.seed,
        explicit=prepared.explicit,
        item_group=item_groups(config.negatives, prepared.items),
        teacher=_teacher(config, prepared),
    )


def fit_model(
    config: Config,
    prepared: Prepared,
    judge: Judge | None,
    *,
    device: str,
    on_event: Callable[[dict[str, Any]], None],
    monitor: Monitor | None = None,
    item_encoder: FeatureEncoder | None = None,
    num_steps: int | None = None,
    checkpoints: Path | None = None,
    workspace: Path | None = None,
    resume: bool = False,
    stop: Callable[[], bool] | None = None,
    ranks: Ranks = ALONE,
) -> tuple[TwoTower, FitResult]:
    """The model of a configuration after its training, and what the training came to.

    Args:
        judge: metrics on validation of the model as it would be served; None without validation,
            and then ``prepared.held_out``, which may be test, is not looked at.
        monitor: looks at the same vectors after ``judge``; None: nobody does.
        item_encoder: of the items of ``prepared``; needed with ``model.init_from``.
        workspace: where the rows may be kept in files while the training lasts, as
            ``data.resident`` says; None: they stay in memory.
        num_steps, checkpoints, resume, device, on_event, stop, ranks: see ``train.fit``, which also
            says what is raised.
    """
    log = training_log(config, prepared)
    rows: AbstractContextManager[EncodedLog] = nullcontext(log)
    # Pairs are made from rows in memory, and stay there.
    if workspace is not None and log is prepared.train:
        rows = rows_for_training(
            log,
            workspace,
            device=device,
            resident=config.data.resident,
            groups=wanted_groups(
                log,
                user=config.user,
                item=config.item,
                loss=config.loss,
                negatives=config.negatives,
            ),
            ranks=ranks,
            say=lambda text: on_event({"kind": "note", "text": text}),
        )

    served = None if judge is None else _Served(judge, monitor, prepared.cutoff, ranks)
    with rows as log:
        data = replace(prepared, train=log) if log.mapped_for is not None else prepared
        model = fresh_model(config, data, table_maker(config.train, ranks, device))
        if starts_spectral(config, len(data.train)):
            std = config.model.init_std
            start_from_spectral(model, data.train, init_std=std, seed=config.seed, ranks=ranks)
        if config.model.init_from is not None:
            folder = weights_folder(config.model.init_from)
            for note in start_from_catalogue(model, item_encoder, folder):
                on_event({"kind": "note", "text": note})
        refresh = None
        if config.negatives.mined is not None:
            refresh = Refresher(
                log,
                config.negatives.mined,
                seed=config.seed,
                cutoff=prepared.cutoff,
                held_out=None if judge is None else prepared.held_out,
                ranks=ranks,
            )
        result = fit(
            model,
            log,
            loss=config.loss,
            negatives=config.negatives,
            train=config.train,
            self_supervision=config.self_supervision,
            seed=config.seed,
            evaluate=None if served is None else served.evaluate,
            monitor=served.monitor if served is not None and monitor is not None else None,
            refresh_negatives=refresh,
            explicit=prepared.explicit,
            select=config.evaluate.select,
            checkpoints=checkpoints,
            resume=resume,
            num_steps=num_steps,
            device=device,
            on_event=on_event,
            stop=stop,
            ranks=ranks,
            item_group=item_groups(config.negatives, prepared.items),
            teacher=_teacher(config, prepared),
        )
    return model, result
