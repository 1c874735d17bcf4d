"""Reading tables: every source gives the same values, and what is broken is named."""

import json

import numpy as np
import pandas as pd
import polars as pl
import pytest

import recclr.data.files as files_module
from recclr.data.files import expand_path, resolve_files
from recclr.data.tables import load_table, read_table
from recclr.errors import ConfigError, DataError

BIG = 2**53 + 1
FRAME = pl.DataFrame({"user_id": [BIG, -1, 7], "item_id": ["a", "é", "c d"], "rating": [1.5, 2, 3]})


def write_csv(path, text):
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def test_every_source_gives_the_same_table(tmp_path):
    FRAME.write_parquet(tmp_path / "a.parquet")
    FRAME.write_csv(tmp_path / "a.csv")
    FRAME.write_ndjson(tmp_path / "a.jsonl")
    (tmp_path / "a.tsv").write_text(FRAME.write_csv(separator="\t"))
    sources = [FRAME, FRAME.lazy(), FRAME.to_pandas(), FRAME.to_arrow()]
    sources += [FRAME.to_arrow().to_batches()[0], tmp_path / "a.parquet"]
    sources += [str(tmp_path / f"a.{kind}") for kind in ("parquet", "csv", "jsonl", "tsv")]
    for source in sources:
        table = read_table(source, name="events")
        assert table["user_id"].to_list() == [BIG, -1, 7]
        assert table["item_id"].to_list() == ["a", "é", "c d"]
        assert table["rating"].to_list() == [1.5, 2.0, 3.0]


def test_keep_projects_but_still_knows_all_columns(tmp_path):
    FRAME.write_parquet(tmp_path / "a.parquet")
    FRAME.write_csv(tmp_path / "a.csv")
    for source in (FRAME, FRAME.lazy(), FRAME.to_pandas(), *tmp_path.iterdir()):
        table = load_table(source, name="events", keep={"item_id", "absent"})
        assert table.frame.columns == ["item_id"]
        assert table.columns == ("user_id", "item_id", "rating")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pd.array([BIG, None, 2**63 - 1], dtype="Int64"), [BIG, None, 2**63 - 1]),
        (pd.Series([BIG, None, -1], dtype=object), [BIG, None, -1]),
        (pd.Series([2**64 - 1, None, 1], dtype=object), [2**64 - 1, None, 1]),
        (np.array([2**64 - 1, 0, 1], dtype=np.uint64), [2**64 - 1, 0, 1]),
    ],
)
def test_pandas_integers_never_pass_through_floats(values, expected):
    column = read_table(pd.DataFrame({"id": values}), name="events")["id"]
    assert column.dtype.is_integer()
    assert column.to_list() == expected


def test_pandas_mistakes_are_named():
    mixed = pd.DataFrame({"id": pd.Series(["x", 1], dtype=object)})
    with pytest.raises(DataError, match="'id' holds values of several types"):
        read_table(mixed, name="events")
    with pytest.raises(DataError, match="same name"):
        read_table(pd.DataFrame([[1, 2]], columns=["a", "a"]), name="events")
    with pytest.raises(DataError, match="found dict"):
        read_table({"a": [1]}, name="events")


# --- files ----------------------------------------------------------------------------------------


def test_folder_ignores_what_engines_leave_and_reads_in_path_order(tmp_path):
    for number, folder in enumerate(["b", "a", "c/d"]):
        (tmp_path / folder).mkdir(parents=True)
        pl.DataFrame({"x": [number]}).write_parquet(tmp_path / folder / "part.parquet")
    for name in ("_SUCCESS", ".part.parquet.crc", ".hidden.parquet", "README.md"):
        (tmp_path / name).write_text("no data")
    (tmp_path / "_temporary").mkdir()
    pl.DataFrame({"x": [99]}).write_parquet(tmp_path / "_temporary" / "part.parquet")
    assert read_table(tmp_path, name="events")["x"].to_list() == [1, 0, 2]
    assert read_table(f"{tmp_path}/*/part.parquet", name="events")["x"].to_list() == [1, 0]
    assert read_table(f"{tmp_path}/**/d/*.parquet", name="events")["x"].to_list() == [2]
    assert read_table(f"{tmp_path}/[ab]/*", name="events")["x"].to_list() == [1, 0]


def test_a_name_with_glob_characters_is_a_name(tmp_path):
    FRAME.write_parquet(tmp_path / "a[1].parquet")
    assert read_table(tmp_path / "a[1].parquet", name="events").height == 3


def test_parquet_without_suffix_is_found_by_its_first_bytes(tmp_path):
    FRAME.write_parquet(tmp_path / "part-0000")
    assert read_table(tmp_path, name="events").height == 3


