"""How much each key mattered, among the trials of one rung."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from recclr import correlation
from recclr.settings import ChoiceSettings
from recclr.tune.propose import Tried, require_optuna, told
from recclr.tune.space import Space

_FEWEST = 4


def importance(space: Space, tried: Sequence[Tried], *, seed: int) -> dict[str, Any]:
    """Shares of the variance that the keys explain, and in which direction numbers pull.

    Args:
        tried: trials of one rung, all with a value. seed: of the trees.

    Returns:
        ``method``: "fanova" (Hutter et al. 2014, by optuna and scikit-learn; shares add up to 1)
        or, without scikit-learn, "rank" (see ``rank_association``). ``values``: key -> value in
        [0, 1]. ``direction``: key -> Spearman's correlation in [-1, 1], numbers only. {} where
        fewer than four trials, or equal values, say nothing.
    """
    values = np.array([trial.value for trial in tried], dtype=np.float64)
    if len(tried) < _FEWEST or not np.ptp(values):
        return {}
    direction = {
        key: spearman(np.array([t.params[key] for t in tried], dtype=np.float64), values)
        for key, parameter in space.parameters.items()
        if not isinstance(parameter, ChoiceSettings)
    }
    method, shares = "fanova", _fanova(space, tried, seed)
    if shares is None:
        method, shares = "rank", rank_association(space, tried)
    return {"method": method, "values": shares, "direction": direction}


def rank_association(space: Space, tried: Sequence[Tried]) -> dict[str, float]:
    """Of each key alone: |Spearman's correlation| with the value for numbers; for choices, the
    correlation ratio of the values' ranks, which for two choices is the same.
    """
    values = torch.tensor([trial.value for trial in tried], dtype=torch.float64)
    ranks = correlation.ranks_of(values).numpy()
    found = {}
    for key, parameter in space.parameters.items():
        given = [trial.params[key] for trial in tried]
        if isinstance(parameter, ChoiceSettings):
            found[key] = _correlation_ratio([json.dumps(value) for value in given], ranks)
        else:
            found[key] = abs(spearman(np.array(given, dtype=np.float64), ranks))
    return found


def spearman(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Rank correlation, equal values sharing their mean rank; 0 where one side is constant."""
    found = correlation.spearman(torch.from_numpy(first), torch.from_numpy(second))
    return 0.0 if math.isnan(found) else found


def _correlation_ratio(groups: Sequence[str], values: NDArray[np.float64]) -> float:
    """Square root of the share of the variance that lies between groups."""
    names = np.array(groups)
    total = float(((values - values.mean()) ** 2).sum())
    between = sum(
        float((names == name).sum()) * float(values[names == name].mean() - values.mean()) ** 2
        for name in sorted(set(groups))
    )
    return float(np.sqrt(between / total)) if total else 0.0


def _fanova(space: Space, tried: Sequence[Tried], seed: int) -> dict[str, float] | None:
    optuna = require_optuna()
    study = optuna.create_study(direction="maximize")
    for trial in tried:
        study.add_trial(told(trial, space))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=seed % (1 << 32))
            found: Mapping[str, float] = optuna.importance.get_param_importances(
                study, evaluator=evaluator
            )
    except ImportError:
        return None
    return {key: float(found.get(key, 0.0)) for key in space.parameters}
