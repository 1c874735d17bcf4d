"""Bad rows are refused or quarantined, counted by reason, and placed in their file."""

import polars as pl
import pytest

from recclr.data.check import check_events
from recclr.data.clean import filter_events
from recclr.data.tables import load_table
from recclr.errors import ConfigError, DataError
from recclr.settings import ColumnSettings, DataSettings

NOW = 1_700_000_000
OK = 1_500_000_000
GOOD = {"user_id": 1, "item_id": 1, "timestamp": OK, "w": 1.0}
BAD = [
    ({"user_id": None}, "user is missing"),
    ({"item_id": None, "timestamp": None}, "item is missing"),
    ({"timestamp": None}, "time is missing"),
    ({"timestamp": 0}, "time is before 1995"),
    ({"timestamp": -OK}, "time is before 1995"),
    ({"timestamp": NOW + 86_401}, "time is in the future"),
    ({"w": None}, "weight is missing"),
    ({"w": float("nan")}, "weight is not finite"),
    ({"w": float("inf")}, "weight is not finite"),
    ({"w": 1e60}, "weight is not finite"),
    ({"w": 0.0}, "weight is not above 0"),
    ({"w": 1e-60}, "weight is not above 0"),
    ({"w": -1.0}, "weight is not above 0"),
]


def clean_events(events, settings, **options):
    return filter_events(check_events(events, settings, **options), settings)


def frame_of(rows):
    schema = {"user_id": pl.Int64, "item_id": pl.Int64, "timestamp": pl.Int64, "w": pl.Float64}
    return pl.DataFrame(rows, schema=schema)


def settings(**values):
    columns = values.pop("columns", {"weight": "w"})
    return DataSettings(events="x", columns=ColumnSettings(**columns), **values)


def clean(frame, **values):
    return clean_events(frame, settings(**values), now=NOW)


@pytest.mark.parametrize(("change", "reason"), BAD)
def test_every_kind_of_bad_row_is_refused_and_named(change, reason):
    rows = [GOOD, {**GOOD, "item_id": 2}, GOOD | change]
    with pytest.raises(DataError) as caught:
        clean(frame_of(rows))
    message = str(caught.value)
    assert f"{reason} in 1 (row 2)" in message
    assert "1 bad rows of 3 (33.33%)" in message
    assert "data.bad_rows = 'drop'" in message


def test_the_edges_of_time_are_good():
    times = [788_918_400, NOW + 86_400]
    rows = [GOOD | {"timestamp": t, "item_id": i} for i, t in enumerate(times)]
    assert clean(frame_of(rows)).frame["timestamp"].to_list() == times


def test_dropped_rows_are_kept_in_quarantine_with_reason():
    rows = [GOOD | {"item_id": i} for i in range(1000)]
    for place, (change, _) in enumerate(BAD):
        rows.insert(10 * place, GOOD | change)
    result = clean(frame_of(rows), bad_rows="drop", max_bad_share=0.02)
    assert result.frame.height == 1000
    assert result.quarantine["row"].to_list() == [10 * place for place in range(len(BAD))]
    assert result.quarantine["reason"].to_list() == [reason for _, reason in BAD]
    assert result.quarantine["item_id"].to_list() == [(GOOD | c)["item_id"] for c, _ in BAD]
    assert set(result.quarantine["file"]) == {"the events"}
    assert next(s for s in result.steps if s.name == "bad_rows").rows_out == 1000


def test_more_than_the_cap_is_refused_all_the_same():
    rows = [GOOD | {"item_id": i} for i in range(19)] + [GOOD | {"user_id": None}]
    assert clean(frame_of(rows), bad_rows="drop", max_bad_share=0.05).frame.height == 19
    with pytest.raises(DataError, match=r"max_bad_share allows 4.90%"):
        clean(frame_of(rows), bad_rows="drop", max_bad_share=0.049)


def test_only_the_first_five_rows_are_listed():
    rows = [GOOD | {"user_id": None} for _ in range(7)]
    with pytest.raises(DataError, match=r"in 7 \(rows 0, 1, 2, 3, 4, \.\.\.\)"):
        clean(frame_of(rows))


def test_rows_are_counted_in_their_own_file_and_before_conditions(tmp_path):
    first = frame_of([GOOD | {"w": -1.0}, GOOD, GOOD | {"item_id": 2}])
    second = frame_of([GOOD | {"item_id": 3}, GOOD | {"user_id": None}])
    first.write_parquet(tmp_path / "a.parquet")
    second.write_parquet(tmp_path / "b.parquet")
    table = load_table(tmp_path, name="events")
    where = {"w": "> 0"}
    with pytest.raises(DataError, match=r"user is missing in 1 \(b.parquet row 1\)"):
        clean_events(table, settings(where=where), now=NOW)
    result = clean_events(table, settings(where=where, bad_rows="drop", max_bad_share=0.5), now=NOW)
    assert result.quarantine.select("file", "row").rows() == [("b.parquet", 1)]


