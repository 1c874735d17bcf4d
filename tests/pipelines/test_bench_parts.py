"""What the benchmark is made of: floors, rows, child processes, rounds, memory, logs."""

import dataclasses
import os
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from bench import bags, data, floors, grid, memory, runner, tables, timing, training
from peers import embedding_bags

SETTINGS = grid.Settings("cpu", 0.01, gemm_size=64)
LOG = data.LogSpec(70, 50, 900)


def task(**changed):
    row = grid.training_row("ids", LOG, SETTINGS, dim=8, batch_size=64, negatives=32)
    return row.task | changed


def a_row(what="a", **changed):
    return grid.Row("ids", what, "bench.training", task(), **changed)


def a_result(seconds, **changed):
    return {"seconds": seconds, "amount": 10, "unit": "rows/s", "peak_memory_mb": 1.0} | changed


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_the_work_of_a_step_by_hand():
    work = floors.training_work(
        batch_size=64, num_candidates=32, dim=8, num_vectors=96, num_touched=80, optimizer="adam"
    )
    assert work.flop == 98_304
    assert work.row_bytes == 96 * 64 + 80 * (28 * 8 + 8) == 24_704
    rates = floors.Rates(gemm=98_304e3, copy=24_704e2)
    assert work.gemm_s(rates) == pytest.approx(0.001)
    assert work.floor_s(rates) == pytest.approx(0.01)
    assert work.bound(rates) == "rows"
    assert work.bound(floors.Rates(gemm=98_304e3, copy=1e12)) == "gemm"


def test_a_step_counts_what_it_looked_up():
    asked = task(negatives=None)
    _, step = training.make_step(asked)
    counts = {}
    step(0, counts)
    settings = training.TrainSettings(batch_size=64)
    log = data.make_log(LOG)
    batch = training.BatchSource(log, settings, seed=0, time_cells=False).batch(0)
    users = len(set(batch.user_idx.tolist()))
    # A vector for each row's user and for every item of the catalogue.
    assert counts == {
        "batch_size": 64,
        "num_candidates": 50,
        "num_vectors": 64 + 50,
        "num_touched": users + 50,
    }


@pytest.mark.parametrize("features", [False, True])
def test_a_step_really_trains(features):
    # One that skipped the update would look fast.
    model, step = training.make_step(task(features=features))
    before = {name: value.clone() for name, value in model.weights().items()}
    step(0)
    step(1)
    after = model.weights()
    for name in model.tables():
        assert not torch.equal(before[f"{name}.weight"], after[f"{name}.weight"]), name


def test_a_table_counts_its_bags():
    asked = {"num_rows": 90, "dim": 8, "num_bags": 12, "bag_size": 5, "optimizer": "sgd"}
    asked |= {"device": "cpu", "seconds": 0.01, "gemm_size": 64}
    found = tables.measure(asked)
    touched = len(set(bags.draw(asked)[0][0].tolist()))
    assert found["row_bytes"] == 12 * 8 * 8 + touched * 12 * 8
    assert (found["amount"], found["flop"]) == (12, 0)


def test_tables_really_train():
    asked = {"num_rows": 90, "dim": 8, "num_bags": 12, "bag_size": 5, "device": "cpu"}
    values, table, step = tables.make_step(asked | {"optimizer": "rowwise_adagrad"})
    other, other_step = embedding_bags.make_step(asked)
    touched = set(values[1].tolist())
    assert 0 < len(touched) < 90
    for weight, do in ((table.weight, step), (other.weight, other_step)):
        before = weight.detach().clone()
        do(1)
        assert set((before != weight).any(1).nonzero().squeeze(1).tolist()) == touched


def test_bags_are_the_same_for_all():
    asked = {"num_rows": 90, "dim": 8, "num_bags": 12, "bag_size": 5}
    values, starts, gradient = bags.draw(asked)
    again, _, _ = bags.draw(asked)
    assert all(np.array_equal(one, other) for one, other in zip(values, again, strict=True))
    assert not np.array_equal(values[0], values[1])
    assert {len(one) for one in values} == {60}
    assert starts.tolist() == list(range(0, 60, 5))
    assert gradient.shape == (12, 8)


