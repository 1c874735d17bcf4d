"""``recclr tune`` as a whole: what it leaves behind, killed, resumed, in several processes."""

import json
import os
import signal
import subprocess
import sys

import polars as pl
import pytest

from recclr.checking import read_data
from recclr.commands import _print_tuned
from recclr.config import load_config, with_changes
from recclr.report.tuning import tuning_page
from recclr.tune.halving import sizes

pytest.importorskip("optuna")

SPACE = """
[space]
"loss.temperature" = { low = 0.05, high = 0.5, log = true }
"negatives.uniform" = { low = 8, high = 64, int = true }
"model.similarity" = { choices = ["cosine", "dot"] }

[tune]
trials = 5
bracket = 3
eta = 2
epochs = [0.5, 1.0]
rows = [0.6, 1.0]
startup = 2
"""
SETTINGS = (
    *("--set", "train.epochs=1", "--set", "baselines.names=[]", "--set", "train.refit=false"),
    *("--set", "data.deduplicate=none"),
)
TIMES = {"seconds", "search_s"}


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    path = tmp_path_factory.mktemp("space") / "space.toml"
    path.write_text(SPACE)
    return path


@pytest.fixture(scope="module")
def command(small_config, space):
    def arguments(out, *extra, config=small_config):
        base = ("tune", "--config", config, "--space", space, "--out", out, "--seeds", 2)
        return (*base, "--device", "cpu", *SETTINGS, *extra)

    return arguments


@pytest.fixture(scope="module")
def searched(recclr, command, tmp_path_factory):
    """A finished search; tests read it and never write into it."""
    out = tmp_path_factory.mktemp("searches") / "finished"
    done = recclr(*command(out))
    assert done.code == 0, done.err
    return out, done


def result(out):
    """Contents of tune.json and of trials.jsonl, without what the clock says."""
    lines = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    return without_times([json.loads((out / "tune.json").read_text()), lines])


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(part) for key, part in value.items() if key not in TIMES}
    return [without_times(part) for part in value] if isinstance(value, list) else value


def test_what_a_search_leaves_behind(searched):
    out, done = searched
    assert sorted(path.name for path in out.iterdir()) == [
        *("best.toml", "config.toml", "declared.json", "final", "report.html", "trials"),
        *("trials.jsonl", "tune.json"),
    ]
    found = json.loads((out / "tune.json").read_text())
    # Brackets of 3 and 2: 3 + 1 and 2 + 1.
    assert [rung["trained"] for rung in found["rungs"]] == [5, 2]
    assert sum(sizes(3, 2, 2)) + sum(sizes(2, 2, 2)) == len(list((out / "trials").iterdir())) == 7
    rows = len(read_data(load_config(out / "config.toml"), {}).split.train)
    for trained in found["trainings"]:
        assert trained["rows"] == (round(0.6 * rows), rows)[trained["rung"]]
        assert trained["epochs"] == (0.5, 1.0)[trained["rung"]]
        assert trained["value"] == trained["metrics"]["recall@10"]
    top = [t for t in found["trainings"] if t["rung"] == 1]
    best = max(top, key=lambda t: (t["value"], -t["number"]))
    assert found["winner"] == {"number": best["number"], "rung": 1, "params": best["params"]}
    assert load_config(out / "best.toml") == with_changes(
        load_config(out / "config.toml"), best["params"]
    )
    assert "1 of 7  trial 0, rung 0: recall@10" in done.err
    assert "best: " in done.err
    assert "tuned" in done.out


def test_the_page_shows_it(searched):
    out, _ = searched
    page = (out / "report.html").read_text("utf-8")
    for text in ("search of settings", "Winner and default", "Progress", "What mattered", "Trials"):
        assert text in page
    assert page.count("<svg") == 2
    assert "0 (default)" in page
    assert "60% rows" in page
    assert "similarity = &quot;" in page


