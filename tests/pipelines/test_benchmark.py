"""The benchmark measures what it says, on sizes that take no time."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from recclr.data.log import EncodedLog
from recclr.settings import LossSettings

PATH = Path(__file__).parents[2] / "pipelines" / "benchmark.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def log():
    draws = torch.Generator().manual_seed(0)
    users = torch.randint(70, (900,), generator=draws).int()
    items = torch.randint(50, (900,), generator=draws).int()
    return EncodedLog(users, items, 70, 50)


def sane(row) -> None:
    assert row["measured_s"] > 0
    assert row["repeats"] >= 1
    assert row["ratio"] == pytest.approx(row["floor_s"] / row["measured_s"])


def test_a_training_row_counts_positives_and_its_floor(benchmark, log):
    row = benchmark.train_row(log, 1e9, batch_size=64, uniform=32, dim=8, seconds=0.05)
    sane(row)
    assert row["floor_s"] == pytest.approx(6 * 64 * 32 * 8 / 1e9)
    assert row["per_s"] == pytest.approx(64 / row["measured_s"])


def test_an_evaluation_row_counts_users_and_its_floor(benchmark, log):
    row = benchmark.evaluation_row(log, 1e9, dim=8, k=5)
    sane(row)
    assert row["floor_s"] == pytest.approx(2 * 70 * 50 * 8 / 1e9)
    assert row["per_s"] == pytest.approx(70 / row["measured_s"])


def test_training_in_the_benchmark_really_trains(benchmark, log):
    # A step that skipped the update would look fast.
    before = benchmark.fresh_model(log, LossSettings(temperature=0.08), 8)
    trained = []
    make = benchmark.fresh_model

    def remembered(*arguments):
        trained.append(make(*arguments))
        return trained[-1]

    benchmark.fresh_model = remembered
    try:
        benchmark.train_row(log, 1e9, batch_size=64, uniform=32, dim=8, seconds=0.05)
    finally:
        benchmark.fresh_model = make
    changed = [
        name
        for (name, old), (_, new) in zip(
            before.named_parameters(), trained[0].named_parameters(), strict=True
        )
        if not torch.equal(old, new)
    ]
    assert changed


@pytest.mark.slow
def test_the_rate_is_that_of_a_product(benchmark):
    rate = benchmark.gemm_rate("cpu")
    assert math.isfinite(rate)
    assert rate > 1e8


def test_a_log_is_generated_where_there_are_no_data(benchmark, monkeypatch, tmp_path):
    monkeypatch.setenv("RECCLR_DATA", str(tmp_path))
    log, source = benchmark.gowalla_log()
    assert source == "generated"
    assert len(log) == benchmark.NUM_ROWS
    assert int(log.user_idx.max()) < log.num_users == benchmark.NUM_USERS
    assert int(log.item_idx.max()) < log.num_items == benchmark.NUM_ITEMS
    counts = log.item_counts().sort(descending=True).values
    assert counts[:4098].sum() > 0.2 * counts.sum()


def test_the_whole_benchmark_writes_its_rows(benchmark, log, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "gowalla_log", lambda: (log, "tiny"))
    monkeypatch.setattr(benchmark, "gemm_rate", lambda device: 1e9)
    benchmark.main(json_file=tmp_path / "rows.json", device="cpu", seconds=0.01)
    report = json.loads((tmp_path / "rows.json").read_text())
    assert (report["log"], report["device"]) == ("tiny", benchmark.device_name("cpu"))
    assert report["peak_memory_mb"] > 1
    printed = capsys.readouterr().out
    assert len(report["rows"]) == 5
    for row in report["rows"]:
        sane(row)
        assert row["what"].split()[0] in printed
