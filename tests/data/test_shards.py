"""Shards give back what was written, to the bit, or say what is wrong with them."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import recclr.data.shards as shards_module
from recclr.data.log import EncodedLog
from recclr.data.shards import open_shards, write_shards
from recclr.errors import DataError, StoreError
from recclr.statistics import TimeIndex

pytestmark = pytest.mark.usefixtures("no_power_cut")
NUM_ROWS, NUM_USERS, NUM_ITEMS = 97, 13, 11


def log(num_rows=NUM_ROWS, *, timed=True, weighted=True, seed=0):
    draws = torch.Generator().manual_seed(seed)
    users = torch.randint(NUM_USERS - 2, (num_rows,), generator=draws).int()
    items = torch.randint(NUM_ITEMS - 1, (num_rows,), generator=draws).int()
    times = torch.randint(50, (num_rows,), generator=draws).sort().values + 1_700_000_000
    return EncodedLog(
        users,
        items,
        NUM_USERS,
        NUM_ITEMS,
        timestamp=times if timed else None,
        weight=torch.rand(num_rows, generator=draws) + 0.1 if weighted else None,
    )


def same(one, other):
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and torch.equal(one, other)


def same_csr(one, other):
    return same(one.offsets, other.offsets) and same(one.values, other.values)


@pytest.fixture
def written(tmp_path):
    folder = tmp_path / "log"
    write_shards(folder, log().stretches(40))
    return folder


@given(
    num_rows=st.integers(1, 60),
    length=st.integers(1, 70),
    timed=st.booleans(),
    weighted=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_a_log_comes_back_as_it_was(tmp_path_factory, num_rows, length, timed, weighted, seed):
    whole = log(num_rows, timed=timed, weighted=weighted, seed=seed)
    folder = tmp_path_factory.mktemp("shards") / "log"
    write_shards(folder, whole.stretches(length))
    found = open_shards(folder)
    assert (len(found), found.num_users, found.num_items) == (num_rows, NUM_USERS, NUM_ITEMS)
    for name in ("user_idx", "item_idx", "timestamp", "weight"):
        assert same(getattr(found, name), getattr(whole, name)), name
    assert same(found.user_counts(), whole.user_counts())
    assert same(found.item_counts(), whole.item_counts())
    assert same_csr(found.user_items(), whole.user_items())
    assert same_csr(found.user_items(NUM_USERS + 3), whole.user_items(NUM_USERS + 3))
    for one, other in zip(found.known_pairs(), whole.known_pairs(), strict=True):
        assert same_csr(one, other)
    assert found.groups.user_items is not None
    if timed:
        for of in (TimeIndex.of_users, TimeIndex.of_items):
            ours, theirs = of(found), of(whole)
            assert (ours.origin, ours.span) == (theirs.origin, theirs.span)
            for name, value in theirs.named_buffers():
                assert same(value, getattr(ours, name)), name
        assert found.groups.user_times is not None


def test_what_is_in_the_files_is_not_made_again(written):
    found = open_shards(written)
    groups = found.groups
    items, users = found.known_pairs()
    for one, other in (
        (found.user_items(), groups.user_items),
        (found.user_items(NUM_USERS + 3), groups.user_items),
        (items, groups.known_items),
        (users, groups.known_users),
    ):
        assert one.values.data_ptr() == other.values.data_ptr()
    for of, times in (
        (TimeIndex.of_users, groups.user_times),
        (TimeIndex.of_items, groups.item_times),
    ):
        assert of(found).keys.data_ptr() == times.data_ptr()
        assert of(found).all_times.data_ptr() == found.timestamp.data_ptr()


def test_what_is_not_in_the_files_is_made_in_memory(tmp_path):
    write_shards(tmp_path / "log", [log()], groups=())
    found, whole = open_shards(tmp_path / "log"), log()
    assert {file.name for file in (tmp_path / "log").iterdir()} == {
        "manifest.json",
        *(f"{name}.bin" for name in ("user_idx", "item_idx", "timestamp", "weight")),
    }
    assert same_csr(found.user_items(), whole.user_items())
    for one, other in zip(found.known_pairs(), whole.known_pairs(), strict=True):
        assert same_csr(one, other)
    assert same(TimeIndex.of_items(found).keys, TimeIndex.of_items(whole).keys)


def test_columns_are_plain_little_endian_values(written):
    for name, code in (("user_idx", "<i4"), ("timestamp", "<i8"), ("weight", "<f4")):
        import numpy as np

        values = np.fromfile(written / f"{name}.bin", code)
        assert values.tolist() == getattr(log(), name).tolist()


def test_the_rows_are_in_files_and_stay_there(written):
    before = {file.name: file.read_bytes() for file in written.iterdir()}
    found = open_shards(written)
    assert found.mapped_for == torch.device("cpu")
    assert found.to("meta").mapped_for == torch.device("meta")
    assert found.to("meta").user_idx.device == torch.device("cpu")
    found.user_idx.zero_()
    found.groups.known_items.values.zero_()
    assert {file.name: file.read_bytes() for file in written.iterdir()} == before
    assert same(open_shards(written).user_idx, log().user_idx)


def test_mapped_rows_outlive_their_files(written):
    found = open_shards(written)
    shutil.rmtree(written)
    assert same(found.timestamp, log().timestamp)


# --- damage ---------------------------------------------------------------------------------------

FILES = [
    *("user_idx", "item_idx", "timestamp", "weight", "user_times", "item_times"),
    *(
        f"{n}.{p}"
        for n in ("user_items", "known_items", "known_users")
        for p in ("offsets", "values")
    ),
]


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_damaged_cut_or_gone_is_named(written, name):
    path = written / f"{name}.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:9] + bytes([whole[9] ^ 4]) + whole[10:])
    with pytest.raises(DataError, match=rf"{name}.bin is damaged"):
        open_shards(written)
    for changed in (whole[:-1], whole[:-8], b"", whole + b"\0"):
        path.write_bytes(changed)
        for verify in (True, False):
            with pytest.raises(DataError, match=rf"{name}.bin is damaged.*found {len(changed):,}"):
                open_shards(written, verify=verify)
    path.unlink()
    with pytest.raises(DataError, match=rf"{name}.bin cannot be read"):
        open_shards(written, verify=False)
    path.write_bytes(whole)
    open_shards(written)


def test_a_file_that_cannot_be_mapped_is_named(written, monkeypatch):
    def fails(*given, **named):
        raise RuntimeError("unable to mmap: Cannot allocate memory")

    monkeypatch.setattr(torch, "from_file", fails)
    with pytest.raises(DataError, match=r"user_idx.bin cannot be mapped: .*allocate"):
        open_shards(written)


def change(manifest, path, value):
    *way, last = path
    for part in way:
        manifest = manifest[part]
    if value is None:
        del manifest[last]
    else:
        manifest[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["format"], None),
        (["num_rows"], None),
        (["num_rows"], 98),
        (["num_rows"], "97"),
        (["num_rows"], True),
        (["num_rows"], 0),
        (["num_users"], 12),
        (["num_users"], -13),
        (["num_users"], 1 << 31),
        (["num_items"], 11.0),
        (["arrays"], None),
        (["arrays"], []),
        (["arrays", "user_idx"], None),
        (["arrays", "timestamp"], None),
        (["arrays", "user_idx"], 5),
        (["arrays", "user_idx", "dtype"], "int64"),
        (["arrays", "user_idx", "length"], 96),
        (["arrays", "user_idx", "length"], -97),
        (["arrays", "user_idx", "length"], 97.0),
        (["arrays", "user_idx", "sha256"], None),
        (["arrays", "known_items.offsets"], None),
        (["arrays", "known_items.values"], None),
        (["arrays", "known_items.values", "length"], 98),
        (["arrays", "known_items.offsets", "length"], 13),
        (["arrays", "user_items.values", "length"], 96),
        (["arrays", "../../etc/passwd"], {"dtype": "int32", "length": 97, "sha256": "0" * 64}),
    ],
    ids=str,
)
def test_a_manifest_that_does_not_fit_is_refused(written, path, value):
    file = written / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest, path, value)
    file.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"manifest.json"):
        open_shards(written, verify=False)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "[" * 100_000, "\ufeff{}"])
def test_a_manifest_that_is_none(written, text):
    (written / "manifest.json").write_text(text)
    with pytest.raises(DataError, match="holds no shards"):
        open_shards(written)


def test_another_format_is_named(written):
    file = written / "manifest.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(DataError, match="format 2; this recclr reads 1"):
        open_shards(written)


def forge(folder, name, values):
    """Other values under a right digest, as somebody would write them who wants harm."""
    data = values.numpy().tobytes()
    (folder / f"{name}.bin").write_bytes(data)
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["arrays"][name]["sha256"] = shards_module.sha256_of(folder / f"{name}.bin")
    file.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("user_idx", 50, NUM_USERS),
        ("item_idx", 3, -1),
        ("weight", 3, float("nan")),
        ("weight", 3, 0.0),
        ("timestamp", 4, 0),
        ("user_items.values", 7, NUM_ITEMS),
        ("known_items.values", 7, -5),
        ("known_users.values", 7, NUM_USERS),
        ("known_users.offsets", 2, 1000),
        ("user_items.offsets", 0, 1),
        ("user_items.offsets", -1, 96),
    ],
)
def test_values_out_of_range_are_refused_whatever_the_digest(written, name, place, value):
    found = open_shards(written)
    column, _, part = name.partition(".")
    array = getattr(found, name) if not part else getattr(getattr(found.groups, column), part)
    array = array.clone()
    array[place] = value
    forge(written, name, array)
    with pytest.raises(DataError, match=column):
        open_shards(written)


# --- writing --------------------------------------------------------------------------------------


def bad(**columns):
    from dataclasses import replace

    return replace(log(), **columns)


def put(name, place, value):
    column = getattr(log(), name).clone()
    column[place] = value
    return {name: column}


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ([], "without rows"),
        ([log().rows(slice(0, 0))], "without rows"),
        ([bad(**put("user_idx", 5, NUM_USERS))], "user_idx reaches from 0 to 13"),
        ([bad(**put("item_idx", 5, -1))], "item_idx reaches from -1"),
        ([bad(**put("weight", 5, 0.0))], "weight must be above 0"),
        ([bad(**put("weight", 5, float("inf")))], "weight must be above 0"),
        ([bad(**put("timestamp", 5, 3))], "timestamp falls"),
        ([bad(user_idx=log().user_idx.long())], "user_idx must be torch.int32"),
        ([bad(item_idx=log().item_idx[:-1])], r"shape \[97\], found torch.int32 of \[96\]"),
        ([log(), log()], "piece 1 begins before the end"),
        ([log(), log(timed=False)], "piece 1 has"),
        ([log(), bad(num_items=12)], "piece 1 has"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused_and_leave_nothing(tmp_path, pieces, said):
    with pytest.raises(DataError, match=said):
        write_shards(tmp_path / "log", pieces)
    assert list(tmp_path.iterdir()) == []


def test_a_piece_without_rows_is_passed_over(tmp_path):
    empty = log().rows(slice(0, 0))
    write_shards(
        tmp_path / "log", [empty, log().rows(slice(0, 50)), empty, log().rows(slice(50, 97))]
    )
    assert same(open_shards(tmp_path / "log").item_idx, log().item_idx)


def test_shards_are_never_written_over(written):
    before = {file.name: file.read_bytes() for file in written.iterdir()}
    with pytest.raises(StoreError, match="exists already"):
        write_shards(written, [log(50)])
    assert {file.name: file.read_bytes() for file in written.iterdir()} == before


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RECCLR_FAULT", "shards.columns:1:enospc")
    with pytest.raises(StoreError, match="no space left"):
        write_shards(tmp_path / "log", [log()])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "point",
    [
        "shards.columns",
        pytest.param("files.rename", marks=pytest.mark.slow),
        pytest.param("files.folder", marks=pytest.mark.slow),
    ],
)
def test_a_writer_that_is_killed_leaves_no_shards_and_the_next_one_cleans_up(tmp_path, point):
    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from recclr.data.log import EncodedLog\n"
        "from recclr.data.shards import write_shards\n"
        "import torch; one = torch.zeros(3, dtype=torch.int32)\n"
        "write_shards(Path(sys.argv[1]), [EncodedLog(one, one, 1, 1)])"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(shards_module.__file__)))
    killed = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "log"), root],
        env={**os.environ, "RECCLR_FAULT": f"{point}:1:kill"},
        check=False,
    )
    assert killed.returncode == -9
    assert not (tmp_path / "log").exists()
    assert len(list(tmp_path.iterdir())) == 1
    write_shards(tmp_path / "log", [log()])
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
    open_shards(tmp_path / "log")


def test_a_big_endian_machine_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module.sys, "byteorder", "big")
    with pytest.raises(ValueError, match="little-endian"):
        write_shards(tmp_path / "log", [log()])


MEMORY = """
import sys
from pathlib import Path

