"""Every kind of store keeps its readers at the old version until the new one is whole."""

import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest

from recclr import files
from recclr.errors import ConfigError, StoreError
from recclr.export import export_embeddings, open_store, parse_target, verify
from recclr.export.bundle import GoldenQueries
from recclr.export.targets import DESTINATIONS

pytestmark = pytest.mark.filterwarnings("error")

# Every place where an export may stop before readers are pointed to the new version.
POINTS = {
    "parquet": (
        "export.items:1",
        "export.users:1",
        "files.write:1",
        "files.rename:1",
        "files.folder:1",
        "export.point:1",
        "files.write:2",
        "files.rename:2",
    ),
    "lancedb": (
        "export.users:1",
        "export.items:1",
        "files.write:1",
        "files.rename:1",
        "export.point:1",
        "files.write:2",
        "files.rename:2",
    ),
}
STOPS = [(kind, point) for kind, points in POINTS.items() for point in points]


def folder_of(target):
    return parse_target(target).location


def tree(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def holds(target, bundle):
    store = open_store(target, bundle.name)
    verify(store, bundle)
    return store.manifest.version == bundle.version


def test_every_kind_of_store_has_its_stops():
    assert set(POINTS) == set(DESTINATIONS)


def stopped(target, make_bundle, fault, plan, error, words):
    old, new = make_bundle(num_users=3), make_bundle(num_users=3, seed=1)
    export_embeddings(old, target)
    fault(plan)
    with pytest.raises(error, match=words):
        export_embeddings(new, target)
    fault("")
    assert holds(target, old)
    assert not list(folder_of(target).rglob("*.tmp-*"))
    assert not export_embeddings(new, target).unchanged
    assert holds(target, new)


@pytest.mark.parametrize(("kind", "point"), STOPS)
def test_a_failure_before_the_flip_leaves_the_version_before(
    tmp_path, make_bundle, fault, kind, point
):
    target = f"{kind}:{tmp_path / 's'}"
    stopped(target, make_bundle, fault, f"{point}:enospc", StoreError, "no space left")


@pytest.mark.parametrize(
    ("action", "error", "words"),
    [("eacces", ConfigError, "no permission to write"), ("eio", StoreError, "writing .* failed")],
)
def test_every_failure_of_the_disk_is_typed(target, make_bundle, fault, action, error, words):
    stopped(target, make_bundle, fault, f"export.items:1:{action}", error, words)


@pytest.mark.parametrize(("kind", "point"), STOPS)
def test_a_failure_of_the_first_export_shows_nothing(tmp_path, make_bundle, fault, kind, point):
    target, bundle = f"{kind}:{tmp_path / 's'}", make_bundle(num_users=3)
    fault(f"{point}:enospc")
    with pytest.raises(StoreError, match="no space left"):
        export_embeddings(bundle, target)
    fault("")
    with pytest.raises(StoreError, match="holds no exported embeddings"):
        open_store(target)
    export_embeddings(bundle, target)
    assert holds(target, bundle)


EXPORT_ANOTHER = """
import sys, polars as pl, torch
from recclr.export import ModelFacts, build_bundle, export_embeddings
export_embeddings(build_bundle(
    item_ids=pl.Series([1, 2, 3]), item_vectors=torch.eye(3), user_ids=pl.Series([4]),
    user_vectors=torch.eye(1, 3), unknown_user_vector=torch.zeros(3), similarity="cosine",
    facts=ModelFacts("now")), sys.argv[1])
"""


def killed(tmp_path, make_bundle, kind, point):
    target, old, new = f"{kind}:{tmp_path / 's'}", make_bundle(), make_bundle(seed=1)
    export_embeddings(old, target)
    done = subprocess.run(
        [sys.executable, "-c", EXPORT_ANOTHER, target],
        env={"RECCLR_FAULT": f"{point}:kill", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == -9
    assert holds(target, old)
    export_embeddings(new, target)
    assert holds(target, new)


def test_an_export_killed_just_before_the_flip(tmp_path, make_bundle):
    killed(tmp_path, make_bundle, "lancedb", "files.rename:2")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "point"), STOPS)
def test_an_export_killed_anywhere_before_the_flip(tmp_path, make_bundle, kind, point):
    killed(tmp_path, make_bundle, kind, point)


def test_what_fails_verification_is_not_shown(target, make_bundle):
    old, new = make_bundle(), make_bundle(seed=1)
    golden = new.golden
    wrong = GoldenQueries(golden.user_ids, golden.item_ids, golden.scores + 1e-3)
    export_embeddings(old, target)
    with pytest.raises(StoreError, match=r"golden query .*; it is not shown to readers, who see"):
        export_embeddings(replace(new, golden=wrong), target)
    assert holds(target, old)
    export_embeddings(new, target)
    assert holds(target, new)


def test_a_live_version_that_fails_verification_can_be_mended_as_told(target, make_bundle):
    """A bundle of equal content whose live copy was damaged behind our back."""
    bundle = make_bundle()
    export_embeddings(bundle, target)
    golden = bundle.golden
    wrong = GoldenQueries(golden.user_ids, golden.item_ids, golden.scores + 1e-3)
    home = open_store(target).home
    with pytest.raises(StoreError, match=f"remove {home} and export again$"):
        export_embeddings(replace(bundle, golden=wrong), target)
    shutil.rmtree(home)
    assert not export_embeddings(bundle, target).unchanged
    assert holds(target, bundle)


def test_readers_during_flips_see_one_version_or_the_other(target, make_bundle):
    bundles = {bundle.version: bundle for bundle in (make_bundle(), make_bundle(seed=1, dim=4))}
    first, second = bundles.values()
    export_embeddings(first, target)
    wrong, reads, done = [], 0, threading.Event()

    def read():
        nonlocal reads
        while not done.is_set() or reads < 5:
            try:
                store = open_store(target)
                verify(store, bundles[store.manifest.version])
            except Exception as error:
                wrong.append(error)
            reads += 1

    reader = threading.Thread(target=read)
    reader.start()
    for bundle in (second, first) * 3:
        export_embeddings(bundle, target)
    done.set()
    reader.join()
    assert wrong == []
    assert reads >= 5


def test_somebody_elses_folder_is_refused_and_left_alone(target, make_bundle):
    folder = folder_of(target)
    (folder / "recclr").mkdir(parents=True)
    (folder / "recclr" / "module.py").write_text("x = 1")
    (folder / "CURRENT").write_text("MANIFEST-000001")
    before = tree(folder)
    with pytest.raises(ConfigError, match=r"is not empty and holds no .*choose an empty or new"):
        export_embeddings(make_bundle(), target)
    assert tree(folder) == before


def test_hidden_files_do_not_make_a_folder_somebodys(target, make_bundle):
    folder_of(target).mkdir(parents=True)
    (folder_of(target) / ".DS_Store").write_bytes(b"x")
    export_embeddings(make_bundle(), target)
    assert holds(target, make_bundle())


@pytest.mark.parametrize("depth", [0, 1])
def test_a_file_in_the_way_is_a_clear_error(target, make_bundle, depth):
    folder = folder_of(target)
    place = [folder, folder.parent][depth]
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"is a file; expected a folder|cannot be written"):
        export_embeddings(make_bundle(), target)
    assert place.read_bytes() == b"mine"


def test_too_little_space_is_found_before_anything_is_written(target, make_bundle, monkeypatch):
    old, new = make_bundle(), make_bundle(seed=1)
    export_embeddings(old, target)
    before = tree(folder_of(target))
    free = SimpleNamespace(free=2 * new.num_bytes - 1)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: free)
    with pytest.raises(StoreError, match="free some space or choose another place"):
        export_embeddings(new, target)
    assert tree(folder_of(target)) == before


def test_a_missing_library_names_the_extra(tmp_path, make_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "lancedb", None)
    with pytest.raises(ConfigError, match=r"pip install 'recclr\[lancedb\]'"):
        export_embeddings(make_bundle(), f"lancedb:{tmp_path / 's'}")
    export_embeddings(make_bundle(), f"parquet:{tmp_path / 'p'}")
