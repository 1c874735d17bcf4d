"""What a split table does before any other rank is asked; the rest: tests/distributed."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recclr import sharded_tables
from recclr.distributed import ALONE, Ranks
from recclr.errors import ConfigError, MissingExtraError
from recclr.optim import Table
from recclr.settings import TrainSettings
from recclr.sharded_tables import RowShard, ShardedTable, drawn, table_maker


def made(num_rows, dim=8, *, sharded, ranks):
    train = TrainSettings(table_optimizer="sgd", sharded_tables=sharded)
    generator = torch.Generator().manual_seed(1)
    return table_maker(train, ranks, "cpu")(num_rows, dim, std=0.5, generator=generator)


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 21), st.integers(1, 5), st.integers(16, 2000))
def test_rows_are_those_of_one_draw_and_leave_the_generator_there(num_rows, dim, size, stretch):
    generators = [torch.Generator().manual_seed(3) for _ in range(size + 1)]
    whole = torch.empty(num_rows, dim).normal_(0.0, 0.3, generator=generators[-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded_tables, "_STRETCH", stretch)
        for rank in range(size):
            start, stop = num_rows * rank // size, num_rows * (rank + 1) // size
            own = drawn(num_rows, dim, start, stop, std=0.3, generator=generators[rank])
            assert torch.equal(own, whole[start:stop])
            assert torch.equal(generators[rank].get_state(), generators[-1].get_state())


def test_no_more_than_a_stretch_is_held(monkeypatch):
    monkeypatch.setattr(sharded_tables, "_STRETCH", 160)
    drawn_at_once, empty = [], torch.empty

    def counted(*shape):
        drawn_at_once.append(shape)
        return empty(*shape)

    monkeypatch.setattr(torch, "empty", counted)
    drawn(100, 10, 40, 60, std=1.0, generator=torch.Generator())
    assert drawn_at_once == [(20, 10), *[(16, 10)] * 5, (20, 10)]


def test_a_process_alone_and_small_tables_stay_whole(monkeypatch):
    monkeypatch.setattr(sharded_tables, "ShardedTable", lambda *shape, **options: (shape, options))
    assert table_maker(TrainSettings(), Ranks(1, 3), "cpu") is Table
    assert isinstance(made(40, sharded="all", ranks=ALONE), Table)
    assert isinstance(made(40, sharded=41, ranks=Ranks(1, 3)), Table)
    shape, options = made(41, sharded=41, ranks=Ranks(1, 3))
    assert shape == (41, 8)
    assert (options["optimizer"], options["device"], options["ranks"].rank) == ("sgd", "cpu", 1)
    # Blocks of 2 rows leave the third rank without any of 4, and with one of 5.
    assert isinstance(made(4, sharded="all", ranks=Ranks(0, 3)), Table)
    assert made(5, sharded="all", ranks=Ranks(0, 3))[0] == (5, 8)


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchrec", None)
    with pytest.raises(MissingExtraError, match=r"'torchrec'.*recclr\[torchrec\]"):
        made(40, sharded="all", ranks=Ranks(0, 2))


def test_a_dimension_that_the_kernel_does_not_take_is_refused():
    with pytest.raises(ConfigError, match=r"multiple of 4 .*found 6"):
        made(40, 6, sharded="all", ranks=Ranks(0, 2))


def test_a_shard_takes_its_rows_and_keeps_a_copy():
    whole, local = torch.arange(21.0).view(7, 3), torch.zeros(2, 3)
    shard = RowShard(local, (0, 5, 7), Ranks(1, 2))
    assert (shard.shape, shard.dtype) == ((7, 3), torch.float32)
    shard.copy_(whole)
    assert torch.equal(local, whole[5:])
    kept = shard.clone()
    local.zero_()
    assert torch.equal(kept.local, whole[5:])
    shard.copy_(kept)
    assert torch.equal(local, whole[5:])
    assert issubclass(ShardedTable, Table)
