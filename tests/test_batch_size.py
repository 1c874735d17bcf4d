"""Batch sizes are tried on real steps, within a budget, and leave nothing behind."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import recclr.batch_size as module
from recclr.batch_size import BatchTrial, fastest, try_batch_sizes
from recclr.config import parse_config
from recclr.data.log import EncodedLog, FeatureTable, Prepared
from recclr.errors import ConfigError
from recclr.stepping import Stepper
from recclr.within import RoomError


def prepared(num_rows=1100):
    draws = torch.Generator().manual_seed(0)
    log = EncodedLog(
        torch.randint(50, (num_rows,), generator=draws).int(),
        torch.randint(70, (num_rows,), generator=draws).int(),
        num_users=50,
        num_items=70,
    )
    return Prepared(log, FeatureTable(50), FeatureTable(70))


def config_of(**train):
    values = {"data": {"events": "none.parquet"}, "model": {"embedding_dim": 4}, "train": train}
    return parse_config(values, source="test")


def config_of_negatives(**negatives):
    values = {"data": {"events": "none.parquet"}, "negatives": negatives}
    return parse_config(values | {"model": {"embedding_dim": 4}}, source="test")


@pytest.fixture
def config():
    return config_of()


def test_sizes_double_up_to_the_whole_log(config):
    shown = []
    trials = try_batch_sizes(config, prepared(), device="cpu", seconds=0.0, on_trial=shown.append)
    assert [trial.batch_size for trial in trials] == [256, 512, 1024, 1100]
    assert shown == trials
    assert all(trial.positives_per_s > 0 for trial in trials)


def test_where_steps_are_replayed_only_those_are_timed(config, monkeypatch):
    calls = []

    class Device:
        """In place of a GPU."""

        def __init__(self, device):
            calls.append([])

        def aside(self, step):
            calls[-1].append("aside")
            return step()

        def capture(self, step, generators):
            return lambda: (calls[-1].append("replay"), step())[1]

    ticks = itertools.count()

    def tick():
        if calls:
            calls[-1].append("clock")
        return next(ticks)

    monkeypatch.setattr("recclr.stepping.plan_graph", lambda *args, **options: True)
    monkeypatch.setattr("recclr.graphs.CudaDevice", Device)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=tick))
    trials = try_batch_sizes(config, prepared(700), device="cpu", seconds=0.0)
    assert [trial.batch_size for trial in trials] == [256, 512, 700]
    for each in calls:
        assert each[:3] == ["aside"] * 3
        assert each.index("replay") < each.index("clock")


def test_each_size_tells_its_duplicates_and_what_it_masks(config):
    """Of 97 rows of one batch: their items, and their users' items among themselves."""
    log = prepared(97).train
    (trial,) = try_batch_sizes(
        config_of_negatives(in_batch=True, uniform=0), prepared(97), device="cpu", seconds=0.0
    )
    distinct = log.item_idx.unique()
    assert trial.duplicate_share == pytest.approx(1 - len(distinct) / 97)
    pairs = {(int(u), int(i)) for u, i in zip(log.user_idx, log.item_idx, strict=True)}
    masked = sum((int(u), int(i)) in pairs for u in log.user_idx for i in distinct)
    assert trial.masked_share == pytest.approx(masked / (97 * len(distinct)))


def test_a_log_smaller_than_the_first_size_is_one_batch(config):
    trials = try_batch_sizes(config, prepared(97), device="cpu", seconds=0.0)
    assert [trial.batch_size for trial in trials] == [97]


def test_speed_counts_the_rows_that_were_there(config, monkeypatch):
    """Of 300 rows the second batch of 256 has 44; the clock ticks once before, once after it."""
    ticks = itertools.count()
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    trials = try_batch_sizes(config, prepared(300), device="cpu", seconds=0.0)
    assert [(trial.batch_size, trial.positives_per_s) for trial in trials] == [
        (256, 22),
        (300, 150),
    ]


