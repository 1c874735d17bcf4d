"""The tables of metrics.json: on whom a ranker is judged, against what, and by how much."""

import json

import polars as pl
import pytest
import torch

from recclr.bootstrap import paired_differences
from recclr.config import Config
from recclr.data.interactions import Log
from recclr.data.prepare import prepare
from recclr.data.reading import read_log
from recclr.errors import ConfigError
from recclr.evaluate import Evaluation, evaluate
from recclr.intervals import resampled
from recclr.judge import collect_results, differences, evaluate_run, judged_by
from recclr.metrics import DEFINITIONS
from recclr.settings import (
    DataSettings,
    EvaluateSettings,
    SplitSettings,
    TowerSettings,
    TrainSettings,
)
from recclr.topk import EmbeddingRanker

NUM_USERS = 60
START = 1_500_000_000


def config_of(events="<memory>", *, refit=True, split=None, **evaluate_settings):
    return Config(
        data=DataSettings(events=str(events)),
        split=split or SplitSettings(valid=0.2, test=0.2),
        train=TrainSettings(refit=refit),
        evaluate=EvaluateSettings(**{"ks": (3, 5), "select": "ndcg@5", **evaluate_settings}),
        seed=3,
    )


def log_of(rows):
    events = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    return Log(events, None, None, DataSettings(events="<memory>"))


def evaluation(name, recall, parts=("all",), chance=None):
    """An evaluation whose NDCG is half its recall, user by user."""
    values = torch.tensor(recall, dtype=torch.float64)
    per_user = {"recall@5": values, "ndcg@5": values / 2, "recall@3": values / 4}
    counts = {"users": len(values), "candidates": 9}
    if chance is not None:
        counts["chance_recall@5"] = chance
    return Evaluation(
        name=name,
        metrics={p: {m: float(v.mean()) for m, v in per_user.items()} for p in parts},
        per_user=dict.fromkeys(parts, per_user),
        counts={p: dict(counts) for p in parts},
    )


def planted():
    draws = torch.Generator().manual_seed(2)
    theirs = torch.rand(NUM_USERS, generator=draws) * 0.5
    same = theirs[torch.randperm(NUM_USERS, generator=draws)]
    return (
        evaluation("model", (theirs + 0.3).tolist()),
        evaluation("worse", theirs.tolist()),
        evaluation("alike", (same + 0.3).tolist()),
    )


def compared(evaluations, config):
    means = resampled(
        [e.per_user for e in evaluations], config.evaluate.num_bootstrap, seed=config.seed
    )
    return differences(evaluations, config, means)


def test_differences_are_the_models_minus_each_baseline_paired_by_user():
    model, worse, alike = planted()
    found = compared([model, worse, alike], config_of(num_bootstrap=500))
    assert list(found) == ["worse", "alike"]
    assert list(found["worse"]["all"]) == ["ndcg@5", "recall@5"]
    better = found["worse"]["all"]["recall@5"]
    # Paired, the difference is 0.3 for every user, whatever the spread between users.
    assert better["difference"] == pytest.approx(0.3)
    assert (better["low"], better["high"]) == pytest.approx((0.3, 0.3))
    assert better["p_value"] == pytest.approx(1 / 501)
    assert found["worse"]["all"]["ndcg@5"]["difference"] == pytest.approx(0.15)
    equal = found["alike"]["all"]["recall@5"]
    assert equal["difference"] == pytest.approx(0, abs=1e-9)
    assert equal["low"] < 0 < equal["high"]
    assert equal["p_value"] > 0.9
    columns = model.per_user["all"]["recall@5"] - alike.per_user["all"]["recall@5"]
    (alone,) = paired_differences(columns[:, None], num_resamples=500, seed=3)
    assert equal == pytest.approx(alone, abs=1e-9)


