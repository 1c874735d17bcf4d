"""From rankers to the tables of metrics.json: what is judged, on whom, and against what."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from recclr.bootstrap import paired_differences
from recclr.config import Config
from recclr.data.interactions import Log
from recclr.data.log import Prepared
from recclr.data.prepare import PreparedLog, encode_held_out
from recclr.data.reading import read_held_out, read_log
from recclr.distributed import ALONE, Ranks
from recclr.errors import ConfigError
from recclr.evaluate import Evaluation, EvaluationSet, evaluate
from recclr.intervals import Resampled, intervals, resampled
from recclr.keeping import digest_of
from recclr.metrics import DEFINITIONS
from recclr.ranking import Ranker


def judged_by(
    prepared: PreparedLog, held_out: Log, config: Config, *, also: Log | None = None
) -> tuple[Prepared, EvaluationSet]:
    """Held-out rows in the indices of a model.

    Args:
        also: rows that came before the held-out ones and that nothing was fitted on; their items
            are left out of the rankings like those of train.

    Raises:
        ConfigError: nothing of ``held_out`` can be judged. DataError: ids of another type.
    """
    encoded, counts = encode_held_out(held_out, prepared.users, prepared.items)
    if len(held_out) and counts["held_out_rows_outside_corpus"] == len(held_out):
        raise ConfigError(
            f"none of the {len(held_out):,} held-out rows has an item that train or the catalogue "
            "knows, so there is nothing to find; are their ids of another kind?"
        )
    seen = None if also is None else encode_held_out(also, prepared.users, prepared.items)[0]
    tensors = replace(prepared.tensors, held_out=encoded)
    examples = EvaluationSet.from_prepared(
        tensors, keep_seen=config.evaluate.keep_seen, also_seen=seen
    )
    return tensors, examples


def collect_results(tables: Mapping[str, Sequence[Evaluation]], config: Config) -> dict[str, Any]:
    """The evaluations of each split, the model first, in the shape of metrics.json."""
    results: dict[str, Any] = {"definitions": DEFINITIONS, "counts": {}, "intervals": {}}
    results["differences"] = {}
    settings = config.evaluate
    for split, evaluations in tables.items():
        if evaluations:
            means = None
            if settings.num_bootstrap >= 2:
                each = [e.per_user for e in evaluations]
                means = resampled(each, settings.num_bootstrap, seed=config.seed)
                evaluations = [
                    replace(e, intervals=intervals(own))
                    for e, own in zip(evaluations, means, strict=True)
                ]
            results[split] = {e.name: e.metrics for e in evaluations}
            results["intervals"][split] = {e.name: e.intervals for e in evaluations}
            results["counts"][split] = evaluations[0].counts
            results["differences"][split] = differences(evaluations, config, means)
    return results


def differences(
    evaluations: Sequence[Evaluation], config: Config, means: Sequence[Resampled] | None
) -> dict[str, Any]:
    """The model minus each baseline, paired by user, for recall, NDCG and the metric of selection.

    Cold items among the cold are compared with chance as well: recall of a random ranking.

    Args:
        evaluations: the model, then the baselines, on one ``EvaluationSet``.
        means: ``intervals.resampled`` of their users; None for no differences.
    """
    model, *others = evaluations
    if means is None:
        return {}
    k = config.evaluate.select.partition("@")[2]
    metrics = list(dict.fromkeys([config.evaluate.select, f"recall@{k}", f"ndcg@{k}"]))
    found: dict[str, Any] = {}
    for part, ours in model.per_user.items():
        keys, columns, drawn = [], [], []
        for other, theirs in zip(others, means[1:], strict=True):
            figures = other.per_user[part]
            for metric in metrics:
                keys.append((other.name, metric))
                columns.append(ours[metric] - figures[metric])
                drawn.append(means[0][part][metric] - theirs[part][metric])
        if part == "cold_items_among_cold":
            metric = f"recall@{k}"
            chance = model.counts[part][f"chance_{metric}"]
            keys.append(("chance", metric))
            columns.append(ours[metric] - chance)
            drawn.append(means[0][part][metric] - chance)
        if not columns:
            continue
        judged = paired_differences(
            torch.stack(columns, 1),
            num_resamples=config.evaluate.num_bootstrap,
            seed=config.seed,
            means_SM=torch.stack(drawn, 1),
        )
        for (name, metric), difference in zip(keys, judged, strict=True):
            found.setdefault(name, {}).setdefault(part, {})[metric] = difference
    return found


def evaluate_run(
    config: Config,
    prepared: PreparedLog,
    ranker: Ranker,
    *,
    split: str = "test",
    events: str | None = None,
    ks: tuple[int, ...] | None = None,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Judge the ranker of a finished run again, on its own held-out rows or on other events.

    Args:
        split: ``test`` or ``valid``; read from the run's input files as the run did.
        events: path of other events, read with the run's columns, conditions and weights.
        ks: cut-offs instead of the configured ones.
        progress: called with (users done, users in all).
        ranks: processes that share the users; all of them get the whole result.

    Raises:
        ConfigError: no such part, or validation of a model that was refitted on it.
    """
    if split not in ("test", "valid"):
        raise ConfigError(f"--split {split!r}: expected test or valid")
    log = read_log(config.data)
    parts = log.split(config.split)
    refitted = config.train.refit and parts.valid is not None
    also = parts.had_before(split, refitted=refitted)
    held_out = parts.test if split == "test" else parts.valid
    if events is not None:
        held_out = read_held_out(log, events)
    elif split == "valid" and refitted:
        raise ConfigError(
            "the model was refitted on train + validation, so validation says nothing about it; "
            "metrics.json has the validation figures of the selected model"
        )
    if held_out is None:
        raise ConfigError(f"the run has no {split} part; give --events FILE")
    _, examples = judged_by(prepared, held_out, config, also=also)
    if ranks.size > 1:
        # Each ranks a part of the users, by number.
        rows = {"users": examples.user_idx, "relevant": examples.relevant.values}
        ranks.agree({"the held-out rows": digest_of(rows)})
    settings = config.evaluate
    return evaluate(
        ranker,
        examples,
        ks=ks or settings.ks,
        num_bootstrap=settings.num_bootstrap,
        seed=config.seed,
        progress=progress,
        ranks=ranks,
    )