def scripted(monkeypatch, peaks):
    """Trials that only report: a peak, or the error it stands for."""

    def trial(config, prepared, size, device, seconds):
        peak = peaks[size]
        if isinstance(peak, type):
            raise peak
        return BatchTrial(size, 1.0, peak)

    monkeypatch.setattr(module, "_trial", trial)


@pytest.mark.parametrize(
    ("peaks", "ran"),
    [
        ({256: 90, 512: 99, 1024: 101}, [256, 512]),  # went beyond
        ({256: 50, 512: 70, 1024: 0}, [256, 512]),  # 70 + 2 * 20 would go beyond: not tried
        ({256: 50, 512: 60, 1024: 80, 1100: 95}, [256, 512, 1024]),  # 80 + 2 * 20 likewise
        ({256: 50, 512: 50, 1024: MemoryError}, [256, 512]),
        ({256: torch.OutOfMemoryError}, []),
        ({256: 50, 512: 50, 1024: RoomError}, [256, 512]),
        ({256: None, 512: None, 1024: None, 1100: None}, [256, 512, 1024, 1100]),
    ],
)
def test_the_budget_is_kept(peaks, ran, config, monkeypatch):
    scripted(monkeypatch, peaks)
    trials = try_batch_sizes(config, prepared(), device="cpu", memory_bytes=100)
    assert [trial.batch_size for trial in trials] == ran


def test_the_fastest_is_the_smallest_that_loses_nothing():
    speeds = {256: 50.0, 512: 96.0, 1024: 100.0, 2048: 80.0}
    trials = [BatchTrial(size, speed, None) for size, speed in speeds.items()]
    assert fastest(trials).batch_size == 512


def test_steps_are_those_of_the_configuration():
    """A setting that does not fit the log is refused as a run would refuse it."""
    with pytest.raises(ConfigError, match="timestamps"):
        try_batch_sizes(config_of(time_cells=True), prepared(), device="cpu")


def test_steps_are_those_of_most_of_a_training(monkeypatch):
    """With a full queue, however many steps of small batches that takes, and with the teacher."""
    seen = []

    class Seen(Stepper):
        def __call__(self, step, **options):
            queue = self.objective.queue
            seen.append((queue.num_filled, queue.queued(0) is not None, self.objective.teacher))
            return super().__call__(step, **options)

    monkeypatch.setattr("recclr.fitting.Stepper", Seen)
    negatives = {"in_batch": True, "queue": {"size": 700, "warmup": 0.9}}
    config = parse_config(
        {
            "data": {"events": "unused.parquet"},
            "model": {"embedding_dim": 4},
            "negatives": negatives,
            "distillation": {"run": "there"},
        }
    )
    data = prepared(300)
    taught = torch.randn(data.train.num_users + 1, 3), torch.randn(data.train.num_items, 3)
    try_batch_sizes(config, replace(data, teacher=taught), device="cpu", seconds=0.0)
    assert seen
    assert all(found[:2] == (700, True) and found[2] is not None for found in seen)


def test_the_command_prints_a_row_per_size(recclr, small_data, monkeypatch):
    scripted(monkeypatch, {256: 50_000_000, 408: None})
    monkeypatch.setattr(module, "_free_bytes", lambda device: 1 << 40)
    events = str(small_data / "events.parquet")
    found = json.loads(recclr("check", events, "--batch-sizes", "--json").out)
    assert [each["batch_size"] for each in found["batch_sizes"]] == [256, 408]
    assert found["fastest_batch_size"] == 256
    shown = recclr("check", events, "--batch-sizes")
    assert "50 MB" in shown.out
    assert "408 is the largest" in shown.err


def test_no_batch_that_fits_is_said(recclr, small_data, monkeypatch):
    scripted(monkeypatch, {256: MemoryError})
    found = recclr("check", str(small_data / "events.parquet"), "--batch-sizes")
    assert found.code == 2
    assert "not even a step" in found.err
