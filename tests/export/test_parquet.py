import shutil

import polars as pl
import pyarrow.parquet as pq
import pytest
import torch

from recclr.errors import ConfigError, StoreError
from recclr.export import export_embeddings, open_store, verify


@pytest.fixture
def target(tmp_path):
    return f"parquet:{tmp_path / 'out'}"


def inside(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["integer", "string"])
def test_the_files_are_for_any_reader(target, tmp_path, make_bundle, kind):
    bundle = make_bundle(kind=kind)
    export_embeddings(bundle, target)
    assert inside(tmp_path / "out") == sorted(["CURRENT", bundle.version])
    folder = tmp_path / "out" / bundle.version
    assert inside(folder) == ["items.parquet", "manifest.json", "users.parquet"]
    assert (tmp_path / "out" / "CURRENT").read_text() == f"{bundle.version}\n"
    for side, ids, vectors in (
        ("item", bundle.item_ids, bundle.item_vectors),
        ("user", bundle.user_ids, bundle.user_vectors),
    ):
        frame = pl.read_parquet(folder / f"{side}s.parquet")
        assert frame.schema == {f"{side}_id": ids.dtype, "embedding": pl.Array(pl.Float32, 6)}
        assert frame[f"{side}_id"].to_list() == ids.to_list()
        assert torch.equal(torch.tensor(frame["embedding"].to_numpy()), vectors)
        schema = pq.read_schema(folder / f"{side}s.parquet")
        assert not schema.field("embedding").nullable
        assert schema.metadata[b"recclr"] == bundle.version.encode()


def test_earlier_versions_stay_and_going_back_copies_nothing(target, tmp_path, make_bundle):
    first, second = make_bundle(), make_bundle(seed=1)
    export_embeddings(first, target)
    export_embeddings(second, target)
    before = (tmp_path / "out" / first.version / "items.parquet").stat()
    export_embeddings(first, target)
    after = (tmp_path / "out" / first.version / "items.parquet").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert inside(tmp_path / "out") == sorted(["CURRENT", first.version, second.version])


def test_a_folder_holds_one_name(target, tmp_path, make_bundle):
    export_embeddings(make_bundle(), target)
    with pytest.raises(ConfigError, match="embeddings named 'catalogue', not 'other'"):
        export_embeddings(make_bundle(seed=1, name="other"), target)
    with pytest.raises(ConfigError, match="choose that one or another folder"):
        open_store(target, "other")
    assert len(inside(tmp_path / "out")) == 2


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "one bit": flip_a_bit,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "another file": lambda path: shutil.copy(
        path.with_name({"items.parquet": "users.parquet"}.get(path.name, "items.parquet")), path
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["items.parquet", "users.parquet", "manifest.json"])
def test_a_damaged_file_is_named_and_mended_as_told(target, make_bundle, damage, name):
    bundle, other = make_bundle(), make_bundle(seed=1)
    export_embeddings(bundle, target)
    home = open_store(target).home
    path = home / name
    DAMAGE[damage](path)
    words = f"^{path}.*; remove {home} and export again$"
    with pytest.raises(StoreError, match=words):
        open_store(target).read_ids(name.split("s.")[0])
    with pytest.raises(StoreError, match=words):
        export_embeddings(bundle, target)
    export_embeddings(other, target)
    verify(open_store(target), other)
    with pytest.raises(StoreError, match=f"remove {home} and export again"):
        export_embeddings(bundle, target)
    verify(open_store(target), other)
    shutil.rmtree(home)
    export_embeddings(bundle, target)
    verify(open_store(target), bundle)


def test_the_only_version_can_be_mended_too(target, make_bundle):
    bundle = make_bundle()
    export_embeddings(bundle, target)
    shutil.rmtree(open_store(target).home)
    with pytest.raises(StoreError, match=r"manifest\.json cannot be read"):
        open_store(target)
    export_embeddings(bundle, target)
    verify(open_store(target), bundle)


@pytest.mark.parametrize("text", ["", "../../etc", "0" * 16, "\0"])
def test_a_damaged_pointer_is_mended_by_an_export(target, tmp_path, make_bundle, text):
    bundle = make_bundle()
    export_embeddings(bundle, target)
    (tmp_path / "out" / "CURRENT").write_text(text)
    with pytest.raises(StoreError, match=r"holds no exported embeddings|cannot be read"):
        open_store(target)
    export_embeddings(bundle, target)
    verify(open_store(target), bundle)


def test_each_file_is_read_once(target, make_bundle, monkeypatch):
    export_embeddings(make_bundle(), target)
    reads = []
    read_table = pq.read_table
    monkeypatch.setattr(pq, "read_table", lambda path: reads.append(path.name) or read_table(path))
    store = open_store(target)
    for _ in range(2):
        store.search(store.user_vectors(["é 500", "nobody"]), 3, exclude=[["é 100"], []])
    assert sorted(reads) == ["items.parquet", "users.parquet"]


def test_a_file_whose_content_is_not_what_the_manifest_says(target, make_bundle, monkeypatch):
    export_embeddings(make_bundle(), target)
    store = open_store(target)
    path = store.home / "items.parquet"
    table = pq.read_table(path)
    monkeypatch.setattr(
        "recclr.export.parquet.sha256_of", lambda path: store.manifest.parts[path.name]["sha256"]
    )
    pq.write_table(table.rename_columns(["id", "embedding"]), path)
    with pytest.raises(StoreError, match=r"items\.parquet: expected a column 'item_id'"):
        store.read_ids("item")
