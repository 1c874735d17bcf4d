"""Batches: each row once an epoch, the moment things are seen at, nothing remembered."""

import pytest
import torch

import recclr.batches as batches_module
from recclr.batches import BatchSource
from recclr.data.log import EncodedLog
from recclr.errors import ConfigError
from recclr.settings import TrainSettings
from recclr.statistics import DAY_S

NUM_ROWS = 53


def log(*, timed=True, weighted=False):
    rows = torch.arange(NUM_ROWS)
    return EncodedLog(
        (rows % 7).int(),
        rows.int(),  # the item names the row
        7,
        NUM_ROWS,
        timestamp=rows * DAY_S if timed else None,
        weight=rows.float() + 1 if weighted else None,
    )


def source(*, batch_size=8, time_cells=False, staleness_d=0.0, **kinds):
    settings = TrainSettings(batch_size=batch_size, staleness_d=staleness_d)
    return BatchSource(log(**kinds), settings, seed=5, time_cells=time_cells)


@pytest.mark.parametrize("batch_size", [1, 8, 53, 100])
def test_an_epoch_shows_every_row_once(batch_size):
    made = source(batch_size=batch_size, timed=False)
    for epoch in range(3):
        steps = range(epoch * made.steps_per_epoch, (epoch + 1) * made.steps_per_epoch)
        rows = torch.cat([made.batch(step).item_idx for step in steps])
        assert torch.equal(rows.sort().values, torch.arange(NUM_ROWS))


def test_epochs_differ_and_shuffle():
    made = source(timed=False)
    first, second = (
        torch.cat([made.batch(e * made.steps_per_epoch + s).item_idx for s in range(7)])
        for e in (0, 1)
    )
    assert not torch.equal(first, second)
    assert not torch.equal(first, torch.arange(NUM_ROWS))


@pytest.mark.parametrize("time_cells", [False, True])
def test_a_batch_follows_from_its_step_alone(time_cells, monkeypatch):
    used = source(time_cells=time_cells)
    for step in range(20):
        used.batch(step)
    # Windows of 8 positions instead of all: what is worked out ahead changes nothing.
    monkeypatch.setattr(batches_module, "_WINDOW", 8)
    for step in (13, 2, 19):
        fresh = source(time_cells=time_cells).batch(step)
        again = used.batch(step)
        assert torch.equal(fresh.item_idx, again.item_idx)
        assert torch.equal(fresh.user_at, again.user_at)


def test_time_cells_are_neighbours_and_seen_as_of_their_begin():
    made = source(time_cells=True)
    seen = []
    for step in range(made.steps_per_epoch):
        batch = made.batch(step)
        rows = batch.item_idx
        assert torch.equal(rows, torch.arange(int(rows[0]), int(rows[-1]) + 1))
        assert int(batch.item_at) == int(rows[0]) * DAY_S
        assert torch.equal(batch.user_at, rows * DAY_S)
        low, high = max(int(rows[0]) - 16, 0), min(int(rows[-1]) + 1 + 16, NUM_ROWS)
        assert torch.equal(batch.pool, torch.arange(low, high).int())
        seen.append(rows)
    assert set(torch.cat(seen).tolist()) == set(range(NUM_ROWS))


def test_stale_cells_stand_at_one_moment_up_to_so_many_days_before():
    made = source(time_cells=True, staleness_d=4.0)
    delays = set()
    for step in range(40):
        batch = made.batch(step)
        delay = int(batch.item_idx[0]) * DAY_S - int(batch.item_at)
        assert 0 <= delay <= 4 * DAY_S
        assert (batch.user_at == batch.item_at).all() or delay == 0
        delays.add(delay)
    assert len(delays) > 30


def test_without_cells_users_are_seen_at_the_moment_of_their_row():
    batch = source(timed=True).batch(3)
    assert torch.equal(batch.user_at, batch.item_idx * DAY_S)
    assert batch.item_at is None
    assert batch.pool is None


def test_weights_go_with_their_rows():
    batch = source(weighted=True).batch(1)
    assert torch.equal(batch.weight, batch.item_idx.float() + 1)
    assert source().batch(1).weight is None


def test_time_cells_need_time():
    with pytest.raises(ConfigError, match="timestamps"):
        source(time_cells=True, timed=False)
