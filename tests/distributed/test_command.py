"""The command under torchrun: the same results, exit codes and messages, and recovery."""

import json

import pytest
import torch

from recclr.checkpoint import find_checkpoint


@pytest.fixture
def torchrun_train(torchrun):
    """``torchrun … train``."""

    def run(config, out, *extra, **options):
        arguments = ("--config", config, "--out", out, "--device", "cpu", *extra)
        return torchrun("train", *arguments, **options)

    return run


def close(one, other, path=""):
    """JSON values equal, but for the ranking of cold items among themselves.

    Those stand where their features put them, many at nearly one score, and the order of sums that
    a training took decides. With the others in the ranking nothing is that near. What is said of
    the vectors themselves, as their effective rank is, moves with every rounding: of the spectral
    start by other numbers of threads too.
    """
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one.keys() - {"cold_items_among_cold"}:
            close(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for number, value in enumerate(one):
            close(value, other[number], f"{path}/{number}")
    elif isinstance(one, float):
        rel = 1e-5 if path.startswith("/monitors/figures/") else None
        assert other == pytest.approx(one, rel=rel, abs=1e-6), path
    else:
        assert other == one, path


@pytest.mark.slow
def test_two_processes_come_to_the_metrics_of_one(
    torchrun_train, small_config, small_run, tmp_path
):
    out = tmp_path / "run"
    done = torchrun_train(small_config, out)
    assert done.returncode == 0, done.stderr
    one = json.loads((small_run / "metrics.json").read_text())
    close(one, json.loads((out / "metrics.json").read_text()))
    ours = {str(path.relative_to(out)) for path in out.rglob("*")}
    assert ours == {str(path.relative_to(small_run)) for path in small_run.rglob("*")}
    # One of two prints.
    assert done.stdout.count("item_knn") == 1
    assert done.stderr.count("report: ") == 1


@pytest.mark.slow
def test_an_evaluation_by_two_processes_is_that_of_one(recclr, torchrun, small_run):
    one = recclr("evaluate", small_run, "--json")
    two = torchrun("evaluate", small_run, "--json")
    assert two.returncode == 0, two.stderr
    close(json.loads(one.out), json.loads(two.stdout))


@pytest.mark.slow
def test_a_command_for_one_process_is_refused_once(torchrun, tmp_path):
    target = tmp_path / "demo"
    done = torchrun("demo", "--out", target)
    assert done.stderr.count("recclr demo runs in one process, found WORLD_SIZE = 2") == 1
    assert done.stderr.count("error: ") == 1
    assert "exitcode  : 2" in done.stderr
    assert not target.exists()


@pytest.mark.slow
def test_tables_split_between_processes_come_to_the_metrics_of_one(
    torchrun_train, recclr, small_config, tmp_path
):
    pytest.importorskip("torchrec", reason="recclr[torchrec] is not installed")
    settings = ["--set", "train.table_optimizer=rowwise_adagrad"]
    split = [*settings, "--set", "train.sharded_tables=40"]
    tensors, results = [], []
    # Two are stopped in the refit, and go on from the selected model, which they load in parts.
    fault = 'if rank == 1: os.environ["RECCLR_FAULT"] = "train.step:28:term"'
    stopped = torchrun_train(small_config, tmp_path / "of-2", *split, fault=fault)
    assert stopped.stderr.count("exitcode  : 75") == 2, stopped.stderr
    for size, options in ((1, settings), (2, [*split, "--resume"])):
        out = tmp_path / f"of-{size}"
        done = torchrun_train(small_config, out, *options, size=size)
        assert done.returncode == 0, done.stderr
        tensors.append(find_checkpoint(out / "checkpoints").tensors)
        results.append(json.loads((out / "metrics.json").read_text()))
    # Cold items are near ties in a log this small, which roundings decide; weights tell more.
    assert tensors[0].keys() == tensors[1].keys()
    for name, value in tensors[0].items():
        torch.testing.assert_close(tensors[1][name], value, atol=4e-6, rtol=1e-5, msg=name)
    one, two = (found["test"]["model"]["all"] for found in results)
    close(one, two)
    # A process alone reads what two wrote, and comes to the same.
    shown = recclr("evaluate", tmp_path / "of-2", "--json")
    assert shown.code == 0, shown.err
    close(two, json.loads(shown.out)["metrics"]["all"])


@pytest.mark.slow
def test_an_error_of_one_process_is_told_once_with_its_rank(torchrun_train, small_config, tmp_path):
    fault = 'rank == 1 and os.environ.update(RECCLR_FAULT="train.step:2:enospc")'
    fault = """
from recclr.errors import StoreError
import recclr.train
def fails(name):
    if rank == 1:
        raise StoreError("the disk is odd")
recclr.train.fault_point = fails
"""
    done = torchrun_train(small_config, tmp_path / "run", fault=fault)
    assert done.returncode == 1  # torchrun's own, whatever the processes end with
    assert done.stderr.count("error: rank 1: the disk is odd") == 1
    assert done.stderr.count("error: ") == 1
    assert "exitcode  : 5" in done.stderr


@pytest.mark.slow
def test_two_disks_are_refused(torchrun_train, small_config, tmp_path):
    fault = f"""
import recclr.run_folder
recclr.run_folder._SHOWN_S = 0.5
if rank == 1:
    sys.argv[sys.argv.index("--out") + 1] = {str(tmp_path / "other")!r}
"""
    done = torchrun_train(small_config, tmp_path / "run", fault=fault)
    assert done.returncode == 1
    assert "rank 1 does not see what rank 0 writes" in done.stderr
    assert "exitcode  : 2" in done.stderr


@pytest.mark.slow
def test_another_configuration_on_one_rank_is_refused(torchrun_train, small_config, tmp_path):
    fault = 'if rank == 1: sys.argv += ["--set", "seed=4"]'
    done = torchrun_train(small_config, tmp_path / "run", fault=fault)
    assert done.returncode == 1
    assert "rank 1 and rank 0 do not agree on the configuration" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_polite_signal_to_one_process_stops_both_with_a_checkpoint(
    torchrun_train, small_config, small_run, tmp_path
):
    out = tmp_path / "run"
    fault = 'if rank == 1: os.environ["RECCLR_FAULT"] = "train.step:8:term"'
    stopped = torchrun_train(small_config, out, fault=fault)
    assert stopped.stderr.count("exitcode  : 75") == 2, stopped.stderr
    assert stopped.stderr.count("stopped by a signal after step 9") == 1
    # Another number of processes goes on with it.
    resumed = torchrun_train(small_config, out, "--resume", size=3)
    assert resumed.returncode == 0, resumed.stderr
    one = json.loads((small_run / "metrics.json").read_text())
    close(one, json.loads((out / "metrics.json").read_text()))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_rows_in_files_are_written_again_after_a_restart(
    torchrun_train, small_config, small_run, tmp_path, rank
):
    fault = f"""
if rank == {rank} and attempt == 0:
    os.environ["RECCLR_FAULT"] = "train.step:23:kill"
"""
    out = tmp_path / "run"
    extra = ("--resume", "--set", "data.resident=false")
    done = torchrun_train(small_config, out, *extra, fault=fault, restarts=2)
    assert done.returncode == 0, done.stderr
    # Of the selection, and of the refit before and after it was killed; by one of two processes.
    assert done.stderr.count("reads its rows from files") == 3
    assert not list(out.glob(".*"))
    one = json.loads((small_run / "metrics.json").read_text())
    close(one, json.loads((out / "metrics.json").read_text()))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("point", ["train.step:23", "checkpoint.manifest:2"])
def test_a_killed_process_is_restarted_from_the_last_checkpoint(
    torchrun_train, small_config, small_run, tmp_path, rank, point
):
    if point.startswith("checkpoint") and rank == 1:
        pytest.skip("only rank 0 writes")
    fault = f"""
if rank == {rank} and attempt == 0:
    os.environ["RECCLR_FAULT"] = "{point}:kill"
"""
    out = tmp_path / "run"
    done = torchrun_train(small_config, out, "--resume", fault=fault, restarts=2)
    assert done.returncode == 0, done.stderr
    assert "Signal 9" in done.stderr or "exitcode: -9" in done.stderr
    one = json.loads((small_run / "metrics.json").read_text())
    close(one, json.loads((out / "metrics.json").read_text()))
