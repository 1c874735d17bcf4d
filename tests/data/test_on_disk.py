"""A log that is read and split on the disk is the one in memory, row by row and word by word."""

from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

import recclr.data.reading as reading
from recclr.data.interactions import apply_decay
from recclr.data.prepare import prepare
from recclr.data.prepared import PreparedLog
from recclr.data.reading import read
from recclr.data.spill import Disk
from recclr.errors import DataError, RecclrError, StoreError
from recclr.settings import ColumnSettings, SplitSettings, TowerSettings

START = 1_500_000_000
SCHEMA = ["user_id", "item_id", "timestamp", "weight", "event"]
ROW = st.tuples(
    st.integers(0, 6),
    st.integers(0, 5),
    st.integers(0, 12),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from(["view", "buy", "ad"]),
)
ROWS = st.lists(ROW, min_size=1, max_size=60)
WAYS = st.fixed_dictionaries(
    {
        "deduplicate": st.sampled_from(["first", "last", "sum", "none"]),
        "k_core_user": st.sampled_from([0, 2]),
        "k_core_item": st.sampled_from([0, 2, 3]),
        "max_per_user": st.sampled_from([None, 2, 4]),
        "id_type": st.sampled_from(["auto", "string"]),
        "event_weights": st.sampled_from([{}, {"buy": 2.0, "view": 0.25}]),
        "where": st.sampled_from([{}, {"item_id": "!= 3"}]),
    }
)
SPLITS = st.one_of(
    st.builds(
        SplitSettings,
        by=st.sampled_from(["time", "random", "items"]),
        valid=st.sampled_from([0.0, 0.2]),
        test=st.sampled_from([0.0, 0.3]),
        train_share=st.sampled_from([1.0, 0.5]),
    ),
    st.builds(
        SplitSettings,
        by=st.just("leave_last"),
        valid=st.just(1.0),
        test=st.sampled_from([0.0, 1.0]),
    ),
)


@pytest.fixture
def small_disk(monkeypatch):
    """Whatever does not stay in memory is worked on seven rows at a time."""
    with_rows(monkeypatch, 7)


def with_rows(monkeypatch, rows):
    monkeypatch.setattr(
        reading,
        "disk_for",
        lambda pieces, settings, workspace: (
            None if settings.resident is True else Disk(Path(workspace or "."), rows)
        ),
    )


def frame_of(rows, *, time):
    frame = pl.DataFrame(rows, schema=SCHEMA, orient="row")
    frame = frame.with_columns(pl.col("timestamp") + START)
    return frame if time else frame.drop("timestamp")


def both(path, **settings):
    """The log, or the error, in memory and on the disk."""
    return [outcome(lambda r=r: read(path, resident=r, **settings)) for r in (True, False)]


def outcome(what):
    try:
        return what()
    except RecclrError as error:
        return error


def assert_same_log(ours, theirs):
    assert ours.events.schema == theirs.events.schema
    assert ours.events.equals(theirs.events)
    assert ours.steps == theirs.steps
    assert ours.quarantine.equals(theirs.quarantine)
    assert ours.notes == theirs.notes


