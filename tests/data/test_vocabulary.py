import resource

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recclr.data.vocabulary import Vocabulary, gather
from recclr.errors import CheckpointError, DataError, ShapeError

INTEGERS = {
    pl.Int8: (-(2**7), 2**7 - 1),
    pl.Int16: (-(2**15), 2**15 - 1),
    pl.Int32: (-(2**31), 2**31 - 1),
    pl.Int64: (-(2**63), 2**63 - 1),
    pl.UInt8: (0, 2**8 - 1),
    pl.UInt16: (0, 2**16 - 1),
    pl.UInt32: (0, 2**32 - 1),
    pl.UInt64: (0, 2**64 - 1),
}


def texts() -> st.SearchStrategy[str]:
    # Surrogates are no Unicode text and cannot be in a data frame.
    return st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


@st.composite
def id_columns(draw: st.DrawFn) -> pl.Series:
    dtype = draw(st.sampled_from([*INTEGERS, pl.String]))
    if dtype == pl.String:
        return pl.Series("user_id", draw(st.lists(texts(), max_size=30)), dtype=dtype)
    low, high = INTEGERS[dtype]
    values = st.one_of(
        st.integers(low, high), st.integers(max(low, high - 3), high), st.integers(low, low + 3)
    )
    return pl.Series("user_id", draw(st.lists(values, max_size=30)), dtype=dtype)


def first_appearance(values: list) -> dict:
    places: dict = {}
    for value in values:
        places.setdefault(value, len(places))
    return places


@settings(max_examples=200, deadline=None)
@given(id_columns(), st.data())
def test_round_trip_against_a_dictionary(ids: pl.Series, data: st.DataObject) -> None:
    values = ids.to_list()
    places = first_appearance(values)
    vocabulary = Vocabulary.of(ids)

    assert vocabulary.ids.to_list() == list(places)
    assert vocabulary.ids.dtype == ids.dtype
    assert vocabulary.counts.tolist() == [values.count(value) for value in places]
    idx = vocabulary.encode(ids)
    assert idx.dtype == np.int32
    assert idx.tolist() == [places[value] for value in values]
    decoded = vocabulary.decode(idx)
    assert decoded.to_list() == values
    assert decoded.dtype == ids.dtype

    other = data.draw(id_columns())
    if other.dtype.is_integer() == ids.dtype.is_integer() or not len(other) or not len(ids):
        expected = [places.get(value, -1) for value in other.to_list()]
        assert vocabulary.encode(other).tolist() == expected


@settings(max_examples=30, deadline=None)
@given(id_columns())
def test_save_and_load_keep_ids_types_and_counts(tmp_path_factory, ids: pl.Series) -> None:
    path = tmp_path_factory.mktemp("vocabulary") / "users.parquet"
    before = Vocabulary.of(ids)
    before.save(path)
    after = Vocabulary.load(path)
    assert after.ids.dtype == before.ids.dtype
    assert after.ids.to_list() == before.ids.to_list()
    assert after.counts.tolist() == before.counts.tolist()
    frame = pl.read_parquet(path)
    assert frame.columns == ["id", "idx", "count"]
    assert frame["idx"].to_list() == list(range(len(before)))


def test_large_integers_stay_apart() -> None:
    near = [2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1]
    vocabulary = Vocabulary.of(pl.Series(near, dtype=pl.UInt64))
    assert vocabulary.decode([1, 4, 0]).to_list() == [2**53 + 1, 2**64 - 1, 2**53]
    assert vocabulary.encode(pl.Series([2**53 + 1, -1, 2**53 + 2])).tolist() == [1, -1, -1]


def test_widths_are_compared_by_value_and_overflow_is_unknown() -> None:
    vocabulary = Vocabulary.of(pl.Series([7, -3], dtype=pl.Int8))
    assert vocabulary.encode(pl.Series([7, 263, None, -3], dtype=pl.Int64)).tolist() == [
        0,
        -1,
        -1,
        1,
    ]


def test_strings_are_compared_byte_by_byte() -> None:
    ids = ["caf\u00e9", "cafe\u0301", "0012", "12", "12 ", "", "A", "a", "\U0001f600", "a\0b"]
    vocabulary = Vocabulary.of(pl.Series(ids))
    assert len(vocabulary) == 10
    assert vocabulary.encode(pl.Series(ids[::-1])).tolist() == list(range(10))[::-1]


