"""Tables split over two and three ranks, against whole ones and against one process."""

import json

import pytest
import torch
from safetensors.torch import load_file

from recclr.checkpoint import find_checkpoint

pytest.importorskip("torchrec", reason="recclr[torchrec] is not installed")

slow = pytest.mark.slow
DIM = 8
# Both towers know the item's tables, whose first names are those in the history.
ROWS = {
    "user_tower.parts.0.table.weight": 12,
    "user_tower.parts.1.table.weight": 6,
    "user_tower.parts.2.item_parts.0.table.weight": 18,
    "user_tower.parts.2.item_parts.1.table.weight": 5,
}


def close(one, other, *, atol=2e-5):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=atol, rtol=2e-5, msg=name)


@pytest.mark.parametrize(
    ("size", "num_rows", "dim", "optimizer"),
    [
        (3, 11, 8, "rowwise_adagrad"),
        pytest.param(3, 11, 4, "sgd", marks=slow),
        pytest.param(2, 23, 12, "rowwise_adagrad", marks=slow),
    ],
)
def test_lookups_bags_and_updates_are_those_of_a_whole_table(
    spread, tmp_path, size, num_rows, dim, optimizer
):
    ended = spread("sharded_table", size, tmp_path, num_rows=num_rows, dim=dim, optimizer=optimizer)
    assert ended.codes == [0] * size, ended.texts
    assert len(list(tmp_path.glob("done-*"))) == size


@pytest.fixture(scope="module")
def one(work, tmp_path_factory):
    """The folder of one process that trained so."""
    found = {}

    def ran(optimizer="rowwise_adagrad", *, worse=False):
        if (optimizer, worse) not in found:
            folder = tmp_path_factory.mktemp(optimizer)
            arguments = {"towers": "rich", "dim": DIM, "optimizer": optimizer, "worse": worse}
            work.alone("train", folder, checkpoints="kept", sharded="all", **arguments)
            found[optimizer, worse] = folder
        return found[optimizer, worse]

    return ran


def trained(spread, size, folder, **arguments):
    arguments = {"towers": "rich", "dim": DIM, "sharded": "all", **arguments}
    ended = spread("train", size, folder, **arguments)
    assert ended.codes == [0] * size, ended.texts
    assert ended.texts == [""] * size
    return load_file(folder / "weights-0.safetensors")


def read(folder, name):
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize(
    ("size", "optimizer", "checkpoints", "worse"),
    [
        (2, "rowwise_adagrad", "kept", False),
        pytest.param(3, "rowwise_adagrad", "kept", True, marks=slow),
        pytest.param(2, "sgd", None, True, marks=slow),
    ],
)
def test_a_training_comes_to_the_weights_of_one_process(
    spread, one, tmp_path, size, optimizer, checkpoints, worse
):
    alone = one(optimizer, worse=worse)
    arguments = {"optimizer": optimizer, "checkpoints": checkpoints, "worse": worse}
    found = trained(spread, size, tmp_path, **arguments)
    close(load_file(alone / "weights-0.safetensors"), found)
    steps, first = read(alone, "steps-0.json"), read(tmp_path, "steps-0.json")
    assert first[0] == steps[0]
    assert first[1][0]["loss"] == pytest.approx(steps[1][0]["loss"], rel=1e-6)
    # Each rank holds its block and no more; one process split nothing.
    assert read(alone, "held-0.json") == {}
    for rank in range(size):
        blocks = {name: -(-rows // size) for name, rows in ROWS.items()}
        held = {
            name: DIM * (min((rank + 1) * block, ROWS[name]) - rank * block)
            for name, block in blocks.items()
        }
        assert read(tmp_path, f"held-{rank}.json") == held


@slow
def test_only_tables_of_so_many_rows_are_split_and_the_others_stay_equal(spread, one, tmp_path):
    found = trained(spread, 2, tmp_path, sharded=12)
    close(load_file(one() / "weights-0.safetensors"), found)
    other = load_file(tmp_path / "weights-1.safetensors")
    assert found.keys() - other.keys() == {name for name, rows in ROWS.items() if rows >= 12}
    assert all(torch.equal(found[name], value) for name, value in other.items())
    assert read(tmp_path, "held-0.json").keys() == found.keys() - other.keys()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, "all"), (3, 12)),
        pytest.param((2, "all"), (1, "all"), marks=slow),
        pytest.param((1, "none"), (2, "all"), marks=slow),
        pytest.param((3, "all"), (2, "none"), marks=slow),
    ],
)
def test_a_checkpoint_is_resumed_by_any_number_of_ranks_split_or_whole(
    work, spread, one, tmp_path, before, after
):
    for (size, sharded), steps in ((before, 6), (after, None)):
        arguments = {"checkpoints": "kept", "resume": True, "num_steps": steps, "sharded": sharded}
        if size == 1:
            work.alone("train", tmp_path, towers="rich", dim=DIM, **arguments)
        else:
            trained(spread, size, tmp_path, **arguments)
    expected = load_file(one() / "weights-0.safetensors")
    close(expected, load_file(tmp_path / "weights-0.safetensors"))
    # The files are those of one process, the optimiser's state among them.
    for pointer in ("LAST", "BEST"):
        alone, ours = (find_checkpoint(f / "kept", pointer) for f in (one(), tmp_path))
        assert ours.folder.name == alone.folder.name
        assert len([name for name in ours.tensors if name.endswith("/second")]) == len(ROWS)
        close(alone.tensors, ours.tensors, atol=5e-5)


@slow
def test_a_value_that_is_not_finite_on_one_rank_ends_all(spread, tmp_path):
    arguments = {"towers": "ids", "dim": DIM, "sharded": "all", "checkpoints": "kept", "odd": 1}
    ended = spread("train", 2, tmp_path, **arguments)
    assert ended.codes == [6, 6], ended.texts
    assert ended.texts[0] == ""
    assert "rank 1: the update overflowed at step 5" in ended.texts[1]
    assert "embedding table user_tower.parts.0.table.weight is not finite" in ended.texts[1]
    # The evaluation of step 5 is the first; the checkpoints before it stand.
    assert {path.name for path in (tmp_path / "kept").glob("step-*")} == {"step-2", "step-4"}


@slow
def test_ranks_without_any_row_take_part_in_every_lookup(work, spread, tmp_path):
    arguments = {"towers": "history", "batch_size": 2, "num_steps": 4}
    found = trained(spread, 3, tmp_path, **arguments)
    (tmp_path / "one").mkdir()
    work.alone("train", tmp_path / "one", dim=DIM, **arguments)
    close(load_file(tmp_path / "one" / "weights-0.safetensors"), found)


@slow
def test_towers_in_bfloat16_look_up_float32(work, spread, tmp_path):
    arguments = {"towers": "rich", "precision": "bfloat16", "num_steps": 3}
    found = trained(spread, 2, tmp_path, **arguments)
    (tmp_path / "whole").mkdir()
    whole = trained(spread, 2, tmp_path / "whole", sharded="none", **arguments)
    close(whole, found, atol=1e-6)


@slow
@pytest.mark.parametrize(
    ("where", "name"),
    [("lookup", "a lookup in a sharded table"), ("update", "the update of a sharded table")],
)
def test_a_rank_that_takes_no_part_is_named_after_the_time_out(spread, tmp_path, where, name):
    ended = spread("sleeps", 2, tmp_path, timeout_s=2.0, ends_s=12.0, who=1, where=where)
    assert ended.codes == [75, None], ended.texts
    assert f"waited 2 s at '{name}' for rank 1; see what it did" in ended.texts[0]
