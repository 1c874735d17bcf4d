"""What a search came to, as JSON values: contents of tune.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from recclr.config import with_changes
from recclr.metrics import DEFINITIONS
from recclr.trials import Repeat, averaged, difference, repeat, with_seed
from recclr.tune.bench import Bench, Trained
from recclr.tune.halving import brackets
from recclr.tune.importance import importance
from recclr.tune.propose import Tried, require_optuna
from recclr.tune.search import Search, best_so_far


def results(search: Search, bench: Bench, *, winner: tuple[int, int], seeds: int) -> dict[str, Any]:
    """The search, its winner, and winner against default over seeds.

    Args:
        winner: (number, rung). seeds: repetitions, all of them finished.
    """
    number, rung = winner
    ordered = _in_order(search)
    params = dict(search.trained[winner].params)
    return {
        "select": bench.config.evaluate.select,
        "select_slice": bench.config.evaluate.select_slice,
        "seed": search.seed,
        "optuna": require_optuna().__version__,
        "space": search.space.to_json(),
        "default": search.default,
        "rungs": _rungs(search),
        "trainings": [asdict(trained) for trained in ordered],
        "best_so_far": [best_so_far(ordered, r) for r in range(len(search.settings.epochs))],
        "stopped_by_budget": search.stopped_by_budget,
        "search_s": round(search.spent_s, 3),
        "winner": {"number": number, "rung": rung, "params": params},
        "importance": _importance(search),
        "final": _final(bench, params, seeds),
        "definitions": DEFINITIONS,
    }


def _in_order(search: Search) -> list[Trained]:
    """As they were trained: by bracket, rung and number."""
    settings = search.settings
    bracket_of = {
        number: place
        for place, numbers in enumerate(brackets(settings.trials, settings.bracket))
        for number in numbers
    }
    return sorted(search.trained.values(), key=lambda t: (bracket_of[t.number], t.rung, t.number))


def _rungs(search: Search) -> list[dict[str, Any]]:
    """How many were trained at each rung, on what, and how many of those came to nothing."""
    found = []
    for rung, (epochs, rows) in enumerate(
        zip(search.settings.epochs, search.settings.rows, strict=True)
    ):
        here = [trained for trained in search.trained.values() if trained.rung == rung]
        failed = sum(trained.value is None for trained in here)
        found.append({"epochs": epochs, "rows": rows, "trained": len(here), "failed": failed})
    return found


def _importance(search: Search) -> dict[str, Any]:
    """Of the first rung, where all configurations got the same training."""
    tried = []
    for trained in search.trained.values():
        params = search.default if trained.number == 0 else trained.params
        if trained.rung == 0 and trained.value is not None and search.space.holds(params):
            tried.append(Tried(params, trained.value, 0, True))
    return importance(search.space, tried, seed=search.seed)


def _final(bench: Bench, params: Mapping[str, Any], seeds: int) -> dict[str, Any]:
    config, part = bench.config, bench.config.evaluate.select_slice
    repeats = {"tuned": _repeats(bench, params, seeds), "default": _repeats(bench, {}, seeds)}
    means = {
        name: averaged(name, [done.evaluations["valid"] for done in of_name])
        for name, of_name in repeats.items()
    }
    return {
        "seeds": [config.seed + number for number in range(seeds)],
        "metrics": {name: mean.metrics for name, mean in means.items()},
        "counts": means["default"].counts,
        "by_seed": {
            name: [done.evaluations["valid"].metrics[part] for done in of_name]
            for name, of_name in repeats.items()
        },
        "best_steps": {name: [d.best_step for d in of_name] for name, of_name in repeats.items()},
        "seconds": {
            name: [round(d.seconds, 3) for d in of_name] for name, of_name in repeats.items()
        },
        "difference": difference(means["tuned"], means["default"], config),
    }


def _repeats(bench: Bench, params: Mapping[str, Any], seeds: int) -> list[Repeat]:
    changed = with_changes(bench.config, params)
    judged = {"valid": bench.examples}
    return [
        repeat(with_seed(changed, number), bench.prepared, judged, bench.place)
        for number in range(seeds)
    ]
