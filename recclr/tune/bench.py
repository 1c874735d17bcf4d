"""Where the trainings of a search happen: one job in, one file out, whichever process does it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from recclr.config import Config, with_changes
from recclr.data.log import Prepared
from recclr.errors import ConfigError, DivergedError
from recclr.evaluate import EvaluationSet
from recclr.files import write_json_atomic
from recclr.run_folder import read_json
from recclr.settings import TuneSettings
from recclr.trials import Place, repeat, share_of, train_once, with_seed

TRIALS, FINAL, PREPARED = "trials", "final", "prepared"
_FEWEST_EPOCHS = 0.001


@dataclass(frozen=True)
class Job:
    """A configuration to train.

    Attributes:
        number: of the trial. params: key -> value. rung: how much of the training it gets.
        repetition: None for the search; else the whole training with another seed, judged in full.
    """

    number: int
    params: Mapping[str, Any]
    rung: int
    repetition: int | None = None

    @property
    def name(self) -> str:
        """Of files and folders."""
        return f"{self.number:05d}-rung{self.rung}"


@dataclass(frozen=True)
class Trained:
    """What a job of the search came to.

    Attributes:
        value: metric of selection on validation; None where the training came to nothing.
        reason: why. epochs, rows: what it was given. best_step: that was selected.
        seconds: of the call that finished it.
    """

    number: int
    rung: int
    params: Mapping[str, Any]
    value: float | None
    metrics: Mapping[str, float]
    reason: str
    epochs: float
    rows: int
    best_step: int
    seconds: float


@dataclass(frozen=True)
class Bench:
    """What all trainings share; nothing of it knows a test row.

    Attributes:
        config: that the values of a job are put into. seed: of the draw of rows.
    """

    config: Config
    prepared: Prepared
    examples: EvaluationSet
    settings: TuneSettings
    seed: int
    place: Place

    def run(self, job: Job) -> None:
        """Train, judge, and leave a file behind; done already, it is not done again.

        Raises:
            InterruptedTraining: asked to stop. RecclrError: what is no fault of the values tried.
        """
        if job.repetition is not None:
            config = with_seed(with_changes(self.config, job.params), job.repetition)
            repeat(config, self.prepared, {"valid": self.examples}, self.place)
            return
        path = self.place.finished.parent / TRIALS / f"{job.name}.json"
        if not path.exists():
            write_json_atomic(path, asdict(self._trained(job)))
        shutil.rmtree(self.place.running / job.name, ignore_errors=True)

    def _trained(self, job: Job) -> Trained:
        began = time.perf_counter()
        log = share_of(self.prepared.train, self.settings.rows[job.rung], self.seed)
        nothing = Trained(job.number, job.rung, dict(job.params), None, {}, "", 0.0, len(log), 0, 0)
        try:
            config = with_changes(self.config, job.params)
            epochs = max(config.train.epochs * self.settings.epochs[job.rung], _FEWEST_EPOCHS)
            config = with_changes(config, {"train.epochs": epochs})
            nothing = replace(nothing, epochs=epochs)
            prepared = replace(self.prepared, train=log)
            _, result = train_once(config, prepared, self.examples, self.place, name=job.name)
        except (ConfigError, DivergedError) as error:
            seconds = round(time.perf_counter() - began, 3)
            return replace(nothing, reason=str(error), seconds=seconds)
        best = next(e for e in result.evaluations if e["step"] == result.best_step)
        return replace(
            nothing,
            value=result.best_value,
            metrics=best["metrics"],
            best_step=result.best_step,
            seconds=round(time.perf_counter() - began, 3),
        )


def read_one(out: Path, job: Job) -> Trained:
    """What a finished job came to."""
    return Trained(**read_json(out / TRIALS / f"{job.name}.json"))


def read_trained(out: Path) -> dict[tuple[int, int], Trained]:
    """(number, rung) -> what is finished, in the order of numbers and rungs.

    Raises:
        CheckpointError: a file is damaged.
    """
    found = [Trained(**read_json(path)) for path in sorted((out / TRIALS).glob("[0-9]*.json"))]
    return {(trained.number, trained.rung): trained for trained in found}


def lines_of(trained: Mapping[tuple[int, int], Trained]) -> bytes:
    """Contents of trials.jsonl: one object per training."""
    return "".join(json.dumps(asdict(t)) + "\n" for t in trained.values()).encode("utf-8")
