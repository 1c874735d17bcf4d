import os
import time
from pathlib import Path

import polars as pl
import pytest

from recclr.data.interactions import Log
from recclr.data.prepare import prepare
from recclr.data.reading import read
from recclr.errors import ConfigError, DataError
from recclr.settings import DataSettings, FeatureSettings, IdSettings, TowerSettings

DATA = Path(os.environ.get("RECCLR_DATA", Path(__file__).parents[3] / "shared" / "data"))
PLAIN = TowerSettings()


def log(
    pairs: list[tuple],
    *,
    users: pl.DataFrame | None = None,
    items: pl.DataFrame | None = None,
    first_s: int | None = 1000,
    **settings: float,
) -> Log:
    """A log of (user, item) or (user, item, weight) rows, ten seconds apart."""
    columns = ["user_id", "item_id", "weight"][: len(pairs[0])]
    events = pl.DataFrame(pairs, schema=columns, orient="row")
    if "weight" in columns:
        events = events.with_columns(pl.col("weight").cast(pl.Float32))
    if first_s is not None:
        times = pl.int_range(len(pairs), dtype=pl.Int64, eager=True) * 10 + first_s
        events = events.with_columns(times.alias("timestamp"))
    return Log(events, users, items, DataSettings(events="<memory>", **settings))


ITEMS = pl.DataFrame(
    {"item_id": ["kiwi", "fig", "date", "lime"], "colour": ["green", "blue", "brown", "green"]}
)
TRAIN = [("bo", "fig"), ("al", "pear"), ("bo", "kiwi"), ("cy", "fig"), ("al", "fig")]
COLOUR = TowerSettings(features={"colour": FeatureSettings(kind="categorical")})


def test_train_first_then_other_logs_then_the_table() -> None:
    users = pl.DataFrame({"user_id": ["di", "al", "ed"]})
    train = log(TRAIN, users=users, items=ITEMS)
    valid = log([("flo", "nut"), ("bo", "fig")])
    prepared = prepare(train, valid, user=PLAIN, item=PLAIN, extra_ids=(valid,))
    assert prepared.users.ids.to_list() == ["bo", "al", "cy", "flo", "di", "ed"]
    assert prepared.items.ids.to_list() == ["fig", "pear", "kiwi", "nut", "date", "lime"]
    assert prepared.users.counts.tolist() == [2, 2, 1, 0, 0, 0]
    assert prepared.items.counts.tolist() == [3, 1, 1, 0, 0, 0]
    encoded = prepared.tensors.train
    assert encoded.user_idx.tolist() == [0, 1, 0, 2, 1]
    assert encoded.item_idx.tolist() == [0, 1, 2, 0, 0]
    assert (encoded.num_users, encoded.num_items) == (6, 6)
    assert encoded.timestamp.tolist() == [1000, 1010, 1020, 1030, 1040]
    assert prepared.tensors.cutoff == 1041
    assert encoded.weight is None
    assert prepared.counts["train_items"] == 3


def test_held_out_ids_that_nobody_knows_are_kept_apart_and_counted() -> None:
    held_out = log([("zo", "fig"), ("al", "nut"), ("yu", "nut"), ("zo", "oat"), ("bo", "lime")])
    prepared = prepare(log(TRAIN, items=ITEMS), held_out, user=PLAIN, item=PLAIN)
    judged = prepared.tensors.held_out
    assert judged.user_idx.tolist() == [3, 1, 4, 3, 0]
    assert judged.item_idx.tolist() == [0, -1, -1, -1, 4]
    assert (judged.num_users, judged.num_items) == (3, 5)
    assert judged.timestamp.tolist() == [1000, 1010, 1020, 1030, 1040]
    assert (
        prepared.counts
        | {
            "held_out_rows": 5,
            "held_out_users": 4,
            "held_out_items": 4,
            "held_out_users_outside": 2,
            "held_out_items_outside_corpus": 2,
            "held_out_rows_outside_corpus": 3,
        }
        == prepared.counts
    )


def test_without_held_out_rows_there_is_nothing_to_judge() -> None:
    prepared = prepare(log(TRAIN), None, user=PLAIN, item=PLAIN)
    assert prepared.tensors.held_out is None
    assert "held_out_rows" not in prepared.counts


def test_features_have_one_row_per_item_of_the_vocabulary() -> None:
    prepared = prepare(log(TRAIN, items=ITEMS), None, user=PLAIN, item=COLOUR)
    # fig, pear (not in the table), kiwi, and the cold date (brown: unknown) and lime (green).
    assert prepared.tensors.items.columns["colour"].idx.tolist() == [1, 0, 2, 0, 2]
    assert prepared.tensors.items.num_rows == 5
    assert prepared.tensors.users.num_rows == 3
    assert prepared.counts["item.features.colour.missing"] == 2
    again = prepared.item_encoder.encode(pl.DataFrame({"colour": ["green", None]}))
    assert again.columns["colour"].idx.tolist() == [2, 0]


def test_nothing_is_learned_from_held_out_rows() -> None:
    """The canary: what only validation and test rows hold changes no number seen in training."""
    items = ITEMS.with_columns(size=pl.Series([2.0, 4.0, 1e6, 3.0]))
    item = TowerSettings(
        features={
            "colour": FeatureSettings(kind="categorical"),
            "size": FeatureSettings(kind="numeric"),
        }
    )
    train = log(TRAIN, items=items)
    plain = prepare(train, None, user=PLAIN, item=item)
    canary = log([("al", "date")] * 50, first_s=10**9)
    planted = prepare(train, canary, user=PLAIN, item=item, extra_ids=(canary,))
    assert planted.item_encoder.to_json() == plain.item_encoder.to_json()
    assert planted.items.counts.sum() == plain.items.counts.sum() == 5
    assert planted.tensors.cutoff == plain.tensors.cutoff


