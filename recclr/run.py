"""A whole run: read, split, select on validation, refit, judge once on test, report, export.

Wiring only. Every stage leaves a file behind and is skipped by ``--resume`` when that file is
there; what is inside a stage resumes from its own checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from recclr.baselines import BaselineChoice, build_baselines, refit_baseline
from recclr.blend_stage import blend_final, blend_selected
from recclr.checking import Data, read_data, refits, require_targets, require_validation
from recclr.config import Config
from recclr.data.log import Prepared
from recclr.data.prepare import PreparedLog, prepare_for
from recclr.data.split import Split
from recclr.distributed import ALONE, LONG_S, Ranks
from recclr.evaluate import Evaluation, EvaluationSet
from recclr.files import write_bytes_atomic, write_json_atomic
from recclr.joining import restarts_are_safe
from recclr.judge import collect_results, judged_by
from recclr.load import load_blend, pick_device, ranker_of
from recclr.monitoring import final_monitors, monitor_of
from recclr.monitors import Monitor
from recclr.other_runs import require_runs, with_teacher
from recclr.ranking import Ranker
from recclr.run_context import Context
from recclr.run_folder import (
    BLEND,
    DATA,
    METRICS,
    REPORT,
    SELECTION,
    begin_run,
    code_digest,
    config_digest,
    data_digest,
    fingerprints,
    locked,
    open_run,
    read_json,
    require_same_inputs,
    require_shared,
)
from recclr.stages import evaluated, fit_seeds, fit_stage, selecting
from recclr.stopping import signals
from recclr.topk import EmbeddingRanker
from recclr.watching import OnEvent, temperature_figures


def train_run(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    device: str = "auto",
    on_event: OnEvent | None = None,
    judge_test: bool = True,
    ranks: Ranks = ALONE,
) -> Path:
    """Run a configuration into a folder, and return the folder.

    Data that are refused leave the folder as it was.

    Args:
        resume: go on with a run that was stopped; a finished one is left as it is.
        device: ``auto`` is the first GPU where there is one.
        on_event: gets every event of log.jsonl, {"kind": "stage", "name": …}, and what else
            ``console.RunProgress`` shows.
        judge_test: look at test in the end; without it, validation is the last word.
        ranks: the processes that share the run, all of which call this with the same arguments.
            Training and the model's evaluations are shared; the first one does the rest.

    Raises:
        RecclrError: its class says what went wrong (see ``errors``); the folder resumes.
    """
    device = pick_device(ranks.own_device(device))
    require_targets(config)
    if not (out / METRICS).exists():
        require_runs(config)
    existed = out.exists()
    emit = on_event if on_event is not None and ranks.first else lambda event: None
    ranks.start(device, config.train.collective_timeout_s)
    if ranks.size > 1:
        ranks.agree({"the configuration": config_digest(config), "the code": code_digest()})
    opened = ranks.first and open_run(out, config, resume=resume)
    if not ranks.from_first(opened, "opening the run folder"):
        if ranks.first and not (out / REPORT).exists():
            _write_report(out, emit)
        return out
    try:
        with locked(out) if ranks.first else nullcontext(), signals() as stop:
            context = Context(config, out, device, emit, resume, stop, ranks, judge_test)
            require_shared(out, ranks)
            data = _read(context)
            require_validation(config, data.examples)
            _begin(context, data)
            selected = _select(context, data)
            final = _final_stage(context, data.split, selected)
            results = _judge(context, data, selected, final)
            if ranks.first:
                _export(context, final)
                # Last of all: its presence is what makes a run a finished one.
                write_json_atomic(out / METRICS, results)
                _write_report(out, emit)
            ranks.meet("the end of the run", LONG_S)
    finally:
        if ranks.first and not existed:
            with suppress(OSError):  # no longer empty
                out.rmdir()
    return out


@dataclass
class Stage:
    """A fitted stage: data, ranker, its temperature, and what selection found."""

    prepared: PreparedLog
    ranker: EmbeddingRanker
    steps: int
    temperature: dict[str, float]
    choices: list[BaselineChoice] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    valid: list[Evaluation] = field(default_factory=list)


def _read(context: Context) -> Data:
    """Read, split and encode, and refuse what cannot be trained on or judged; writes nothing."""
    context.enter("read")
    inputs = fingerprints(context.config, start=True)
    if context.ranks.first and (context.out / DATA).exists():
        require_same_inputs(context.out, inputs)
    data = read_data(context.config, inputs, workspace=context.out)
    if context.ranks.size > 1:
        context.ranks.meet("reading the data", LONG_S)
        context.ranks.agree(data_digest(data.prepared, inputs))
    return data


def _begin(context: Context, data: Data) -> None:
    """Make the folder that of this run; data.json, quarantine.parquet."""
    if not context.ranks.first:
        return
    begin_run(context.out, context.config, data.to_json(), context.device)
    quarantine = data.log.quarantine
    if quarantine.height:
        buffer = BytesIO()
        quarantine.write_parquet(buffer)
        write_bytes_atomic(context.out / "quarantine.parquet", buffer.getvalue())
    context.on_event({"kind": "data", "log": repr(data.log), "split": data.split.by})
    notes = [*data.log.whereabouts, *data.notes]
    if not restarts_are_safe():
        notes.append(
            "processes that torchrun restarts may not find each other again; set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where it is started"
        )
    for note in notes:
        context.on_event({"kind": "note", "text": note})


def _select(context: Context, data: Data) -> Stage:
    """Train on train, choose the number of steps and the baselines' settings on validation."""
    refitted = refits(context.config, data.split)
    folder = context.out / SELECTION if refitted else context.out
    prepared, examples = data.prepared, data.examples
    _save(context, prepared, folder)
    model, steps = fit_stage(context, "selection", folder, prepared, examples, None)
    ranker = ranker_of(model, prepared.tensors.cutoff, context.ranks)
    if context.config.blend.several:
        rankers = [ranker, *fit_seeds(context, "selection", folder, prepared, examples)]
        ranker = _blend_selected(context, prepared, rankers, folder, examples)
    stage = Stage(prepared, ranker, steps, temperature_figures(model))
    judged: dict[str, Evaluation] = {}
    if context.ranks.first:
        stage.choices, stage.skipped, judged = _choose_baselines(
            context, prepared.tensors, examples
        )
    context.ranks.meet("the baselines", LONG_S)
    if examples is not None:
        judged[ranker.name] = evaluated(context, ranker, examples, ranks=context.ranks)
        # A resumed run has the choices, but not the evaluations that led to them.
        again = [choice for choice in stage.choices if choice.name not in judged]
        for each in _baselines(context, again, prepared.tensors):
            judged[each.name] = evaluated(context, each, examples)
        stage.valid = [judged[name] for name in (ranker.name, *(c.name for c in stage.choices))]
    context.ranks.meet("the validation of baselines", LONG_S)
    return stage


