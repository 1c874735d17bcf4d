"""What to try next: optuna's tree-structured Parzen estimator (Bergstra et al. 2011).

A study of optuna is made afresh for every round from what is finished, in order, so that a proposal
follows from the seed, its number and those results alone: nothing has to be kept between rounds.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recclr.errors import require
from recclr.order import mix
from recclr.settings import ChoiceSettings
from recclr.tune.space import Parameter, Space


@dataclass(frozen=True)
class Tried:
    """A configuration and what it came to.

    Attributes:
        params: key -> value, within the space. value: at its highest rung; None where its training
            came to nothing. rung: that rung. whole: whether it is the last.
    """

    params: Mapping[str, Any]
    value: float | None
    rung: int
    whole: bool


def require_optuna() -> Any:
    """The library.

    Raises:
        MissingExtraError: it is not installed; names the extra.
    """
    found: Any = require("optuna", "tune")
    found.logging.set_verbosity(found.logging.ERROR)
    return found


def propose(
    space: Space, tried: Sequence[Tried], *, seed: int, first: int, count: int, startup: int
) -> list[dict[str, Any]]:
    """Values of all keys for the trials ``first`` to ``first + count - 1``.

    Trials of one round do not know each other's values, only their places, which count as bad
    ("constant liar"), so that they spread.

    Args:
        tried: finished trials, in order. startup: so many are drawn at random first.
    """
    optuna = require_optuna()
    study = _study(optuna, mix(seed, first) % (1 << 32), startup)
    for trial in tried:
        study.add_trial(told(trial, space))
    distributions = _distributions(optuna, space)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        for _ in range(count):
            asked = study.ask(distributions).params
            found.append({key: _decoded(asked[key], p) for key, p in space.parameters.items()})
    return found


def _study(optuna: Any, seed: int, startup: int) -> Any:
    with warnings.catch_warnings():
        # "multivariate" and "constant_liar" are marked as experimental.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=startup, multivariate=True, constant_liar=True
        )
    return optuna.create_study(direction="maximize", sampler=sampler)


def told(trial: Tried, space: Space) -> Any:
    """Optuna's form of a trial: what was trained in full before what was not, that by rung,
    failures last.
    """
    optuna = require_optuna()
    state = optuna.trial.TrialState
    given = {
        "params": {key: _encoded(trial.params[key], p) for key, p in space.parameters.items()},
        "distributions": _distributions(optuna, space),
    }
    if trial.whole and trial.value is not None:
        return optuna.trial.create_trial(state=state.COMPLETE, value=trial.value, **given)
    seen = {0: math.nan} if trial.value is None else {trial.rung: trial.value}
    return optuna.trial.create_trial(state=state.PRUNED, intermediate_values=seen, **given)


def _distributions(optuna: Any, space: Space) -> dict[str, Any]:
    return {key: _distribution(optuna, p) for key, p in space.parameters.items()}


def _distribution(optuna: Any, parameter: Parameter) -> Any:
    if isinstance(parameter, ChoiceSettings):
        return optuna.distributions.CategoricalDistribution(
            [json.dumps(choice) for choice in parameter.choices]
        )
    low, high, log = parameter.low, parameter.high, parameter.log
    if parameter.int:
        return optuna.distributions.IntDistribution(
            int(low), int(high), log=log, step=int(parameter.step or 1)
        )
    return optuna.distributions.FloatDistribution(low, high, log=log, step=parameter.step)


def _encoded(value: Any, parameter: Parameter) -> Any:
    """Optuna takes few types as choices: text stands for them."""
    return json.dumps(value) if isinstance(parameter, ChoiceSettings) else value


def _decoded(value: Any, parameter: Parameter) -> Any:
    return json.loads(value) if isinstance(parameter, ChoiceSettings) else value
