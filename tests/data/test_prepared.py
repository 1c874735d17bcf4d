import json
import shutil
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from recclr.data.interactions import Log
from recclr.data.prepare import PreparedLog, prepare
from recclr.errors import CheckpointError, StoreError
from recclr.files import sha256_of
from recclr.settings import DataSettings, FeatureSettings, TowerSettings

FILES = ("prepared.safetensors", "vocabulary/users.parquet", "vocabulary/items.parquet")


@pytest.fixture(scope="module")
def prepared() -> PreparedLog:
    events = pl.DataFrame(
        {
            "user_id": [7, 5, 7, 6, 5],
            "item_id": ["fig", "pear", "kiwi", "fig", "fig"],
            "timestamp": [10, 20, 30, 40, 50],
            "weight": pl.Series([1.0, 0.5, 2.0, 1.0, 1.0], dtype=pl.Float32),
        }
    )
    items = pl.DataFrame(
        {
            "item_id": ["kiwi", "fig", "date"],
            "a/b": ["green", "blue", "brown"],
            "tags": [["x", "y"], [], ["y"]],
            "size": [0.1, 0.7, None],
            "vector": [[1.0, 1 / 3], None, [0.0, 1.0]],
        }
    )
    item = TowerSettings(
        features={
            "a/b": FeatureSettings(kind="categorical"),
            "tags": FeatureSettings(kind="multi_hot"),
            "size": FeatureSettings(kind="numeric", transform="quantile"),
            "vector": FeatureSettings(kind="vector"),
        }
    )
    train = Log(events, None, items, DataSettings(events="<memory>"))
    held_out = train.with_events(events.drop("weight").tail(2))
    return prepare(train, held_out, user=TowerSettings(), item=item)


@pytest.fixture
def folder(prepared: PreparedLog, tmp_path: Path) -> Path:
    (tmp_path / "config.toml").write_text("seed = 7")
    prepared.save(tmp_path)
    return tmp_path


def test_round_trip(prepared: PreparedLog, folder: Path) -> None:
    loaded = PreparedLog.load(folder)
    for part in ("train", "held_out"):
        before, after = getattr(prepared.tensors, part), getattr(loaded.tensors, part)
        assert (before.num_users, before.num_items) == (after.num_users, after.num_items)
        for name in ("user_idx", "item_idx", "timestamp", "weight"):
            first, second = getattr(before, name), getattr(after, name)
            assert (first is None) == (second is None)
            assert first is None or (first.dtype == second.dtype and torch.equal(first, second))
    assert loaded.tensors.cutoff == prepared.tensors.cutoff == 51
    assert list(loaded.tensors.items.columns) == ["a/b", "tags", "size", "vector"]
    assert torch.equal(
        loaded.tensors.items.columns["a/b"].idx, prepared.tensors.items.columns["a/b"].idx
    )
    tags, before = (of.tensors.items.columns["tags"] for of in (loaded, prepared))
    assert tags.cardinality == before.cardinality
    assert torch.equal(tags.csr.offsets, before.csr.offsets)
    assert torch.equal(tags.csr.values, before.csr.values)
    for name in ("size", "vector"):
        assert torch.equal(
            loaded.tensors.items.columns[name].values, prepared.tensors.items.columns[name].values
        )
    assert loaded.users.ids.to_list() == [7, 5, 6]
    assert loaded.items.counts.tolist() == prepared.items.counts.tolist()
    assert loaded.item_encoder.to_json() == prepared.item_encoder.to_json()
    assert loaded.counts == prepared.counts


def test_saving_twice_gives_the_same_bytes_and_leaves_the_rest(
    prepared: PreparedLog, folder: Path
) -> None:
    before = {name: (folder / name).read_bytes() for name in (*FILES, "prepared.json")}
    prepared.save(folder)
    assert {name: (folder / name).read_bytes() for name in before} == before
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {*before, "config.toml"}


@pytest.mark.parametrize("name", [*FILES, "prepared.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "empty"])
def test_every_damaged_file_is_refused(folder: Path, name: str, damage: str) -> None:
    path = folder / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-9])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        content[len(content) // 2] ^= 0x80
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"prepared|vocabulary"):
        PreparedLog.load(folder)


def test_files_of_two_saves_do_not_mix(prepared: PreparedLog, folder: Path, tmp_path) -> None:
    other = tmp_path / "other"
    PreparedLog(
        prepared.tensors,
        prepared.users.counted(pl.Series([5])),
        prepared.items,
        prepared.user_encoder,
        prepared.item_encoder,
        {},
    ).save(other)
    shutil.copy(other / FILES[1], folder / FILES[1])
    with pytest.raises(CheckpointError, match=r"users\.parquet is missing or damaged"):
        PreparedLog.load(folder)


def rewrite(folder: Path, change, tensors: dict | None = None) -> None:
    """Change the state (and tensors) and sign them again, as somebody crafting files would."""
    if tensors is not None:
        save_file(load_file(folder / FILES[0]) | tensors, folder / FILES[0])
    state = json.loads((folder / "prepared.json").read_text())
    state["files"][FILES[0]] = sha256_of(folder / FILES[0])
    change(state)
    (folder / "prepared.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"train.user_idx": torch.tensor([0, 1, 2, 3, 0], dtype=torch.int32)}, "from 0 to 3"),
        ({"train.item_idx": torch.tensor([0, 1, -1, 0, 0], dtype=torch.int32)}, "from -1"),
        ({"train.item_idx": torch.tensor([0, 1], dtype=torch.int32)}, "differ in length"),
        ({"train.user_idx": torch.zeros(5, dtype=torch.int64)}, "found .5,. of torch.int64"),
        ({"items.0.idx": torch.zeros(3, dtype=torch.int32)}, "3 rows instead of 4"),
        ({"items.0.idx": torch.full((4,), 9, dtype=torch.int32)}, "from 9 to 9"),
        ({"items.1.offsets": torch.tensor([0, 3, 2, 2, 3])}, "offsets"),
        ({"items.1.values": torch.full((3,), 99, dtype=torch.int32)}, "from 99 to 99"),
        ({"items.2.dense": torch.full((4, 2), torch.nan)}, "not finite"),
        ({"extra": torch.zeros(1)}, "unexpected tensors"),
    ],
)
def test_crafted_tensors_are_refused(folder: Path, tensors: dict, problem: str) -> None:
    rewrite(folder, lambda state: None, tensors)
    with pytest.raises(CheckpointError, match=problem):
        PreparedLog.load(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(format=99),
        lambda state: state.pop("encoders"),
        lambda state: state.update(cutoff="soon"),
        lambda state: state["columns"].update(items=[]),
        lambda state: state["columns"]["items"][0].update(type="os.system"),
        lambda state: state["columns"]["items"][1].update(cardinality=None),
        lambda state: state["encoders"].update(item={"side": "item"}),
        lambda state: state.update(counts=[1]),
        lambda state: state.update(files=None),
    ],
)
def test_crafted_descriptions_are_refused(folder: Path, change) -> None:
    rewrite(folder, change)
    with pytest.raises(CheckpointError):
        PreparedLog.load(folder)


def test_a_folder_without_a_prepared_log_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no prepared log"):
        PreparedLog.load(tmp_path)


def test_a_full_disk_is_said(prepared, tmp_path, monkeypatch):
    def full(*args):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("recclr.data.prepared.save_file", full)
    with pytest.raises(StoreError, match="no space left on the disk"):
        prepared.save(tmp_path)
    assert not list(tmp_path.iterdir())
