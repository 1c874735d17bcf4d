"""The search with trainings that cost nothing: a formula stands for them."""

import json
import shutil
from dataclasses import asdict

import pytest

from recclr.errors import ConfigError, MissingExtraError
from recclr.files import write_json_atomic
from recclr.settings import ChoiceSettings, RangeSettings, TuneSettings
from recclr.tune.bench import TRIALS, Job, Trained
from recclr.tune.propose import Tried, propose, require_optuna
from recclr.tune.search import Search, best_so_far
from recclr.tune.space import Space

pytest.importorskip("optuna")

SPACE = Space(
    {
        "a": RangeSettings(low=0.01, high=1.0, log=True),
        "b": RangeSettings(low=1, high=9, int=True),
        "c": ChoiceSettings(choices=("good", "bad", ["odd"])),
    }
)
SETTINGS = TuneSettings(
    trials=11, bracket=6, eta=2, epochs=(0.25, 0.5, 1.0), rows=(0.5, 1.0, 1.0), startup=4
)
DEFAULT = {"a": "learned", "b": 3, "c": "good"}


def formula(job):
    """Best at a = 0.3, b = 7, c = good; more training adds the same to all."""
    if not job.params:
        return 0.2 + 0.1 * job.rung
    distance = abs(job.params["a"] - 0.3) + abs(job.params["b"] - 7) / 10
    return 0.5 - 0.2 * distance - 0.1 * (job.params["c"] != "good") + 0.1 * job.rung


class Fake:
    """Writes what a training would leave behind; of a round, the last one ends first."""

    def __init__(self, out, value=formula, seconds=2.0):
        self.out, self.value, self.seconds, self.rounds = out, value, seconds, []

    def __call__(self, jobs, done):
        self.rounds.append([(job.number, job.rung) for job in jobs])
        for job in reversed(jobs):
            value = self.value(job)
            trained = Trained(
                number=job.number,
                rung=job.rung,
                params=job.params,
                value=value,
                metrics={},
                reason="" if value is not None else "diverged",
                epochs=1.0,
                rows=10,
                best_step=5,
                seconds=self.seconds * (job.rung + 1),
            )
            write_json_atomic(self.out / TRIALS / f"{job.name}.json", asdict(trained))
            done(job)


def search_in(out, runner=None, **changes):
    options = {"settings": SETTINGS, "seed": 5, "round_size": 1, "budget_s": None} | changes
    return Search(
        out=out,
        space=SPACE,
        default=DEFAULT,
        runner=runner or Fake(out),
        on_trained=lambda *facts: None,
        **options,
    )


@pytest.fixture(autouse=True)
def _fast(no_power_cut):
    pass


def files(out):
    return {path.name: path.read_bytes() for path in sorted((out / TRIALS).iterdir())}


def test_counts_are_those_of_a_calculation_by_hand(tmp_path):
    seen = []
    search = search_in(tmp_path)
    search.on_trained = lambda trained, done, total: seen.append((done, total))
    best = search.run()
    # Brackets of 6 and 5: 6 + 3 + 1 and 5 + 2 + 1.
    numbers = [[n for n, rung in search.trained if rung == r] for r in range(3)]
    assert [len(n) for n in numbers] == [11, 5, 2]
    assert seen == [(done, 18) for done in range(1, 19)]
    values = search.values()
    first = sorted(range(6), key=lambda n: -values[n, 0])
    second = sorted(range(6, 11), key=lambda n: -values[n, 0])
    assert sorted(numbers[1]) == sorted(first[:3] + second[:2])
    assert sorted(numbers[2]) == sorted([first[0], second[0]])
    top = max(numbers[2], key=lambda n: values[n, 2])
    assert best == (top, 2)
    assert search.trained[0, 0].params == {}


def test_the_same_seed_finds_the_same_and_another_one_something_else(tmp_path):
    found = {}
    for name, seed in (("one", 5), ("again", 5), ("other", 6)):
        search_in(tmp_path / name, seed=seed).run()
        found[name] = files(tmp_path / name)
    assert found["one"] == found["again"]
    assert found["one"] != found["other"]


@pytest.mark.parametrize("round_size", [1, 4])
def test_a_search_cut_off_anywhere_goes_on_as_if_it_had_not_been(tmp_path, round_size):
    whole = search_in(tmp_path / "whole", round_size=round_size)
    best = whole.run()
    expected = files(tmp_path / "whole")
    order = [key for jobs in whole.runner.rounds for key in jobs]
    for kept in range(0, len(order), 3):
        out = tmp_path / f"cut{kept}"
        (out / TRIALS).mkdir(parents=True)
        for number, rung in order[:kept]:
            name = f"{Job(number, {}, rung).name}.json"
            shutil.copy(tmp_path / "whole" / TRIALS / name, out / TRIALS / name)
        search = search_in(out, round_size=round_size)
        assert search.run() == best
        assert files(out) == expected
        assert [key for jobs in search.runner.rounds for key in jobs] == order[kept:]
        assert search.spent_s == whole.spent_s
        assert list(search.trained) == list(whole.trained) == sorted(whole.trained)