def test_the_full_preset_is_the_whole_grid():
    rows = grid.own_rows("full", LOG, SETTINGS, most_rows=0)
    for section in ("ids", "features"):
        asked = [row.task for row in rows if row.section == section]
        found = {(t["dim"], t["batch_size"], t["negatives"]) for t in asked}
        sizes = (64, 128, 256), (2_048, 8_192, 32_768, 131_072), (1_024, 8_192, None)
        assert found == set(product(*sizes))
        assert {t["features"] for t in asked} == {section == "features"}


def test_the_standard_preset_shows_every_size_once():
    dims, batch_sizes, negatives = zip(*grid.STANDARD, strict=True)
    assert set(dims) == set(grid.DIMS)
    assert set(batch_sizes) == set(grid.BATCH_SIZES)
    assert set(negatives) == set(grid.NEGATIVES)


@pytest.mark.parametrize("preset", ["smoke", "standard", "full"])
def test_names_of_rows_are_distinct(preset):
    # A peer finds its twin by name.
    rows = grid.own_rows(preset, LOG, SETTINGS, most_rows=100_000_000)
    names = [(row.section, row.what) for row in rows]
    assert len(set(names)) == len(names)


def test_growth_goes_as_far_as_asked_and_no_further():
    def largest(most_rows):
        rows = grid.growth_rows(SETTINGS, most_rows=most_rows)
        logs = [row.task["log"] for row in rows]
        return tuple(
            max(log[key] for log in logs) for key in ("num_users", "num_items", "num_rows")
        )

    assert largest(1_000_000) == (100_000, 100_000, 1_000_000)
    assert largest(99_999_999) == (1_000_000, 1_000_000, 10_000_000)
    assert largest(100_000_000) == (10_000_000, 10_000_000, 100_000_000)


def test_a_row_that_does_not_fit_is_skipped_with_a_reason():
    (entry,) = runner.run_rows([a_row(needed_bytes=1 << 50)], pytest.fail, say=lambda text: None)
    if memory.available_bytes() is None:
        pytest.skip("this system does not say how much memory is free")
    assert entry["skipped"].startswith("needs about 1048576.0 GiB")


def test_rounds_go_over_all_rows_in_turn_and_are_joined():
    asked = []

    def measure(row):
        asked.append(row.what)
        if row.what == "b":
            return "no"
        return a_result([3.0, 1.0] if asked.count("a") == 1 else [9.0], peak_memory_mb=len(asked))

    first, second = runner.run_rows(
        [a_row("a"), a_row("b")], measure, rounds=2, say=lambda text: None
    )
    assert asked == ["a", "b", "a"]
    assert (first["measured_s"], first["repeats"], first["rounds"]) == (3.0, 3, 2)
    assert first["per_s"] == pytest.approx(10 / 3)
    assert first["peak_memory_mb"] == 3
    assert second["skipped"] == "no"


def test_rates_are_medians_over_the_rows_of_the_run():
    rows = [a_row("a"), a_row("b"), a_row("c")]
    gemm = {"a": 1e9, "b": 5e9, "c": 2e9}
    entries = runner.run_rows(
        rows, lambda row: a_result([1.0], gemm=gemm[row.what], copy=3e9), say=lambda text: None
    )
    assert runner.median_rates(entries) == floors.Rates(gemm=2e9, copy=3e9)
    assert runner.median_rates([]) is None


def test_a_peer_gets_the_floor_of_its_twin_per_positive():
    def measure(row):
        if row.what == "own":
            return a_result([0.5], gemm=4e9, copy=1e9, flop=8e8, row_bytes=1e8)
        return a_result([3.0], amount=30)

    own, peer = runner.run_rows(
        [a_row("own"), a_row("peer", against="own")], measure, say=lambda text: None
    )
    runner.add_floors([own, peer], runner.median_rates([own, peer]))
    assert (own["floor_s"], own["ratio"]) == pytest.approx((0.2, 0.4))
    assert own["bound"] == "gemm"
    # 10 in 0.2 s are 30 in 0.6 s; 20 a second beside 10.
    assert (peer["floor_s"], peer["ratio"], peer["recclr_times"]) == pytest.approx((0.6, 0.2, 2.0))


