"""The verbs of the command line in Python, for notebooks and jobs that hold frames in memory."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import polars as pl

from recclr.checking import advice_on
from recclr.config import Config, parse_config
from recclr.data.infer import infer_features
from recclr.data.interactions import Log
from recclr.data.prepare import PreparedLog, prepare_for
from recclr.data.reading import read
from recclr.errors import ConfigError
from recclr.evaluate import Evaluation, EvaluationSet, evaluate, selecting_metrics
from recclr.fitting import fit_model
from recclr.judge import judged_by
from recclr.load import load_ranker, pick_device, ranker_of
from recclr.monitoring import monitor_of
from recclr.other_runs import with_teacher
from recclr.recommend import recommend, similar
from recclr.shipping import ExportReport, ship
from recclr.topk import EmbeddingRanker
from recclr.towers import TwoTower as Model

__all__ = ["TwoTower", "read"]


@dataclass(frozen=True, eq=False)
class TwoTower:
    """A trained model with the ids it speaks.

    Attributes:
        config: everything it was trained with. prepared: the data it knows.
        ranker: its embeddings, frozen at the end of train.
        valid: rows that selected the checkpoint and that nothing was fitted on; their items count
            as had when test is judged. None after a refit, and after ``load``.
    """

    config: Config
    prepared: PreparedLog
    ranker: EmbeddingRanker
    valid: Log | None = None

    @classmethod
    def fit(
        cls,
        train: Log,
        *,
        valid: Log | None = None,
        config: Mapping[str, Any] | None = None,
        device: str = "auto",
        progress: bool = True,
    ) -> Self:
        """Train on ``train``; with ``valid``, keep the checkpoint that does best on it.

        Args:
            config: sections as in the TOML file, for example ``{"train": {"epochs": 5}}``;
                ``data``, ``split``, ``export`` and ``blend`` have no place here. With
                ``train.refit`` the model is trained afresh on ``train`` and ``valid`` in the
                end. Without ``item.features`` or ``user.features``, the columns of the log's tables
                become features by type. A run that ``distillation`` names must not have seen
                ``valid`` before its refit: logs in memory tell nobody what they are.
            device: ``auto`` is the first GPU where there is one.
            progress: show a bar on stderr.

        Raises:
            ConfigError: a wrong setting. DataError: too little to train on.
            DivergedError: the loss is not finite.
        """
        from recclr.console import RunProgress

        settings = _settings(train, config or {})
        if settings.train.refit and valid is None:
            raise ConfigError("train.refit: there is no validation to select on; give valid=")
        for sentence in advice_on(settings, timed=train.has_time, validates=valid is not None):
            warnings.warn(sentence, stacklevel=2)
        kept = valid
        device = pick_device(device)
        with (
            RunProgress(settings.evaluate.select, quiet=not progress) as shown,
            _workspace(train) as workspace,
        ):
            extra = [] if valid is None or settings.train.refit else [valid]
            prepared = prepare_for(settings, train, valid, extra)
            prepared = with_teacher(prepared, settings, of_selection=valid is not None)
            model, steps = _trained(settings, prepared, device, shown, workspace)
            if valid is not None and settings.train.refit:
                prepared, kept = prepare_for(settings, train.concat(valid), None, []), None
                prepared = with_teacher(prepared, settings, of_selection=False)
                model, _ = _trained(settings, prepared, device, shown, workspace, num_steps=steps)
        return cls(settings, prepared, ranker_of(model, prepared.tensors.cutoff), kept)

    @classmethod
    def load(cls, run: Path | str) -> Self:
        """The model of a run folder.

        A run without a refit leaves out what users had in validation when it judges test;
        ``evaluate`` cannot, since the rows are not in the folder. ``recclr evaluate RUN`` does.

        Raises:
            ConfigError: no run folder. CheckpointError: no model in it, or a damaged one.
        """
        return cls(*load_ranker(Path(run)))

    def __repr__(self) -> str:
        dim = self.ranker.item_vectors.shape[1]
        users, items = len(self.prepared.users), len(self.prepared.items)
        return f"TwoTower({users:,} users, {items:,} items, {dim} dimensions)"

    def evaluate(
        self, test: Log | None, *, ks: Sequence[int] = (10, 20), num_bootstrap: int = 1000
    ) -> Evaluation:
        """Exact metrics on held-out rows, by slice; printing it gives a table.

        Args:
            test: rows later than, or apart from, those of train. ks: cut-offs, each at least 1.
            num_bootstrap: resamples of users behind ``.intervals``; 0 for none.

        Raises:
            ConfigError: ``test`` is None, as a split without test gives it, nothing of it can be
            judged, or a number is out of range.
        """
        if test is None:
            raise ConfigError("there are no test rows: the split has no test part")
        if not isinstance(ks, Sequence) or not ks or any(k < 1 or k != int(k) for k in ks):
            raise ConfigError(f"ks must be whole numbers of at least 1, such as (10, 20): {ks!r}")
        if num_bootstrap < 0 or num_bootstrap == 1:
            raise ConfigError(f"num_bootstrap must be 0 or at least 2, found {num_bootstrap}")
        _, examples = judged_by(self.prepared, test, self.config, also=self.valid)
        return evaluate(
            self.ranker, examples, ks=ks, num_bootstrap=num_bootstrap, seed=self.config.seed
        )

    def recommend(
        self,
        users: Any = None,
        *,
        k: int = 10,
        items: Any = None,
        keep_seen: bool = False,
    ) -> pl.DataFrame:
        """Best items per user; ``users`` and ``items`` are any sequences of raw ids.

        See ``recommend.recommend``.
        """
        return recommend(
            self.prepared,
            self.ranker,
            _ids(users),
            k=k,
            items=_ids(items),
            keep_seen=keep_seen,
        )

    def similar(self, items: Any = None, *, k: int = 10) -> pl.DataFrame:
        """Items like the given ones. See ``recommend.similar``."""
        return similar(self.prepared, self.ranker, _ids(items), k=k)

    def export(self, target: str, *, name: str = "catalogue") -> ExportReport:
        """Write both towers' embeddings to a store, verified.

        Args:
            target: ``parquet:DIR`` or ``lancedb:DIR``.

        Raises:
            StoreError: the store refused the write, or holds something else afterwards.
        """
        return ship(self.prepared, self.ranker, target, run=None, config=self.config, name=name)


@contextmanager
def _workspace(log: Log) -> Iterator[Path | None]:
    """A folder for what training makes of a log that lies on the disk; None of others."""
    if log.disk is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="recclr-", dir=log.disk.folder) as folder:
        yield Path(folder)


def _trained(
    settings: Config,
    prepared: PreparedLog,
    device: str,
    shown: Callable[[dict[str, Any]], None],
    workspace: Path | None,
    *,
    num_steps: int | None = None,
) -> tuple[Model, int]:
    """The model, and its best step by the held-out rows of ``prepared``, if there are any."""
    examples = None
    if prepared.tensors.held_out is not None:
        examples = EvaluationSet.from_prepared(
            prepared.tensors, keep_seen=settings.evaluate.keep_seen
        )
        examples.require_slice(settings.evaluate.select_slice)

    def judge(ranker: EmbeddingRanker) -> dict[str, float]:
        assert examples is not None
        return selecting_metrics(ranker, examples, settings.evaluate)

    shown({"kind": "stage", "name": "training" if num_steps is None else "refit"})
    model, result = fit_model(
        settings,
        prepared.tensors,
        None if examples is None else judge,
        item_encoder=prepared.item_encoder,
        device=device,
        on_event=shown,
        monitor=None if examples is None else monitor_of(prepared.tensors, examples, settings),
        num_steps=num_steps,
        workspace=workspace,
    )
    return model, result.best_step


def _settings(train: Log, given: Mapping[str, Any]) -> Config:
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"config must be sections by name, as {{'train': {{'epochs': 5}}}}, found {given!r}"
        )
    misplaced = sorted({"data", "split", "export"} & set(given))
    if misplaced:
        raise ConfigError(
            f"config has {', '.join(misplaced)}: the log is read and split already; "
            "give them to recclr.read, Log.split and TwoTower.export"
        )
    if "blend" in given:
        raise ConfigError(
            "config has blend: one model is fitted here; lay several side by side with recclr train"
        )
    values: dict[str, Any] = {name: _copied(value) for name, value in given.items()}
    for side, table in (("user", train.users), ("item", train.items)):
        section = values.setdefault(side, {})
        if table is not None and isinstance(section, dict) and "features" not in section:
            section["features"] = infer_features(table, key=f"{side}_id")
    values["data"] = {"events": train.settings.events}
    if train.settings.event_weights:
        values["data"]["event_weights"] = dict(train.settings.event_weights)
        values["data"]["columns"] = {"event": train.settings.columns.event}
    return parse_config(values, source="config")


def _copied(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _ids(values: Any) -> pl.Series | None:
    if values is None or isinstance(values, pl.Series):
        return values
    if isinstance(values, (str, bytes)):
        raise ConfigError(f"expected a sequence of ids, found the single value {values!r}")
    return pl.Series("id", list(values))
