"""Checkpoints: whole or not at all, verified to the last bit, never a pickle."""

import errno
import json
import multiprocessing
import os
import pickle
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recclr import files
from recclr.checkpoint import (
    FORMAT_VERSION,
    find_checkpoint,
    load_checkpoint,
    require_match,
    save_checkpoint,
)
from recclr.errors import CheckpointError, StoreError
from recclr.memory import held_bytes

pytestmark = pytest.mark.usefixtures("no_power_cut")

FILES = ("manifest.json", "state.json", "tensors.safetensors")


def tensors_of(step):
    generator = torch.Generator().manual_seed(step)
    return {
        "model/über.weight": torch.randn(5, 3, generator=generator),
        "model/half": torch.randn(4, generator=generator).half(),
        "model/transposed": torch.randn(2, 7, generator=generator).T,
        "optimizers/count": torch.tensor(float(step)),
        "optimizers/rows": torch.arange(step),
    }


def state_of(step):
    return {"step": step, "best_value": step / 3, "evaluations": [{"epoch": 0.1 * step}]}


def save(root, step, *, best=False, keep=2):
    return save_checkpoint(root, tensors_of(step), state_of(step), best=best, keep=keep)


def is_that_of(found, step):
    assert found is not None
    assert found.state == state_of(step)
    expected = tensors_of(step)
    assert found.tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert found.tensors[name].dtype == value.dtype
        assert torch.equal(found.tensors[name], value)
    return True


def folders(root):
    return sorted(path.name for path in root.glob("step-*"))


def rewrite_manifest(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)