def _blend_selected(
    context: Context,
    prepared: PreparedLog,
    rankers: list[EmbeddingRanker],
    folder: Path,
    examples: EvaluationSet | None,
) -> EmbeddingRanker:
    """The model with others beside it, as an earlier call left it, or at weights found here."""
    if context.ranks.from_first((folder / BLEND).exists(), "looking for what is done"):
        found = load_blend(folder)
        assert found is not None
        return found
    context.enter("blend")

    def value(candidate: EmbeddingRanker) -> float:
        assert examples is not None
        return selecting(context, candidate, examples)[context.config.evaluate.select]

    return blend_selected(context.config, prepared, rankers, folder, value, context.ranks)


def _final_stage(context: Context, split: Split, selected: Stage) -> Stage:
    """The model to ship: refitted on train + validation, or the selected one."""
    if not refits(context.config, split):
        return selected
    assert split.valid is not None
    config = context.config
    train = split.train.concat(split.valid)
    extra = () if split.left_out is None else (split.left_out,)
    prepared = prepare_for(config, train, split.test, extra)
    prepared = with_teacher(prepared, config, of_selection=False)
    _save(context, prepared, context.out)
    model, steps = fit_stage(context, "refit", context.out, prepared, None, selected.steps)
    ranker = ranker_of(model, prepared.tensors.cutoff, context.ranks)
    if config.blend.several:
        selection, out = context.out / SELECTION, context.out
        rankers = [ranker, *fit_seeds(context, "refit", out, prepared, None, selection)]
        context.enter("blend")
        ranker = blend_final(config, prepared, rankers, out, selection, context.ranks)
    temperature = temperature_figures(model)
    return Stage(prepared, ranker, steps, temperature, selected.choices, selected.skipped)


