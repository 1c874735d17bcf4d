"""A whole run: read, split, select on validation, refit, judge once on test, report, export.

Wiring only. Every stage leaves a file behind and is skipped by ``--resume`` when that file is
there; what is inside a stage resumes from its own checkpoints.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from recclr.baselines import BaselineChoice, build_baselines, refit_baseline
from recclr.config import Config
from recclr.data.interactions import Log, read_log
from recclr.data.log import Prepared
from recclr.data.prepare import PreparedLog, prepare
from recclr.data.split import Split
from recclr.errors import ConfigError
from recclr.evaluate import Evaluation, EvaluationSet, evaluate
from recclr.files import write_bytes_atomic, write_json_atomic
from recclr.judge import collect_results, judged_by
from recclr.load import fresh_model, load_model, pick_device, ranker_of
from recclr.ranking import Ranker
from recclr.run_folder import (
    DATA,
    LOG,
    METRICS,
    environment,
    fingerprints,
    locked,
    open_run,
    read_json,
)
from recclr.topk import EmbeddingRanker
from recclr.towers import TwoTower
from recclr.train import fit

OnEvent = Callable[[dict[str, Any]], None]
_SELECTION = "selection"


@dataclass
class Context:
    """What every stage needs.

    Attributes:
        out: the run folder. device: where the model lives. on_event: progress, one dict each.
        stop: whether a signal asked to end.
    """

    config: Config
    out: Path
    device: str
    on_event: OnEvent
    resume: bool = False
    stop: Callable[[], bool] = field(default=lambda: False)

    def log(self, event: dict[str, Any]) -> None:
        """One line of log.jsonl, and the progress display."""
        with (self.out / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **event}) + "\n")
        self.on_event(event)


def train_run(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    device: str = "auto",
    on_event: OnEvent | None = None,
) -> Path:
    """Run a configuration into a folder, and return the folder.

    Args:
        resume: go on with a run that was stopped; a finished one is left as it is.
        device: ``auto`` is the first GPU where there is one.
        on_event: gets every event of log.jsonl and {"kind": "stage", "name": …}.

    Raises:
        RecclrError: its class says what went wrong (see ``errors``); the folder resumes.
    """
    device = pick_device(device)
    if not open_run(out, config, resume=resume):
        return out
    with locked(out), _signals() as stop:
        context = Context(config, out, device, on_event or (lambda event: None), resume, stop)
        write_json_atomic(out / "environment.json", environment(device))
        split = _read(context)
        selected = _select(context, split)
        final = _final_stage(context, split, selected)
        results = _judge(context, split, selected, final)
        _export(context, final)
        # Last of all: its presence is what makes a run a finished one.
        write_json_atomic(out / METRICS, results)
        _write_report(context)
    return out


@dataclass
class Stage:
    """A fitted stage: data, ranker, and what selection found."""

    prepared: PreparedLog
    ranker: EmbeddingRanker
    steps: int
    choices: list[BaselineChoice] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    valid: list[Evaluation] = field(default_factory=list)


def _read(context: Context) -> Split:
    """Read and split the data; data.json, quarantine.parquet."""
    context.on_event({"kind": "stage", "name": "read"})
    config = context.config
    prints = fingerprints(config)
    path = context.out / DATA
    if context.resume and path.exists() and read_json(path)["inputs"] != prints:
        raise ConfigError(
            "the input files have changed since the run began; start a new run, or restore them"
        )
    log = read_log(config.data)
    split = log.split(config.split)
    if log.quarantine.height and not (context.out / "quarantine.parquet").exists():
        from io import BytesIO

        buffer = BytesIO()
        log.quarantine.write_parquet(buffer)
        write_bytes_atomic(context.out / "quarantine.parquet", buffer.getvalue())
    write_json_atomic(
        path,
        {
            "inputs": prints,
            "log": repr(log),
            "steps": [asdict(step) for step in log.steps],
            "quarantined": log.bad_rows,
            "notes": list(log.notes),
            "split": {"by": split.by, "cutoffs": split.cutoffs, "counts": split.counts},
        },
    )
    context.on_event({"kind": "data", "log": repr(log), "split": split.by})
    return split


def _select(context: Context, split: Split) -> Stage:
    """Train on train, choose the number of steps and the baselines' settings on validation."""
    config = context.config
    folder = context.out / _SELECTION if _refits(config, split) else context.out
    # Without a refit the test users seen in validation must be known by their index.
    extra = [] if _refits(config, split) or split.valid is None else [split.valid]
    prepared = _prepared(context, folder, split.train, split.valid, extra)
    examples = None
    if split.valid is not None:
        examples = EvaluationSet.from_prepared(
            prepared.tensors, keep_seen=config.evaluate.keep_seen
        )
    model, steps = _fit(context, "selection", folder, prepared, examples, None)
    ranker = ranker_of(model, prepared.tensors.cutoff)
    stage = Stage(prepared, ranker, steps)
    stage.choices, stage.skipped = _choose_baselines(context, prepared.tensors, examples)
    if examples is not None:
        rankers: list[Ranker] = [ranker]
        rankers += [refit_baseline(c, prepared.tensors, config.seed) for c in stage.choices]
        stage.valid = [_evaluated(context, r, examples) for r in rankers]
    return stage