def test_what_is_saved_comes_back_in_every_bit(tmp_path):
    root = tmp_path / "run" / "checkpoints"
    folder = save(root, 12, best=True)
    assert folder == root / "step-12"
    assert is_that_of(load_checkpoint(folder), 12)
    assert is_that_of(find_checkpoint(root), 12)
    assert is_that_of(find_checkpoint(root, "BEST"), 12)
    assert sorted(path.name for path in root.iterdir()) == ["BEST", "LAST", "step-12"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    digest = files.sha256_of(folder / "tensors.safetensors")
    assert load_checkpoint(folder).digest == digest


def test_a_checkpoint_is_read_as_far_as_it_is_used(tmp_path):
    """Each of several ranks on a machine takes its part of a table, none the whole."""
    if held_bytes() is None:
        pytest.skip("this system does not say what a process holds")
    table = torch.arange(1 << 23, dtype=torch.float32).view(-1, 8)
    folder = save_checkpoint(tmp_path, {"table": table}, {"step": 1}, best=False)
    load_checkpoint(folder)
    before = held_bytes()
    found = load_checkpoint(folder)
    part = found.tensors["table"][300:500].clone()
    assert held_bytes() - before < 8 << 20 < table.nbytes
    # What was read stays, also when the folder is pruned.
    shutil.rmtree(folder)
    assert torch.equal(part, table[300:500])
    assert torch.equal(found.tensors["table"], table)


def test_no_checkpoint_is_none(tmp_path):
    assert find_checkpoint(tmp_path / "nowhere") is None
    assert find_checkpoint(tmp_path, "BEST") is None
    save(tmp_path, 1)
    assert find_checkpoint(tmp_path, "BEST") is None


def test_pruning_keeps_the_newest_and_what_pointers_name(tmp_path):
    for step in (2, 3, 10, 20, 100):
        save(tmp_path, step, best=step == 3)
        assert is_that_of(find_checkpoint(tmp_path), step)
        if step >= 3:
            assert is_that_of(find_checkpoint(tmp_path, "BEST"), 3)
    assert folders(tmp_path) == ["step-100", "step-20", "step-3"]
    save(tmp_path, 5, keep=1)
    # Step 100 is the newest by number, 5 by LAST, 3 by BEST.
    assert folders(tmp_path) == ["step-100", "step-3", "step-5"]
    save(tmp_path, 101, best=True, keep=1)
    assert folders(tmp_path) == ["step-101"]


def faults():
    """Every point that a save passes, with how often it passes it."""
    points = {"files.folder": 1, "checkpoint.tensors": 1, "checkpoint.manifest": 1}
    points |= {"checkpoint.renamed": 1, "checkpoint.best": 1, "files.write": 5, "files.rename": 5}
    return [(point, count) for point, most in points.items() for count in range(1, most + 1)]


def check_still_good(root, *, after):
    """Whatever was interrupted: a whole checkpoint each, of before or after, and no pickle."""
    last, best = find_checkpoint(root), find_checkpoint(root, "BEST")
    assert last.folder.name == files.read_pointer(root / "LAST")
    assert best.folder.name == files.read_pointer(root / "BEST")
    assert last.state["step"] in (1, after)
    assert is_that_of(last, last.state["step"])
    assert is_that_of(best, best.state["step"])
    for name in folders(root):
        assert is_that_of(load_checkpoint(root / name), int(name.removeprefix("step-")))


@pytest.mark.parametrize(("point", "count"), faults())
def test_a_disk_that_fills_up_anywhere_leaves_the_checkpoints_before(
    tmp_path, monkeypatch, point, count
):
    save(tmp_path, 1, best=True)
    monkeypatch.setattr(files, "_reached", {})
    monkeypatch.setenv("RECCLR_FAULT", f"{point}:{count}:enospc")
    with pytest.raises((StoreError, OSError)) as caught:
        save(tmp_path, 2, best=True)
    assert isinstance(caught.value, StoreError) or caught.value.errno == errno.ENOSPC
    check_still_good(tmp_path, after=2)
    assert not list(tmp_path.glob(".*"))
    monkeypatch.delenv("RECCLR_FAULT")
    save(tmp_path, 2, best=True)
    assert is_that_of(find_checkpoint(tmp_path), 2)
    assert is_that_of(find_checkpoint(tmp_path, "BEST"), 2)


def killed_save(root, step, fault):
    """Save in a child that SIGKILL ends at the fault; true if it was reached."""

    def run():
        os.environ["RECCLR_FAULT"] = fault
        files._reached.clear()
        save(root, step, best=True)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join()
    assert child.exitcode in (0, -9)
    return child.exitcode == -9


@pytest.mark.parametrize(("point", "count"), faults())
def test_a_kill_anywhere_leaves_good_checkpoints_and_the_next_save_cleans_up(
    tmp_path, point, count
):
    save(tmp_path, 1, best=True)
    assert killed_save(tmp_path, 2, f"{point}:{count}:kill")
    check_still_good(tmp_path, after=2)
    # The resumed run may be killed as well while it writes the same step.
    for other in ("files.write:1", "checkpoint.tensors:1", "files.folder:1", "checkpoint.best:1"):
        killed_save(tmp_path, 2, f"{other}:kill")
        check_still_good(tmp_path, after=2)
    save(tmp_path, 2, best=True)
    assert is_that_of(find_checkpoint(tmp_path), 2)
    assert is_that_of(find_checkpoint(tmp_path, "BEST"), 2)
    assert not list(tmp_path.glob(".step-*"))


def test_a_folder_that_a_damaged_pointer_left_behind_is_written_anew(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    flip(tmp_path / "step-2" / "tensors.safetensors", 999)
    assert is_that_of(find_checkpoint(tmp_path), 1)
    save(tmp_path, 2)
    assert is_that_of(find_checkpoint(tmp_path), 2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    save(root, 6, best=True)
    return root


@given(name=st.sampled_from(FILES), bit=st.integers(0, 1 << 16))
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_flipped_bit_is_ever_read_as_truth(whole, tmp_path_factory, name, bit):
    root = tmp_path_factory.mktemp("flipped") / "r"
    shutil.copytree(whole, root)
    flip(root / "step-6" / name, bit)
    try:
        found = load_checkpoint(root / "step-6")
    except CheckpointError:
        return
    # Blanks and sizes of the manifest tell nothing; what was loaded is what was saved.
    assert name == "manifest.json"
    assert is_that_of(found, 6)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_cut_or_empty_file_is_refused(tmp_path, name):
    folder = save(tmp_path, 6)
    path = folder / name
    data = path.read_bytes()
    for damaged in (data[:-1], data[: len(data) // 2], b""):
        path.write_bytes(damaged)
        if name == "manifest.json" and damaged == data[:-1]:
            continue  # the line end
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "text",
    ["[]", "3", "null", '{"format": 1}', '{"format": 1, "files": {"state.json": 7}}', "\xff"],
)
def test_a_manifest_of_another_shape_is_refused(tmp_path, text):
    folder = save(tmp_path, 6)
    (folder / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
        load_checkpoint(folder)


@pytest.mark.parametrize("version", [0, FORMAT_VERSION + 1, 99])
def test_another_format_is_refused_by_its_number(tmp_path, version):
    folder = save(tmp_path, 6)
    rewrite_manifest(folder, lambda manifest: manifest.update(format=version))
    with pytest.raises(CheckpointError, match=f"checkpoint format {version}"):
        load_checkpoint(folder)


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was run')",))


def test_a_pickle_is_refused_even_with_the_right_hash(tmp_path):
    folder = save(tmp_path, 6)
    path = folder / "tensors.safetensors"

    def sign(manifest):
        manifest["files"][path.name]["sha256"] = files.sha256_of(path)

    for data in (pickle.dumps(Bomb()), pickle.dumps({"model/x": [1.0]}, protocol=0)):
        path.write_bytes(data)
        rewrite_manifest(folder, sign)
        with pytest.raises(CheckpointError, match="step-6"):
            load_checkpoint(folder)
    torch.save(tensors_of(6), path)
    rewrite_manifest(folder, sign)
    with pytest.raises(CheckpointError, match="step-6"):
        load_checkpoint(folder)


def test_a_damaged_last_falls_back_to_the_newest_good_one(tmp_path):
    for step in (4, 30, 200):
        save(tmp_path, step, keep=9)
    flip(tmp_path / "step-200" / "state.json", 77)
    assert is_that_of(find_checkpoint(tmp_path), 30)
    shutil.rmtree(tmp_path / "step-200")
    assert is_that_of(find_checkpoint(tmp_path), 30)
    (tmp_path / "LAST").write_bytes(b"../elsewhere\n")
    assert is_that_of(find_checkpoint(tmp_path), 30)
    flip(tmp_path / "step-30" / "tensors.safetensors", 1234)
    assert is_that_of(find_checkpoint(tmp_path), 4)
    (tmp_path / "LAST").unlink()
    assert is_that_of(find_checkpoint(tmp_path), 4)


@pytest.mark.parametrize("pointed", [True, False])
def test_where_no_checkpoint_is_good_each_is_named(tmp_path, pointed):
    for step in (4, 30):
        flip(save(tmp_path, step) / "tensors.safetensors", step)
    if not pointed:
        (tmp_path / "LAST").unlink()
    with pytest.raises(CheckpointError, match="no good checkpoint") as caught:
        find_checkpoint(tmp_path)
    assert "step-4/" in str(caught.value)
    assert "step-30/" in str(caught.value)


def test_nothing_takes_the_place_of_a_damaged_best(tmp_path):
    save(tmp_path, 4, best=True)
    save(tmp_path, 5)
    (tmp_path / "BEST").write_bytes(b"\x00")
    with pytest.raises(CheckpointError, match="BEST is damaged"):
        find_checkpoint(tmp_path, "BEST")
    files.write_pointer(tmp_path / "BEST", "step-4")
    flip(tmp_path / "step-4" / "tensors.safetensors", 500)
    with pytest.raises(CheckpointError, match="step-4"):
        find_checkpoint(tmp_path, "BEST")
    assert is_that_of(find_checkpoint(tmp_path), 5)


def test_what_does_not_fit_is_listed_in_full():
    own = {"a": torch.zeros(2, 3), "b": torch.zeros(4), "c": torch.zeros(1)}
    require_match(own, {name: value + 1 for name, value in own.items()}, "it")
    found = {"a": torch.zeros(3, 2), "c": torch.tensor([torch.nan]), "d": torch.zeros(1)}
    with pytest.raises(CheckpointError) as caught:
        require_match(own, found, "the checkpoint")
    assert str(caught.value) == (
        "the checkpoint does not fit: missing b; unexpected d; a: expected (2, 3), found (3, 2); "
        "c holds values that are not finite"
    )
    require_match({"n": torch.tensor([1])}, {"n": torch.tensor([2])}, "whole numbers")
