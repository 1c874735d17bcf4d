"""What a run does in both of its stages: train a model, or find it trained, and judge rankers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from recclr.data.prepared import PreparedLog
from recclr.distributed import ALONE, Ranks
from recclr.evaluate import Evaluation, EvaluationSet, evaluate
from recclr.files import write_json_atomic
from recclr.fitting import fit_model
from recclr.load import load_model, ranker_of
from recclr.monitoring import monitor_of
from recclr.ranking import Ranker
from recclr.run_context import Context
from recclr.run_folder import read_json
from recclr.settings.judging import SLICES
from recclr.sharded_tables import table_maker
from recclr.topk import EmbeddingRanker
from recclr.towers import TwoTower
from recclr.trials import with_seed


def evaluated(
    context: Context,
    ranker: Ranker,
    examples: EvaluationSet,
    slices: Sequence[str] = SLICES,
    *,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Judge, and show how far that is; ``ranks`` share it, else the caller does it alone.

    On the device of the run where the ranker is one of vectors, unless tables outgrow it.
    """
    context.end_if_asked()
    if isinstance(ranker, EmbeddingRanker) and context.config.train.sharded_tables == "none":
        ranker = ranker.to(context.device)

    def progress(done: int, total: int) -> None:
        event = {"kind": "judging", "name": ranker.name, "done": done, "total": total}
        context.on_event(event)

    progress(0, len(examples.user_idx))
    ks = context.config.evaluate.ks
    return evaluate(ranker, examples, ks=ks, slices=slices, progress=progress, ranks=ranks)


def selecting(context: Context, ranker: Ranker, examples: EvaluationSet) -> dict[str, float]:
    """Metrics of the slice that selects; all ranks call this."""
    part = context.config.evaluate.select_slice
    return evaluated(context, ranker, examples, (part,), ranks=context.ranks).metrics[part]


def fit_stage(
    context: Context,
    stage: str,
    folder: Path,
    prepared: PreparedLog,
    examples: EvaluationSet | None,
    num_steps: int | None,
    *,
    seed: int = 0,
) -> tuple[TwoTower, int]:
    """Train a stage, or load it if an earlier call finished it; the model and its best step.

    Args:
        folder: gets the checkpoints, and last a file that says it is done. num_steps: see
            ``fit_model``. seed: of which of the models that ``blend.seeds`` asks for, 0 the first.
    """
    config, done = context.config, folder / f"{stage}.json"
    if seed:
        config = with_seed(config, seed)
    if context.ranks.from_first(done.exists(), "looking for what is done"):
        tables = table_maker(config.train, context.ranks, "cpu")
        model = load_model(config, prepared.tensors, folder / "checkpoints", tables)
        return model, int(read_json(done)["best_step"])
    context.enter(f"{stage}, seed {config.seed}" if context.config.blend.seeds else stage)
    number = {"seed": config.seed} if seed else {}

    def judge(ranker: Ranker) -> dict[str, float]:
        assert examples is not None
        return selecting(context, ranker, examples)

    model, result = fit_model(
        config,
        prepared.tensors,
        None if examples is None else judge,
        item_encoder=prepared.item_encoder,
        device=context.device,
        on_event=lambda event: context.log({"stage": stage, **number, **event}),
        monitor=None if examples is None else monitor_of(prepared.tensors, examples, config),
        num_steps=num_steps,
        checkpoints=folder / "checkpoints",
        workspace=context.out,
        resume=context.resume,
        stop=context.stop,
        ranks=context.ranks,
    )
    if context.ranks.first:
        write_json_atomic(done, asdict(result))
    return model, result.best_step


def fit_seeds(
    context: Context,
    stage: str,
    folder: Path,
    prepared: PreparedLog,
    examples: EvaluationSet | None,
    selection: Path | None = None,
) -> list[EmbeddingRanker]:
    """The further models of ``blend.seeds``, each in a folder of its own, as they would be served.

    Args:
        selection: folder of the stage that chose their numbers of steps, for a refit.
    """
    found = []
    for seed in range(1, context.config.blend.seeds + 1):
        own, num_steps = folder / f"seed-{seed}", None
        if context.ranks.first:
            own.mkdir(exist_ok=True)
        if selection is not None:
            chosen = read_json(selection / own.name / "selection.json")
            num_steps = int(chosen["best_step"])
        model, _ = fit_stage(context, stage, own, prepared, examples, num_steps, seed=seed)
        found.append(ranker_of(model, prepared.tensors.cutoff, context.ranks))
    return found
