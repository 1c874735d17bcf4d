"""A whole search in a folder: read once, search, repeat the winner and the default, report.

Wiring only. Test rows are neither encoded nor judged: what is chosen here is judged on test by
``recclr train``, once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from recclr.checking import Data, read_data
from recclr.config import Config, dump_toml, with_changes
from recclr.errors import ConfigError
from recclr.evaluate import EvaluationSet
from recclr.files import write_bytes_atomic, write_json_atomic
from recclr.load import pick_device
from recclr.other_runs import require_runs
from recclr.run_folder import fingerprints, read_json
from recclr.settings import TuneSettings
from recclr.stopping import signals
from recclr.trials import OnEvent, Place, left_out
from recclr.tune.bench import FINAL, PREPARED, Bench, Job, Trained, lines_of
from recclr.tune.propose import require_optuna
from recclr.tune.results import results
from recclr.tune.search import Search
from recclr.tune.space import Space, default_space, read_space
from recclr.tune.workers import WORKERS_LOCK, Alone, Runner, Workers, wait_for_orphans
from recclr.work_folder import DECLARED, RUNNING, work_folder

RESULT, BEST, LINES, PAGE = "tune.json", "best.toml", "trials.jsonl", "report.html"


def tune(
    config: Config,
    out: Path,
    *,
    space: Path | None = None,
    trials: int | None = None,
    budget_s: float | None = None,
    processes: int = 1,
    seed: int | None = None,
    seeds: int = 3,
    resume: bool = False,
    device: str = "auto",
    on_event: OnEvent = lambda event: None,
) -> dict[str, Any]:
    """Search settings by successive halving, judged on validation, into a folder.

    The same seed finds the same winner, also where the search was killed and resumed, and with
    several processes, which make rounds of so many trials.

    Args:
        space: TOML file with ``[space]`` and ``[tune]``; None: what suits the configuration.
        trials: instead of ``tune.trials``. seed: of the search; None: that of the configuration,
            with which every trial is trained.
        budget_s: no round of the search is begun after so long; the last repetitions, which follow,
            are not part of it. May differ when the search is resumed.
        processes: trainings at once. seeds: repetitions of the winner and of the default.
        resume: go on with a search that was stopped; a finished one is only read.

    Returns:
        Contents of tune.json; best.toml, trials.jsonl and report.html are beside it.

    Raises:
        ConfigError: settings, space or folder are refused, before anything is trained; or nothing
            trained. DataError: the data are refused. InterruptedTraining: a signal asked to end.
    """
    require_optuna()
    if processes < 1 or seeds < 1:
        raise ConfigError(f"--processes and --seeds must be at least 1: {processes}, {seeds}")
    device = pick_device(device)
    searched, settings = _declared_space(config, space)
    settings = _with_trials(settings, trials)
    inputs: dict[str, Any] = {}

    def declared() -> dict[str, Any]:
        require_runs(config)
        inputs.update(fingerprints(config, start=True))
        return {
            "work": "tune",
            "space": searched.to_json(),
            "tune": asdict(settings),
            "seed": config.seed if seed is None else seed,
            "seeds": seeds,
            **_shape(out, processes),
            "inputs": inputs,
        }

    with (
        work_folder(out, config, declared, finished=RESULT, resume=resume) as to_do,
        signals() as stop,
    ):
        if not to_do:
            return read_json(out / RESULT)
        on_event({"kind": "stage", "name": "read"})
        for note in left_out(config):
            on_event({"kind": "note", "text": note})
        data = read_data(config, inputs, with_test=False, workspace=out)
        examples = _validation(data)
        work = read_json(out / DECLARED)
        place = Place(out / RUNNING, out / FINAL, device, stop, on_event=lambda event: None)
        bench = Bench(config, data.prepared.tensors, examples, settings, work["seed"], place)
        with _runner(bench, data, out, processes, work["threads"]) as runner:
            search = Search(
                out=out,
                space=searched,
                settings=settings,
                seed=work["seed"],
                default=searched.values_of(config),
                round_size=work["round_size"],
                budget_s=budget_s,
                runner=runner,
                on_trained=lambda *facts: on_event(_event(*facts)),
            )
            on_event({"kind": "stage", "name": f"search of {settings.trials} configurations"})
            for trained in search.trained.values():
                on_event({**_event(trained, 0, 0), "kind": "known"})
            best = search.run()
            params = search.trained[best].params
            winner = with_changes(config, params)
            write_bytes_atomic(out / BEST, dump_toml(winner).encode("utf-8"))
            write_bytes_atomic(out / LINES, lines_of(search.trained))
            _repeat(runner, best[0], params, settings, seeds, on_event)
        found_all = results(search, bench, winner=best, seeds=seeds)
        _write_page(out, found_all, config)
        # Last of all: its presence is what makes a search a finished one.
        write_json_atomic(out / RESULT, found_all)
        (out / WORKERS_LOCK).unlink(missing_ok=True)
        return found_all


def _declared_space(config: Config, path: Path | None) -> tuple[Space, TuneSettings]:
    if path is not None:
        return read_space(path, config)
    return default_space(config), TuneSettings()


def _with_trials(settings: TuneSettings, trials: int | None) -> TuneSettings:
    try:
        return settings if trials is None else replace(settings, trials=trials)
    except ValueError as error:
        raise ConfigError(f"--trials: {error}") from None


def _shape(out: Path, processes: int) -> dict[str, int]:
    """Trials of a round and threads of a training, as the search was begun: on the one depends
    which results a proposal knows, on the other how sums are rounded.
    """
    shape = {"round_size": processes, "threads": max(1, torch.get_num_threads() // processes)}
    begun = read_json(out / DECLARED) if (out / DECLARED).exists() else {}
    return {name: int(begun.get(name, value)) for name, value in shape.items()}


def _validation(data: Data) -> EvaluationSet:
    if data.examples is None:
        raise ConfigError("tune needs validation to judge by: set split.valid above 0")
    return data.examples


@contextmanager
def _runner(bench: Bench, data: Data, out: Path, processes: int, threads: int) -> Iterator[Runner]:
    wait_for_orphans(out)
    if processes > 1:
        if not (out / PREPARED / "prepared.json").exists():
            data.prepared.save(out / PREPARED)
        device, stop = bench.place.device, bench.place.stop
        with Workers(out, processes, device, threads, stop) as workers:
            yield workers
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield Alone(bench)
    finally:
        torch.set_num_threads(before)


def _repeat(
    runner: Runner,
    number: int,
    params: Mapping[str, Any],
    settings: TuneSettings,
    seeds: int,
    on_event: OnEvent,
) -> None:
    """Train winner and default with each seed; what is trained already is passed over."""
    last = len(settings.epochs) - 1
    entrants: dict[int, Mapping[str, Any]] = {0: {}, number: params}
    jobs = [Job(n, entrants[n], last, r) for r in range(seeds) for n in sorted(entrants)]
    on_event({"kind": "stage", "name": f"winner and default, {seeds} seeds"})
    count = 0

    def done(job: Job) -> None:
        nonlocal count
        count += 1
        name = f"{'winner' if job.number else 'default'}, repetition {job.repetition}"
        on_event({"kind": "repeated", "name": name, "done": count, "total": len(jobs)})

    runner(jobs, done)


def _event(trained: Trained, done: int, total: int) -> dict[str, Any]:
    return {"kind": "trained", "done": done, "total": total, **asdict(trained)}


def _write_page(out: Path, found: Mapping[str, Any], config: Config) -> None:
    from recclr.report.tuning import tuning_page

    write_bytes_atomic(out / PAGE, tuning_page(found, config, out.name).encode("utf-8"))
