from pathlib import Path

import pytest

from recclr.errors import ConfigError
from recclr.export import Target, parse_target
from recclr.export.lance import LanceDatabase
from recclr.export.parquet import ParquetFolder


@pytest.mark.parametrize(
    ("text", "kind", "location"),
    [
        ("lancedb://vectors", "lancedb", "vectors"),
        ("lancedb:vectors", "lancedb", "vectors"),
        ("lancedb:///data/vectors", "lancedb", "/data/vectors"),
        ("parquet:DIR", "parquet", "DIR"),
        ("parquet:../a b/é", "parquet", "../a b/é"),
        ("parquet:a:b", "parquet", "a:b"),
        ("parquet:.", "parquet", "."),
    ],
)
def test_a_kind_and_a_folder(text, kind, location):
    target = parse_target(text)
    assert target == Target(kind, Path(location))
    assert str(target) == f"{kind}:{location}"
    assert parse_target(str(target)) == target
    assert parse_target(target) is target


def test_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert parse_target("parquet:~/out").location == Path("/somewhere/out")
    assert parse_target("parquet:a~").location == Path("a~")


def test_a_relative_place_is_taken_from_a_folder_and_an_absolute_one_stays():
    run = Path("/run")
    assert str(parse_target("lancedb://store").under(run)) == "lancedb:/run/store"
    assert str(parse_target("lancedb:/a/store").under(run)) == "lancedb:/a/store"


def test_each_kind_has_its_destination():
    assert isinstance(parse_target("lancedb:a").destination(), LanceDatabase)
    parquet = parse_target("parquet:a").destination()
    assert isinstance(parquet, ParquetFolder)
    assert parquet.location == Path("a")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("vectors", r"expected KIND:DIR, for example lancedb:vectors; kinds: lancedb, parquet"),
        ("", "for example lancedb:store"),
        ("lance:x", r"'lance' is no kind of store; did you mean lancedb:x\?"),
        ("Parquet:x", r"did you mean parquet:x\?"),
        ("qzx:x", r"'qzx' is no kind of store \(kinds: lancedb, parquet\)"),
        ("s3://bucket/x", r"'s3' is no kind of store \("),
        (":x", "'' is no kind of store"),
        ("parquet:", "expected a folder after parquet:"),
        ("lancedb://", "expected a folder after lancedb:"),
        ("lancedb:s3://bucket", "expected a folder after lancedb:"),
        ("parquet:a\0b", "expected a folder"),
    ],
)
def test_what_is_no_target_is_refused_with_advice(text, words):
    with pytest.raises(ConfigError, match=words) as caught:
        parse_target(text)
    assert repr(text) in str(caught.value)
