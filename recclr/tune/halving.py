"""Successive halving: how many configurations reach each rung, which, and who wins.

Jamieson & Talwalkar 2016, Algorithm 1; brackets as in Li et al. 2018. Plain arithmetic on values:
nothing here trains or draws.
"""

from __future__ import annotations

from collections.abc import Mapping

Values = Mapping[tuple[int, int], float | None]
"""(number of the trial, rung) -> metric on validation; None for a training that came to nothing."""


def brackets(trials: int, bracket: int) -> list[range]:
    """Numbers of the trials of each bracket, in order; the last one may be smaller."""
    return [range(start, min(start + bracket, trials)) for start in range(0, trials, bracket)]


def sizes(entrants: int, eta: int, num_rungs: int) -> list[int]:
    """How many configurations are trained at each rung: entrants // eta ** rung, at least one."""
    return [max(1, entrants // eta**rung) for rung in range(num_rungs)]


def num_trainings(trials: int, bracket: int, eta: int, num_rungs: int) -> int:
    """Trainings of a whole search."""
    return sum(sum(sizes(len(b), eta, num_rungs)) for b in brackets(trials, bracket))


def promoted(values: Values, numbers: range | list[int], rung: int, count: int) -> list[int]:
    """The best of ``numbers`` at ``rung``, in the order of their numbers.

    Args:
        count: how many; of equals the lower number is kept. What came to nothing never goes on, so
            there may be fewer.
    """
    found = [(number, values.get((number, rung))) for number in numbers]
    ranked = sorted((-value, number) for number, value in found if value is not None)
    return sorted(number for _, number in ranked[:count])


def winner(values: Values, num_rungs: int) -> tuple[int, int] | None:
    """(number, rung) of the best at the highest rung that has a value; None if none has one.

    Values of different rungs are not compared: more training gives more.
    """
    for rung in reversed(range(num_rungs)):
        numbers = [number for number, at in values if at == rung]
        best = promoted(values, numbers, rung, 1)
        if best:
            return best[0], rung
    return None