def assert_same_split(disk, memory, settings):
    expected, found = (outcome(lambda log=log: log.split(settings)) for log in (memory, disk))
    if isinstance(expected, RecclrError):
        assert (type(found), str(found)) == (type(expected), str(expected))
        return
    for name in ("train", "valid", "test", "left_out"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert (ours is None) == (theirs is None)
        assert ours is None or ours.events.equals(theirs.events), name
    assert (found.counts, found.cutoffs, found.by) == (
        expected.counts,
        expected.cutoffs,
        expected.by,
    )
    if expected.valid is not None:
        ours, theirs = (split.train.concat(split.valid) for split in (found, expected))
        assert ours.events.equals(theirs.events)


@given(
    rows=ROWS, ways=WAYS, time=st.booleans(), at_once=st.sampled_from([1, 5, 23]), data=st.data()
)
@limits(max_examples=80)
def test_reading_and_splitting_are_those_in_memory(
    tmp_path_factory, rows, ways, time, at_once, data
):
    folder = tmp_path_factory.mktemp("log")
    frame_of(rows, time=time).write_parquet(folder / "events.parquet", row_group_size=9)
    columns = {"weight": "weight"} | ({"event": "event"} if ways["event_weights"] else {})
    ways["columns"] = ColumnSettings(**columns, timestamp="timestamp" if time else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with_rows(patch, at_once)
        memory, disk = both(folder / "events.parquet", **ways)
        if isinstance(memory, RecclrError):
            assert type(disk) is type(memory)
            return
        assert disk.disk is not None
        assert memory.disk is None
        assert_same_log(disk, memory)
        settings = data.draw(SPLITS)
        if time or settings.by != "time":
            assert_same_split(disk, memory, settings)
        if time:
            ours, theirs = apply_decay(disk, 3e-5), apply_decay(memory, 3e-5)
            assert ours.events.equals(theirs.events)
        # Files without a name, and nobody's rows are left in them.
        assert {path.name for path in folder.iterdir()} == {"events.parquet"}


def test_fractions_of_seconds_order_rows_of_all_pieces(tmp_path, small_disk):
    """Most pieces have whole seconds only, and rows of a second come in many of them."""
    times = [(START + row % 3) * 1000 + (0 if row < 30 else 997 - row) for row in range(40)]
    frame = pl.DataFrame({"user_id": range(40), "item_id": [1] * 40, "timestamp": times})
    frame.write_parquet(tmp_path / "events.parquet")
    memory, disk = both(tmp_path / "events.parquet")
    assert_same_log(disk, memory)
    assert disk.events["user_id"].to_list() != sorted(disk.events["user_id"])


@pytest.mark.parametrize("policy", ["refuse", "drop"])
def test_bad_rows_of_all_pieces_are_counted_together(tmp_path, small_disk, policy):
    frame = frame_of([(row, row % 4, row, 1.0, "buy") for row in range(60)], time=True)
    bad = pl.Series([None if row in (11, 50) else row for row in range(60)])
    frame.with_columns(user_id=bad).write_parquet(tmp_path / "events.parquet")
    ways = {"bad_rows": policy, "max_bad_share": 0.05}
    memory, disk = both(tmp_path / "events.parquet", **ways)
    if policy == "drop":
        assert_same_log(disk, memory)
        assert disk.quarantine["row"].to_list() == [11, 50]
        memory, disk = both(tmp_path / "events.parquet", **ways | {"max_bad_share": 0.03})
        assert str(memory).replace("60 (3.33%)", "60 (3.33%) that were looked at") == str(disk)
    else:
        assert "events.parquet: 2 bad rows of 60 (3.33%); rows count from 0" in str(memory)
        assert "1 bad rows of 7 (14.29%) that were looked at; rows count from 0" in str(disk)
        assert "column 'user_id': user is missing in 1 (row 11)" in str(disk)


def test_a_time_in_another_unit_is_refused_whichever_piece_it_is_in(tmp_path, small_disk):
    times = [START + row for row in range(40)] + [(START + 50) * 1000]
    frame = pl.DataFrame({"user_id": range(41), "item_id": [1] * 41, "timestamp": times})
    frame.write_parquet(tmp_path / "events.parquet")
    memory, disk = both(tmp_path / "events.parquet")
    assert "mixes time units: 40 values in s and 1 values in ms" in str(disk)
    assert str(disk) == str(memory)


def test_pieces_without_times_take_the_unit_of_the_others(tmp_path, small_disk):
    times = [None if (row + 20) % 40 > 20 else (START + row) * 1000 for row in range(60)]
    frame = pl.DataFrame({"user_id": range(60), "item_id": [1] * 60, "timestamp": times})
    frame.write_parquet(tmp_path / "events.parquet")
    memory, disk = both(tmp_path / "events.parquet", where={"timestamp": "not null"})
    assert_same_log(disk, memory)
    assert any("numbers in ms, detected" in note for note in disk.notes)


@pytest.mark.parametrize("policy", ["refuse", "drop"])
@pytest.mark.parametrize("digits", [range(14), range(30, 36), [20], range(40)])
def test_times_in_words_make_numbers_among_them_unreadable(tmp_path, small_disk, digits, policy):
    """Wherever they stand; a piece of numbers alone does not know of the words."""
    times = [
        str(START + row) if row in digits else f"2017-07-14 03:00:{row:02}" for row in range(40)
    ]
    frame = pl.DataFrame({"user_id": range(40), "item_id": [1] * 40, "timestamp": times})
    frame.write_parquet(tmp_path / "events.parquet")
    memory, disk = both(tmp_path / "events.parquet", bad_rows=policy, max_bad_share=0.9)
    if isinstance(memory, RecclrError):
        assert type(disk) is type(memory)
        assert "time is unreadable" in str(disk)
    else:
        assert_same_log(disk, memory)


@pytest.mark.parametrize("first", [0, 5 * 10**10])
@pytest.mark.parametrize("known", [True, False])
def test_a_first_piece_whose_numbers_are_no_times_waits_for_the_others(
    tmp_path, small_disk, first, known
):
    times = [first] * 9 + [(START + row) * 1000 if known else first + 1 for row in range(30)]
    frame = pl.DataFrame({"user_id": range(39), "item_id": [1] * 39, "timestamp": times})
    frame.write_parquet(tmp_path / "events.parquet")
    memory, disk = both(tmp_path / "events.parquet", bad_rows="drop", max_bad_share=0.9)
    if known:
        assert_same_log(disk, memory)
    else:
        assert str(disk) == str(memory)
        assert "no value is a time between 1995 and now" in str(memory)


def test_an_event_column_that_nothing_reads_may_hold_anything(tmp_path, small_disk):
    frame = pl.DataFrame({"user_id": range(20), "item_id": [1] * 20, "event": [b"\xff"] * 20})
    frame.write_parquet(tmp_path / "events.parquet")
    memory, disk = both(tmp_path / "events.parquet", columns=ColumnSettings(event="event"))
    assert_same_log(disk, memory)


def test_many_parts_open_few_files(tmp_path, monkeypatch):
    """As many parts as there may be, with the limit that processes have by default."""
    resource = pytest.importorskip("resource")
    with_rows(monkeypatch, 1)
    rows = [(row, row % 3, row, 1.0, "buy") for row in range(700)] * 2
    frame_of(rows, time=True).write_parquet(tmp_path / "events.parquet")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, limits[1]), limits[1]))
    monkeypatch.setattr(Disk, "stretch", property(lambda disk: 500))
    try:
        memory, disk = both(tmp_path / "events.parquet", k_core_item=2, deduplicate="none")
        assert_same_log(disk, memory)
        assert_same_split(disk, memory, SplitSettings(by="random"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize(
    ("ways", "message"),
    [
        ({"where": {"item_id": "> 9"}}, "'where item_id' left no rows of 60"),
        ({"k_core_item": 40}, "'k_core' left no rows of 15"),
        (
            {"event_weights": {"buyy": 1.0}, "columns": ColumnSettings(event="event")},
            r"no row is of an event type in .*; the column holds \['buy'\]; did you mean 'buy'",
        ),
    ],
)
def test_a_step_that_leaves_nothing_of_all_is_refused(tmp_path, small_disk, ways, message):
    """One that leaves nothing of a piece is not."""
    frame = frame_of([(row % 6, row % 4, row, 1.0, "buy") for row in range(60)], time=True)
    frame = frame.with_columns(item_id=pl.when(pl.int_range(60) < 30).then(1).otherwise("item_id"))
    frame.write_parquet(tmp_path / "events.parquet")
    kept = read(tmp_path / "events.parquet", resident=False, where={"item_id": "!= 1"})
    assert kept.steps[0].rows_in == 60
    with pytest.raises(DataError, match=message):
        read(tmp_path / "events.parquet", resident=False, **ways)


def test_rows_given_by_hand_and_a_leak_among_them(tmp_path, small_disk):
    rows = [(row % 7, row % 11, row, 1.0, "buy") for row in range(60)]
    frame = frame_of(rows, time=True)
    frame[:50].write_parquet(tmp_path / "train.parquet")
    frame[50:].with_columns(item_id=pl.col("item_id") + 20).write_parquet(tmp_path / "test.parquet")
    frame[12:15].write_parquet(tmp_path / "leak.parquet")
    memory, disk = both(tmp_path / "train.parquet")
    given = SplitSettings(by="given", valid=0.2, test_events=str(tmp_path / "test.parquet"))
    assert_same_split(disk, memory, given)
    for log in (memory, disk):
        with pytest.raises(DataError, match=r"3 of 3 .* pairs .* are also in the rows"):
            log.split(replace(given, test_events=str(tmp_path / "leak.parquet")))


def test_what_training_sees_is_the_same(tmp_path, small_disk, monkeypatch):
    """Ids of the tables are wider than those of the events, weights decay, users refused items."""
    monkeypatch.chdir(tmp_path)
    rows = [(row % 7, (3 * row) % 11, row * 900, 1.0 + row % 2, "buy") for row in range(70)]
    rows += [(row % 7, row % 10, row * 900, 1.0, "refused") for row in range(20)]
    frame = frame_of(rows, time=True).cast({"user_id": pl.Int32, "item_id": pl.Int16})
    frame.write_parquet("events.parquet", row_group_size=13)
    items = pl.DataFrame({"item_id": range(14), "kind": [str(i % 3) for i in range(14)]})
    ways = {
        "items": items,
        "event_weights": {"buy": 1.0},
        "columns": ColumnSettings(event="event", weight="weight"),
        "explicit": ["refused"],
        "decay_half_life_d": 0.2,
    }
    memory, disk = both("events.parquet", **ways)
    assert disk.events["item_id"].dtype == pl.Int64
    assert_same_log(disk, memory)
    encoded = []
    for log in (disk, memory):
        train, valid, _ = log.split_by_time(valid=0.2, test=0.1)
        found = prepare(train, valid, user=TowerSettings(), item=TowerSettings())
        found.save(tmp_path / f"run{len(encoded)}")
        encoded += [found, PreparedLog.load(tmp_path / f"run{len(encoded)}")]
    first = encoded[0]
    assert first.tensors.train.mapped_for == torch.device("cpu")
    for other in encoded[1:]:
        assert other.counts == first.counts
        for ours, theirs in ((first.users, other.users), (first.items, other.items)):
            assert ours.ids.equals(theirs.ids)
            assert (ours.counts == theirs.counts).all()
        for part in ("train", "held_out"):
            ours, theirs = getattr(first.tensors, part), getattr(other.tensors, part)
            assert [name for name, _ in ours.columns()] == [name for name, _ in theirs.columns()]
            for (name, mine), (_, its) in zip(ours.columns(), theirs.columns(), strict=True):
                assert torch.equal(mine, its), (part, name)
        assert torch.equal(first.tensors.explicit.values, other.tensors.explicit.values)


def test_who_stays_in_memory(tmp_path, monkeypatch):
    path = tmp_path / "events.parquet"
    rows = 1000
    pl.DataFrame({"user_id": range(rows), "item_id": [1] * rows}).write_parquet(path)
    for free, resident, stays in (
        (2 * 65 * rows, "auto", True),
        (2 * 65 * rows - 1, "auto", False),
        (1, True, True),
        (1 << 60, False, False),
        (None, "auto", True),
        (None, False, False),
    ):
        monkeypatch.setattr(reading, "available_bytes", lambda free=free: free)
        log = read(path, resident=resident)
        assert (log.disk is None) == stays, (free, resident)
        assert any("read piece by piece" in sentence for sentence in log.whereabouts) != stays
    # Texts take more, and a table that is no Parquet comes whole.
    monkeypatch.setattr(reading, "available_bytes", lambda: 2 * 70 * rows)
    assert read(path).disk is None
    pl.read_parquet(path).cast({"user_id": pl.String}).write_parquet(path)
    assert read(path).disk.rows == reading._LEAST_ROWS
    pl.read_parquet(path).write_csv(tmp_path / "events.csv")
    assert read(tmp_path / "events.csv", resident=False).disk is None


def test_a_disk_without_room_is_said_before_reading(tmp_path, small_disk, monkeypatch):
    monkeypatch.setattr(reading, "_FILE_BYTES", 1 << 60)
    path = tmp_path / "events.parquet"
    pl.DataFrame({"user_id": [1, 2], "item_id": [1, 2]}).write_parquet(path)
    with pytest.raises(StoreError, match=r"needs about .* MB, but its disk has"):
        read(path, resident=False)
