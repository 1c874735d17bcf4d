"""Ids as a command gets them, and results as it writes them."""

import json

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from recclr.data.vocabulary import Vocabulary
from recclr.errors import ConfigError, DataError
from recclr.ids_input import read_ids, require_ending, write_parts, write_rows

pytestmark = pytest.mark.usefixtures("no_power_cut")

NUMBERS = Vocabulary(pl.Series([30, 10, 20]))
TEXTS = Vocabulary(pl.Series(["b", "1", "é"]))


def test_no_ids_is_not_the_same_as_an_empty_list():
    assert read_ids(None, None, NUMBERS, "user_id") is None
    for listed in ("", " , ,"):
        with pytest.raises(ConfigError, match="names none"):
            read_ids(listed, None, TEXTS, "user_id")


def test_listed_ids_take_the_type_of_the_run():
    numbers = read_ids("20, 7,-3", None, NUMBERS, "user_id")
    assert (numbers.dtype, numbers.to_list()) == (NUMBERS.ids.dtype, [20, 7, -3])
    texts = read_ids("1, é ,01", None, TEXTS, "user_id")
    assert (texts.dtype, texts.to_list()) == (pl.String, ["1", "é", "01"])


@pytest.mark.parametrize("wrong", ["abc", "2.5", "99999999999999999999999"])
def test_a_listed_id_that_is_no_number_is_named(wrong):
    with pytest.raises(ConfigError, match="integers") as caught:
        read_ids(f"20,{wrong}", None, NUMBERS, "user_id")
    assert repr(wrong) in str(caught.value)


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_ids_of_a_table_come_from_their_column(tmp_path, ending):
    path = tmp_path / f"ids.{ending}"
    frame = pl.DataFrame({"who": [20, 10], "other": ["x", "y"]})
    getattr(frame, {"jsonl": "write_ndjson"}.get(ending, f"write_{ending}"))(path)
    assert read_ids(None, str(path), NUMBERS, "who").to_list() == [20, 10]
    with pytest.raises(DataError, match=r"no column 'user_id'.*'who', 'other'") as caught:
        read_ids(None, str(path), NUMBERS, "user_id")
    assert str(path) in str(caught.value)


def test_a_table_of_one_column_may_name_it_as_it_likes(tmp_path):
    path = tmp_path / "ids.csv"
    path.write_text("whoever\nb\né\n")
    assert read_ids(None, str(path), TEXTS, "user_id").to_list() == ["b", "é"]


def test_ids_from_two_places_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="not both"):
        read_ids("1", str(tmp_path / "ids.csv"), NUMBERS, "user_id")


FRAME = pl.DataFrame({"user_id": ["a", "ü"], "rank": [1, 2], "score": [0.5, -0.25]})


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("x.parquet", pl.read_parquet),
        ("x.csv", pl.read_csv),
        ("x.jsonl", pl.read_ndjson),
        ("deep/er/x.ndjson", pl.read_ndjson),
    ],
)
def test_rows_are_written_by_the_ending_and_nothing_is_shown(tmp_path, name, read):
    write_rows(FRAME, tmp_path / name, show=pytest.fail, as_json=True)
    assert_frame_equal(read(tmp_path / name), FRAME)
    assert [p.name for p in (tmp_path / name).parent.iterdir()] == [(tmp_path / name).name]


def test_an_unknown_ending_writes_nothing(tmp_path):
    for name in ("x.xlsx", "x", ".csv", "x.parquet.gz"):
        with pytest.raises(ConfigError, match=r"\.parquet, \.csv") as caught:
            write_rows(FRAME, tmp_path / name, show=pytest.fail, as_json=False)
        assert name in str(caught.value)
        with pytest.raises(ConfigError):
            require_ending(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    require_ending(None)


def test_without_a_file_rows_are_shown_as_frame_or_as_json():
    shown = []
    write_rows(FRAME, None, show=shown.append, as_json=False)
    write_rows(FRAME, None, show=shown.append, as_json=True)
    assert shown[0] is FRAME
    assert json.loads(json.dumps(shown[1])) == FRAME.to_dicts()


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_parts_are_one_file_and_a_failure_leaves_what_was_there(tmp_path, ending):
    whole = pl.DataFrame({"id": ["a", "é", "c", "d"], "rank": [1, 2, 3, 4], "score": [0.5] * 4})
    path = tmp_path / f"rows.{ending}"
    write_parts((whole[start : start + 2] for start in (0, 2, 4)), path)
    read = {"jsonl": pl.read_ndjson}.get(ending) or getattr(pl, f"read_{ending}")
    assert_frame_equal(read(path), whole)

    def broken():
        yield whole[:1]
        raise DataError("the second part is odd")

    with pytest.raises(DataError, match="odd"):
        write_parts(broken(), path)
    assert_frame_equal(read(path), whole)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    with pytest.raises(ConfigError, match=r"ends in \.parquet"):
        write_parts([whole], tmp_path / "rows.xlsx")
