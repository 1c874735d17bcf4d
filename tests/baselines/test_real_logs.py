"""The baselines on MovieLens 100k, chosen on validation and judged on test as a run does it."""

from pathlib import Path

import pytest
import torch

from recclr.baselines import build_baselines, refit_baseline
from recclr.bootstrap import paired_differences
from recclr.data.files import expand_path
from recclr.data.prepare import prepare
from recclr.data.reading import read
from recclr.evaluate import EvaluationSet, evaluate
from recclr.settings import FeatureSettings, SplitSettings, TowerSettings
from recclr.settings.baselines import BaselineSettings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def movies():
    folder = Path(expand_path("${RECCLR_DATA}")) / "ml-100k"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set RECCLR_DATA")
    return read(folder / "interactions.parquet", items=folder / "items.parquet")


def judged(log, split_settings, names):
    """{baseline: Evaluation on test}."""
    split = log.split(split_settings)
    item = TowerSettings(features={"genres": FeatureSettings(kind="multi_hot")})
    valid = prepare(split.train, split.valid, user=TowerSettings(), item=item).tensors
    refit = split.train.concat(split.valid)
    test = prepare(refit, split.test, user=TowerSettings(), item=item).tensors
    examples = EvaluationSet.from_prepared(valid)

    def judge(ranker):
        return evaluate(ranker, examples, ks=(20,), slices=("all",)).metrics["all"]["recall@20"]

    choices, skipped = build_baselines(
        valid, settings=BaselineSettings(names=names), judge=judge, seed=1, embedding_dim=64
    )
    assert not skipped
    examples = EvaluationSet.from_prepared(test)
    rankers = [refit_baseline(choice, test, 1) for choice in choices]
    return {ranker.name: evaluate(ranker, examples, ks=(20,)) for ranker in rankers}


def lead_over_popularity(found, name):
    """Recall@20 over that of popularity, and the p-value of the difference."""
    recall = {n: found[n].per_user["all"]["recall@20"] for n in (name, "popularity")}
    difference = (recall[name] - recall["popularity"])[:, None]
    (judged_by_user,) = paired_differences(difference, num_resamples=2000)
    ratio = float(recall[name].mean() / recall["popularity"].mean())
    return ratio, judged_by_user["p_value"]


def test_everything_that_learns_from_interactions_beats_popularity(movies):
    names = ("popularity", "item_knn", "als", "bpr", "spectral", "ease", "content")
    found = judged(movies, SplitSettings(by="random", valid=0.1, test=0.1), names)
    for name in ("item_knn", "als", "bpr", "spectral", "ease"):
        ratio, p_value = lead_over_popularity(found, name)
        assert ratio > 1.3, name
        assert p_value < 0.001, name
    # Genres alone do not; but they are not chance either.
    ratio, p_value = lead_over_popularity(found, "content")
    assert ratio < 1
    chance = 20 / found["content"].counts["all"]["candidates"]
    assert found["content"].metrics["all"]["recall@20"] > 2 * chance


def test_where_taste_moves_recency_beats_popularity(movies):
    names = ("popularity", "recent_popularity", "recent_item_knn")
    found = judged(movies, SplitSettings(by="time", valid=0.1, test=0.1), names)
    for name in names[1:]:
        ratio, p_value = lead_over_popularity(found, name)
        assert ratio > 1.2, name
        assert p_value < 0.01, name
    strangers = found["recent_item_knn"].per_user["cold_users"]["recall@20"]
    assert torch.equal(strangers, found["recent_popularity"].per_user["cold_users"]["recall@20"])