def _final_stage(context: Context, split: Split, selected: Stage) -> Stage:
    """The model to ship: refitted on train + validation, or the selected one."""
    if not _refits(context.config, split):
        return selected
    assert split.valid is not None
    train = split.train.concat(split.valid)
    prepared = _prepared(context, context.out, train, split.test)
    model, steps = _fit(context, "refit", context.out, prepared, None, selected.steps)
    ranker = ranker_of(model, prepared.tensors.cutoff)
    return Stage(prepared, ranker, steps, selected.choices, selected.skipped)


def _judge(context: Context, split: Split, selected: Stage, final: Stage) -> dict[str, Any]:
    """Validation and test tables; test is looked at here, once, and nowhere else."""
    config = context.config
    tables = {"valid": selected.valid}
    if split.test is not None:
        context.on_event({"kind": "stage", "name": "test"})
        refitted = final is not selected
        prepared, examples = judged_by(
            final.prepared, split.test, config, also=None if refitted else split.valid
        )
        rankers: list[Ranker] = [final.ranker]
        rankers += [refit_baseline(c, prepared, config.seed) for c in final.choices]
        tables["test"] = [_evaluated(context, ranker, examples) for ranker in rankers]
    results = collect_results(tables, config)
    results["baselines"] = {c.name: asdict(c) for c in final.choices}
    results["skipped_baselines"] = final.skipped
    results["selected_steps"] = selected.steps
    return results


def _evaluated(context: Context, ranker: Ranker, examples: EvaluationSet) -> Evaluation:
    context.on_event({"kind": "judging", "name": ranker.name})
    return evaluate(ranker, examples, ks=context.config.evaluate.ks)


def _fit(
    context: Context,
    stage: str,
    folder: Path,
    prepared: PreparedLog,
    examples: EvaluationSet | None,
    num_steps: int | None,
) -> tuple[TwoTower, int]:
    """Train a stage, or load it if an earlier call finished it; the model and its best step."""
    config, done = context.config, folder / f"{stage}.json"
    if done.exists():
        model = load_model(config, prepared.tensors, folder / "checkpoints")
        return model, int(read_json(done)["best_step"])
    context.on_event({"kind": "stage", "name": stage})
    model = fresh_model(config, prepared.tensors)

    def judge(candidate: TwoTower) -> dict[str, float]:
        assert examples is not None
        ranker = ranker_of(candidate, prepared.tensors.cutoff)
        return evaluate(ranker, examples, ks=config.evaluate.ks, slices=("all",)).metrics["all"]

    result = fit(
        model,
        prepared.tensors.train,
        loss=config.loss,
        negatives=config.negatives,
        train=config.train,
        seed=config.seed,
        evaluate=None if examples is None else judge,
        select=config.evaluate.select,
        checkpoints=folder / "checkpoints",
        resume=context.resume,
        num_steps=num_steps,
        device=context.device,
        on_event=lambda event: context.log({"stage": stage, **event}),
        stop=context.stop,
    )
    write_json_atomic(done, asdict(result))
    return model, result.best_step


def _choose_baselines(
    context: Context, prepared: Prepared, examples: EvaluationSet | None
) -> tuple[list[BaselineChoice], dict[str, str]]:
    """Settings of the baselines, chosen on validation once per run."""
    path, config = context.out / "baselines.json", context.config
    if path.exists():
        stored = read_json(path)
        return [BaselineChoice(**choice) for choice in stored["choices"]], stored["skipped"]
    context.on_event({"kind": "stage", "name": "baselines"})

    def judge(ranker: Ranker) -> float:
        if examples is None:
            return 0.0
        metrics = evaluate(ranker, examples, ks=config.evaluate.ks, slices=("all",)).metrics
        value = metrics["all"][config.evaluate.select]
        context.on_event({"kind": "baseline", "name": ranker.name, "value": value})
        return value

    choices, skipped = build_baselines(
        prepared,
        settings=config.baselines,
        judge=judge,
        seed=config.seed,
        embedding_dim=config.model.embedding_dim,
    )
    stored = {"choices": [asdict(choice) for choice in choices], "skipped": skipped}
    write_json_atomic(path, stored)
    return choices, skipped


def _prepared(
    context: Context, folder: Path, train: Log, held_out: Log | None, extra: Sequence[Log] = ()
) -> PreparedLog:
    prepared = prepare(
        train, held_out, user=context.config.user, item=context.config.item, extra_ids=extra
    )
    if not (context.resume and (folder / "prepared.json").exists()):
        prepared.save(folder)
    return prepared


def _refits(config: Config, split: Split) -> bool:
    return config.train.refit and split.valid is not None


def _export(context: Context, final: Stage) -> None:
    if context.config.export:
        from recclr.shipping import ship

        for target in context.config.export:
            context.on_event({"kind": "stage", "name": f"export to {target}"})
            ship(final.prepared, final.ranker, target, run=context.out, config=context.config)


def _write_report(context: Context) -> None:
    from recclr.report import write_report

    context.on_event({"kind": "stage", "name": "report"})
    write_report(context.out)


@contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """SIGTERM and SIGINT ask the loop to end after its step; a second one ends at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def handle(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