def test_trials_of_a_round_are_chosen_before_any_of_it_is_known(tmp_path):
    search = search_in(tmp_path, round_size=4)
    search.run()
    assert search.runner.rounds[:3] == [
        [(0, 0), (1, 0), (2, 0), (3, 0)],
        [(4, 0), (5, 0)],
        [(n, 1) for n in sorted(n for n, rung in search.trained if rung == 1 and n < 6)],
    ]
    # Two rounds of the first bracket's 6, one each of its 3 and 1; two of 5, one each of 2 and 1.
    assert search.spent_s == 2 * 2 + 4 + 6 + 2 * 2 + 4 + 6


def test_the_budget_ends_the_search_between_rounds(tmp_path):
    search = search_in(tmp_path, budget_s=7.0)
    # Four trials of 2 s each: the first three took 6 s.
    assert search.run()[1] == 0
    assert sorted(search.trained) == [(n, 0) for n in range(4)]
    assert search.stopped_by_budget
    assert not search_in(tmp_path, budget_s=1e6).stopped_by_budget
    further = search_in(tmp_path)
    further.run()
    assert len(further.trained) == 18
    assert not further.stopped_by_budget


def test_a_budget_that_no_trial_fits_is_said(tmp_path):
    with pytest.raises(ConfigError, match="the budget of 0 s was spent"):
        search_in(tmp_path, budget_s=0.0).run()


def test_what_comes_to_nothing_never_goes_on(tmp_path):
    def value(job):
        return None if job.params.get("c") == "good" or job.number in (1, 2, 3, 4, 5) else 0.3

    search = search_in(tmp_path, Fake(tmp_path, value))
    best = search.run()
    assert all(search.values()[n, 0] is not None for n, rung in search.trained if rung)
    # Of the first bracket only the default came to something.
    assert [key for key in search.trained if key[0] < 6 and key[1]] == [(0, 1), (0, 2)]
    assert search.trained[best].value == 0.3


def test_if_nothing_trains_the_reasons_are_said(tmp_path):
    with pytest.raises(ConfigError, match=r"no trial came to anything.*\ndiverged"):
        search_in(tmp_path, Fake(tmp_path, lambda job: None)).run()


# --- proposals -----------------------------------------------------------------------------------


def tried(count, *, rung=1, whole=True):
    found = []
    for number in range(count):
        (params,) = propose(SPACE, found, seed=1, first=number, count=1, startup=8)
        found.append(Tried(params, formula(Job(number, params, 0)), rung, whole))
    return found


def test_values_lie_in_the_space_and_have_its_types():
    for trial in tried(20):
        assert SPACE.holds(trial.params)
        assert type(trial.params["b"]) is int
        assert trial.params["c"] in ("good", "bad", ["odd"])


def test_a_proposal_follows_from_seed_number_and_results():
    known = tried(10)
    first = propose(SPACE, known, seed=1, first=10, count=3, startup=4)
    assert first == propose(SPACE, known, seed=1, first=10, count=3, startup=4)
    assert first != propose(SPACE, known, seed=2, first=10, count=3, startup=4)
    assert first != propose(SPACE, known, seed=1, first=11, count=3, startup=4)
    assert first != propose(SPACE, known[:9], seed=1, first=10, count=3, startup=4)
    assert len({json.dumps(params) for params in first}) == 3


def test_results_draw_proposals_to_where_they_are_good():
    """Planted: one choice is worth more than all else, so it must be asked for most."""
    found = []
    for number in range(40):
        (params,) = propose(SPACE, found, seed=3, first=number, count=1, startup=10)
        value = (params["c"] == "good") * 1.0 + params["b"] / 100
        found.append(Tried(params, value, 1, True))
    late = [trial.params for trial in found[20:]]
    assert sum(params["c"] == "good" for params in late) > 14
    assert sum(params["b"] for params in late) / 20 > 6


def test_whole_trainings_count_more_than_halves_and_failures_least():
    """The good choice is known from whole trainings only; halves say the opposite, louder."""
    whole = [Tried({"a": 0.1, "b": 5, "c": "good"}, 0.1, 2, True)] * 3
    halves = [Tried({"a": 0.1, "b": 5, "c": "bad"}, 0.9, 0, False)] * 9
    failed = [Tried({"a": 0.1, "b": 5, "c": ["odd"]}, None, 0, False)] * 9
    asked = propose(SPACE, [*halves, *failed, *whole], seed=0, first=0, count=1, startup=4)
    assert asked[0]["c"] == "good"


def test_without_optuna_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'recclr\[tune\]'"):
        require_optuna()


def test_the_best_so_far_of_a_rung_never_falls():
    values = [(0, 0.2), (0, 0.1), (1, 0.5), (0, None), (0, 0.4)]
    trained = [
        Trained(n, rung, {}, value, {}, "", 1.0, 1, 1, 0.0)
        for n, (rung, value) in enumerate(values)
    ]
    assert best_so_far(trained, 0) == [(1, 0.2), (2, 0.2), (3, 0.2), (4, 0.2), (5, 0.4)]
    assert best_so_far(trained, 1) == [(3, 0.5), (4, 0.5), (5, 0.5)]
    assert best_so_far(trained, 2) == []
