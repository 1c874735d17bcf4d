"""Batches: each row once an epoch, the moment things are seen at, nothing remembered."""

import threading

import pytest
import torch

import recclr.batches as batches_module
import recclr.windows as windows_module
from recclr.batches import BatchSource
from recclr.data.log import EncodedLog
from recclr.data.shards import open_shards, write_shards
from recclr.errors import ConfigError, DataError
from recclr.order import permuted
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


def test_rows_count_the_same_in_every_time_cell_by_the_weights_of_the_whole_log():
    """Divided by its own weights, an old cell would count as much as a new one."""
    made = source(time_cells=True, weighted=True)
    mean = (NUM_ROWS + 1) / 2
    cells = [made.batch(step) for step in range(made.batches_per_epoch)]
    assert len({len(cell.item_idx) for cell in cells}) > 1
    for cell in cells:
        shares = cell.weight / cell.total()
        expected = (cell.item_idx + 1) / (len(cell.item_idx) * mean)
        torch.testing.assert_close(shares, expected.float())
    assert source(time_cells=True).batch(0).total() == 8.0
    shuffled = source(weighted=True).batch(0)
    assert shuffled.total() == shuffled.weight.sum()


@pytest.mark.parametrize("batch_size", [1, 8, 53, 100])
@pytest.mark.parametrize("window", [1, 20, 1 << 16])
def test_an_epoch_shows_every_row_once_in_the_order_of_its_permutation(
    batch_size, window, monkeypatch
):
    monkeypatch.setattr(batches_module, "_WINDOW", window)
    made = source(batch_size=batch_size, timed=False)
    for epoch in range(3):
        steps = range(epoch * made.steps_per_epoch, (epoch + 1) * made.steps_per_epoch)
        batches = [made.batch(step) for step in steps]
        assert {len(batch.item_idx) for batch in batches[:-1]} <= {min(batch_size, NUM_ROWS)}
        rows = torch.cat([batch.item_idx for batch in batches])
        key = batches_module._ORDER
        assert torch.equal(rows, permuted(torch.arange(NUM_ROWS), NUM_ROWS, 5, epoch, key))
        assert torch.equal(torch.cat([batch.user_idx for batch in batches]), rows % 7)
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
    for step in range(made.steps_per_epoch):
        batch = made.batch(step)
        rows = batch.item_idx
        assert 1 <= len(rows) <= 8
        assert torch.equal(rows, torch.arange(int(rows[0]), int(rows[-1]) + 1))
        assert int(batch.item_at) == int(rows[0]) * DAY_S
        assert torch.equal(batch.user_at, rows * DAY_S)
        low, high = max(int(rows[0]) - 16, 0), min(int(rows[-1]) + 1 + 16, NUM_ROWS)
        assert torch.equal(batch.pool, torch.arange(low, high).int())


@pytest.mark.parametrize("batch_size", [1, 8, 27, 53, 60])
def test_time_cells_show_every_row_once_and_fill_an_empty_cell_with_the_newest(batch_size):
    made = source(time_cells=True, batch_size=batch_size)
    per_epoch = made.steps_per_epoch
    starts, orders, filled = set(), set(), 0
    for epoch in range(40):
        cells = [made.batch(epoch * per_epoch + at).item_idx for at in range(per_epoch)]
        times = torch.bincount(torch.cat(cells), minlength=NUM_ROWS)
        extra = times - 1
        if extra.any():
            filled += 1
            assert torch.equal(extra, (torch.arange(NUM_ROWS) >= NUM_ROWS - batch_size).long())
        firsts = tuple(int(cell[0]) for cell in cells)
        starts.add(tuple(sorted(firsts)))
        orders.add(tuple(at for at, _ in sorted(enumerate(firsts), key=lambda pair: pair[1])))
    if 1 < batch_size < NUM_ROWS:
        # Cut elsewhere in each epoch, so that all neighbours meet, and shown in another order.
        assert len(starts) > min(batch_size, 40) / 2
        assert 0 < filled < 40
    if batch_size == 8:
        # Eight cells have 40320 orders.
        assert len(orders) > 35


