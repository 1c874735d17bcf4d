"""What LanceDB does of its own, beyond the contract of every store."""

import shutil
from types import SimpleNamespace

import lancedb
import polars as pl
import pyarrow as pa
import pytest
import torch

from recclr.errors import ConfigError, StoreError
from recclr.export import export_embeddings, open_store, verify

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "db"


@pytest.fixture
def target(folder):
    return f"lancedb:{folder}"


def rows(folder, name):
    return lancedb.connect(folder).open_table(name).to_arrow()


def test_a_reader_without_recclr_sees_both_tables(target, folder, make_bundle):
    bundle = make_bundle()
    export_embeddings(bundle, target)
    items = rows(folder, "catalogue")
    assert items.schema.names == ["id", "vector"]
    assert items.schema.field("vector").type.list_size == 6
    assert items["id"].to_pylist() == bundle.item_ids.to_list()
    assert rows(folder, "catalogue_users")["id"].to_pylist() == bundle.user_ids.to_list()
    table = lancedb.connect(folder).open_table("catalogue")
    best = table.search(bundle.user_vectors[0].numpy()).distance_type("dot").limit(3).to_list()
    golden = bundle.golden
    assert [row["id"] for row in best] == golden.item_ids[0][:3]
    assert [1 - row["_distance"] for row in best] == pytest.approx(
        golden.scores[0, :3].tolist(), abs=1e-6
    )


def test_every_version_has_a_tag_and_the_last_export_is_the_latest(target, folder, make_bundle):
    first, second = make_bundle(), make_bundle(seed=1)
    for bundle in (first, second, first):
        export_embeddings(bundle, target)
    table = lancedb.connect(folder).open_table("catalogue")
    assert set(table.tags.list()) == {f"recclr-{first.version}", f"recclr-{second.version}"}
    for bundle in (second, first):
        table.checkout(f"recclr-{bundle.version}")
        found = torch.tensor(pl.from_arrow(table.to_arrow())["vector"].to_numpy())
        assert torch.equal(found, bundle.item_vectors)
    table.checkout_latest()
    assert table.version == table.tags.list()[f"recclr-{first.version}"]["version"]


@pytest.mark.parametrize("point", ["export.users:1", "export.items:1", "files.rename:2"])
def test_after_a_failure_readers_without_recclr_see_the_old_rows(
    target, folder, make_bundle, fault, point
):
    old, new = make_bundle(), make_bundle(seed=1, num_items=41, dim=4)
    export_embeddings(new, target)
    export_embeddings(old, target)
    names = ("catalogue", "catalogue_users")
    before = [rows(folder, name) for name in names]
    tags = [lancedb.connect(folder).open_table(name).tags.list() for name in names]
    fault(f"{point}:eio")
    with pytest.raises(StoreError, match="failed"):
        export_embeddings(new, target)
    assert [rows(folder, name) for name in names] == before
    assert [lancedb.connect(folder).open_table(name).tags.list() for name in names] == tags


def test_a_failure_of_the_first_export_leaves_no_table(target, folder, make_bundle, fault):
    fault("export.items:1:eio")
    with pytest.raises(StoreError, match="failed"):
        export_embeddings(make_bundle(), target)
    assert not list(folder.glob("*.lance"))


@pytest.mark.parametrize("name", ["catalogue", "catalogue_users"])
def test_a_table_of_somebody_else_is_left_as_it_is(target, folder, make_bundle, name):
    table = pa.table({"id": [1, 2], "mine": ["a", "b"]})
    lancedb.connect(folder).create_table(name, table)
    with pytest.raises(ConfigError, match=f"table '{name}' exists and is not an export named"):
        export_embeddings(make_bundle(), target)
    assert rows(folder, name) == table
    assert [path.name for path in folder.iterdir()] == [f"{name}.lance"]


def test_names_live_beside_each_other_and_beside_other_tables(target, folder, make_bundle):
    lancedb.connect(folder).create_table("mine", pa.table({"a": [1]}))
    first, second = make_bundle(), make_bundle(seed=1, name="other")
    export_embeddings(first, target)
    export_embeddings(second, target)
    verify(open_store(target), first)
    verify(open_store(target, "other"), second)
    with pytest.raises(ConfigError, match="table 'catalogue_users' exists"):
        export_embeddings(make_bundle(name="catalogue_users"), target)
    verify(open_store(target), first)
    assert rows(folder, "mine")["a"].to_pylist() == [1]


def test_a_change_by_somebody_else_does_not_reach_readers_of_an_export(target, folder, make_bundle):
    bundle = make_bundle()
    export_embeddings(bundle, target)
    table = lancedb.connect(folder).open_table("catalogue")
    table.delete("true")
    verify(open_store(target), bundle)
    assert export_embeddings(bundle, target).unchanged