def test_the_slice_that_selects_comes_first(searched, capsys):
    out, _ = searched
    found, part = json.loads((out / "tune.json").read_text()), "warm_items"
    assert found["select_slice"] == "all"
    # Whatever won: nothing is said of figures where it is the default.
    found |= {"select_slice": part, "winner": {**found["winner"], "number": 1}}
    tuned = found["final"]["metrics"]["tuned"]
    assert tuned[part]["recall@10"] != tuned["all"]["recall@10"]
    value, users = tuned[part]["recall@10"], found["final"]["counts"][part]["users"]
    config = load_config(out / "config.toml")
    page = tuning_page(found, config, "searched")
    assert f"on validation (warm items) of {value:.4f}" in page
    _print_tuned(found)
    shown = capsys.readouterr().out
    assert f"validation, {part}: {users} users" in shown
    assert f"{value:.4f}" in shown


@pytest.mark.parametrize("which", ["tuned", "default"])
def test_the_end_is_what_single_runs_give(searched, recclr, tmp_path, which):
    """The winner and the default, trained by ``recclr train`` from their files."""
    out, _ = searched
    config = out / ("best.toml" if which == "tuned" else "config.toml")
    run = tmp_path / "run"
    done = recclr("train", "--config", config, "--out", run, "--device", "cpu", "--set", "seed=4")
    assert done.code == 0, done.err
    metrics = json.loads((run / "metrics.json").read_text())["valid"]["model"]["all"]
    final = json.loads((out / "tune.json").read_text())["final"]
    assert final["seeds"] == [3, 4]
    assert final["by_seed"][which][1] == metrics


def test_means_and_differences_belong_together(searched):
    final = json.loads((searched[0] / "tune.json").read_text())["final"]
    means = {
        name: sum(metrics["recall@10"] for metrics in final["by_seed"][name]) / 2
        for name in ("tuned", "default")
    }
    for name, mean in means.items():
        assert final["metrics"][name]["all"]["recall@10"] == pytest.approx(mean)
    found = final["difference"]["all"]["recall@10"]
    assert found["difference"] == pytest.approx(means["tuned"] - means["default"], abs=1e-12)
    assert found["low"] <= found["difference"] <= found["high"]


@pytest.mark.slow
def test_stopped_by_a_signal_and_resumed_it_finds_the_same(
    searched, recclr, command, tmp_path, monkeypatch
):
    out = tmp_path / "search"
    monkeypatch.setattr("recclr.files._reached", {})
    # In the middle of a trial: a bracket of three begins with three steps of each.
    monkeypatch.setenv("RECCLR_FAULT", "train.step:8:term")
    stopped = recclr(*command(out))
    monkeypatch.delenv("RECCLR_FAULT")
    assert stopped.code == 75, stopped.err
    kept = sorted(path.name for path in (out / "trials").iterdir())
    assert 0 < len(kept) < 7
    assert any((out / "running").iterdir())
    assert recclr(*command(out)).code == 2
    changed = recclr(*command(out, "--resume", "--trials", 9))
    assert changed.code == 2
    assert "tune.trials = 5 there, 9 here" in changed.err
    before = {name: (out / "trials" / name).stat().st_mtime_ns for name in kept}
    assert recclr(*command(out, "--resume", "--budget-s", 1e6)).code == 0
    assert {name: (out / "trials" / name).stat().st_mtime_ns for name in kept} == before
    assert result(out) == result(searched[0])
    assert not (out / "running").exists()


class Poison:
    """Held-out rows that nobody may look at."""

    def __getattribute__(self, name):
        raise AssertionError(f"test rows were looked at: {name}")


