"""Who may write a run folder, and what is refused about it with nothing touched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recclr import run_folder
from recclr.config import load_config, parse_config
from recclr.errors import CheckpointError, ConfigError, DataError, StoreError
from recclr.kernels import native
from recclr.load import pick_device

pytestmark = pytest.mark.usefixtures("no_power_cut")

CONFIG = parse_config(
    {"data": {"events": "e"}, "user": {"dropout": 0.1}, "item": {"dropout": 0.1}, "seed": 3}
)


def begin(out, config=CONFIG):
    assert run_folder.open_run(out, config, resume=False)
    with run_folder.locked(out):
        run_folder.begin_run(out, config, {"inputs": {}}, "cpu")


def names(out):
    return sorted(path.name for path in out.iterdir())


# --- opening --------------------------------------------------------------------------------------


def test_a_new_folder_is_opened_and_left_empty_until_the_run_begins(tmp_path):
    out = tmp_path / "deep" / "run"
    assert run_folder.open_run(out, CONFIG, resume=False)
    assert names(out) == []
    begin(out)
    assert names(out) == ["config.toml", "data.json", "environment.json"]
    assert load_config(out / "config.toml") == CONFIG


def test_resume_of_nothing_is_a_new_run(tmp_path):
    assert run_folder.open_run(tmp_path / "run", CONFIG, resume=True)


def test_what_a_killed_process_leaves_behind_is_in_nobodys_way(tmp_path):
    for name in (".lock", ".config.toml.tmp-0a1b", ".probe.tmp-0a1b"):
        (tmp_path / name).write_text("x")
    begin(tmp_path)
    assert names(tmp_path) == ["config.toml", "data.json", "environment.json"]


def test_leftovers_below_the_folder_are_removed_and_nothing_else(tmp_path):
    begin(tmp_path)
    for name in ("checkpoints/.step-3.tmp-77/tensors", "store/.x.tmp-77", "store/x.tmp-77"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    with run_folder.locked(tmp_path):
        run_folder.begin_run(tmp_path, CONFIG, {}, "cpu")
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*tmp-*")}
    assert left == {"store/x.tmp-77"}


@pytest.mark.parametrize("folder", [".", "selection", None])
def test_a_begun_run_wants_resume_and_says_whether_it_holds_work(tmp_path, folder):
    begin(tmp_path)
    with pytest.raises(ConfigError, match=r"unfinished run; add --resume.*nothing is trained"):
        run_folder.open_run(tmp_path, CONFIG, resume=False)
    other = CONFIG.model_copy(update={"seed": 9})
    with pytest.raises(ConfigError, match=r"another folder \(nothing is trained there yet"):
        run_folder.open_run(tmp_path, other, resume=True)
    if folder is None:
        (tmp_path / "data.json").unlink()
    else:
        (tmp_path / folder / "checkpoints").mkdir(parents=True)
    for config, resume in ((CONFIG, False), (other, True)):
        with pytest.raises(ConfigError) as refused:
            run_folder.open_run(tmp_path, config, resume=resume)
        assert "nothing is trained" not in str(refused.value)
    assert run_folder.open_run(tmp_path, CONFIG, resume=True)


def test_a_finished_run_is_never_written_again(tmp_path):
    begin(tmp_path)
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"finished run.*choose another --out"):
        run_folder.open_run(tmp_path, CONFIG, resume=False)
    assert not run_folder.open_run(tmp_path, CONFIG, resume=True)


@pytest.mark.parametrize("finished", [False, True])
def test_a_changed_configuration_is_refused_key_by_key(tmp_path, finished):
    begin(tmp_path)
    if finished:
        (tmp_path / "metrics.json").write_text("{}")
    # The same line stands in other sections as well.
    other = parse_config({"data": {"events": "e"}, "item": {"dropout": 0.1}, "seed": 4})
    with pytest.raises(ConfigError) as caught:
        run_folder.open_run(tmp_path, other, resume=True)
    first, *changed = str(caught.value).splitlines()
    assert str(tmp_path / "config.toml") in first
    assert changed == ["seed = 3 there, 4 here", "user.dropout = 0.1 there, 0.0 here"]
    assert load_config(tmp_path / "config.toml") == CONFIG


def test_how_a_run_is_carried_out_may_change_when_it_is_resumed(tmp_path):
    begin(tmp_path)
    train = {"cuda_graph": False, "compile": True, "collective_timeout_s": 9.0}
    other = parse_config(
        {"data": {"events": "e"}, "user": {"dropout": 0.1}, "seed": 3}
        | {"item": {"dropout": 0.1}, "train": train}
    )
    assert run_folder.open_run(tmp_path, other, resume=True)


def test_another_run_that_began_in_the_meantime_is_noticed_under_the_lock(tmp_path):
    other = CONFIG.model_copy(update={"seed": 9})
    assert run_folder.open_run(tmp_path, CONFIG, resume=False)
    begin(tmp_path, other)
    with run_folder.locked(tmp_path), pytest.raises(ConfigError, match="seed = 9 there, 3 here"):
        run_folder.begin_run(tmp_path, CONFIG, {}, "cpu")
    assert load_config(tmp_path / "config.toml") == other


def test_a_folder_of_somebody_else(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for resume in (False, True):
        with pytest.raises(ConfigError, match="not empty and holds no run"):
            run_folder.open_run(tmp_path, CONFIG, resume=resume)
        with pytest.raises(ConfigError, match="is a file; expected a folder"):
            run_folder.open_run(tmp_path / "thesis.txt", CONFIG, resume=resume)
        with pytest.raises(ConfigError, match="cannot be written"):
            run_folder.open_run(tmp_path / "thesis.txt" / "run", CONFIG, resume=resume)
    assert names(tmp_path) == ["thesis.txt"]


def test_too_little_space_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "_MIN_BYTES", 1 << 60)
    with pytest.raises(StoreError, match="free some space"):
        run_folder.open_run(tmp_path / "run", CONFIG, resume=False)
    assert names(tmp_path / "run") == []


# --- the lock -------------------------------------------------------------------------------------


def test_a_held_folder_is_refused_and_free_afterwards(tmp_path):
    with run_folder.locked(tmp_path):
        with pytest.raises(ConfigError, match=rf"in use by .*process {os.getpid()} on"):
            run_folder.locked(tmp_path).__enter__()
        assert names(tmp_path) == [".lock"]
    assert names(tmp_path) == []
    with run_folder.locked(tmp_path):
        pass


def test_the_lock_goes_when_the_work_fails(tmp_path):
    with pytest.raises(OSError, match="the work"), run_folder.locked(tmp_path):
        raise OSError("the work")
    assert names(tmp_path) == []


HOLD = (
    "import sys; from pathlib import Path; from recclr.run_folder import locked\n"
    "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
)


def test_a_killed_process_holds_nothing(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"process {holder.pid} on"):
            run_folder.locked(tmp_path).__enter__()
        holder.kill()
    assert (tmp_path / ".lock").exists()
    with run_folder.locked(tmp_path):
        pass


def test_a_lock_file_with_the_id_of_a_living_process_is_no_lock(tmp_path):
    # A restarted container has its old host name, and process ids begin again.
    (tmp_path / ".lock").write_text(json.dumps({"pid": os.getpid()}))
    with run_folder.locked(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()}")


def test_a_place_that_takes_no_lock_file(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(ConfigError, match=r"\.lock cannot be written"):
        run_folder.locked(tmp_path).__enter__()


# --- inputs ---------------------------------------------------------------------------------------


def config_of(**paths):
    return parse_config({"data": {name: str(path) for name, path in paths.items()}})


def test_fingerprints_name_every_shard_and_see_every_change_of_the_end(tmp_path):
    (tmp_path / "e").mkdir()
    for number, content in enumerate((b"one", b"two")):
        (tmp_path / "e" / f"{number}.parquet").write_bytes(content)
    (tmp_path / "items.csv").write_bytes(b"x" * 200_000)
    config = config_of(events=tmp_path / "e", items=tmp_path / "items.csv")
    before = run_folder.fingerprints(config)
    assert list(before) == [
        f"events: {tmp_path}/e/0.parquet",
        f"events: {tmp_path}/e/1.parquet",
        f"items: {tmp_path}/items.csv",
    ]
    assert [found["bytes"] for found in before.values()] == [3, 3, 200_000]
    assert run_folder.fingerprints(config) == before
    (tmp_path / "e" / "1.parquet").write_bytes(b"2wo")
    (tmp_path / "items.csv").write_bytes(b"x" * 199_999 + b"y")
    after = run_folder.fingerprints(config)
    assert [name for name in before if before[name] != after[name]] == list(before)[1:]


def test_changed_inputs_are_named(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps({"inputs": {"events: a": 1, "events: b": 2}}))
    run_folder.require_same_inputs(tmp_path, {"events: b": 2, "events: a": 1})
    with pytest.raises(ConfigError, match="events: a, events: c; restore them") as caught:
        run_folder.require_same_inputs(tmp_path, {"events: c": 1, "events: b": 2})
    assert str(tmp_path) in str(caught.value)


def test_an_input_that_may_not_be_read(tmp_path, monkeypatch):
    (tmp_path / "e.csv").write_text("x")

    def refuse(self, *arguments, **named):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"e\.csv cannot be read: Permission denied"):
        run_folder.fingerprints(config_of(events=tmp_path / "e.csv"))


# --- reading --------------------------------------------------------------------------------------


def test_what_is_no_run_folder(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ConfigError, match="is no run folder"):
            run_folder.read_config(path)


@pytest.mark.parametrize("content", ["", "{", "[1]", "\xff"])
def test_json_that_is_damaged(tmp_path, content):
    (tmp_path / "data.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"data\.json"):
        run_folder.read_json(tmp_path / "data.json")
    with pytest.raises(CheckpointError, match="cannot be read"):
        run_folder.read_json(tmp_path / "absent.json")


def test_the_environment_can_be_compared():
    found = run_folder.environment("cpu")
    assert found["device"] == "cpu"
    assert found["gpu"] is None
    assert found["cpu_kernels"] == native.description()
    with native.turned_off():
        told = run_folder.environment("cpu")["cpu_kernels"]
    assert told == "those of PyTorch alone: turned off"
    assert {"torch", "numpy", "polars"} <= {n for n, v in found["versions"].items() if v}
    assert json.loads(json.dumps(found)) == found


def test_there_need_be_no_git(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert run_folder.environment("cpu")["git_revision"] is None
    monkeypatch.setenv("PATH", "")
    assert run_folder.environment("cpu")["git_revision"] is None


# --- devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpux", "gpu", "", "cuda:", "cuda:x", "CPU", "mps", "cpu:-1"])
def test_a_device_that_is_none(device):
    with pytest.raises(ConfigError, match="expected auto, cpu, cuda or cuda:N") as caught:
        pick_device(device)
    assert repr(device) in str(caught.value)


@pytest.mark.parametrize(
    ("gpus", "device", "expected"),
    [(0, "auto", "cpu"), (2, "auto", "cuda"), (2, "cuda:1", "cuda:1"), (0, "cpu", "cpu")],
)
def test_a_device_that_is_there(monkeypatch, gpus, device, expected):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert pick_device(device) == expected


@pytest.mark.parametrize(
    ("gpus", "device", "words"),
    [(0, "cuda", "no GPU"), (0, "cuda:0", "no GPU"), (2, "cuda:2", "only 2 GPUs")],
)
def test_a_gpu_that_is_not_there(monkeypatch, gpus, device, words):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    with pytest.raises(ConfigError, match=f"--device {device}: PyTorch finds {words} here"):
        pick_device(device)
