"""Frames that were put into a file come back as they were, and leave nothing behind."""

import errno

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recclr.data.spill import Disk, Spill, by_stretches
from recclr.errors import DataError, StoreError
from recclr.memory import anonymous_bytes

ROW = st.tuples(
    st.none() | st.integers(0, 2**64 - 1),
    st.none() | st.text(max_size=30),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(width=32, allow_nan=False),
    st.booleans(),
)
SCHEMA = {
    "unsigned": pl.UInt64,
    "text": pl.String,
    "signed": pl.Int64,
    "float": pl.Float32,
    "bool": pl.Boolean,
}


def frame_of(rows):
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


@given(pieces=st.lists(st.lists(ROW, max_size=9), min_size=1, max_size=5))
def test_frames_come_back_as_one(tmp_path_factory, pieces):
    folder = tmp_path_factory.mktemp("disk")
    frames = [frame_of(rows) for rows in pieces]
    found = Disk(folder, 7).written(frames)
    assert found.schema == frames[0].schema
    assert found.equals(pl.concat(frames))
    assert not list(folder.iterdir())  # a file without a name


def test_a_part_of_a_frame_takes_the_room_of_its_rows(tmp_path):
    """A filter of texts may hold on to all of them, which must not all be written."""
    frame = pl.DataFrame({"text": [f"{row:040d}" for row in range(20_000)]})
    few = frame.filter(pl.int_range(pl.len()) % 100 == 3)
    spill = Spill(Disk(tmp_path, 1000))
    spill.append(few)
    assert spill._places[-1][1] < 200 * (40 + 16) + 4_000
    assert spill.mapped().equals(few)


def test_what_is_mapped_is_not_copied(tmp_path):
    """As it is where values are not aligned in the file, of batches of odd lengths."""
    if anonymous_bytes() is None:
        pytest.skip("this system does not say how much memory is no file's")
    spill, rows = Spill(Disk(tmp_path, 10)), 1_000_003
    for batch in range(6):
        spill.append(pl.DataFrame({"a": np.arange(rows + batch), "b": np.arange(rows + batch)}))
    before = anonymous_bytes()
    mapped = spill.mapped()
    assert mapped["a"].sum() == sum((rows + b) * (rows + b - 1) // 2 for b in range(6))
    assert anonymous_bytes() - before < 6 * rows * 16 / 4


def test_pieces_of_other_types_are_refused(tmp_path):
    spill = Spill(Disk(tmp_path, 10))
    spill.append(pl.DataFrame({"user_id": [1]}))
    with pytest.raises(DataError, match=r"in pieces has columns of .*Int64.* and of .*UInt64"):
        spill.append(pl.DataFrame({"user_id": [2]}, schema={"user_id": pl.UInt64}))


@pytest.mark.parametrize(
    "told", [(errno.ENOSPC, "No space"), ("No space left on device (os error 28)",)]
)
def test_a_full_disk_is_said(tmp_path, monkeypatch, told):
    """Also by polars, whose errors have no number."""

    def full(*args, **named):
        raise OSError(*told)

    spill = Spill(Disk(tmp_path, 10))
    monkeypatch.setattr(pl.DataFrame, "write_ipc", full)
    with pytest.raises(StoreError, match="no space left"):
        spill.append(pl.DataFrame({"a": [1]}))
    assert not list(tmp_path.iterdir())


def test_a_disk_too_full_for_an_array_is_said_before_it_is_written(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(StoreError, match="no space left"):
        Disk(tmp_path, 10).array(4, np.int32)
    assert not list(tmp_path.iterdir())


def test_stretches_and_what_is_made_of_each(tmp_path):
    disk, frame = Disk(tmp_path, 4), pl.DataFrame({"a": range(11)})
    assert [piece.height for piece in disk.stretches(frame)] == [4, 4, 3]
    assert [piece.height for piece in disk.stretches(frame.clear())] == [0]
    given = []

    def doubled(rows):
        given.append(rows.height)
        return rows.with_columns(pl.col("a") * 2)

    expected = frame.with_columns(pl.col("a") * 2)
    assert by_stretches(frame, doubled, disk).equals(expected)
    assert by_stretches(frame, doubled, None).equals(expected)
    assert given == [4, 4, 3, 11]
    assert by_stretches(frame.clear(), doubled, disk).schema == frame.schema


def test_arrays_start_as_zeros_and_keep_what_is_written(tmp_path):
    disk = Disk(tmp_path, 4)
    array = disk.array(9, np.int32)
    assert array.dtype == np.int32
    assert not array.any()
    array[3:5] = [7, -8]
    assert array.tolist() == [0, 0, 0, 7, -8, 0, 0, 0, 0]
    assert disk.array(0, np.int64).tolist() == []
    assert not list(tmp_path.iterdir())
