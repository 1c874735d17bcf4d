"""``read``: what comes in comes out, in order, with what was noticed on the way."""

import numpy as np
import pandas as pd
import polars as pl
import pytest

from recclr.data.interactions import Log, apply_decay, require_trainable
from recclr.data.reading import read, read_log
from recclr.errors import ConfigError, DataError
from recclr.settings import ColumnSettings, DataSettings, SplitSettings

START = 1_500_000_000
BIG = [2**53 + 1, 2**63 - 1, -1, -(2**63)]


def events_of(users, items=None, **columns):
    items = list(range(len(users))) if items is None else items
    times = [START + 60 * i for i in range(len(users))]
    return pl.DataFrame({"user_id": users, "item_id": items, "timestamp": times, **columns})


EVENTS = events_of([1, 2, 1, 3], [10, 20, 30, 10], rating=[9, 8, 2, 7])
USERS = pl.DataFrame({"user_id": [1, 2, 3], "country": ["FR", "DE", "FR"]})
ITEMS = pl.DataFrame({"item_id": [10, 20, 30, 40], "title": ["a", "b", "c", "d"]})


def test_five_lines_from_files(tmp_path):
    for name, frame in (("events", EVENTS), ("users", USERS), ("items", ITEMS)):
        frame.write_parquet(tmp_path / f"{name}.parquet")
    log = read(
        tmp_path / "events.parquet",
        users=str(tmp_path / "users.parquet"),
        items=tmp_path / "items.parquet",
        where={"rating": ">= 7"},
    )
    assert repr(log) == (
        "Log(3 users, 2 items, 3 events, 2017-07-14 02:40 to 2017-07-14 02:43 UTC, "
        "with tables of users and items)"
    )
    assert len(log) == 3
    assert log.users.equals(USERS)
    assert log.items.equals(ITEMS)
    assert log.events.columns == ["user_id", "item_id", "timestamp"]
    assert read_log(log.settings).events.equals(log.events)
    assert log.settings.events == str(tmp_path / "events.parquet")
    train, valid, test = log.split_by_time(valid=0.3, test=0.3)
    assert [len(part) for part in (train, valid, test)] == [1, 1, 1]
    assert log.split_by_time(valid=0, test=0.3)[1] is None


def test_frames_of_any_kind_give_the_same_log():
    expected = read(EVENTS, items=ITEMS).events
    for convert in (pl.DataFrame.lazy, pl.DataFrame.to_pandas, pl.DataFrame.to_arrow):
        assert read(convert(EVENTS), items=convert(ITEMS)).events.equals(expected)


def test_columns_are_mapped_also_in_the_tables():
    log = read(
        EVENTS.rename({"user_id": "u", "item_id": "i", "timestamp": "t"}),
        users=USERS.rename({"user_id": "u"}),
        columns={"user": "u", "item": "i", "timestamp": "t"},
    )
    assert log.events.equals(read(EVENTS).events)
    assert log.users.columns == ["user_id", "country"]


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl", "pandas"])
@pytest.mark.parametrize("ids", [BIG, [2**64 - 1, 2**63, 0, 1], ["café", "cafe\u0301", "a b", "0"]])
def test_ids_come_back_as_they_went_in(tmp_path, kind, ids):
    dtype = pl.UInt64 if ids[0] == 2**64 - 1 else None
    frame = events_of(pl.Series(ids, dtype=dtype))
    path = tmp_path / f"e.{kind}"
    if kind == "pandas":
        source = frame.to_pandas()
    else:
        source = path
        {"parquet": frame.write_parquet, "csv": frame.write_csv, "jsonl": frame.write_ndjson}[kind](
            path
        )
    assert read(source).events["user_id"].to_list() == ids


