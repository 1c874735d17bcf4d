"""Which baselines run, and with which settings: chosen by the judge, and by nothing else."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch

import recclr.baselines.choose as choose_module
from recclr.baselines import BaselineChoice, build_baselines, refit_baseline
from recclr.data.log import CategoricalColumn
from recclr.errors import ConfigError, MissingExtraError
from recclr.evaluate import EvaluationSet, evaluate
from recclr.settings.baselines import BASELINE_NAMES, BaselineSettings

KIND = CategoricalColumn((1 + torch.arange(11) % 3).int(), 4)


def build(prepared, judge, *, names=BASELINE_NAMES, dim=3, seed=1, **options):
    settings = BaselineSettings(names=names, **options)
    return build_baselines(prepared, settings=settings, judge=judge, seed=seed, embedding_dim=dim)


@pytest.fixture
def unfitted(monkeypatch):
    """Nothing is fitted; the judge is handed the choices themselves. Returns the list of them."""
    tried = []

    def fit(choice, prepared, seed):
        tried.append(choice)
        return choice

    monkeypatch.setattr(choose_module, "refit_baseline", fit)
    return tried


@pytest.mark.parametrize("budget", ["small", "full"])
def test_the_planted_best_settings_are_chosen(random_prepared, unfitted, budget):
    prepared = random_prepared(1, columns={"kind": KIND})
    build(prepared, lambda choice: 0.0, budget=budget)
    by_name = {name: [c for c in unfitted if c.name == name] for name in BASELINE_NAMES}
    assert all(by_name.values())
    assert sum(map(len, by_name.values())) == len(unfitted)
    # Each of the last, so that neither the first nor an accident can be right.
    best = {name: tried[-1].settings for name, tried in by_name.items()}
    fallback = best["recent_popularity"]["half_life_d"]
    for name in BASELINE_NAMES:
        if "popularity" not in name:
            best[name] = {**best[name], "fallback_half_life_d": fallback}
    choices, skipped = build(prepared, lambda c: float(c.settings == best[c.name]), budget=budget)
    assert {choice.name: choice.settings for choice in choices} == best
    assert [choice.score for choice in choices] == [1.0] * len(BASELINE_NAMES)
    assert skipped == {}


def test_no_settings_are_tried_twice_and_a_larger_budget_tries_more(random_prepared, unfitted):
    prepared = random_prepared(1, columns={"kind": KIND})
    sizes = []
    for budget in ("small", "full"):
        unfitted.clear()
        build(prepared, lambda choice: 0.0, budget=budget)
        keys = [json.dumps([choice.name, choice.settings]) for choice in unfitted]
        assert len(set(keys)) == len(keys)
        sizes.append(len(keys))
    assert sizes[0] < sizes[1]


def test_the_order_of_the_grid_settles_ties_and_a_higher_score_beats_it(random_prepared, unfitted):
    prepared = random_prepared(1)
    names = ("recent_popularity",)
    build(prepared, lambda choice: 0.0, names=names)
    tried = [choice.settings for choice in unfitted]
    choices, _ = build(prepared, lambda choice: 0.3, names=names)
    assert choices == [BaselineChoice("recent_popularity", tried[0], 0.3)]
    values = {json.dumps(s): v for s, v in zip(tried, [1, 5, 5, 2] + [0] * 4, strict=True)}
    choices, _ = build(prepared, lambda c: float(values[json.dumps(c.settings)]), names=names)
    assert choices == [BaselineChoice("recent_popularity", tried[1], 5.0)]


def test_choices_stand_in_the_order_asked_for(random_prepared, unfitted):
    names = ("ease", "popularity", "recent_popularity", "item_knn")
    choices, _ = build(random_prepared(1), lambda choice: 0.0, names=names)
    assert [choice.name for choice in choices] == list(names)
    # Recent popularity is chosen first all the same: the others fall back to its half-life.
    half_life_d = choices[2].settings["half_life_d"]
    assert choices[0].settings["fallback_half_life_d"] == half_life_d


def test_factorisations_get_the_size_of_the_model(random_prepared, unfitted):
    names = ("als", "bpr", "spectral", "ease")
    choices, _ = build(random_prepared(1), lambda choice: 0.0, names=names, dim=17)
    assert [choice.settings.get("dim") for choice in choices] == [17, 17, 17, None]


def test_without_recent_popularity_the_fallback_is_all_of_train(random_prepared):
    prepared = random_prepared(1)
    choices, _ = build(prepared, lambda ranker: 0.0, names=("ease",))
    assert choices[0].settings["fallback_half_life_d"] is None
    strangers = torch.tensor([77])
    found = refit_baseline(choices[0], prepared, 1).top_k(strangers, 5)
    popular = refit_baseline(BaselineChoice("popularity", {}, 0.0), prepared, 1)
    assert torch.equal(found.item_idx, popular.top_k(strangers, 5).item_idx)


def test_settings_are_chosen_on_the_rows_that_are_judged(random_prepared):
    prepared = random_prepared(2, num_rows=150, columns={"kind": KIND})
    later = random_prepared(9).train
    examples = EvaluationSet.from_prepared(replace(prepared, held_out=later))

    def judge(ranker):
        return evaluate(ranker, examples, ks=(4,), slices=("all",)).metrics["all"]["ndcg@4"]

    choices, skipped = build(prepared, judge)
    assert [choice.name for choice in choices] == list(BASELINE_NAMES)
    assert skipped == {}
    for choice in choices:
        # What was chosen is what is fitted again, and it goes through baselines.json.
        stored = BaselineChoice(**json.loads(json.dumps(asdict(choice))))
        assert stored == choice
        assert judge(refit_baseline(stored, prepared, 1)) == pytest.approx(choice.score)
    half_lives = [0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 120.0]
    scores = [
        judge(
            refit_baseline(BaselineChoice("recent_popularity", {"half_life_d": h}, 0), prepared, 1)
        )
        for h in half_lives
    ]
    assert len(set(scores)) > 1
    recent = choices[1]
    assert recent.score == max(scores)
    assert recent.settings == {"half_life_d": half_lives[scores.index(max(scores))]}


def test_data_say_which_baselines_they_do_not_allow(random_prepared, unfitted):
    _, skipped = build(random_prepared(1, with_time=False), lambda choice: 0.0, ease_max_items=10)
    assert skipped == {
        "recent_popularity": "the log has no timestamps",
        "recent_item_knn": "the log has no timestamps",
        "ease": "11 items are more than baselines.ease_max_items = 10",
        "content": "there are no item features",
    }


def test_ease_runs_up_to_its_limit(random_prepared, unfitted):
    prepared = random_prepared(1)
    for limit, left_out in ((11, {}), (10, {"ease"})):
        _, skipped = build(prepared, lambda choice: 0.0, names=("ease",), ease_max_items=limit)
        assert set(skipped) == set(left_out)


def test_without_times_no_half_life_is_tried(random_prepared, unfitted):
    prepared = random_prepared(1, with_time=False, columns={"kind": KIND})
    build(prepared, lambda choice: 0.0, budget="full")
    tried = [choice.settings for choice in unfitted if choice.name == "content"]
    assert tried == [{"half_life_d": None, "fallback_half_life_d": None}]


@pytest.mark.parametrize(("num_users", "num_items"), [(2, 5), (5, 2)])
def test_tiny_logs_are_not_factorised(prepared_of, unfitted, num_users, num_items):
    prepared = prepared_of([(0, 0), (1, 1)], num_users, num_items, days=[1, 2])
    _, skipped = build(prepared, lambda choice: 0.0)
    reason = "a factorisation needs at least 3 users and 3 items"
    assert {name: skipped[name] for name in ("als", "bpr", "spectral")} == dict.fromkeys(
        ("als", "bpr", "spectral"), reason
    )


def test_the_smallest_log_that_is_factorised_works(prepared_of):
    prepared = prepared_of([(0, 0), (1, 1), (2, 2), (0, 1)], 3, 3, days=[1, 2, 3, 4])
    choices, skipped = build(prepared, lambda ranker: 0.0, dim=8)
    assert set(skipped) == {"content"}
    for choice in choices:
        found = refit_baseline(choice, prepared, 1).top_k(torch.arange(4), 3)
        assert found.item_idx.sort(1).values.tolist() == [[0, 1, 2]] * 4


def test_a_missing_library_skips_its_baselines_and_says_what_to_install(
    random_prepared, monkeypatch
):
    monkeypatch.setitem(sys.modules, "implicit.als", None)
    prepared = random_prepared(1)
    names = ("als", "ease")
    choices, skipped = build(prepared, lambda ranker: 0.0, names=names)
    assert [choice.name for choice in choices] == ["ease"]
    assert list(skipped) == ["als"]
    assert "pip install 'recclr[baselines]'" in skipped["als"]
    with pytest.raises(MissingExtraError, match=r"implicit\.als"):
        refit_baseline(BaselineChoice("als", {**ALS, "dim": 2}, 0.0), prepared, 1)


ALS = {"regularization": 0.1, "alpha": 2.0, "iterations": 1}


def test_popularity_needs_no_optional_library():
    program = """
import sys
for name in ("scipy", "scipy.sparse", "sklearn", "implicit", "threadpoolctl"):
    sys.modules[name] = None
import torch
from recclr.baselines import build_baselines
from recclr.data.log import EncodedLog, FeatureTable, Prepared
from recclr.settings.baselines import BaselineSettings
idx = torch.arange(4, dtype=torch.int32)
prepared = Prepared(EncodedLog(idx, idx, 4, 4), FeatureTable(4), FeatureTable(4))
choices, skipped = build_baselines(
    prepared, settings=BaselineSettings(), judge=lambda ranker: 0.0, seed=1, embedding_dim=2
)
assert [choice.name for choice in choices] == ["popularity"], choices
for name in ("item_knn", "als", "bpr", "spectral", "ease"):
    assert "recclr[baselines]" in skipped[name], skipped
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_baseline_is_named_beside_the_known(random_prepared):
    with pytest.raises(ConfigError, match="'svd'; known: popularity, recent_popularity"):
        refit_baseline(BaselineChoice("svd", {}, 0.0), random_prepared(1), 1)


def test_every_baseline_of_the_settings_has_a_grid():
    assert set(choose_module._GRIDS) == set(BASELINE_NAMES)
