import datetime
import json

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm, rankdata
from sklearn.preprocessing import QuantileTransformer, StandardScaler

from recclr.data.column import Column
from recclr.data.dense import QuantileNumberEncoder, StandardNumberEncoder, VectorEncoder
from recclr.errors import DataError


def column(values: pl.Series, kind: str = "numeric", rows: np.ndarray | None = None) -> Column:
    return Column(values, values.name, "item.features.f", kind, rows)


def numbers(values: list, dtype: pl.DataType | None = None) -> Column:
    return column(pl.Series("x", values, dtype=dtype))


def test_standardised_as_scikit_learn_does() -> None:
    rng = np.random.default_rng(5)
    train, later = rng.gamma(2.0, 3.0, size=73), rng.gamma(2.0, 4.0, size=31)
    encoder = StandardNumberEncoder.fit(numbers(train.tolist()))
    found = encoder.encode(numbers(later.tolist())).values
    expected = StandardScaler().fit(train[:, None]).transform(later[:, None])
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found[:, :1].numpy(), expected, rtol=1e-6)
    assert found[:, 1].tolist() == [0.0] * 31


@pytest.mark.parametrize("size", [2, 57, 1000])
def test_equal_values_share_their_middle_rank(size: int) -> None:
    rng = np.random.default_rng(size)
    train = rng.normal(size=size).round(1)
    train[:2] = [-1.0, 2.0]
    encoder = QuantileNumberEncoder.fit(numbers(train.tolist()))
    found = encoder.encode(numbers(train.tolist())).values
    expected = norm.ppf((rankdata(train) - 0.5) / size)
    np.testing.assert_allclose(found[:, 0].numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("size", "tolerance"), [(3, 1e-6), (61, 1e-6), (1000, 1e-6), (4003, 1e-3)])
def test_quantiles_between_train_values_as_scikit_learn_has_them(
    size: int, tolerance: float
) -> None:
    rng = np.random.default_rng(size)
    train, later = rng.normal(size=size), rng.normal(size=91)
    encoder = QuantileNumberEncoder.fit(numbers(train.tolist()))
    knots = min(1000, size)
    assert len(encoder.knots) == knots
    peer = QuantileTransformer(n_quantiles=knots, subsample=None).fit(train[:, None])
    inside = (peer.transform(later[:, None])[:, 0] * (knots - 1) + 0.5) / knots
    found = norm.cdf(encoder.encode(numbers(later.tolist())).values[:, 0].numpy())
    np.testing.assert_allclose(found, inside, atol=tolerance)


def test_quantiles_keep_order_and_do_not_follow_outliers() -> None:
    encoder = QuantileNumberEncoder.fit(numbers([*range(100), 10**9]))
    found = encoder.encode(numbers([0, 50, 99, 10**9, 10**12, -5])).values[:, 0]
    assert found[1].abs() < 1e-6
    assert (found[:4].diff() > 0).all()
    assert found[4] == found[3] < 3.4
    assert found[5] == found[0] == -found[3]


@pytest.mark.parametrize("encoder", [StandardNumberEncoder, QuantileNumberEncoder])
def test_missing_values_are_flagged_and_count_for_nothing(encoder) -> None:
    train = numbers([2.0, None, float("nan"), 4.0])
    fitted = encoder.fit(train)
    assert fitted == encoder.fit(numbers([2.0, 4.0]))
    values = fitted.encode(train).values
    assert values[:, 1].tolist() == [0, 1, 1, 0]
    assert values[1:3, 0].tolist() == [0, 0]
    assert values[3, 0] == -values[0, 0] > 0


@pytest.mark.parametrize("encoder", [StandardNumberEncoder, QuantileNumberEncoder])
@pytest.mark.parametrize("train", [[0.1, 0.1, 0.1], [0.1], [None, None], []])
def test_constant_and_empty_columns_tell_nothing(encoder, train: list) -> None:
    fitted = encoder.fit(numbers(train, pl.Float64))
    found = fitted.encode(numbers([0.1, 7.0, None], pl.Float64)).values
    assert found.tolist() == [[0, 0], [0, 0], [0, 1]]


@pytest.mark.parametrize("encoder", [StandardNumberEncoder, QuantileNumberEncoder])
@settings(max_examples=60, deadline=None)
@given(train=st.lists(st.floats(-1e150, 1e150), max_size=12), later=st.floats(-1e150, 1e150))
def test_always_finite_and_bounded(encoder, train: list[float], later: float) -> None:
    fitted = encoder.fit(numbers(train, pl.Float64))
    found = fitted.encode(numbers([*train, later], pl.Float64)).values
    assert torch.isfinite(found).all()
    assert found[:, 0].abs().max() <= 10


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1, 3], pl.UInt8),
        ([1, 3], pl.Decimal(10, 2)),
        ([False, True], pl.Boolean),
        ([datetime.date(2013, 1, 1), datetime.date(2014, 6, 1)], pl.Date),
        ([datetime.datetime(2013, 1, 1), datetime.datetime(2014, 6, 1)], pl.Datetime("ms")),
    ],
)
def test_all_kinds_of_numbers(values: list, dtype: pl.DataType) -> None:
    wanted = numbers(values, dtype)
    found = StandardNumberEncoder.fit(wanted).encode(wanted).values
    assert found[:, 0].tolist() == pytest.approx([-1, 1])