def test_nulls_do_not_make_floats_of_pandas_ids():
    frame = pd.DataFrame(
        {"user_id": pd.array([2**53 + 1, None, 7], dtype="Int64"), "item_id": [1, 2, 3]}
    )
    log = read(frame, where={"user_id": "not null"})
    assert log.events["user_id"].to_list() == [2**53 + 1, 7]
    with pytest.raises(DataError, match="ids as floats"):
        read(pd.DataFrame({"user_id": [1.0, np.nan], "item_id": [1, 2]}))


def test_leading_zeros_in_csv_stay(tmp_path):
    (tmp_path / "e.csv").write_text("user_id,item_id\n0012,1\n12,1\n")
    assert read(tmp_path / "e.csv").events["user_id"].to_list() == ["0012", "12"]
    (tmp_path / "f.csv").write_text("user_id,item_id\n12,1\n13,2\n")
    log = read(tmp_path / "f.csv", id_type="string")
    assert log.events["user_id"].to_list() == ["12", "13"]
    assert log.events["item_id"].dtype == pl.String
    (tmp_path / "g.csv").write_text("user_id,item_id\n12.0,1\n13.0,2\n")
    with pytest.raises(DataError, match="ids as floats"):
        read(tmp_path / "g.csv")
    taken = read(tmp_path / "g.csv", id_type="string").events["user_id"].to_list()
    assert taken == ["12.0", "13.0"]


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_values_that_are_not_between_commas_are_said(tmp_path, mark):
    (tmp_path / "e.csv").write_text(f"user_id{mark}item_id\n1{mark}2\n")
    with pytest.raises(DataError, match="values between commas, found") as caught:
        read(tmp_path / "e.csv")
    assert repr(mark) in str(caught.value)


def test_ids_that_look_like_missing_ones_are_said_with_a_condition_that_drops_them():
    frame = pl.DataFrame({"who": ["a", "nan", "b", "nan", ""], "item_id": [1, 2, 3, 4, 5]})
    columns = {"user": "who"}
    notes = [note for note in read(frame, columns=columns).notes if "looks like a missing" in note]
    assert len(notes) == 2
    assert notes[0].startswith("user_id: 2 rows have the id 'nan'")
    assert notes[0].endswith("""data.where = { who = "!= 'nan'" }""")
    for found in ("nan", ""):
        frame = read(frame, columns=columns, where={"who": f"!= '{found}'"}).events
        frame = frame.rename({"user_id": "who"})
    assert frame["who"].to_list() == ["a", "b"]


def test_ids_of_events_and_tables_get_one_type():
    log = read(EVENTS.cast({"item_id": pl.Int16}), items=ITEMS.cast({"item_id": pl.Int64}))
    assert log.events["item_id"].dtype == log.items["item_id"].dtype == pl.Int64
    assert read(EVENTS.cast({"user_id": pl.Int16})).events["user_id"].dtype == pl.Int16
    with pytest.raises(DataError, match="id_type = 'string'"):
        read(EVENTS, items=ITEMS.cast({"item_id": pl.String}))
    log = read(EVENTS, items=ITEMS.cast({"item_id": pl.String}), id_type="string")
    assert log.events["item_id"].to_list() == ["10", "20", "30", "10"]


def test_tables_must_have_one_row_per_id():
    twice = pl.concat([ITEMS, ITEMS.head(1)])
    with pytest.raises(DataError, match=r"column 'item_id': 1 of 5 rows .*\(row 4, from 0\)"):
        read(EVENTS, items=twice)
    log = read(EVENTS, items=twice, bad_rows="drop", max_bad_share=0.2)
    assert log.items.equals(ITEMS)
    assert any("1 of 5 rows" in note for note in log.notes)
    with pytest.raises(DataError, match="one row per item"):
        read(EVENTS, items=twice, bad_rows="drop", max_bad_share=0.1)
    with pytest.raises(DataError, match=r"users: .* no column 'user_id'"):
        read(EVENTS, users=ITEMS)
    both = USERS.with_columns(u=pl.col("user_id"))
    with pytest.raises(DataError, match="rename or drop one"):
        read(EVENTS.rename({"user_id": "u"}), users=both, columns={"user": "u"})


