"""The demo, on a log small enough to wait for."""

import polars as pl
import pytest

from recclr.data.synthetic import generate_log
from recclr.demo import run_demo
from recclr.errors import ConfigError
from recclr.export import recommend_from_store


@pytest.fixture(scope="module")
def log():
    return generate_log(num_users=250, num_items=200, num_events=5_000, num_days=60, seed=3)


@pytest.fixture(scope="module")
def result(log, tmp_path_factory):
    return run_demo(tmp_path_factory.mktemp("demo"), log=log, device="cpu")


@pytest.mark.slow
def test_the_model_is_judged_beside_every_baseline_of_the_demo(result):
    rankers = {"model", "popularity", "recent_popularity", "recent_item_knn", "als", "ease"}
    for split in ("valid", "test"):
        assert set(result.metrics[split]) == rankers
        assert set(result.metrics["intervals"][split]) == rankers
    assert result.metrics["skipped_baselines"] == {}


@pytest.mark.slow
def test_the_report_is_written_and_complete(result):
    page = result.report.read_text("utf-8")
    assert "Not in the run folder" not in page
    assert f"{result.metrics['test']['model']['all']['recall@20']:.4f}" in page


@pytest.mark.slow
def test_the_store_answers_with_items_that_the_users_did_not_have(result, log):
    asked = log.users["user_id"].head(3)
    assert result.answer["user_id"].to_list() == [user for user in asked for _ in range(5)]
    assert result.answer["rank"].to_list() == [1, 2, 3, 4, 5] * 3
    assert set(result.answer["item_id"]) <= set(log.items["item_id"])
    assert result.answer.join(log.events, on=["user_id", "item_id"]).is_empty()


@pytest.mark.slow
def test_the_store_answers_again_for_who_it_never_saw(result):
    strangers = pl.Series(["nobody"])
    assert recommend_from_store(f"lancedb:{result.store}", strangers, k=7).height == 7


def test_a_folder_with_something_in_it_is_left_alone(tmp_path, log):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="--out"):
        run_demo(tmp_path, log=log)
    with pytest.raises(ConfigError, match="--out"):
        run_demo(tmp_path / "thesis.txt", log=log)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
