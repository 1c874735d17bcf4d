"""The search itself: rounds of jobs, each chosen from what is finished, until nothing is left.

Which jobs a round has follows from the finished ones in order, so a search that was killed goes on
as if it had not been.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recclr.errors import ConfigError
from recclr.settings import TuneSettings
from recclr.tune.bench import Job, Trained, read_one, read_trained
from recclr.tune.halving import brackets, num_trainings, promoted, sizes, winner
from recclr.tune.propose import Tried, propose
from recclr.tune.space import Space
from recclr.tune.workers import Runner

OnTrained = Callable[[Trained, int, int], None]


@dataclass
class Search:
    """A search in a folder.

    Attributes:
        default: values that the configuration has at the keys. round_size: jobs that are chosen
            together, before any of them is finished. budget_s: see ``spent_s``; None for no limit.
        on_trained: gets every training that is finished here, how many are, and how many there
            will be.
        trained: (number, rung) -> what is finished.
    """

    out: Path
    space: Space
    settings: TuneSettings
    seed: int
    default: dict[str, Any]
    round_size: int
    budget_s: float | None
    runner: Runner
    on_trained: OnTrained

    def __post_init__(self) -> None:
        self.trained = read_trained(self.out)
        self.rounds_s: list[float] = []
        self.stopped_by_budget = False

    @property
    def spent_s(self) -> float:
        """Seconds of the rounds so far, each as long as its longest training."""
        return sum(self.rounds_s)

    def run(self) -> tuple[int, int]:
        """All brackets, or as much as the budget allows; (number, rung) of the winner.

        Raises:
            ConfigError: no training came to anything. Else as ``Bench.run``.
        """
        for numbers in brackets(self.settings.trials, self.settings.bracket):
            if not self._bracket(numbers):
                self.stopped_by_budget = True
                break
        best = winner(self.values(), len(self.settings.epochs))
        if best is None and not self.trained:
            raise ConfigError(
                f"the budget of {self.budget_s or 0:g} s was spent before the first trial began; "
                "raise --budget-s, or leave it out"
            )
        if best is None:
            reasons = sorted({t.reason for t in self.trained.values()})
            raise ConfigError(
                "no trial came to anything; the space, or the configuration itself, does not "
                "train:\n" + "\n".join(reasons[:5])
            )
        return best

    def values(self) -> dict[tuple[int, int], float | None]:
        """(number, rung) -> metric of selection."""
        return {key: trained.value for key, trained in self.trained.items()}

    def _bracket(self, numbers: range) -> bool:
        """Whether it was finished before the budget was."""
        counts = sizes(len(numbers), self.settings.eta, len(self.settings.epochs))
        for start in range(0, len(numbers), self.round_size):
            if self._out_of_budget():
                return False
            self._round(self._proposed(numbers[start : start + self.round_size]))
        going = list(numbers)
        for rung, count in enumerate(counts[1:], start=1):
            going = promoted(self.values(), going, rung - 1, count)
            jobs = [Job(number, self.trained[number, 0].params, rung) for number in going]
            for start in range(0, len(jobs), self.round_size):
                if self._out_of_budget():
                    return False
                self._round(jobs[start : start + self.round_size])
        return True

    def _proposed(self, numbers: range) -> list[Job]:
        """Jobs of a round; of trials that are finished, with the values they were trained with."""
        known = {n: self.trained[n, 0].params for n in numbers if (n, 0) in self.trained}
        if 0 in numbers:
            # The configuration as it is: what the search has to beat.
            known[0] = {}
        if len(known) == len(numbers):
            return [Job(number, known[number], 0) for number in numbers]
        asked = [number for number in numbers if number != 0]
        found = propose(
            self.space,
            self._tried(numbers.start),
            seed=self.seed,
            first=numbers.start,
            count=len(asked),
            startup=self.settings.startup,
        )
        params = dict(zip(asked, found, strict=True)) | known
        return [Job(number, params[number], 0) for number in numbers]

    def _tried(self, before: int) -> list[Tried]:
        """What trials below a number came to, for the sampler."""
        tried = []
        last_rung = len(self.settings.epochs) - 1
        for number in range(before):
            rungs = [self.trained[number, r] for r in range(last_rung + 1) if self._has(number, r)]
            params = self.default if number == 0 else rungs[0].params
            if not self.space.holds(params):
                continue
            values = [trained.value for trained in rungs]
            value = None if None in values else values[-1]
            tried.append(Tried(params, value, rungs[-1].rung, rungs[-1].rung == last_rung))
        return tried

    def _has(self, number: int, rung: int) -> bool:
        return (number, rung) in self.trained

    def _round(self, jobs: Sequence[Job]) -> None:
        missing = [job for job in jobs if not self._has(job.number, job.rung)]

        def done(job: Job) -> None:
            trained = read_one(self.out, job)
            self.trained[job.number, job.rung] = trained
            self.on_trained(trained, len(self.trained), self._planned())

        if missing:
            self.runner(missing, done)
            # Processes end in any order; what is drawn from results must not depend on it.
            self.trained = dict(sorted(self.trained.items()))
        self.rounds_s.append(max(self.trained[job.number, job.rung].seconds for job in jobs))

    def _planned(self) -> int:
        settings = self.settings
        return num_trainings(settings.trials, settings.bracket, settings.eta, len(settings.epochs))

    def _out_of_budget(self) -> bool:
        return self.budget_s is not None and self.spent_s >= self.budget_s


def best_so_far(trained: Sequence[Trained], rung: int) -> list[tuple[float, float]]:
    """(how many trainings, best value at ``rung`` among them) from the first such value on."""
    points: list[tuple[float, float]] = []
    for count, one in enumerate(trained, start=1):
        best = points[-1][1] if points else None
        if one.rung == rung and one.value is not None and (best is None or one.value > best):
            best = one.value
        if best is not None:
            points.append((float(count), best))
    return points