def test_what_was_noticed_is_noted():
    strange = events_of(["café", "cafe\u0301", "Bob", "bob "], [10, 20, 30, 99])
    log = read(strange, items=ITEMS)
    notes = "\n".join(log.notes)
    assert "numbers in s, detected" in notes
    assert "user_id: 2 ids differ from another only in case" in notes
    assert "1 of 4 items in the events are not in the table" in notes
    assert read(EVENTS.drop("timestamp")).notes[0].startswith("no column 'timestamp'")
    numbers = events_of([*map(str, range(30)), "NULL"])
    assert any("1 of 31 distinct ids are no integers" in note for note in read(numbers).notes)


def test_bad_rows_are_counted_by_reason():
    frame = events_of([1, None, 2, None], [1, 2, None, 4])
    log = read(frame, bad_rows="drop", max_bad_share=0.8)
    assert log.bad_rows == {"item is missing": 1, "user is missing": 2}
    assert read(EVENTS).bad_rows == {}


def test_one_user_or_one_item_cannot_be_trained():
    require_trainable(read(EVENTS))
    with pytest.raises(DataError, match=r"hold 1 user in 3 rows.*at least 2 users and 2 items"):
        require_trainable(read(events_of([1, 1, 1])))
    with pytest.raises(DataError, match="hold 1 item in"):
        require_trainable(read(events_of([1, 2, 3], [5, 5, 5])))


def test_decay_is_applied_on_demand_only():
    log = read(EVENTS, decay_half_life_d=60 / 86_400)
    assert "weight" not in log.events.columns
    train = apply_decay(log, log.settings.decay_half_life_d)
    assert train.events["weight"].to_list() == [0.125, 0.25, 0.5, 1.0]
    assert apply_decay(log, None) is log


def test_concat_restores_the_log():
    log = read(EVENTS, items=ITEMS)
    split = log.split(SplitSettings(by="leave_last", valid=0, test=1))
    assert split.train.concat(split.test).events.equals(log.events)
    # Parts of one moment each, one after the other or not, and nothing at all.
    parts = [
        log.with_events(log.events.filter(pl.col("timestamp") == time))
        for time in log.events["timestamp"].unique().sort()
    ]
    assert len(parts) > 2
    for first, *others in (parts, parts[::-1], [log.with_events(log.events.clear()), log]):
        for other in others:
            first = first.concat(other)
        assert first.events.equals(log.events)
    weighted = apply_decay(split.train, 1.0)
    joined = weighted.concat(split.test).events
    assert joined.filter(pl.col("timestamp") == START + 120)["weight"].to_list() == [1.0]
    with pytest.raises(ConfigError, match="cannot be joined"):
        log.concat(read(EVENTS.drop("timestamp")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"wher": {}}, "did you mean 'where'"),
        ({"k_core_user": "3"}, "k_core_user"),
        ({"bad_rows": "ignore"}, "bad_rows"),
        ({"columns": {"usr": "x"}}, "columns.usr"),
        ({"max_per_user": 0}, "max_per_user"),
        ({"where": {"rating": np.int64(7)}}, "plain"),
    ],
)
def test_wrong_settings_are_config_errors(settings, message):
    with pytest.raises(ConfigError, match=message):
        read(EVENTS, **settings)


def test_settings_objects_are_accepted():
    columns = ColumnSettings(user="user_id")
    assert read(EVENTS, columns=columns).settings == DataSettings(events="<memory>")


def test_a_log_is_frozen():
    log = read(EVENTS)
    with pytest.raises(AttributeError):
        log.events = EVENTS
    assert isinstance(log.with_events(log.events.head(2)), Log)
    assert log.with_events(log.events.head(2)).num_users == 2
    assert log.num_users == 3
