"""Parquet files some rows at a time: the rows that ``load_table`` has, each at its place."""

import polars as pl
import pytest

from recclr.data.pieces import ParquetPieces
from recclr.data.tables import load_table
from recclr.errors import DataError

KEEP = {"user_id", "rating"}


def folder_of(tmp_path, heights=(5, 1, 7), dtypes=(pl.Int32, pl.Int64, pl.UInt8)):
    done = 0
    for number, (height, dtype) in enumerate(zip(heights, dtypes, strict=True)):
        rows = range(done, done + height)
        frame = pl.DataFrame({"user_id": pl.Series(rows, dtype=dtype), "other": list(rows)})
        # A name that a reader of hives or globs would make something of.
        frame.write_parquet(tmp_path / f"day={number}[a].parquet")
        done += height
    return tmp_path


@pytest.mark.parametrize("rows", [1, 3, 5, 6, 100])
def test_all_rows_come_in_order_and_know_their_place(tmp_path, rows):
    folder = folder_of(tmp_path)
    whole = load_table(folder, name="events", keep=KEEP)
    pieces = ParquetPieces.of(folder, name="events", keep=KEEP)
    assert pieces.num_rows == 13
    tables = list(pieces.tables(rows))
    assert [table.frame.height for table in tables[:-1]] == [rows] * (len(tables) - 1)
    assert pl.concat([table.frame for table in tables]).equals(whole.frame)
    assert {table.columns for table in tables} == {whole.columns}
    assert {table.label for table in tables} == {whole.label}
    every = pl.int_range(13, dtype=pl.UInt32, eager=True)
    places = [
        table.locate(pl.int_range(table.frame.height, dtype=pl.UInt32, eager=True))
        for table in tables
    ]
    for column, expected in zip(zip(*places, strict=True), whole.locate(every), strict=True):
        assert pl.concat(column).equals(expected)


def test_one_file_is_named_by_its_rows(tmp_path):
    path = tmp_path / "events.parquet"
    pl.DataFrame({"user_id": range(9)}).write_parquet(path, row_group_size=2)
    last = list(ParquetPieces.of(path, name="events", keep=KEEP).tables(4))[-1]
    assert last.frame["user_id"].to_list() == [8]
    assert last.name_rows(pl.Series([0])) == "row 8"


def test_in_a_folder_even_a_piece_of_one_file_is_named_by_it(tmp_path):
    first = next(ParquetPieces.of(folder_of(tmp_path), name="e", keep=KEEP).tables(2))
    assert first.name_rows(pl.Series([1])) == "day=0[a].parquet row 1"


def test_other_sources_are_read_otherwise(tmp_path):
    frame = pl.DataFrame({"user_id": [1, 2]})
    frame.write_csv(tmp_path / "events.csv")
    frame.rename({"user_id": "who"}).write_parquet(tmp_path / "others.parquet")
    frame.clear().write_parquet(tmp_path / "none.parquet")
    for source in (
        frame,
        *(tmp_path / n for n in ("events.csv", "others.parquet", "none.parquet")),
    ):
        assert ParquetPieces.of(source, name="events", keep=KEEP) is None


@pytest.mark.parametrize("damage", ["footer", "data", "partial", "types"])
def test_refusals_are_those_of_whole_tables(tmp_path, damage):
    folder = folder_of(tmp_path)
    path = folder / "day=1[a].parquet"
    if damage == "footer":
        path.write_bytes(path.read_bytes()[:-9])
    elif damage == "data":
        data = bytearray(path.read_bytes())
        data[4:40] = bytes(36)
        path.write_bytes(bytes(data))
    elif damage == "partial":
        pl.DataFrame({"user_id": [1], "rating": [2]}).write_parquet(path)
    else:
        pl.DataFrame({"user_id": ["a"]}).write_parquet(path)
    with pytest.raises(DataError) as whole:
        load_table(folder, name="events", keep=KEEP)
    with pytest.raises(DataError) as pieces:
        list(ParquetPieces.of(folder, name="events", keep=KEEP).tables(4))
    if damage in ("partial", "types"):
        assert str(pieces.value) == str(whole.value)
    else:
        for message in (str(pieces.value), str(whole.value)):
            assert "day=1[a].parquet cannot be read as parquet" in message