def test_the_metric_of_selection_is_compared_whatever_it_is():
    model, worse, _ = planted()
    for e in (model, worse):
        e.per_user["all"]["mrr@3"] = e.per_user["all"]["recall@5"] / 8
        e.per_user["all"]["ndcg@3"] = e.per_user["all"]["recall@5"] / 16
    found = compared([model, worse], config_of(select="mrr@3", num_bootstrap=9))
    assert list(found["worse"]["all"]) == ["mrr@3", "recall@3", "ndcg@3"]
    assert found["worse"]["all"]["mrr@3"]["difference"] == pytest.approx(0.3 / 8)


def test_cold_items_are_compared_with_chance():
    parts = ("all", "cold_items_among_cold")
    model = evaluation("model", [0.5, 0.7, 0.9], parts, chance=0.25)
    found = compared([model], config_of(num_bootstrap=50))
    assert list(found) == ["chance"]
    assert list(found["chance"]) == ["cold_items_among_cold"]
    chance = found["chance"]["cold_items_among_cold"]
    assert list(chance) == ["recall@5"]
    assert chance["recall@5"]["difference"] == pytest.approx(0.7 - 0.25)


def test_results_have_the_shape_of_metrics_json():
    model, worse, alike = planted()
    tables = {"valid": [worse], "test": [model, worse, alike], "other": []}
    results = collect_results(tables, config_of(num_bootstrap=40))
    assert json.loads(json.dumps(results, allow_nan=False))["test"] == results["test"]
    assert list(results["test"]) == ["model", "worse", "alike"]
    assert results["test"]["model"]["all"]["recall@5"] == model.metrics["all"]["recall@5"]
    assert results["definitions"] == DEFINITIONS
    assert results["counts"]["test"] == model.counts
    assert "other" not in results
    assert results["differences"]["valid"] == {}
    for name in ("model", "worse"):
        low, high = results["intervals"]["test"][name]["all"]["recall@5"]
        assert low < results["test"][name]["all"]["recall@5"] < high
    # The same resamples: the model is better by 0.3 in each.
    shift = [
        a - b
        for a, b in zip(
            *(results["intervals"]["test"][n]["all"]["recall@5"] for n in ("model", "worse")),
            strict=True,
        )
    ]
    assert shift == pytest.approx([0.3, 0.3])


def test_without_resamples_there_are_no_intervals_and_no_differences():
    model, worse, _ = planted()
    results = collect_results({"test": [model, worse]}, config_of(num_bootstrap=0))
    assert results["differences"]["test"] == {}
    assert results["intervals"]["test"] == {"model": {}, "worse": {}}
    assert results["test"]["worse"] == worse.metrics


TRAIN = [(1, "a", 10), (1, "b", 11), (2, "a", 12), (3, "c", 13)]
VALID = [(1, "c", 20), (2, "b", 21)]
TEST = [(1, "d", 30), (1, "b", 31), (2, "b", 32), (2, "c", 33), (9, "a", 34), (3, "z", 35)]


def planted_run(train, extra=()):
    items = pl.DataFrame({"item_id": ["a", "b", "c", "d"]})
    log = Log(log_of(train).events, None, items, DataSettings(events="<memory>"))
    return prepare(log, None, user=TowerSettings(), item=TowerSettings(), extra_ids=extra)


def test_judged_rows_are_in_the_indices_of_the_model():
    prepared = planted_run(TRAIN)
    tensors, examples = judged_by(prepared, log_of(TEST), config_of())
    assert examples.user_idx.tolist() == [0, 1, 2, 3]
    # User 1 had b; z is outside the corpus; user 9 is unknown, and so comes after the others.
    expected = [["d"], ["b", "c"], [None], ["a"]]
    for row, items in enumerate(expected):
        found = examples.relevant.row(row).numpy()
        assert sorted(prepared.items.decode(found).to_list(), key=str) == items
    assert (examples.num_repeats, examples.num_dropped) == (1, 0)
    assert tensors.held_out is not None
    assert prepared.tensors.held_out is None
    assert tensors.train is prepared.tensors.train


