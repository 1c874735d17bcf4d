"""Files and folders appear whole or not at all, and every failure says what to do."""

import hashlib
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recclr import files
from recclr.errors import ConfigError, StoreError


def inside(folder):
    return sorted(p.name for p in folder.iterdir())


def test_bytes_replace_what_was_there_and_leave_nothing_else(tmp_path):
    path = tmp_path / "deep" / "er" / "a.bin"
    files.write_bytes_atomic(path, b"first")
    files.write_bytes_atomic(path, b"")
    assert path.read_bytes() == b""
    assert inside(path.parent) == ["a.bin"]


def test_json_keeps_order_and_unicode_and_refuses_what_is_not_json(tmp_path):
    path = tmp_path / "a.json"
    value = {"z": 1, "a": ["é", 2.5, None], "big": 2**63 + 1}
    files.write_json_atomic(path, value)
    assert list(json.loads(path.read_text("utf-8"))) == ["z", "a", "big"]
    assert json.loads(path.read_text("utf-8")) == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json_atomic(path, {"x": float("nan")})
    assert json.loads(path.read_text("utf-8")) == value


def test_sha256_is_that_of_the_standard_library(tmp_path):
    data = bytes(range(256)) * 9001
    (tmp_path / "x").write_bytes(data)
    assert files.sha256_of(tmp_path / "x") == hashlib.sha256(data).hexdigest()


def test_a_folder_appears_at_the_end_of_the_block_only(tmp_path):
    final = tmp_path / "out" / "step-7"
    with files.new_folder(final) as temporary:
        (temporary / "part").mkdir()
        (temporary / "part" / "a").write_bytes(b"1")
        assert not final.exists()
        assert temporary.parent == final.parent
        assert temporary.name.startswith(".")
    assert (final / "part" / "a").read_bytes() == b"1"
    assert inside(final.parent) == ["step-7"]


def test_a_folder_is_removed_when_the_block_fails_and_never_overwritten(tmp_path):
    final = tmp_path / "v"
    with pytest.raises(StoreError, match="missing"), files.new_folder(final) as temporary:
        (temporary / "a").write_bytes((tmp_path / "missing").read_bytes())
    assert inside(tmp_path) == []
    final.mkdir()
    with pytest.raises(StoreError, match="exists already"), files.new_folder(final):
        pass


def test_leftovers_of_the_same_name_are_removed_and_of_others_kept(tmp_path):
    for name in (".v[1].tmp-aaaa", ".v1.tmp-bbbb"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_bytes(b"x")
    with files.new_folder(tmp_path / "v[1]"):
        pass
    assert inside(tmp_path) == [".v1.tmp-bbbb", "v[1]"]


@pytest.mark.parametrize(
    ("action", "kind", "words"),
    [
        ("enospc", StoreError, "no space left"),
        ("eacces", ConfigError, "no permission"),
        ("eio", StoreError, "failed"),
    ],
)
@pytest.mark.parametrize("point", ["files.write", "files.rename"])
def test_a_failing_disk_leaves_the_old_file_and_says_so(
    tmp_path, monkeypatch, point, action, kind, words
):
    path = tmp_path / "a"
    files.write_bytes_atomic(path, b"old")
    monkeypatch.setattr(files, "_reached", {})
    monkeypatch.setenv("RECCLR_FAULT", f"{point}:1:{action}")
    with pytest.raises(kind, match=words) as caught:
        files.write_bytes_atomic(path, b"new")
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"old"
    assert inside(tmp_path) == ["a"]


def test_a_full_disk_removes_the_unfinished_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_reached", {})
    monkeypatch.setenv("RECCLR_FAULT", "files.folder:1:enospc")
    with pytest.raises(StoreError, match="no space"), files.new_folder(tmp_path / "v") as folder:
        (folder / "a").write_bytes(b"1")
    assert inside(tmp_path) == []


@pytest.mark.parametrize("count", [1, 2])
def test_a_killed_writer_leaves_the_version_before(tmp_path, count):
    program = (
        "import sys; from pathlib import Path; from recclr.files import write_bytes_atomic as w\n"
        "for text in (b'one', b'two', b'three'): w(Path(sys.argv[1]), text)"
    )
    path = tmp_path / "a"
    files.write_bytes_atomic(path, b"zero")
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        env={"RECCLR_FAULT": f"files.rename:{count}:kill"},
        check=False,
    )
    assert done.returncode == -9
    assert path.read_bytes() == [b"zero", b"one"][count - 1]


def test_a_file_in_the_way_of_a_folder_is_a_clear_error(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot be written"):
        files.write_bytes_atomic(tmp_path / "a" / "b", b"")
    with pytest.raises(ConfigError, match="cannot be written"):
        files.write_bytes_atomic(tmp_path, b"")


def test_pointers(tmp_path):
    pointer = tmp_path / "CURRENT"
    assert files.read_pointer(pointer) is None
    files.write_pointer(pointer, "step-12")
    assert files.read_pointer(pointer) == "step-12"
    for name in ("", "..", "../x", "/etc", "a/b", "a b", ".hidden", "a\x00", "x" * 201, "é"):
        with pytest.raises(ConfigError, match="plain name"):
            files.write_pointer(pointer, name)
        pointer.write_bytes(name.encode())
        assert files.read_pointer(pointer) is None
        files.write_pointer(pointer, "step-12")


@given(st.binary(max_size=9) | st.text("./ab\\-\x00", max_size=9).map(str.encode))
def test_a_pointer_never_leads_out_of_its_folder(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("pointer")
    (folder / "P").write_bytes(data)
    name = files.read_pointer(folder / "P")
    if name is None:
        return
    assert (folder / name).parent == folder
    assert (folder / name).resolve().is_relative_to(folder.resolve())


def test_space_is_asked_for_before_anything_is_written(tmp_path):
    files.require_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(StoreError, match="free some space"):
        files.require_space(tmp_path / "not" / "yet", 1 << 60)
    assert inside(tmp_path) == []


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    files.require_writable(tmp_path / "new")
    assert inside(tmp_path / "new") == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot be written"):
        files.require_writable(tmp_path / "file")