def test_links_to_folders_are_not_followed(tmp_path):
    (tmp_path / "data").mkdir()
    FRAME.write_parquet(tmp_path / "data" / "a.parquet")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data", target_is_directory=True)
    assert len(resolve_files(str(tmp_path / "data"), name="events")) == 1


def test_the_number_of_entries_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "MAX_ENTRIES", 5)
    for number in range(6):
        (tmp_path / f"{number}.csv").write_text("x\n1\n")
    with pytest.raises(DataError, match="more than 5 entries"):
        resolve_files(str(tmp_path), name="events")


def test_missing_paths_suggest_the_nearest_name(tmp_path):
    FRAME.write_parquet(tmp_path / "events.parquet")
    with pytest.raises(DataError, match=r"did you mean 'events.parquet'"):
        read_table(tmp_path / "evnts.parquet", name="events")
    with pytest.raises(DataError, match="nor is there a folder"):
        read_table(tmp_path / "no" / "x.parquet", name="events")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data file"):
        read_table(tmp_path / "empty", name="events")
    (tmp_path / "a.xlsx").write_text("PK")
    with pytest.raises(DataError, match=r"format of .*a.xlsx is unknown"):
        read_table(tmp_path / "a.xlsx", name="events")


def test_mixed_formats_are_refused_by_name(tmp_path):
    FRAME.write_parquet(tmp_path / "a.parquet")
    FRAME.write_csv(tmp_path / "b.csv")
    with pytest.raises(DataError, match=r"a.parquet and .*b.csv"):
        read_table(tmp_path, name="events")


def test_environment_variables(monkeypatch):
    monkeypatch.setenv("HERE", "/x")
    monkeypatch.delenv("RECCLR_DATA", raising=False)
    monkeypatch.delenv("NOT_SET", raising=False)
    assert expand_path("${HERE}/y/${HERE}") == "/x/y//x"
    assert expand_path("${RECCLR_DATA}/y") == "../shared/data/y"
    assert expand_path("$HERE/~") == "$HERE/~"
    with pytest.raises(ConfigError, match="'NOT_SET'"):
        expand_path("${NOT_SET}/y")
    with pytest.raises(ConfigError):
        expand_path("")
    with pytest.raises(ConfigError):
        expand_path("a\0b")


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [100, 12, 4])
def test_truncated_parquet_is_refused_by_name(tmp_path, cut):
    FRAME.write_parquet(tmp_path / "whole.parquet")
    data = (tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "events.parquet").write_bytes(data[:-cut])
    with pytest.raises(DataError, match=r"events.parquet cannot be read as parquet"):
        read_table(tmp_path / "events.parquet", name="events")


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_empty_files_are_refused_by_name(tmp_path, kind):
    (tmp_path / f"e.{kind}").touch()
    with pytest.raises(DataError, match=rf"e.{kind} is empty"):
        read_table(tmp_path / f"e.{kind}", name="events")


def test_no_rows_is_refused_but_one_empty_shard_is_not(tmp_path):
    FRAME.head(0).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no rows"):
        read_table(tmp_path, name="events")
    with pytest.raises(DataError, match="no rows"):
        read_table(write_csv(tmp_path / "x.csv", "a,b\n"), name="events")
    with pytest.raises(DataError, match="no rows"):
        read_table(FRAME.head(0), name="events")
    FRAME.write_parquet(tmp_path / "b.parquet")
    assert read_table(f"{tmp_path}/*.parquet", name="events").height == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n3\n4,5\n", "Row #3: Expected 2 columns, got 1"),
        ("a,b\n1,2\n3,4,5\n", "Row #3: Expected 2 columns, got 3"),
        (b"a,b\n1,\xff\n", "invalid UTF8"),
        ("a,a\n1,2\n", "same name"),
        (b"\xff\xfe\n", "cannot be read"),
    ],
)
def test_bad_csv_is_refused_with_its_line(tmp_path, text, message):
    path = write_csv(tmp_path / "bad.csv", text)
    with pytest.raises(DataError, match=r"bad.csv") as caught:
        read_table(path, name="events")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"a":1}\n{"a":\n', "line 2"), ('{"a":1}\n[1]\n', "line 2"), ("\n", "cannot be read")],
)
def test_bad_jsonl_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / "bad.jsonl", name="events")


def test_no_permission(tmp_path, monkeypatch):
    FRAME.write_csv(tmp_path / "a.csv")

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("recclr.data.tables._read_csv", denied)
    with pytest.raises(DataError, match="no permission"):
        read_table(tmp_path / "a.csv", name="events")


# --- CSV values -----------------------------------------------------------------------------------


