"""Importance against scipy, and on planted effects."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from recclr.settings import ChoiceSettings, RangeSettings
from recclr.tune import importance as module
from recclr.tune.importance import importance, rank_association, spearman
from recclr.tune.propose import Tried
from recclr.tune.space import Space

pytest.importorskip("optuna")

SPACE = Space(
    {
        "matters": RangeSettings(low=0.0, high=1.0),
        "idle": RangeSettings(low=0.0, high=1.0),
        "which": ChoiceSettings(choices=("x", "y")),
    }
)


def planted(count=40):
    """The value is a falling function of one number, and nothing else."""
    draws = np.random.default_rng(8)
    found = []
    for _ in range(count):
        params = {
            "matters": float(draws.uniform()),
            "idle": float(draws.uniform()),
            "which": str(draws.choice(["x", "y"])),
        }
        found.append(Tried(params, 1 - params["matters"] ** 3, 0, True))
    return found


NUMBERS = st.lists(st.integers(0, 5), min_size=3, max_size=12)


@given(NUMBERS, st.randoms(use_true_random=False))
def test_rank_correlation_is_scipys(numbers, random):
    first = np.array(numbers, dtype=np.float64)
    second = np.array(random.choices(range(4), k=len(numbers)), dtype=np.float64)
    if np.ptp(first) and np.ptp(second):
        expected = stats.spearmanr(first, second).statistic
        assert spearman(first, second) == pytest.approx(expected, abs=1e-12)
    else:
        assert spearman(first, second) == 0.0


@pytest.mark.parametrize("method", ["fanova", "rank"])
def test_the_setting_that_matters_is_found(monkeypatch, method):
    if method == "rank":
        monkeypatch.setattr(module, "_fanova", lambda *arguments: None)
    found = importance(SPACE, planted(), seed=2)
    assert found["method"] == method
    values = found["values"]
    assert set(values) == set(SPACE.parameters)
    assert values["matters"] > 0.8
    assert max(values["idle"], values["which"]) < 0.3
    assert found["direction"]["matters"] == pytest.approx(-1.0)
    assert set(found["direction"]) == {"matters", "idle"}


def test_without_scikit_learn_ranks_stand_in(monkeypatch):
    import optuna

    def absent(**options):
        raise ImportError("sklearn")

    monkeypatch.setattr(optuna.importance, "FanovaImportanceEvaluator", absent)
    assert importance(SPACE, planted(), seed=2)["method"] == "rank"


def test_two_choices_are_like_two_numbers():
    trials = planted(15)
    as_number = np.array([t.params["which"] == "x" for t in trials], dtype=np.float64)
    values = np.array([t.value for t in trials])
    expected = abs(stats.spearmanr(as_number, values).statistic)
    assert rank_association(SPACE, trials)["which"] == pytest.approx(expected)


def test_too_little_to_say_is_nothing():
    assert importance(SPACE, planted(3), seed=0) == {}
    alike = [Tried(trial.params, 0.5, 0, True) for trial in planted(9)]
    assert importance(SPACE, alike, seed=0) == {}
