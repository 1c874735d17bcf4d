"""Rows that are negatives of their user: read beside the log, in time, and never a positive."""

import polars as pl
import pytest
import torch

from recclr.data.prepare import prepare
from recclr.data.prepared import PreparedLog
from recclr.data.reading import read
from recclr.errors import ConfigError, DataError
from recclr.settings import SplitSettings, TowerSettings

pytestmark = pytest.mark.usefixtures("no_power_cut")

START = 1_600_000_000
# (user, item, type, day); of ten positives the last three are held out.
ROWS = [
    ("a", "i1", "buy", 0),
    ("b", "i2", "buy", 1),
    ("a", "i3", "shown", 1),
    ("a", "i3", "shown", 2),
    ("a", "i4", "hide", 2),
    ("b", "i1", "shown", 2),
    ("a", "i2", "buy", 3),
    ("b", "i3", "buy", 3),
    # What the user buys after all, in train.
    ("a", "i2", "shown", 1),
    # Nobody buys these; that user buys nothing; a type nobody named.
    ("a", "i9", "shown", 2),
    ("z", "i1", "shown", 2),
    ("b", "i4", "scroll", 2),
    ("b", "i4", "buy", 4),
    ("c", "i4", "buy", 4),
    ("c", "i1", "buy", 5),
    # After the last row of train (day 5), before that of validation (day 7).
    ("c", "i2", "shown", 6),
    ("c", "i3", "buy", 7),
    ("a", "i4", "buy", 8),
    ("b", "i5", "buy", 9),
]
FRAME = pl.DataFrame(
    {
        "user_id": [row[0] for row in ROWS],
        "item_id": [row[1] for row in ROWS],
        "event": [row[2] for row in ROWS],
        "timestamp": [START + 86_400 * row[3] for row in ROWS],
    }
)
KINDS = ("shown", "hide")


def log_of(frame=FRAME, **settings):
    columns = {"event": "event"} | settings.pop("columns", {})
    return read(frame, columns=columns, event_weights={"buy": 1.0}, explicit=KINDS, **settings)


def prepared_of(train):
    return prepare(train, None, user=TowerSettings(), item=TowerSettings())


def lists_of(prepared):
    lists, found = prepared.tensors.explicit, {}
    for user, user_id in enumerate(prepared.users.ids.to_list()):
        found[user_id] = sorted(prepared.items.decode(lists.row(user).numpy()).to_list())
    return found


def test_rows_of_the_named_types_are_negatives_and_no_rows_of_the_log():
    log = log_of()
    assert set(zip(*log.events.select("user_id", "item_id").to_dict().values(), strict=True)) == {
        (user, item) for user, item, kind, _ in ROWS if kind == "buy"
    }
    assert log.explicit["user_id"].len() == 7
    assert any("7 pairs of the event types shown, hide are negatives" in n for n in log.notes)
    assert read(FRAME, columns={"event": "event"}, event_weights={"buy": 1.0}).explicit is None


def test_a_stage_gets_what_was_there_in_its_time_and_is_no_positive():
    split = log_of().split(SplitSettings(by="time", valid=0.1, test=0.2))
    assert len(split.train) == 7
    selection = prepared_of(split.train)
    # i4 is in train, and a buys it in test only; b's i1 counts, its i4 was scrolled past.
    assert lists_of(selection) == {"a": ["i3", "i4"], "b": ["i1"], "c": []}
    assert selection.counts["explicit_pairs"] == 3
    # All but what was shown to c on day 6.
    assert selection.counts["explicit_rows"] == 6
    refit = prepared_of(split.train.concat(split.valid))
    assert lists_of(refit) == {"a": ["i3", "i4"], "b": ["i1"], "c": ["i2"]}


def test_a_log_without_time_takes_all(tmp_path):
    log = log_of(FRAME.drop("timestamp"))
    found = lists_of(prepared_of(log))
    # The whole log is train here, with all that anybody bought.
    assert found == {"a": ["i3"], "b": ["i1"], "c": ["i2"]}


def test_ids_of_numbers_and_text_meet():
    numbers = FRAME.with_columns(item_id=pl.col("item_id").str.slice(1).cast(pl.Int64))
    assert lists_of(prepared_of(log_of(numbers)))["a"] == [3]
    # The only text is in a row that is no positive.
    odd = numbers.with_columns(
        item_id=pl.when(pl.col("event") == "hide")
        .then(pl.lit("x"))
        .otherwise(pl.col("item_id").cast(pl.String))
    )
    assert lists_of(prepared_of(log_of(odd)))["c"] in (["2"], [2])


def test_lists_are_saved_with_the_log(tmp_path):
    prepared = prepared_of(log_of())
    prepared.save(tmp_path)
    loaded = PreparedLog.load(tmp_path).tensors.explicit
    assert torch.equal(loaded.offsets, prepared.tensors.explicit.offsets)
    assert torch.equal(loaded.values, prepared.tensors.explicit.values)


def test_types_that_make_no_sense_are_refused():
    with pytest.raises(DataError, match=r"explicit = \['hidden'\].*no row is of an event type"):
        read(FRAME, columns={"event": "event"}, event_weights={"buy": 1.0}, explicit=["hidden"])
    with pytest.raises(ConfigError, match=r"types that data\.event_weights does not name"):
        read(FRAME, columns={"event": "event"}, event_weights={"buy": 1.0}, explicit=["buy"])
    with pytest.raises(ConfigError, match=r"types that data\.event_weights does not name"):
        read(FRAME, columns={"event": "event"}, explicit=["shown"])
