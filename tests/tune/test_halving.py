"""Counts against a calculation by hand, choices against a slow rule."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recclr.tune.halving import brackets, num_trainings, promoted, sizes, winner


def test_brackets_take_the_trials_in_order_and_the_last_takes_the_rest():
    assert [list(b) for b in brackets(7, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [list(b) for b in brackets(2, 9)] == [[0, 1]]


@pytest.mark.parametrize(
    ("entrants", "eta", "rungs", "expected"),
    [
        (27, 3, 4, [27, 9, 3, 1]),
        (9, 3, 3, [9, 3, 1]),
        (8, 3, 3, [8, 2, 1]),
        (5, 2, 4, [5, 2, 1, 1]),
        (1, 2, 2, [1, 1]),
    ],
)
def test_counts_of_a_bracket(entrants, eta, rungs, expected):
    assert sizes(entrants, eta, rungs) == expected


def test_trainings_of_a_whole_search():
    # Three brackets of 9: 9 + 3 + 1 each; one of 2: 2 + 1 + 1.
    assert num_trainings(29, 9, 3, 3) == 3 * 13 + 4


VALUES = st.lists(st.none() | st.sampled_from([0.1, 0.2, 0.3, 0.4]), min_size=1, max_size=12)


@given(VALUES, st.integers(1, 6))
def test_those_go_on_that_few_others_beat(values, count):
    table = {(number, 1): value for number, value in enumerate(values)}
    table |= {(number, 0): 0.9 for number in range(len(values))}
    expected = []
    for number, value in enumerate(values):
        if value is None:
            continue
        worth = (value, -number)
        others = [(other, -n) for n, other in enumerate(values) if other is not None]
        if sum(other > worth for other in others) < count:
            expected.append(number)
    assert promoted(table, range(len(values)), 1, count) == expected


def test_the_winner_is_the_best_of_the_highest_rung_that_came_to_something():
    table = {(0, 0): 0.5, (1, 0): 0.9, (2, 0): None, (0, 1): 0.3, (1, 1): None, (0, 2): None}
    assert winner(table, 3) == (0, 1)
    assert winner({(3, 0): 0.2, (2, 0): 0.2}, 3) == (2, 0)
    assert winner({(0, 0): None}, 2) is None
    assert winner({}, 2) is None
