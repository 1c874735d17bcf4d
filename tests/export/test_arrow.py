import polars as pl
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recclr.errors import StoreError
from recclr.export.arrow import ids_of, to_table, vectors_of

INTEGERS = [pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32, pl.UInt64]
NOTE = {"who": "é"}


def table_of(ids, vectors):
    return to_table(ids, vectors, id_column="key", vector_column="vec", note=NOTE)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=12, max_size=12))
def test_every_bit_pattern_of_a_float_comes_back(patterns):
    bits = torch.tensor(patterns, dtype=torch.int64).to(torch.int32).view(4, 3)
    table = table_of(pl.Series([1, 2, 3, 4]), bits.view(torch.float32))
    assert torch.equal(vectors_of(table, "vec", 3, "here").view(torch.int32), bits)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_come_back_in_their_type(dtype):
    extremes = pl.select(dtype.min().alias("low"), dtype.max().alias("high")).row(0)
    ids = pl.Series(list(extremes), dtype=dtype)
    found = ids_of(table_of(ids, torch.eye(2)), "key", dtype(), "here")
    assert found.dtype == dtype
    assert found.to_list() == list(extremes)


@given(st.lists(st.text(max_size=4), min_size=1, max_size=5))
def test_any_text_comes_back(texts):
    table = table_of(pl.Series(texts, dtype=pl.String), torch.zeros(len(texts), 2))
    assert ids_of(table, "key", pl.String(), "here").to_list() == texts


def test_the_schema_is_what_other_readers_expect():
    schema = table_of(pl.Series(["a", "b"]), torch.eye(2, 3)).schema
    assert schema.field("key") == pa.field("key", pa.large_string(), nullable=False)
    assert schema.field("vec").type == pa.list_(pa.field("element", pa.float32(), False), 3)
    assert not schema.field("vec").nullable
    assert schema.metadata == {b"who": "é".encode()}


def test_no_rows_make_an_empty_table():
    table = table_of(pl.Series([], dtype=pl.Int32), torch.empty(0, 5))
    assert ids_of(table, "key", pl.Int32(), "here").dtype == pl.Int32
    assert vectors_of(table, "vec", 5, "here").shape == (0, 5)


def test_what_is_read_has_memory_of_its_own():
    vectors = torch.eye(2, 3)
    table = table_of(pl.Series([1, 2]), vectors)
    vectors_of(table, "vec", 3, "here")[0, 0] = 7
    assert vectors[0, 0] == 1
    assert vectors_of(table, "vec", 3, "here")[0, 0] == 1


def test_a_sliced_and_chunked_table_is_read_in_order():
    parts = [table_of(pl.Series([row, row + 1]), torch.full((2, 3), row)) for row in (1.0, 3.0)]
    whole = pa.concat_tables([part.set_column(0, "key", pa.array([1, 2])) for part in parts]).slice(
        1, 2
    )
    assert vectors_of(whole, "vec", 3, "here")[:, 0].tolist() == [1.0, 3.0]


def nulls(kind):
    return pa.table({"vec": pa.array([None], kind)})


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (pa.table({"other": [1]}), r"expected a column 'vec', found \['other'\]"),
        (nulls(pa.list_(pa.float32(), 3)), "'vec' holds 1 nulls"),
        (table_of(pl.Series([1]), torch.ones(1, 4)), "'vec': expected 3 float32"),
        (
            pa.table({"vec": pa.array([[1.0] * 3], pa.list_(pa.float64(), 3))}),
            r"found fixed.*double",
        ),
        (pa.table({"vec": pa.array([[1.0] * 3], pa.list_(pa.float32()))}), "found list<"),
        (pa.table({"vec": [1.0]}), "expected 3 float32, found double"),
    ],
)
def test_vectors_of_another_kind_are_refused(table, words):
    with pytest.raises(StoreError, match=f"^here: .*{words}"):
        vectors_of(table, "vec", 3, "here")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (pa.array([1], pa.int32()), "expected Int64, found Int32"),
        (pa.array(["1"]), "expected Int64, found String"),
        (pa.array([1.0]), "expected Int64, found Float64"),
        (pa.array([1, None]), "holds 1 nulls"),
    ],
)
def test_ids_of_another_kind_are_refused(values, words):
    with pytest.raises(StoreError, match=f"^here: column 'key'.*{words}"):
        ids_of(pa.table({"key": values}), "key", pl.Int64(), "here")
    with pytest.raises(StoreError, match="expected a column 'id'"):
        ids_of(pa.table({"key": values}), "id", pl.Int64(), "here")


def test_a_null_inside_a_vector_is_not_taken_for_a_number():
    lists = pa.array([[1.0, None, 3.0]], pa.list_(pa.float32(), 3))
    with pytest.raises(StoreError, match="null"):
        vectors_of(pa.table({"vec": lists}), "vec", 3, "here")
