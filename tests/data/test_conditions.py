"""Conditions of ``data.where``: typed comparisons, and nothing but ConfigError for nonsense."""

import datetime
import operator

import polars as pl
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from recclr.data.conditions import parse_condition
from recclr.errors import ConfigError

SIGNS = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}


def passing(values, text, dtype=None):
    series = pl.Series("x", values, dtype=dtype)
    mask = parse_condition(text, source="data.where.x").mask(series)
    assert mask.dtype == pl.Boolean
    assert mask.null_count() == 0
    return [value for value, hit in zip(values, mask, strict=True) if hit]


@given(
    values=st.lists(st.integers(-(2**63), 2**63 - 1) | st.none(), max_size=6),
    sign=st.sampled_from(sorted(SIGNS)),
    literal=st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False),
)
@example(values=[2**53, 2**53 + 1], sign="==", literal=2**53 + 1)
def test_integers_compare_exactly_with_any_number(values, sign, literal):
    expected = [v for v in values if v is not None and SIGNS[sign](v, literal)]
    assert passing(values, f"{sign} {literal!r}", pl.Int64) == expected


def test_integers_beside_a_fraction():
    expected = {">=": [3], ">": [3], "<": [2], "<=": [2], "==": [], "!=": [2, 3]}
    for sign, values in expected.items():
        assert passing([2, 3], f"{sign} 2.5", pl.Int8) == values
    assert passing([-2, -3], ">= -2.5", pl.Int8) == [-2]
    assert passing([-2, -3], "<= -2.5", pl.Int8) == [-3]


def test_unsigned_integers_compare_exactly():
    values = [0, 2**63, 2**64 - 1]
    assert passing(values, f">= {2**63}", pl.UInt64) == values[1:]
    assert passing(values, "> -1", pl.UInt64) == values
    assert passing(values, f"in [{2**64 - 1}, -5]", pl.UInt64) == [2**64 - 1]


def test_floats_compare_in_their_own_type_and_missing_passes_nothing():
    values = [0.1, None, float("nan"), 7.0]
    assert passing(values, "<= 0.1", pl.Float32) == [0.1]  # 0.1f is above 0.1 as a double
    assert passing(values, ">= 7", pl.Float32) == [7.0]  # polars takes NaN for the largest number
    assert passing(values, "!= 7", pl.Float64) == [0.1]
    assert passing(values, "not null", pl.Float64) == [0.1, 7.0]


def test_text_booleans_and_lists():
    assert passing(["a", "b", None], "== 'a'") == ["a"]
    assert passing(["it's", '"'], '== "it\'s"') == ["it's"]
    assert passing(["a", "b", "c"], "in ['a', \"c\"]") == ["a", "c"]
    assert passing(["a", "b", None], "not null") == ["a", "b"]
    assert passing([True, False, None], "== true") == [True]
    assert passing([True, False, None], "!= TRUE") == [False]
    assert passing(["a", "b"], "in ['a']", pl.Categorical) == ["a"]
    assert passing(["and", "or"], "== 'and' and != 'or'") == ["and"]


def test_tests_are_joined_by_and():
    assert passing([0, 1, 4, 5], ">= 1 and < 5") == [1, 4]
    assert passing([0, 1, 4, 5], "not null AND in [1, 5] and!= 5") == [1]


def test_dates():
    day, utc = datetime.date(2020, 5, 1), datetime.UTC
    assert passing([day], ">= '2020-05-01'") == [day]
    assert passing([day], "> '2020-05-01'") == []
    noon = datetime.datetime(2020, 5, 1, 12)
    assert passing([noon], "== '2020-05-01T14:00+02:00'") == [noon]
    aware = noon.replace(tzinfo=utc)
    assert passing([aware], "< '2020-05-01T12:00:01'", pl.Datetime("ns", "UTC")) == [aware]
    with pytest.raises(ConfigError, match="no date"):
        passing([day], "> 'yesterday'")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "nothing"),
        ("= 7", "cannot read '= 7'"),
        (">=", "the end"),
        ("== France", "quotes: 'France'"),
        ("in []", "expected a value"),
        ("in [1, 'a']", "one type"),
        ("in [1, true]", "one type"),
        ("in 1", "expected '['"),
        ("not", "'null'"),
        (">= 7 or < 3", "expected 'and'"),
        (">= 7 and", "nothing"),
        ("== 'a", "cannot read"),
        ("== 1 == 2", "expected 'and'"),
        ("== nan", "quotes"),
        ("== 1e999", "finite"),
        ("== 1_000", "cannot read"),
        ("== __import__('os')", "cannot read"),
        ("== 1; drop table x", "cannot read"),
        ("== " + "9" * 5000, "characters"),
        ("== '" + "a" * 10_000 + "'", "the most is 10,000"),
    ],
)
def test_nonsense_is_explained_with_examples(text, message):
    with pytest.raises(ConfigError, match=r"data\.where\.x") as caught:
        parse_condition(text, source="data.where.x")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (["a"], "> 1"),
        ([1], "== '1'"),
        ([1], "== true"),
        ([True], "== 1"),
        ([[1]], "== 1"),
        ([1.0], "in ['x']"),
    ],
)
def test_values_of_another_type_are_refused(values, text):
    with pytest.raises(ConfigError, match="cannot be compared"):
        passing(values, text)


FRAGMENTS = st.sampled_from(
    [*SIGNS, "and", "in", "not", "null", "[", "]", ",", "7", "-1.5", "'a'", '"', "'", "true", "x"]
)
COLUMNS = st.sampled_from(
    [
        pl.Series([1, None]),
        pl.Series([1.5, None]),
        pl.Series(["a", None]),
        pl.Series([True, None]),
        pl.Series([datetime.datetime(2020, 1, 1), None]),
        pl.Series([[1], None]),
        pl.Series([None, None]),
        pl.Series([b"a", None]),
    ]
)


@given(text=st.text() | st.lists(FRAGMENTS, max_size=8).map(" ".join), column=COLUMNS)
def test_the_parser_raises_nothing_but_config_errors(text, column):
    try:
        mask = parse_condition(text, source="data.where.x").mask(column)
    except ConfigError:
        return
    assert len(mask) == len(column)
    assert mask.null_count() == 0