def test_quarantine_keeps_columns_that_bear_its_own_names():
    frame = frame_of([GOOD, GOOD | {"user_id": None}]).with_columns(row=pl.Series(["x", "y"]))
    result = clean(frame, bad_rows="drop", max_bad_share=0.5)
    assert result.quarantine["row_original"].to_list() == ["y"]
    assert result.quarantine["row"].to_list() == [1]


def test_conditions_run_before_the_check():
    rows = [GOOD, GOOD | {"user_id": None}, GOOD | {"item_id": 2, "w": -1.0}]
    result = clean(frame_of(rows), where={"user_id": "not null", "w": "> 0"})
    assert result.frame.height == 1
    assert [(s.name, s.rows_out) for s in result.steps][:2] == [
        ("where user_id", 2),
        ("where w", 1),
    ]


def test_conditions_on_tables_go_by_id():
    events = frame_of([GOOD | {"user_id": u, "item_id": i} for u in (1, 2) for i in (1, 2, 3)])
    users = pl.DataFrame({"user_id": [1, 2], "country": ["FR", "DE"], "kind": ["a", "b"]})
    items = pl.DataFrame({"item_id": [1, 2, 9], "price": [5.0, None, 1.0], "kind": ["a", "b", "c"]})

    def pairs(where):
        result = clean_events(events, settings(where=where), users=users, items=items, now=NOW)
        return result.frame.select("user_id", "item_id").rows()

    assert pairs({"country": "== 'FR'"}) == [(1, 1), (1, 2), (1, 3)]
    assert pairs({"price": "> 1"}) == [(1, 1), (2, 1)]
    assert pairs({"price": "not null", "country": "== 'DE'"}) == [(2, 1)]
    assert pairs({"users.kind": "== 'b'", "items.kind": "== 'b'"}) == [(2, 2)]
    assert pairs({"events.item_id": "== 3"}) == [(1, 3), (2, 3)]
    # A column of the events goes before one of the tables.
    prices = items.rename({"price": "w"})
    result = clean_events(events, settings(where={"w": "<= 1"}), items=prices, now=NOW)
    assert result.frame.height == 6
    with pytest.raises(ConfigError, match=r"'users.kind' or 'items.kind'"):
        pairs({"kind": "== 'a'"})
    with pytest.raises(DataError, match="did you mean 'country'"):
        pairs({"contry": "== 'FR'"})
    with pytest.raises(DataError, match="'where price' left no rows"):
        pairs({"price": "> 99"})


def test_every_condition_is_parsed_before_the_first_runs():
    with pytest.raises(ConfigError, match=r"data\.where\.w"):
        clean(frame_of([GOOD]), where={"user_id": "> 5", "w": "> "})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user": "userid"}, "no column 'userid' (from data.columns.user)"),
        ({"user": "USER_ID"}, "did you mean 'user_id'"),
        ({"timestamp": "time"}, "data.columns.timestamp"),
        ({"weight": "x"}, "data.columns.weight"),
        ({"event": "kind"}, "data.columns.event"),
    ],
)
def test_missing_columns_are_data_errors_with_the_nearest_name(columns, message):
    with pytest.raises(DataError) as caught:
        clean(frame_of([GOOD]), columns=columns)
    assert message in str(caught.value)
    assert "'user_id', 'item_id', 'timestamp', 'w'" in str(caught.value)


def test_settings_that_contradict_each_other():
    with pytest.raises(ConfigError, match="named for users and for items"):
        clean(frame_of([GOOD]), columns={"user": "item_id"})
    with pytest.raises(ConfigError, match=r"data\.columns\.event"):
        clean(frame_of([GOOD]), event_weights={"buy": 1.0})


def test_a_log_without_the_default_timestamp_says_so():
    frame = frame_of([GOOD]).rename({"timestamp": "Timestamp"})
    result = clean(frame, columns={})
    assert result.frame.columns == ["user_id", "item_id"]
    assert "is it 'Timestamp'" in result.notes[0]
    assert clean(frame_of([GOOD]), columns={"timestamp": ""}).notes == []


def test_weights_beyond_float32_are_refused_after_multiplying():
    frame = frame_of([GOOD | {"w": 1e38}]).with_columns(kind=pl.Series(["a"]))
    columns = {"weight": "w", "event": "kind"}
    assert clean(frame, columns=columns, event_weights={"a": 2.0}).frame.height == 1
    with pytest.raises(DataError, match="beyond float32"):
        clean(frame, columns=columns, event_weights={"a": 1e30})
    with pytest.raises(DataError, match="weights must be numbers"):
        clean(frame, columns={"weight": "kind"})


def test_unreadable_times_in_text():
    frame = pl.DataFrame(
        {
            "user_id": [1, 1, 1],
            "item_id": [1, 2, 3],
            "timestamp": ["2017-07-14T02:40:00Z", "soon", None],
        }
    )
    with pytest.raises(DataError) as caught:
        clean_events(frame, DataSettings(events="x"), now=NOW)
    assert "time is unreadable in 1 (row 1)" in str(caught.value)
    assert "time is missing in 1 (row 2)" in str(caught.value)
    result = clean_events(
        frame, DataSettings(events="x", bad_rows="drop", max_bad_share=0.7), now=NOW
    )
    assert result.frame["timestamp"].to_list() == [OK]