def test_weights_are_carried_over_and_decay_on_train_only() -> None:
    day_s = 86_400
    rows = [("bo", "fig", 2.0), ("al", "kiwi", 3.0)]
    train = log(rows, decay_half_life_d=10 / day_s)
    prepared = prepare(train, train, user=PLAIN, item=PLAIN)
    assert prepared.tensors.train.weight.tolist() == pytest.approx([1.0, 3.0])
    assert prepared.tensors.held_out.weight.tolist() == [2.0, 3.0]


def test_a_log_without_time_has_no_cut_off() -> None:
    prepared = prepare(log(TRAIN, first_s=None), None, user=PLAIN, item=PLAIN)
    assert prepared.tensors.train.timestamp is None
    assert prepared.tensors.cutoff is None


@pytest.mark.parametrize(
    ("item", "setting"),
    [
        (
            TowerSettings(features={"recent": FeatureSettings(kind="statistics")}),
            r"item\.features\.recent",
        ),
        (TowerSettings(id=IdSettings(as_of=True)), r"item\.id\.as_of"),
    ],
)
def test_what_needs_time_says_so(item: TowerSettings, setting: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"{setting}.*needs timestamps.*data\.columns\.timestamp"
    ):
        prepare(log(TRAIN, first_s=None), None, user=PLAIN, item=item)
    assert prepare(log(TRAIN), None, user=PLAIN, item=item).tensors.items.columns == {}


def test_a_given_vocabulary_keeps_its_indices() -> None:
    first = prepare(log(TRAIN, items=ITEMS), None, user=PLAIN, item=PLAIN)
    refit = log([("cy", "lime"), *TRAIN[::-1]], items=ITEMS)
    second = prepare(refit, None, user=PLAIN, item=COLOUR, vocabulary=(first.users, first.items))
    assert second.items.ids.to_list() == first.items.ids.to_list()
    assert second.items.counts.tolist() == [3, 1, 1, 0, 1]
    assert second.tensors.train.item_idx.tolist() == [4, 0, 0, 2, 1, 0]
    assert second.tensors.items.num_rows == 5
    stranger = log([*TRAIN, ("bo", "nut"), ("bo", "nut")])
    with pytest.raises(DataError, match=r"1 values of item_id that the given vocabulary lacks"):
        prepare(stranger, None, user=PLAIN, item=PLAIN, vocabulary=(first.users, first.items))


def test_integer_ids_of_several_widths_stay_exact() -> None:
    large = 2**53 + 1
    items = pl.DataFrame({"item_id": pl.Series([large, large - 1], dtype=pl.UInt64)})
    train = Log(
        pl.DataFrame({"user_id": [1, 2], "item_id": pl.Series([large, 3], dtype=pl.Int64)}),
        None,
        items,
        DataSettings(events="<memory>"),
    )
    prepared = prepare(train, None, user=PLAIN, item=PLAIN)
    assert prepared.items.ids.to_list() == [large, 3, large - 1]
    assert prepared.tensors.train.item_idx.tolist() == [0, 1]


def test_a_table_with_two_rows_for_an_item_is_refused() -> None:
    twice = pl.concat([ITEMS, ITEMS[1:2]])
    with pytest.raises(DataError, match=r"items table: 2 rows .*\(first rows 1, 4\)"):
        prepare(log(TRAIN, items=twice), None, user=PLAIN, item=PLAIN)


def test_a_log_too_small_to_learn_from_is_refused() -> None:
    with pytest.raises(DataError, match="at least 2 users and 2 items"):
        prepare(log([("bo", "fig"), ("bo", "kiwi")]), None, user=PLAIN, item=PLAIN)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no data at {DATA}: set RECCLR_DATA")
def test_movietweetings_fits_on_train_and_is_fast() -> None:
    folder = DATA / "movietweetings-2013"
    whole = read(folder / "interactions.parquet", items=folder / "items.parquet")
    train, valid, _ = whole.split_by_time(valid=0.1, test=0.1)
    item = TowerSettings(
        features={
            "genres": FeatureSettings(kind="multi_hot"),
            "title": FeatureSettings(kind="text", buckets=20_000),
            "year": FeatureSettings(kind="numeric"),
        }
    )
    start = time.perf_counter()
    prepared = prepare(train, valid, user=PLAIN, item=item)
    assert time.perf_counter() - start < 10
    items, tensors = prepared.items, prepared.tensors
    assert len(items) == 12_611
    assert items.decode(tensors.train.item_idx.numpy()).equals(
        train.events["item_id"], check_names=False
    )
    assert prepared.counts["held_out_items_outside_corpus"] == 0
    # Genres of one film, from the table to the tensor.
    number = int(items.encode(pl.Series([1223], dtype=pl.Int32))[0])
    names = prepared.item_encoder.columns["genres"].to_json()["categories"]
    genres = tensors.items.columns["genres"].csr.row(number).tolist()
    assert {names[index - 1] for index in genres} == {"Short", "Horror", "Sci-Fi"}
    known = items.counts > 0
    years = tensors.items.columns["year"].values[:, 0].numpy()
    assert abs(years[known].mean()) < 1e-5
    assert abs(years[known].std() - 1) < 1e-3