def test_types_are_not_mixed() -> None:
    numbers = Vocabulary.of(pl.Series([12, 5]))
    with pytest.raises(DataError, match=r"'item' .* String.* Int64"):
        numbers.encode(pl.Series("item", ["12"]))
    with pytest.raises(DataError, match="floats"):
        numbers.encode(pl.Series("item", [12.0]))
    with pytest.raises(DataError, match="Int64"):
        Vocabulary.of(pl.Series(["12"])).encode(pl.Series("item", [12]))
    assert numbers.encode(pl.Series("item", [None, None])).tolist() == [-1, -1]


def test_categoricals_come_back_as_strings() -> None:
    vocabulary = Vocabulary.of(pl.Series(["b", "a", "b"], dtype=pl.Categorical))
    assert vocabulary.decode(np.array([1, 0])).to_list() == ["a", "b"]
    assert vocabulary.counts.tolist() == [2, 1]


def test_ids_must_be_distinct_and_present() -> None:
    for ids in ([4, 4], [4, None]):
        with pytest.raises(DataError, match="distinct"):
            Vocabulary(pl.Series(ids))
    with pytest.raises(ShapeError, match="one count per id"):
        Vocabulary(pl.Series([4, 5]), np.zeros(3, dtype=np.int64))


def test_counted_replaces_the_counts() -> None:
    vocabulary = Vocabulary.of(pl.Series([4, 4, 9])).counted(pl.Series([9, 8, 9, 9, 4]))
    assert vocabulary.counts.tolist() == [1, 3]


def test_decode_checks_its_range() -> None:
    vocabulary = Vocabulary.of(pl.Series(["x", "y", "z"]))
    assert vocabulary.decode([2, -1]).to_list() == ["z", None]
    assert vocabulary.decode([]).to_list() == []
    for wrong in ([3], [-2], [0.5], [[0]]):
        with pytest.raises(ShapeError, match="indices must"):
            vocabulary.decode(wrong)


def test_an_empty_vocabulary_knows_nothing() -> None:
    vocabulary = Vocabulary.of(pl.Series([], dtype=pl.Int32))
    assert len(vocabulary) == 0
    assert vocabulary.encode(pl.Series([1, 2])).tolist() == [-1, -1]
    assert vocabulary.decode([]).dtype == pl.Int32


def test_memory_follows_the_number_of_ids() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ids = pl.Series([10**18 + 10**14 * number for number in range(1000)])
    vocabulary = Vocabulary.of(ids)
    assert vocabulary.encode(ids).tolist() == list(range(1000))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-40]),
        lambda path: path.write_bytes(b"no Parquet"),
        lambda path: pl.DataFrame({"id": [1, 2]}).write_parquet(path),
        lambda path: pl.DataFrame({"id": [1, 2], "idx": [1, 0], "count": [0, 0]}).write_parquet(
            path
        ),
        lambda path: pl.DataFrame({"id": [2, 2], "idx": [0, 1], "count": [0, 0]}).write_parquet(
            path
        ),
        lambda path: pl.DataFrame({"id": [1.5], "idx": [0], "count": [0]}).write_parquet(path),
        lambda path: pl.DataFrame({"id": [1], "idx": [0], "count": ["x"]}).write_parquet(path),
        lambda path: pl.DataFrame({"id": [1], "idx": [0], "count": [None]}).write_parquet(path),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, damage) -> None:
    path = tmp_path / "items.parquet"
    Vocabulary.of(pl.Series([30, 10, 20])).save(path)
    damage(path)
    with pytest.raises(CheckpointError, match=r"items\.parquet"):
        Vocabulary.load(path)


def test_gather_gives_null_where_there_is_no_row() -> None:
    lists = pl.Series([["a", "b"], [], None])
    assert gather(lists, np.array([1, -1, 0])).to_list() == [[], None, ["a", "b"]]
    arrays = pl.Series([[1.0, 2.0]], dtype=pl.Array(pl.Float32, 2))
    assert gather(arrays, np.array([-1, 0])).to_list() == [None, [1.0, 2.0]]
    assert gather(arrays.clear(), np.array([-1, -1])).to_list() == [None, None]