def test_a_table_made_anew_is_not_taken_for_the_export(target, folder, make_bundle):
    bundle = make_bundle()
    export_embeddings(bundle, target)
    copy = rows(folder, "catalogue").replace_schema_metadata(None)
    database = lancedb.connect(folder)
    database.drop_table("catalogue")
    with pytest.raises(StoreError, match=r"table 'catalogue'.* was not found"):
        open_store(target)
    database.create_table("catalogue", copy)
    with pytest.raises(StoreError, match="'catalogue' was replaced since the export; export again"):
        open_store(target)
    database.drop_table("catalogue")
    export_embeddings(bundle, target)
    verify(open_store(target), bundle)


def test_rows_are_put_in_order_whatever_order_lance_gives_them_in(target, make_bundle):
    bundle = make_bundle()
    export_embeddings(bundle, target)
    store = open_store(target)
    table = store._tables["user"]

    class Shuffled:
        def take_offsets(self, offsets):
            taken = table.take_offsets(offsets).to_arrow()
            return SimpleNamespace(to_arrow=lambda: taken.take([2, 0, 1]))

        def search(self):
            return table.search()

    store._tables["user"] = Shuffled()
    rows = torch.tensor([9, 3, 9, 30])
    assert torch.equal(store.read_vectors("user", rows), bundle.user_vectors[rows])


def data_file(folder, name):
    (path,) = (folder / f"{name}.lance" / "data").iterdir()
    return path


def test_a_file_that_is_cut_short_or_missing_is_refused_and_mended(target, folder, make_bundle):
    bundle = make_bundle()
    export_embeddings(bundle, target)
    path = data_file(folder, "catalogue")
    whole = path.read_bytes()
    for damage in (lambda: path.write_bytes(whole[:40]), path.unlink):
        damage()
        with pytest.raises(StoreError, match=r"table 'catalogue': LanceDB failed: [^\n]*$") as told:
            open_store(target).read_vectors("item")
        assert ".rs:" not in str(told.value)
        path.write_bytes(whole)
    path.write_bytes(whole[:40])
    home = folder / "recclr" / "catalogue"
    with pytest.raises(StoreError, match=f"remove {home} and export again"):
        export_embeddings(bundle, target)
    shutil.rmtree(home)
    export_embeddings(bundle, target)
    verify(open_store(target), bundle)


def test_a_flipped_bit_of_a_live_vector_is_found_by_the_next_export(target, folder, make_bundle):
    """Lance itself reads it back without a word."""
    bundle = make_bundle()
    export_embeddings(bundle, target)
    path = data_file(folder, "catalogue")
    data = bytearray(path.read_bytes())
    place = bytes(data).index(bundle.item_vectors[7].numpy().tobytes())
    data[place + 4] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(StoreError, match=r"item vectors \(1 rows differ\), row 7, coordinate 1"):
        export_embeddings(bundle, target)


def test_a_table_that_cannot_be_opened_is_never_dropped(target, folder, make_bundle):
    export_embeddings(make_bundle(), target)
    for path in (folder / "catalogue.lance" / "_versions").glob("*.manifest"):
        path.write_bytes(b"garbage")
    before = sorted(folder.rglob("*"))
    with pytest.raises(StoreError, match=r"catalogue\.lance is no whole table: LanceDB failed"):
        export_embeddings(make_bundle(seed=1), target)
    assert sorted(folder.rglob("*")) == before


def test_a_bare_folder_that_a_failed_create_left_is_no_table(target, folder, make_bundle):
    (folder / "catalogue.lance").mkdir(parents=True)
    export_embeddings(make_bundle(), target)
    verify(open_store(target), make_bundle())


def test_nothing_is_said_on_standard_error(target, folder, make_bundle, fault, capfd):
    with pytest.raises(StoreError):
        open_store(target)
    for bundle in (make_bundle(), make_bundle(), make_bundle(seed=1, kind="integer", dim=4)):
        export_embeddings(bundle, target)
        store = open_store(target)
        store.search(store.user_vectors([None]), 3)
    fault("export.items:1:eio")
    with pytest.raises(StoreError):
        export_embeddings(make_bundle(seed=2), target)
    fault("")
    shutil.rmtree(folder / "catalogue.lance")
    with pytest.raises(StoreError):
        open_store(target)
    export_embeddings(make_bundle(), target)
    assert capfd.readouterr() == ("", "")


def test_scores_that_lance_cannot_tell_apart_are_told_apart(target, make_bundle):
    # Around 1, where Lance has its distances, neighbours in float32 lie 2^-24 apart.
    gaps = torch.arange(300).flip(0) * 2.0**-31
    vectors = torch.stack([gaps, torch.ones(300)], 1)
    bundle = make_bundle(item_vectors=vectors, dim=2, similarity="dot", num_users=1)
    export_embeddings(bundle, target)
    found, scores = open_store(target).search(
        torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), 4, exclude=[[], bundle.item_ids[-2:].to_list()]
    )
    ids = bundle.item_ids.to_list()
    assert found == [ids[:4], ids[-3:-7:-1]]
    assert scores[0].tolist() == gaps[:4].tolist()
    assert scores[1].tolist() == [-float(gap) for gap in gaps[[-3, -4, -5, -6]]]