def _judge(context: Context, data: Data, selected: Stage, final: Stage) -> dict[str, Any]:
    """Validation and test tables; test is looked at here, once, and nowhere else."""
    config, split = context.config, data.split
    tables = {"valid": selected.valid}
    refitted = final is not selected
    prepared, examples = final.prepared.tensors, None if refitted else data.examples
    if split.test is not None and context.judge_test:
        context.enter("test")
        prepared, examples = judged_by(
            final.prepared, split.test, config, also=split.had_before("test", refitted=refitted)
        )
        tables["test"] = [evaluated(context, final.ranker, examples, ranks=context.ranks)]
        for ranker in _baselines(context, final.choices, prepared):
            tables["test"].append(evaluated(context, ranker, examples))
    if not context.ranks.first:
        return {}
    results = collect_results(tables, config)
    results["baselines"] = {c.name: asdict(c) for c in final.choices}
    results["skipped_baselines"] = final.skipped
    results["selected_steps"] = selected.steps
    if config.blend.several:
        results["blend"] = read_json(context.out / BLEND)
    results["monitors"] = _looked_at(context, monitor_of(prepared, examples, config), final)
    return results


def _looked_at(context: Context, monitor: Monitor, final: Stage) -> dict[str, Any]:
    """Figures of the final model's vectors, and what is wrong with them."""
    found = final_monitors(monitor(final.ranker) | final.temperature)
    where = {"stage": "final", "step": final.steps}
    context.log({"kind": "monitor", **where, "figures": found["figures"]})
    for cause in found["causes"]:
        context.log({"kind": "warning", **where, **cause})
    return found


def _baselines(
    context: Context, choices: Sequence[BaselineChoice], prepared: Prepared
) -> Iterator[Ranker]:
    """The baselines, each fitted when its turn comes."""
    for choice in choices:
        context.end_if_asked()
        context.on_event({"kind": "judging", "name": choice.name})
        yield refit_baseline(choice, prepared, context.config.seed)


def _choose_baselines(
    context: Context, prepared: Prepared, examples: EvaluationSet | None
) -> tuple[list[BaselineChoice], dict[str, str], dict[str, Evaluation]]:
    """Settings of the baselines, chosen on validation once per run; why others were left out; and
    the evaluation of each choice, where this call made it (fitting one again may take minutes).
    """
    path, config = context.out / "baselines.json", context.config
    if path.exists():
        stored = read_json(path)
        return [BaselineChoice(**choice) for choice in stored["choices"]], stored["skipped"], {}
    context.enter("baselines")
    select, part = config.evaluate.select, config.evaluate.select_slice
    best: dict[str, Evaluation] = {}

    def judge(ranker: Ranker) -> float:
        if examples is None:
            return 0.0
        found = evaluated(context, ranker, examples)
        value = found.metrics[part][select]
        # The first of the best, as ``build_baselines`` chooses.
        if ranker.name not in best or value > best[ranker.name].metrics[part][select]:
            best[ranker.name] = found
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
    return choices, skipped, best


def _save(context: Context, prepared: PreparedLog, folder: Path) -> None:
    """Once per run: a resumed one prepares the same again."""
    if context.ranks.first and not (context.resume and (folder / "prepared.json").exists()):
        prepared.save(folder)


def _export(context: Context, final: Stage) -> None:
    if context.config.export:
        from recclr.shipping import ship

        for target in context.config.export:
            context.enter(f"export to {target}")
            ship(final.prepared, final.ranker, target, run=context.out, config=context.config)


def _write_report(out: Path, emit: OnEvent) -> None:
    from recclr.report import write_report

    emit({"kind": "stage", "name": "report"})
    write_report(out)