def test_the_unit_of_a_datetime_does_not_matter() -> None:
    moments = [datetime.datetime(2013, 1, 1), datetime.datetime(2014, 6, 1)]
    coarse, fine = (numbers(moments, pl.Datetime(unit)) for unit in ("ms", "ns"))
    assert StandardNumberEncoder.fit(coarse) == StandardNumberEncoder.fit(fine)


def test_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(DataError, match=r"column 'x' .*'numeric'\) holds String; expected"):
        StandardNumberEncoder.fit(numbers(["1"]))
    rows = np.array([8, 3, 11, 5])
    bad = column(pl.Series("x", [float("inf"), 1.0, -1e200, 2.0]), rows=rows)
    with pytest.raises(DataError, match=r"infinite .* in 2 rows \(first rows 8, 11\)"):
        StandardNumberEncoder.fit(bad)


def vectors(values: list, dtype: pl.DataType | None = None) -> Column:
    return column(pl.Series("v", values, dtype=dtype), "vector")


@pytest.mark.parametrize("dtype", [pl.List(pl.Float64), pl.Array(pl.Float32, 3), pl.List(pl.Int8)])
def test_vectors_are_scaled_by_one_number(dtype: pl.DataType) -> None:
    train = [[3, 4, 0], None, [0, 0, 5], [0, 10, 0]]
    encoder = VectorEncoder.fit(vectors(train, dtype))
    length = np.sqrt((25 + 25 + 100) / 3)
    assert encoder.length == pytest.approx(length)
    found = encoder.encode(vectors([None, [1, 2, 3], [0, 0, 0]], dtype)).values
    assert found.dtype == torch.float16
    assert found.shape == (3, 4)
    assert found[0].tolist() == [0, 0, 0, 1]
    assert found[2].tolist() == [0, 0, 0, 0]
    np.testing.assert_allclose(found[1, :3].numpy(), np.array([1, 2, 3]) / length, rtol=1e-3)
    assert found[1, 3] == 0


def test_chunks_of_vectors_change_nothing(monkeypatch) -> None:
    rng = np.random.default_rng(2)
    values = [None if i % 4 == 1 else rng.normal(size=5).tolist() for i in range(17)]
    whole = VectorEncoder.fit(vectors(values))
    expected = whole.encode(vectors(values)).values
    monkeypatch.setattr("recclr.data.dense._CHUNK_ROWS", 3)
    assert VectorEncoder.fit(vectors(values)).length == pytest.approx(whole.length)
    assert torch.equal(whole.encode(vectors(values)).values, expected)


def test_vectors_of_another_length_are_named() -> None:
    values = [[1.0, 2.0], [3.0], [4.0, 5.0], [], [1.0, 2.0, 3.0], [0.0, 1.0]]
    with pytest.raises(DataError, match=r"than 2 in 3 rows \(first rows 1, 3, 4\)"):
        VectorEncoder.fit(vectors(values))
    encoder = VectorEncoder.fit(vectors(values[:1]))
    with pytest.raises(DataError, match=r"such as 1\) than 2"):
        encoder.encode(vectors(values[:2]))


def test_vectors_with_holes_are_named(monkeypatch) -> None:
    monkeypatch.setattr("recclr.data.dense._CHUNK_ROWS", 2)
    values = [[1.0, 2.0], None, [3.0, None], [1.0, float("nan")], [1e300, 0.0], [1.0, 1.0]]
    with pytest.raises(DataError, match=r"in 2 rows \(first rows 2, 3\)"):
        VectorEncoder.fit(vectors(values))


def test_vectors_beyond_float16_are_named() -> None:
    encoder = VectorEncoder.fit(vectors([[1.0, 0.0]]))
    with pytest.raises(DataError, match=r"65,000 times longer .* \(first rows 1\)"):
        encoder.encode(vectors([[0.5, 1.0], [70_000.0, 0.0]]))


def test_columns_without_vectors_are_refused() -> None:
    for values in ([None, None], [[], []]):
        with pytest.raises(DataError, match="no vector"):
            VectorEncoder.fit(vectors(values, pl.List(pl.Float32)))
    for series in (pl.Series("v", [1.0]), pl.Series("v", [["a"]])):
        with pytest.raises(DataError, match="expected lists or arrays of numbers"):
            VectorEncoder.fit(column(series, "vector"))
    zeros = VectorEncoder.fit(vectors([[0.0, 0.0]]))
    assert zeros.encode(vectors([[0.5, 0.0]])).values.tolist() == [[0.5, 0, 0]]


def test_all_null_rows_can_be_encoded_later() -> None:
    encoder = VectorEncoder.fit(vectors([[1.0, 0.0]]))
    assert encoder.encode(vectors([None, None])).values.tolist() == [[0, 0, 1], [0, 0, 1]]


@pytest.mark.parametrize(
    "encoder",
    [
        StandardNumberEncoder.fit(numbers([0.1, 0.7, 1 / 3])),
        QuantileNumberEncoder.fit(numbers([0.1, 0.7, 1 / 3])),
        VectorEncoder.fit(vectors([[0.1, 1 / 3]])),
    ],
)
def test_json_round_trip_is_exact(encoder) -> None:
    assert type(encoder).from_json(json.loads(json.dumps(encoder.to_json()))) == encoder