def test_stale_cells_stand_at_one_moment_up_to_so_many_days_before():
    made = source(time_cells=True, staleness_d=4.0)
    delays_s = []
    for step in range(400):
        batch = made.batch(step)
        delay_s = int(batch.item_idx[0]) * DAY_S - int(batch.item_at)
        assert 0 <= delay_s <= 4 * DAY_S
        assert batch.user_at.tolist() == [int(batch.item_at)] * len(batch.item_idx)
        delays_s.append(delay_s)
    # Uniform: a quarter of 400 draws a day, give or take 4.5 standard deviations.
    by_day = torch.bincount(torch.tensor(delays_s) // DAY_S, minlength=4)
    assert ((by_day - 100).abs() <= 4.5 * (400 * 0.25 * 0.75) ** 0.5).all()


def test_without_cells_staleness_moves_every_user_of_a_step_by_the_same_time():
    batch = source(staleness_d=4.0).batch(3)
    delays_s = (batch.item_idx * DAY_S - batch.user_at).unique()
    assert len(delays_s) == 1
    assert 0 < int(delays_s) <= 4 * DAY_S
    assert batch.item_at is None


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


def test_seeds_differ():
    settings = TrainSettings(batch_size=8)
    one, other = (
        BatchSource(log(), settings, seed=seed, time_cells=False).batch(0).item_idx
        for seed in (5, 6)
    )
    assert not torch.equal(one, other)


def mapped(tmp_path, **kinds):
    write_shards(tmp_path / "log", log(**kinds).stretches(20))
    return open_shards(tmp_path / "log")


@pytest.mark.usefixtures("no_power_cut")
@pytest.mark.parametrize(
    ("time_cells", "staleness_d"), [(False, 0.0), (False, 4.0), (True, 0.0), (True, 4.0)]
)
@pytest.mark.parametrize("batch_size", [8, 53])
@pytest.mark.parametrize("least_rows", [1, 20, 1 << 18])
def test_batches_of_mapped_rows_are_those_of_rows_in_memory(
    tmp_path, monkeypatch, time_cells, staleness_d, batch_size, least_rows
):
    monkeypatch.setattr(windows_module, "_LEAST_ROWS", least_rows)
    settings = TrainSettings(batch_size=batch_size, staleness_d=staleness_d)
    arguments = {"seed": 5, "time_cells": time_cells}
    resident = BatchSource(log(weighted=True), settings, **arguments)
    made = BatchSource(mapped(tmp_path, weighted=True), settings, **arguments)
    assert made.steps_per_epoch == resident.steps_per_epoch
    # In turn over two epochs, then as resumed runs and evaluations of the same step ask.
    steps = [*range(2 * made.steps_per_epoch + 1), 5, 0, 11, 11, 12, 4]
    for step in steps:
        ours, theirs = made.batch(step), resident.batch(step)
        for name in ("user_idx", "item_idx", "weight", "user_at", "item_at", "pool"):
            one, other = getattr(ours, name), getattr(theirs, name)
            assert (one is None) == (other is None), name
            if one is not None:
                assert one.dtype == other.dtype, name
                assert torch.equal(one, other), (step, name)
    made.close()


@pytest.mark.usefixtures("no_power_cut")
@pytest.mark.parametrize("time_cells", [False, True])
def test_closed_sources_leave_no_thread_and_can_go_on(tmp_path, time_cells):
    before = threading.active_count()
    made = BatchSource(mapped(tmp_path), TrainSettings(batch_size=8), seed=5, time_cells=time_cells)
    assert threading.active_count() == before
    first = made.batch(3).item_idx
    assert threading.active_count() == before + 1
    made.close()
    made.close()
    assert threading.active_count() == before
    assert torch.equal(made.batch(3).item_idx, first)
    made.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("time_cells", [False, True])
def test_a_log_without_rows_is_refused(time_cells):
    nothing = torch.empty(0, dtype=torch.int32)
    empty = EncodedLog(nothing, nothing, 3, 3, timestamp=nothing.long())
    with pytest.raises(DataError, match="no rows"):
        BatchSource(empty, TrainSettings(), seed=0, time_cells=time_cells)