def child(row, *interpreters, limit_s=100):
    return runner.in_child(row, limit_s=limit_s, interpreters=interpreters or (sys.executable,))


def test_the_first_interpreter_that_has_the_library_measures(tmp_path):
    bag = {"num_rows": 90, "dim": 8, "num_bags": 12, "bag_size": 5, "seconds": 0.01}
    row = grid.Row("tables", "t", "peers.embedding_bags", bag | {"device": "cpu"}, library="torch")
    without = script(tmp_path / "python", "exit 66")
    assert child(row, without) == "torch is not installed"
    found = child(row, without, sys.executable)
    assert found["version"] == torch.__version__
    assert len(found["seconds"]) >= 3


def test_a_child_that_fails_says_why(tmp_path):
    row = a_row()
    assert child(dataclasses.replace(row, library="no_such_library")) == (
        "no_such_library is not installed"
    )
    broken = dataclasses.replace(row, module="bench.no_such_module")
    assert child(broken) == "ModuleNotFoundError: No module named 'bench.no_such_module'"
    assert "signal 9" in child(row, script(tmp_path / "killed", "kill -9 $$"))
    assert child(row, script(tmp_path / "silent", "exit 3")) == "exit code 3"
    assert child(row, str(tmp_path / "nowhere")).endswith("No such file or directory")
    assert child(row, script(tmp_path / "slow", "exec sleep 50"), limit_s=0.3) == (
        "took more than 0.3 s"
    )


def test_other_interpreters_do_not_get_this_one_s_libraries(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "mine")
    own = runner._environment(sys.executable)["PYTHONPATH"].split(os.pathsep)
    other = runner._environment("other")["PYTHONPATH"].split(os.pathsep)
    assert own[-1] == "mine"
    assert other == [str(runner.PIPELINES)]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_peak_is_that_since_the_reset():
    memory.reset_peak()
    before = memory.peak_mb()
    block = np.ones(80 << 17)
    high = memory.peak_mb()
    del block
    assert high >= before + 75
    # The system counts in batches of pages.
    assert memory.peak_mb() == pytest.approx(high, abs=1)
    memory.reset_peak()
    assert memory.peak_mb() <= high - 75


def test_calls_are_repeated_for_the_time_asked():
    numbers = []
    times = timing.repeated(numbers.append, 0.02)
    assert numbers == list(range(len(numbers)))
    assert len(times) >= 3
    assert len(numbers) - len(times) >= 1
    assert sum(times) <= 0.2


def test_slow_calls_are_repeated_three_times_and_very_slow_ones_once():
    assert len(timing.repeated(lambda number: time.sleep(0.11), 0.1)) == 3
    assert len(timing.repeated(lambda number: time.sleep(0.06), 0.01)) == 1


def test_a_log_is_generated_where_there_are_no_data(monkeypatch, tmp_path):
    monkeypatch.setenv("RECCLR_DATA", str(tmp_path))
    spec = data.gowalla()
    assert str(spec).startswith("generated: 29,858 users")
    log = data.make_log(spec)
    assert len(log) == 810_128
    assert int(log.user_idx.max()) < 29_858
    assert int(log.item_idx.max()) < 40_981
    counts = log.item_counts().sort(descending=True).values
    assert counts[:4_098].sum() > 0.2 * counts.sum()


def test_others_get_the_same_log(tmp_path):
    told = data.write_arrays(LOG, tmp_path)
    log = data.make_log(LOG)
    assert np.array_equal(np.load(told["users"]), log.user_idx.numpy())
    assert np.array_equal(np.load(told["items"]), log.item_idx.numpy())
    assert (told["num_users"], told["num_items"]) == (70, 50)