def test_rows_between_train_and_test_are_seen():
    prepared = planted_run(TRAIN, [log_of(VALID)])
    _, examples = judged_by(prepared, log_of(TEST), config_of(), also=log_of(VALID))
    assert examples.num_repeats == 2
    seen = [sorted(prepared.items.decode(examples.seen.row(r).numpy())) for r in range(2)]
    assert seen == [["a", "b", "c"], ["a", "b"]]
    _, kept = judged_by(prepared, log_of(TEST), config_of(keep_seen=True), also=log_of(VALID))
    assert kept.seen is None
    assert kept.num_repeats == 0


@pytest.fixture
def finished(tmp_path):
    """Files of a log, and a function that gives config, data and ranker of a run on them."""
    draws = torch.Generator().manual_seed(5)
    rows = [
        (int(u), f"i{int(i)}", START + 86_400 * t)
        for t, (u, i) in enumerate(
            zip(
                torch.randint(0, 12, (150,), generator=draws),
                torch.randint(0, 17, (150,), generator=draws),
                strict=True,
            )
        )
    ]
    path = tmp_path / "events.parquet"
    log_of(rows).events.write_parquet(path)

    def run(**options):
        config = config_of(path, num_bootstrap=20, **options)
        split = read_log(config.data).split(config.split)
        train = split.train.concat(split.valid) if config.train.refit else split.train
        extra = [] if config.train.refit else [split.valid]
        prepared = prepare(train, None, user=config.user, item=config.item, extra_ids=extra)
        vectors = torch.Generator().manual_seed(6)
        ranker = EmbeddingRanker(
            "model",
            torch.randn(len(prepared.users) + 1, 3, generator=vectors),
            torch.randn(len(prepared.items), 3, generator=vectors),
        )
        return config, split, prepared, ranker

    return run


@pytest.mark.parametrize("refit", [True, False])
def test_a_finished_run_is_judged_as_it_was(finished, refit):
    config, split, prepared, ranker = finished(refit=refit)
    calls = []
    found = evaluate_run(
        config, prepared, ranker, progress=lambda *done_and_all: calls.append(done_and_all)
    )
    assert calls[-1][0] == calls[-1][1] > 0
    also = None if refit else split.valid
    _, examples = judged_by(prepared, split.test, config, also=also)
    expected = evaluate(ranker, examples, ks=(3, 5), num_bootstrap=20, seed=3)
    assert found.metrics == expected.metrics
    assert found.intervals == expected.intervals
    assert found.counts == expected.counts


def test_validation_is_judged_only_where_the_model_has_not_seen_it(finished):
    config, split, prepared, ranker = finished(refit=False)
    found = evaluate_run(config, prepared, ranker, split="valid", ks=(4,))
    _, examples = judged_by(prepared, split.valid, config)
    assert found.metrics == evaluate(ranker, examples, ks=(4,)).metrics
    config, _, prepared, ranker = finished(refit=True)
    with pytest.raises(ConfigError, match="refitted"):
        evaluate_run(config, prepared, ranker, split="valid")


def test_other_events_are_judged_by_the_same_model(finished, tmp_path):
    config, _, prepared, ranker = finished()
    log_of([(3, "i4", START), (77, "i5", START)]).events.write_parquet(tmp_path / "new.parquet")
    found = evaluate_run(config, prepared, ranker, events=str(tmp_path / "new.parquet"), ks=(17,))
    assert found.counts["cold_users"]["users"] == 1
    assert found.metrics["cold_users"]["recall@17"] == 1.0


def test_parts_that_are_not_there_are_refused(finished):
    config, _, prepared, ranker = finished()
    with pytest.raises(ConfigError, match="expected test or valid"):
        evaluate_run(config, prepared, ranker, split="train")
    config = config.model_copy(update={"split": SplitSettings(valid=0.2, test=0.0)})
    with pytest.raises(ConfigError, match="no test part"):
        evaluate_run(config, prepared, ranker)
