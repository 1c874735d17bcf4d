"""What rows the benchmark measures, how they are put together, and the tables among them."""

import os
import sys
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest


@pytest.fixture(scope="module")
def bench():
    from bench import bags, data, floors, grid, runner, tables, timing, versus
    from peers import embedding_bags

    modules = (bags, data, floors, grid, runner, tables, timing, versus, embedding_bags)
    return SimpleNamespace(**{module.__name__.rpartition(".")[2]: module for module in modules})


@pytest.fixture
def settings(bench):
    return bench.grid.Settings("cpu", 0.01, gemm_size=64)


@pytest.fixture
def log(bench):
    return bench.data.LogSpec(num_users=70, num_items=50, num_rows=900)


@pytest.fixture
def rows(bench, settings, log):
    """Rows of those names; the second and later ones are compared with the first."""

    def make(*names):
        first = bench.grid.evaluation_row("ids", log, settings, dim=8, k=5, what=names[0])
        return [
            bench.grid.Row("ids", name, "nothing", first.task, against=names[0] if place else None)
            for place, name in enumerate(names)
        ]

    return make


BAGS = {"num_rows": 90, "dim": 8, "num_bags": 12, "bag_size": 5, "device": "cpu", "seconds": 0.01}


def result(seconds, **changed):
    found = {"seconds": seconds, "cores": 1.0, "amount": 10, "unit": "rows/s"}
    return found | {"peak_memory_mb": 1.0} | changed


def quiet(text):
    pass


def test_the_full_preset_is_the_whole_grid(bench, settings, log):
    rows = bench.grid.own_rows("full", log, settings, most_rows=0)
    for section in ("ids", "features"):
        asked = [row.task for row in rows if row.section == section]
        found = {(task["dim"], task["batch_size"], task["negatives"]) for task in asked}
        sizes = (64, 128, 256), (2_048, 8_192, 32_768, 131_072), (1_024, 8_192, None)
        assert found == set(product(*sizes))
        assert {task["features"] for task in asked} == {section == "features"}


def test_the_standard_preset_shows_every_size(bench):
    dims, batch_sizes, negatives = zip(*bench.grid.STANDARD, strict=True)
    assert set(dims) == set(bench.grid.DIMS)
    assert set(batch_sizes) == set(bench.grid.BATCH_SIZES)
    assert set(negatives) == set(bench.grid.NEGATIVES)


def test_growth_goes_as_far_as_asked_and_no_further(bench, settings):
    def largest(most_rows):
        logs = [row.task["log"] for row in bench.grid.growth_rows(settings, most_rows=most_rows)]
        return tuple(
            max(log[key] for log in logs) for key in ("num_users", "num_items", "num_rows")
        )

    assert largest(1_000_000) == (100_000, 100_000, 1_000_000)
    assert largest(99_999_999) == (1_000_000, 1_000_000, 10_000_000)
    assert largest(100_000_000) == (10_000_000, 10_000_000, 100_000_000)


def test_a_peer_gets_the_floor_of_its_twin_per_positive(bench, rows):
    def measure(row):
        if row.what == "own":
            return result([0.5], gemm=4e9, copy=1e9, flop=8e8, row_bytes=1e8)
        return result([3.0], amount=30)

    own, peer = entries = bench.runner.run_rows(rows("own", "peer"), measure, say=quiet)
    bench.runner.add_floors(entries, bench.runner.median_rates(entries))
    assert (own["floor_s"], own["ratio"]) == pytest.approx((0.2, 0.4))
    # 10 in 0.2 s are 30 in 0.6 s; 20 a second beside 10.
    assert (peer["floor_s"], peer["ratio"], peer["recclr_times"]) == pytest.approx((0.6, 0.2, 2.0))


def test_rates_are_medians_over_the_rows_of_the_run(bench, rows):
    gemm = {"a": 1e9, "b": 5e9, "c": 2e9}
    entries = bench.runner.run_rows(
        rows("a", "b", "c"), lambda row: result([1.0], gemm=gemm[row.what], copy=3e9), say=quiet
    )
    assert bench.runner.median_rates(entries) == bench.floors.Rates(gemm=2e9, copy=3e9)
    assert bench.runner.median_rates([]) is None


def test_other_interpreters_do_not_get_the_libraries_of_this_one(bench, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "mine")
    own = bench.runner._environment(sys.executable)["PYTHONPATH"].split(os.pathsep)
    assert own[-1] == "mine"
    assert bench.runner._environment("other")["PYTHONPATH"] == str(bench.runner.PIPELINES)


def test_tables_stand_beside_each_other(bench, settings):
    def measure(row):
        if row.library == "torchrec":
            return "torchrec is not installed"
        return {"tables": bench.tables, "embedding_bags": bench.embedding_bags}[
            row.module.rpartition(".")[2]
        ].measure(row.task)

    asked = bench.versus.table_rows("smoke", settings)
    own, torch_own, fused = entries = bench.runner.run_rows(asked, measure, rounds=2, say=quiet)
    bench.runner.add_floors(entries, bench.runner.median_rates(entries))
    assert own["amount"] == torch_own["amount"] == 12
    assert torch_own["recclr_times"] == pytest.approx(own["per_s"] / torch_own["per_s"])
    assert torch_own["floor_s"] == pytest.approx(own["floor_s"], rel=1e-12)
    assert own["floor_s"] > 0
    assert own["bound"] == "rows"
    assert fused["skipped"] == "torchrec is not installed"


def test_the_work_of_a_table_by_hand(bench):
    found = bench.tables.measure(BAGS | {"optimizer": "sgd", "gemm_size": 64})
    touched = len(set(bench.bags.draw(BAGS)[0][0].tolist()))
    # 12 sums written and their gradients read; rows read, then read and written by the update.
    assert found["row_bytes"] == 12 * 2 * 4 * 8 + touched * 3 * 4 * 8
    assert (found["amount"], found["flop"]) == (12, 0)


def test_tables_really_train(bench):
    values, table, step = bench.tables.make_step(BAGS | {"optimizer": "rowwise_adagrad"})
    other, other_step = bench.embedding_bags.make_step(BAGS)
    touched = set(values[1].tolist())
    assert 0 < len(touched) < 90
    for weight, do in ((table.weight, step), (other.weight, other_step)):
        before = weight.detach().clone()
        do(1)
        assert set((before != weight).any(1).nonzero().squeeze(1).tolist()) == touched


def test_bags_are_the_same_for_all(bench):
    values, starts, gradient = bench.bags.draw(BAGS)
    again, _, _ = bench.bags.draw(BAGS)
    assert all(np.array_equal(one, other) for one, other in zip(values, again, strict=True))
    assert not np.array_equal(values[0], values[1])
    assert {len(one) for one in values} == {60}
    assert starts.tolist() == list(range(0, 60, 5))
    assert gradient.shape == (12, 8)


@pytest.mark.slow
def test_the_fused_table_is_measured_where_it_is_installed():
    pytest.importorskip("torchrec")
    from peers import torchrec_bags

    found = torchrec_bags.measure(BAGS)
    assert found["amount"] == 12
    assert min(found["seconds"]) > 0
