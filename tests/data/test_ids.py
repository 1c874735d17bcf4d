"""Ids stay what they are: exact integers, byte-exact text."""

import decimal

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recclr.data.ids import align_ids, canonical_ids, hash_ids, lookalikes, placeholders, stray_text
from recclr.errors import DataError

EXTREMES = [2**53 + 1, 2**63 - 1, -1, -(2**63), 0, None]


def canonical(series, **settings):
    return canonical_ids(series, where="t: column 'id'", **settings)


@pytest.mark.parametrize("dtype", [pl.Int8, pl.UInt16, pl.Int32, pl.Int64, pl.UInt64])
def test_integers_keep_type_and_value(dtype):
    series = pl.Series([1, None, 7], dtype=dtype)
    assert canonical(series).equals(series)
    assert canonical(series).dtype == dtype
    assert canonical(series, as_text=True).to_list() == ["1", None, "7"]


def test_extreme_integers_are_exact():
    assert canonical(pl.Series(EXTREMES, dtype=pl.Int64)).to_list() == EXTREMES
    wide = pl.Series([2**64 - 1, 1], dtype=pl.Int128)
    assert canonical(wide).to_list() == [2**64 - 1, 1]
    assert canonical(pl.Series(EXTREMES, dtype=pl.Int128)).dtype == pl.Int64
    with pytest.raises(DataError, match="64 bits"):
        canonical(pl.Series([2**64 - 1, -1], dtype=pl.Int128))
    assert canonical(pl.Series([decimal.Decimal(12)], dtype=pl.Decimal(38, 0))).to_list() == [12]


def test_text_is_byte_exact():
    values = ["café", "cafe\u0301", " a", "A", "0012", "", "\0", None]
    assert canonical(pl.Series(values)).to_list() == values
    assert canonical(pl.Series(["a", None], dtype=pl.Categorical)).to_list() == ["a", None]


@pytest.mark.parametrize("values", [[1.0, 2.0], [True], [[1]], [b"a"], [decimal.Decimal("1.5")]])
def test_other_types_are_refused(values):
    with pytest.raises(DataError, match="ids"):
        canonical(pl.Series(values))


def test_floats_are_refused_with_the_way_out():
    with pytest.raises(DataError, match=r"ids as floats.*Int64"):
        canonical(pl.Series([1.0, None]))


def test_tables_are_aligned_without_loss():
    big, small = 2**64 - 1, 7
    aligned = align_ids(
        {"events": pl.Series([big], dtype=pl.UInt64), "items": pl.Series([small], dtype=pl.Int32)}
    )
    assert {s.dtype for s in aligned.values()} == {pl.UInt64()}
    assert aligned["events"].to_list() == [big]
    aligned = align_ids(
        {"events": pl.Series([-1], dtype=pl.Int64), "items": pl.Series([7], dtype=pl.UInt64)}
    )
    assert {s.dtype for s in aligned.values()} == {pl.Int64()}
    with pytest.raises(DataError, match="no common integer type"):
        align_ids({"a": pl.Series([big], dtype=pl.UInt64), "b": pl.Series([-1])})
    with pytest.raises(DataError, match="Int64 in events but String in items"):
        align_ids({"events": pl.Series([1]), "items": pl.Series(["1"])})


def test_lookalikes_and_strays_are_counted():
    ids = pl.Series(["café", "cafe\u0301", "Anna", "anna ", "ANNA", "bob", "bob", None])
    assert lookalikes(ids) == 3
    assert lookalikes(pl.Series([1, 2])) == 0
    numbers = [str(i) for i in range(20)]
    assert stray_text(pl.Series([*numbers, "NULL"])) == 1
    assert stray_text(pl.Series(numbers)) == 0
    assert stray_text(pl.Series(["a", "b", "1"])) == 0


def test_ids_that_look_like_missing_ones_are_counted_by_row():
    ids = pl.Series(["nan", "u1", "NaN", "", "nan", " null ", "Nana", None, "none of these"])
    assert placeholders(ids) == {"nan": 2, "NaN": 1, "": 1, " null ": 1}
    assert placeholders(pl.Series([1, 2])) == placeholders(pl.Series(["a"])) == {}


def test_hashes_are_fixed_for_ever():
    # Changing them would move rows between train and test of every published random split.
    assert hash_ids(pl.Series([0, -1, 2**63 - 1]), 0).tolist() == HASHES_OF_INTEGERS
    assert hash_ids(pl.Series(["a", "é", "a"]), 7).tolist() == HASHES_OF_TEXT


HASHES_OF_INTEGERS = [12035550249420947055, 3303439293501059696, 14389535693014737104]
HASHES_OF_TEXT = [15394373519623422112, 1807869918171555581, 15394373519623422112]


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1), st.integers(0, 2**62))
def test_hashes_depend_on_the_value_alone(values, seed):
    narrow = hash_ids(pl.Series(values, dtype=pl.Int32), seed)
    assert narrow.tolist() == hash_ids(pl.Series(values, dtype=pl.Int64), seed).tolist()
    assert len(set(narrow.tolist())) == len(set(values))