@pytest.mark.slow
def test_test_rows_are_never_read(
    searched, recclr, command, small_data, small_config, tmp_path, monkeypatch
):
    """Other items in all test rows, and rows that end the search if touched: the same result."""
    split = read_data(load_config(small_config), {}).split
    begins = split.cutoffs["test"]
    events = pl.read_parquet(small_data / "events.parquet")
    other = pl.col("item_id").reverse().over(pl.col("timestamp") >= begins)
    changed = events.with_columns(
        pl.when(pl.col("timestamp") >= begins).then(other).otherwise(pl.col("item_id"))
    )
    assert not changed.equals(events)
    changed.write_parquet(tmp_path / "events.parquet")
    config = tmp_path / "small.toml"
    text = small_config.read_text()
    path = f'events = "{small_data}/events.parquet"'
    assert path in text
    config.write_text(text.replace(path, f'events = "{tmp_path}/events.parquet"'))

    from dataclasses import replace

    from recclr.data.interactions import Log

    cut = Log.split
    monkeypatch.setattr(
        Log, "split", lambda log, settings: replace(cut(log, settings), test=Poison())
    )
    done = recclr(*command(tmp_path / "search", config=config))
    assert done.code == 0, done.err
    assert result(tmp_path / "search") == result(searched[0])


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--trials", 0), "--trials: trials must be between 1 and 100000, found 0"),
        (("--set", "split.valid=0"), "tune needs validation to judge by: set split.valid above 0"),
        (("--set", "loss.tau=0.1"), "unknown key"),
        (("--device", "tpu"), "expected auto, cpu, cuda"),
    ],
)
def test_refusals_leave_no_trial_behind(recclr, command, tmp_path, extra, message):
    done = recclr(*command(tmp_path / "search", *extra))
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "search" / "trials").exists()


def test_without_optuna_it_says_what_to_install(recclr, command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    done = recclr(*command(tmp_path / "search"))
    assert done.code == 2
    assert "pip install 'recclr[tune]'" in done.err
    assert not (tmp_path / "search").exists()


def test_a_space_in_which_nothing_trains_ends_with_the_reason(recclr, command, tmp_path):
    """A history of features that no item has: that shows when a model is built."""
    path = tmp_path / "space.toml"
    path.write_text(
        '[space]\n"train.table_lr" = { low = 0.01, high = 0.02 }\n[tune]\ntrials = 2\n'
        "epochs = [1.0]\nrows = [1.0]\n"
    )
    extra = ("--set", "user.history.use=features", "--set", "item.features={}")
    done = recclr(*command(tmp_path / "search", *extra, "--space", path))
    assert done.code == 2
    assert "no trial came to anything" in done.err
    assert "user.history.use" in done.err


# --- processes, and their ends -------------------------------------------------------------------


def run(arguments, fault=""):
    environment = os.environ | {"RECCLR_FAULT": fault, "CUDA_VISIBLE_DEVICES": ""}
    program = [sys.executable, "-m", "recclr", *map(str, arguments)]
    return subprocess.run(program, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    ["train.step:3", "train.step:14", "files.rename:4", "files.write:13", "files.rename:35"],
)
def test_killed_it_finds_the_same(searched, command, tmp_path, fault):
    out = tmp_path / "search"
    killed = run(command(out), f"{fault}:kill")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = run(command(out, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert result(out) == result(searched[0])


@pytest.fixture(scope="module")
def searched_by_two(command, tmp_path_factory):
    """A finished search of two processes."""
    out = tmp_path_factory.mktemp("searches") / "by_two"
    done = run(command(out, "--processes", 2))
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return out


@pytest.mark.slow
def test_a_round_ends_the_same_whoever_ends_it(searched_by_two, command, tmp_path):
    declared = json.loads((searched_by_two / "declared.json").read_text())
    assert declared["round_size"] == 2
    # The fault is that of each process: a worker dies in its second trial, then this one ends.
    out = tmp_path / "search"
    killed = run(command(out, "--processes", 2), "train.step:9:kill")
    assert killed.returncode == 75, killed.stderr
    assert "a worker was ended by signal 9" in killed.stderr
    resumed = run(command(out, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert result(out) == result(searched_by_two)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_workers_end_with_the_one_that_started_them(
    searched_by_two, command, tmp_path, number, code
):
    out = tmp_path / "search"
    program = [sys.executable, "-m", "recclr", *map(str, command(out, "--processes", 2))]
    process = subprocess.Popen(program, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "1 of 7" in line:
            process.send_signal(number)
            break
    assert process.wait() == code
    process.stderr.close()
    # Waits for workers that have not noticed yet.
    resumed = run(command(out, "--resume", "--processes", 2))
    assert resumed.returncode == 0, resumed.stderr
    assert result(out) == result(searched_by_two)
