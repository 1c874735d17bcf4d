"""The counts that the READMEs of the real logs state, read by the normal path."""

from pathlib import Path

import polars as pl
import pytest

from recclr.data.files import expand_path
from recclr.data.reading import read
from recclr.settings import SplitSettings


def real(name):
    folder = Path(expand_path("${RECCLR_DATA}")) / name
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set RECCLR_DATA")
    return {
        "events": folder / "interactions.parquet",
        **{n: p for n in ("users", "items") if (p := folder / f"{n}.parquet").exists()},
    }


def pairs_of_known_users(split):
    """Test rows of users seen before the test, how many users, and rows on items never seen."""
    before = pl.concat([split.train.events, split.valid.events])
    known = split.test.events.join(before, on="user_id", how="semi")
    cold = known.join(before, on="item_id", how="anti")
    return known.height, known["user_id"].n_unique(), cold.height


def test_movietweetings():
    log = read(**real("movietweetings-2013"), where={"rating": ">= 7"})
    assert [(s.name, s.rows_in, s.rows_out) for s in log.steps] == [
        ("where rating", 141_695, 102_400),
        ("bad_rows", 102_400, 102_400),
        ("deduplicate", 102_400, 102_400),
    ]
    split = log.split()
    assert split.cutoffs == {"valid": 1379383012, "test": 1381471264}
    assert [len(p) for p in (split.train, split.valid, split.test)] == [81_920, 10_240, 10_240]
    assert pairs_of_known_users(split) == (8_329, 3_220, 816)


def test_online_retail():
    where = {
        "user_id": "not null",
        "quantity": "> 0",
        "unit_price": "> 0",
        "is_product_code": "== true",
    }
    log = read(**real("online-retail"), where=where)
    assert [s.rows_out for s in log.steps] == [406_829, 397_924, 397_884, 396_337, 396_337, 266_221]
    assert (log.num_users, log.num_items) == (4_334, 3_659)
    assert log.bad_rows == {}
    split = log.split()
    assert split.cutoffs == {"valid": 1319467620, "test": 1321432080}
    assert pairs_of_known_users(split) == (20_881, 1_097, 375)


def test_gowalla():
    paths = real("gowalla-lightgcn")
    folder = paths["events"].parent
    log = read(folder / "interactions_train.parquet")
    assert (log.num_users, log.num_items, len(log)) == (29_858, 40_981, 810_128)
    test = str(folder / "interactions_test.parquet")
    split = log.split(SplitSettings(by="given", test_events=test))
    assert len(split.train) + len(split.valid) == 810_128
    assert abs(len(split.valid) - 81_013) < 400
    assert split.counts["test"]["rows"] == 217_242
    assert split.counts["test_after_refit"]["rows_also_before"] == 0
    assert split.counts["train"]["users"] == 29_858


def test_movielens():
    log = read(**real("ml-100k"))
    assert (log.num_users, log.num_items, len(log)) == (943, 1_682, 100_000)
    log = read(**real("ml-1m"))
    assert (log.num_users, log.num_items, len(log)) == (6_040, 3_706, 1_000_209)
    assert not log.has_time


@pytest.mark.slow
def test_globo_in_milliseconds():
    log = read(**real("globo-news"))
    assert (log.num_users, log.num_items, len(log)) == (322_897, 46_033, 2_950_710)
    split = log.split()
    # The README cuts at 1507843570.534 and 1508028677.568; here whole seconds.
    assert split.cutoffs == {"valid": 1507843570, "test": 1508028677}
    assert pairs_of_known_users(split)[1] == 65_886
