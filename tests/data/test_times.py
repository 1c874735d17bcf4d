"""Times of any form become the same seconds; two units in one column are refused."""

import datetime

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recclr.data.times import EARLIEST, PER_SECOND, read_times
from recclr.errors import DataError

NOW = 1_700_000_000
UTC = datetime.UTC


def times(values, dtype=None, unit="auto"):
    return read_times(pl.Series("t", values, dtype=dtype), unit=unit, where="t", now=NOW)


@given(
    seconds=st.lists(st.integers(EARLIEST, NOW), min_size=1, max_size=5),
    fraction=st.integers(0, 999),
    unit=st.sampled_from(sorted(PER_SECOND)),
)
def test_integer_units_are_detected(seconds, fraction, unit):
    factor = PER_SECOND[unit]
    extra = 0 if unit == "s" else fraction * (factor // 1000)
    read = times([s * factor + extra for s in seconds] + [None])
    assert read.seconds.to_list() == [*seconds, None]
    if extra:
        assert read.fraction.to_list() == [fraction * 10**6] * len(seconds) + [None]
    else:
        assert read.fraction is None  # whole seconds need no second column
    assert f"numbers in {unit}, detected" in read.note


@pytest.mark.parametrize("other", ["ms", "us", "ns"])
def test_mixed_units_are_refused_even_for_one_value(other):
    values = [NOW - i for i in range(100)] + [NOW * PER_SECOND[other]]
    with pytest.raises(DataError, match=f"100 values in s and 1 values in {other}"):
        times(values)


def test_a_declared_unit_is_taken_as_it_is():
    values = [1_500_000_000, 1_500_000_000_000]
    assert times(values, unit="ms").seconds.to_list() == [1_500_000, 1_500_000_000]
    assert "as declared" in times(values, unit="ms").note


def test_impossible_values_do_not_hide_the_unit():
    read = times([0, -5, 1_500_000_000_123])
    assert read.seconds.to_list() == [0, -1, 1_500_000_000]
    assert read.fraction.to_list() == [0, 995_000_000, 123_000_000]


def test_no_possible_value_is_refused():
    with pytest.raises(DataError, match="no value is a time"):
        times([1, 2, 3])
    with pytest.raises(DataError, match="no value is a time"):
        times([1, 2], dtype=pl.Int8)


def test_extremes_neither_wrap_nor_become_missing():
    read = times([2**64 - 1, NOW], dtype=pl.UInt64)
    assert read.seconds.to_list() == [2**63 - 1, NOW]
    read = times([1e300, -1e300, NOW + 0.25, float("nan"), float("inf"), None])
    assert read.seconds.to_list() == [2**62, -(2**62), NOW, None, None, None]
    assert read.fraction[2] == 250_000_000


def test_dates_and_datetimes():
    day = datetime.date(2020, 2, 29)
    moment = datetime.datetime(2020, 2, 29, 12, 30, 0, 250_000)
    midnight = int(datetime.datetime(2020, 2, 29, tzinfo=UTC).timestamp())
    assert times([day, None]).seconds.to_list() == [midnight, None]
    for unit in ("ms", "us", "ns"):
        read = times([moment, None], dtype=pl.Datetime(unit))
        assert read.seconds.to_list() == [midnight + 45_000, None]
        assert read.fraction.to_list() == [250_000_000, None]
    berlin = times([moment], dtype=pl.Datetime("us", "UTC")).seconds
    zoned = pl.Series("t", [moment]).dt.replace_time_zone("Europe/Berlin")
    read = read_times(zoned, unit="auto", where="t", now=NOW)
    assert read.seconds[0] == berlin[0] - 3600
    assert "Europe/Berlin" in read.note


def test_iso_text():
    noon = int(datetime.datetime(2024, 1, 31, 12, tzinfo=UTC).timestamp())
    forms = {
        "2024-01-31": noon - 43_200,
        "2024-01-31 12:00:00": noon,
        "2024-01-31T12:00": noon,
        "2024-01-31T12:00:00Z": noon,
        " 2024-01-31 12:00:00 UTC ": noon,
        "2024-01-31T12:00:00.125+02:00": noon - 7200,
        "2024-01-31 12:00:00-0530": noon + 19_800,
        "2024-01-31T12:00+02": noon - 7200,
        "2024-13-01": None,
        "31.1.2024": None,
        "": None,
    }
    read = times(list(forms))
    assert read.seconds.to_list() == list(forms.values())
    assert read.fraction[5] == 125_000_000


def test_digits_as_text_are_numbers():
    assert times(["1500000000", None]).seconds.to_list() == [1_500_000_000, None]


def test_other_types_are_refused():
    for values in ([True], [[1]], [datetime.timedelta(1)]):
        with pytest.raises(DataError, match="expected times"):
            times(values)
