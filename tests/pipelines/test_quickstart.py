"""The quickstart runs as a user would run it, and leaves behind what it says."""

import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from recclr.data.synthetic import generate_log
from recclr.export import recommend_from_store

SCRIPT = Path(__file__).parents[2] / "pipelines" / "quickstart.py"


@pytest.fixture(scope="module")
def log():
    return generate_log(num_users=120, num_items=90, num_events=1_500, num_days=40, seed=4)


@pytest.fixture(scope="module")
def done(log, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    log.write(folder / "mine")
    tables = [f"--{name}={folder / 'mine' / name}.parquet" for name in ("events", "items")]
    command = [sys.executable, SCRIPT, *tables, f"--out={folder / 'out'}", "--epochs=1", "--k=7"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    return folder / "out", result.stdout


@pytest.mark.slow
def test_it_prints_figures_and_what_was_verified(done):
    _, printed = done
    assert "recall@20" in printed
    assert "verified" in printed


@pytest.mark.slow
def test_everyone_gets_items_that_they_did_not_have(done, log):
    out, _ = done
    found = pl.read_parquet(out / "recommendations.parquet")
    assert set(found.group_by("user_id").len()["len"]) == {7}
    cutoff = log.events["timestamp"].sort()[int(0.8 * log.events.height) - 1]
    before = log.events.filter(pl.col("timestamp") < cutoff)
    assert set(before["user_id"]) <= set(found["user_id"])
    assert found.join(before, on=["user_id", "item_id"]).is_empty()


@pytest.mark.slow
def test_the_store_gives_the_same_ranking(done, log):
    out, _ = done
    found = pl.read_parquet(out / "recommendations.parquet")
    nothing_seen = recommend_from_store(
        f"lancedb:{out / 'store'}", found["user_id"].unique().sort().head(5), k=90
    )
    had_left_out = nothing_seen.join(log.events, on=["user_id", "item_id"], how="anti")
    both = had_left_out.join(found, on=["user_id", "item_id"], suffix="_here")
    assert both.height > 0
    assert (both["score"] - both["score_here"]).abs().max() < 1e-5


@pytest.mark.slow
def test_without_arguments_it_generates_a_log(tmp_path):
    command = [sys.executable, SCRIPT, f"--out={tmp_path}", "--epochs=0.1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "data" / "events.parquet").is_file()
    assert (tmp_path / "recommendations.parquet").is_file()


def test_help_says_how_to_use_it():
    result = subprocess.run(
        [sys.executable, SCRIPT, "--help"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0
    assert "--events" in result.stdout