def test_csv_text_becomes_numbers_only_without_loss(tmp_path):
    text = (
        "id,zip,price,flag,note,big,sign\r\n"
        '1,0012,1.5,true,"x,\ny",18446744073709551615,+1\r\n'
        '-2,12,2,FALSE,"",3,\r\n'
    )
    table = read_table(write_csv(tmp_path / "a.csv", text), name="events")
    assert table.to_dict(as_series=False) == {
        "id": [1, -2],
        "zip": ["0012", "12"],
        "price": [1.5, 2.0],
        "flag": [True, False],
        "note": ["x,\ny", ""],
        "big": [2**64 - 1, 3],
        "sign": [1.0, None],
    }
    assert table["id"].dtype == pl.Int64
    assert table["big"].dtype == pl.UInt64


def test_csv_types_are_those_of_all_files_together(tmp_path):
    (tmp_path / "a.csv").write_text("\ufeffid,zip\n1,10115\n")
    (tmp_path / "b.csv").write_text("zip,id\nK1A,2\n")
    table = read_table(tmp_path, name="events")
    assert table.to_dict(as_series=False) == {"id": [1, 2], "zip": ["10115", "K1A"]}


def test_csv_columns_declared_text_stay_text(tmp_path):
    path = write_csv(tmp_path / "a.csv", "id,x\n12,1\n13,2\n")
    assert read_table(path, name="events", text=("id",))["id"].to_list() == ["12", "13"]


def test_jsonl_integers_are_exact(tmp_path):
    values = [BIG, 2**64 - 1, None]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"id": v}) + "\n" for v in values))
    assert read_table(tmp_path / "a.jsonl", name="events")["id"].to_list() == values


# --- several files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "joint"),
    [
        (pl.Int32, pl.Int64, pl.Int64),
        (pl.UInt32, pl.Int8, pl.Int64),
        (pl.UInt8, pl.UInt64, pl.UInt64),
        (pl.Int32, pl.Float64, pl.Float64),
        (pl.Float32, pl.Int16, pl.Float32),
        (pl.Float32, pl.Int32, pl.Float64),
        (pl.Int64, pl.Null, pl.Int64),
        (pl.List(pl.Int8), pl.List(pl.Int32), pl.List(pl.Int32)),
    ],
)
def test_safe_types_are_widened(tmp_path, first, second, joint):
    for name, dtype in (("a", first), ("b", second)):
        value = [[1]] if isinstance(dtype, pl.List) else [None if dtype == pl.Null else 1]
        frame = pl.DataFrame({"x": pl.Series(value, dtype=dtype), "y": [1]})
        frame.write_parquet(tmp_path / f"{name}.parquet")
    assert read_table(tmp_path, name="events")["x"].dtype == joint


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (pl.Int64, pl.Float64),
        (pl.Int64, pl.UInt64),
        (pl.String, pl.Int32),
        (pl.Date, pl.Datetime("us")),
        (pl.Boolean, pl.Int8),
    ],
)
def test_lossy_types_are_refused_naming_both_files(tmp_path, first, second):
    for name, dtype in (("one", first), ("two", second)):
        pl.DataFrame({"x": pl.Series([None], dtype=dtype)}).write_parquet(
            tmp_path / f"{name}.parquet"
        )
    with pytest.raises(DataError, match=r"'x' is .* in one.parquet and .* in two.parquet"):
        read_table(tmp_path, name="events")


def test_a_needed_column_must_be_in_every_file(tmp_path):
    pl.DataFrame({"x": [1], "y": [1]}).write_parquet(tmp_path / "a.parquet")
    pl.DataFrame({"x": [2]}).write_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"'y' is in a.parquet but not in b.parquet"):
        read_table(tmp_path, name="events", keep={"x", "y"})
    assert read_table(tmp_path, name="events", keep={"x"})["x"].to_list() == [1, 2]
    assert read_table(tmp_path, name="items")["y"].to_list() == [1, None]


def test_rows_are_placed_in_their_files(tmp_path):
    for name, rows in (("a", 2), ("b", 0), ("c", 3)):
        frame = pl.DataFrame({"x": list(range(rows))}, schema={"x": pl.Int64})
        frame.write_parquet(tmp_path / f"{name}.parquet")
    table = load_table(tmp_path, name="events")
    files, rows = table.locate(pl.Series([0, 1, 2, 4], dtype=pl.UInt32))
    assert files.to_list() == ["a.parquet", "a.parquet", "c.parquet", "c.parquet"]
    assert rows.to_list() == [0, 1, 0, 2]
    assert table.name_rows(pl.Series([1, 4])) == "a.parquet row 1, c.parquet row 2"
