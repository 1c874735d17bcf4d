"""Who looks at the vectors of a run: samples from its data, and what the final model came to."""

from __future__ import annotations

from typing import Any

from recclr.causes import causes
from recclr.config import Config
from recclr.data.log import Prepared
from recclr.evaluate import EvaluationSet
from recclr.monitors import DEFINITIONS, Monitor


def monitor_of(prepared: Prepared, examples: EvaluationSet | None, config: Config) -> Monitor:
    """The monitor of a stage: positives and rankings of those who are judged.

    Args:
        examples: held-out rows; None: rankings are of users with train rows, seen items left out.
    """
    k, keep_seen = int(config.evaluate.select.partition("@")[2]), config.evaluate.keep_seen
    train, seed = prepared.train, config.seed
    if examples is None:
        users = (train.user_counts() > 0).nonzero().squeeze(1).cpu()
        seen = None if keep_seen else train.user_items(len(train.user_counts())).take(users)
        return Monitor(train, k=k, seed=seed, users=users, seen=seen)
    inside = examples.relevant.values >= 0
    users = examples.user_idx[examples.relevant.row_numbers()[inside]]
    return Monitor(
        train,
        k=k,
        seed=seed,
        users=examples.user_idx,
        seen=examples.seen,
        held_out=(users, examples.relevant.values[inside].long()),
    )


def final_monitors(figures: dict[str, float]) -> dict[str, Any]:
    """What metrics.json has under "monitors": figures of the final model, causes, definitions."""
    return {
        "figures": figures,
        "causes": [cause.to_json() for cause in causes([figures], final=True)],
        "definitions": dict(DEFINITIONS),
    }