import torch

import recclr.data.grouping as grouping
import recclr.data.log as log_module
import recclr.data.shards as shards
from recclr.data.log import EncodedLog
from recclr.memory import forget_peak, held_bytes, peak_bytes

num_rows, piece, folder = int(sys.argv[1]), 1 << 18, Path(sys.argv[2])
grouping._ROWS = log_module._STRETCH = piece


def pieces():
    for number in range(num_rows // piece):
        draws = torch.Generator().manual_seed(number)
        users = torch.randint(20_000, (piece,), generator=draws, dtype=torch.int32)
        items = torch.randint(3_000, (piece,), generator=draws, dtype=torch.int32)
        yield EncodedLog(users, items, 20_000, 3_000)


list(shards.grouped(next(pieces()), shards.GROUPS))  # libraries are loaded and threads started
forget_peak()
before = held_bytes()
shards.write_shards(folder, pieces())
written = peak_bytes() - before
log = shards.open_shards(folder)
forget_peak()
before = held_bytes()
whole = log.with_columns(torch.clone)
pairs = whole.known_pairs()
print(written, peak_bytes() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for its memory")
def test_writing_takes_the_memory_of_a_stretch_and_not_of_the_log(tmp_path):
    found = {}
    for num_rows in (1 << 22, 1 << 23):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(num_rows), str(tmp_path / str(num_rows))],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found[num_rows] = [int(word) for word in done.stdout.split()]
    more = 1 << 22
    # Of a row more, what is written takes the mapped pages of its columns at most (8 bytes) ...
    assert found[2 * more][0] - found[more][0] < 12 * more
    # ... where sorting in memory takes several int64 (the comparison can tell).
    assert found[2 * more][1] - found[more][1] > 40 * more
