"""Two and three ranks against one process, on batches that do not divide evenly."""

import json

import pytest
import torch
from safetensors.torch import load_file

from recclr.checkpoint import find_checkpoint

# Sums in another order: a few float32 roundings (6e-8) of sums of about fifty terms near 1.
# Probabilities have a relative precision of 2e-6 (``tiled._RANGE``), and ranks tile differently.
ATOL, RTOL = 4e-6, 2e-5
CASES = [
    ("ids", "infonce", "mixed"),
    ("rich", "bsl", "mixed"),
    ("timed", "full_softmax", "mixed"),
    ("rich", "own_only", "not_in_batch"),
    ("rich", "infonce", "few"),
    ("ids", "family", "own"),
    ("augmented", "infonce", "mixed"),
    ("rich", "infonce", "own"),
    ("rich", "family", "mixed"),
    ("timed", "both_ways", "mixed"),
    ("rich", "bpr", "mixed"),
    ("ids", "semi_hard", "mixed"),
    ("rich", "spread", "none"),
]
slow = pytest.mark.slow


def close(one, other, *, atol=ATOL):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert other[name].shape == value.shape, name
        odd = (other[name].double() - value.double()).abs() - RTOL * value.double().abs()
        assert odd.numel() == 0 or odd.max() <= atol, (name, odd.max())


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("towers", "loss", "negatives"), CASES)
def test_loss_and_every_gradient_are_those_of_one_process(
    work, spread, tmp_path, size, towers, loss, negatives
):
    settings = {"towers": towers, "loss": loss, "negatives": negatives}
    # Those of few negatives go through sockets, all others through shared memory.
    ended = spread("gradients", size, tmp_path, **settings, sockets=negatives == "few")
    assert ended.codes == [0] * size, ended.texts
    (tmp_path / "one").mkdir()
    work.alone("gradients", tmp_path / "one", **settings)
    one = load_file(tmp_path / "one" / "gradients-0.safetensors")
    assert any(value.abs().max() > 1e-3 for name, value in one.items() if "gradients" in name)
    first = load_file(tmp_path / "gradients-0.safetensors")
    close(one, first)
    for rank in range(1, size):
        other = load_file(tmp_path / f"gradients-{rank}.safetensors")
        assert all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, {"loss": "bce"}),
        (3, {"loss": "ccl", "negatives": "own"}),
        (2, {"loss": "margin", "similarity": "euclidean"}),
        (2, {"loss": "distance_weighted"}),
        (3, {"loss": "family", "similarity": "euclidean"}),
        (2, {"loss": "both_ways", "similarity": "dot"}),
        (3, {"loss": "infonce", "negatives": "within"}),
        (2, {"loss": "bpr", "negatives": "within"}),
        (2, {"loss": "infonce", "siamese": True}),
        (3, {"loss": "semi_hard", "siamese": True, "similarity": "euclidean"}),
        (2, {"loss": "infonce", "similarity": "euclidean", "views": {"weight": 0.5}}),
    ],
)
def test_every_objective_is_that_of_one_process(work, spread, tmp_path, size, options):
    settings = {"towers": "rich", "steps": (0, 3)} | options
    ended = spread("gradients", size, tmp_path, **settings)
    assert ended.codes == [0] * size, ended.texts
    (tmp_path / "one").mkdir()
    work.alone("gradients", tmp_path / "one", **settings)
    one = load_file(tmp_path / "one" / "gradients-0.safetensors")
    assert any(value.abs().max() > 1e-3 for name, value in one.items() if "gradients" in name)
    for rank in range(size):
        close(one, load_file(tmp_path / f"gradients-{rank}.safetensors"))


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, {"chunk_size": 2}),
        (2, {"accumulate": 3}),
        (3, {"chunk_size": 3, "accumulate": 2}),
        (2, {"chunk_size": 3, "accumulate": 2, "loss": "family"}),
        (3, {"chunk_size": 2, "negatives": "few"}),
        (2, {"chunk_size": 3, "accumulate": 2, "loss": "spread", "negatives": "none"}),
    ],
)
def test_chunks_and_accumulated_batches_are_those_of_one_process(
    work, spread, tmp_path, size, options
):
    options = dict(options)
    settings = {"towers": "rich", "loss": "infonce", "steps": (0, 1)}
    settings |= {name: options.pop(name) for name in ("loss", "negatives") if name in options}
    ended = spread("gradients", size, tmp_path, **settings, **options)
    assert ended.codes == [0] * size, ended.texts
    (tmp_path / "one").mkdir()
    # Chunks change nothing, so one process does without.
    options.pop("chunk_size", None)
    work.alone("gradients", tmp_path / "one", **settings, **options)
    one = load_file(tmp_path / "one" / "gradients-0.safetensors")
    close(one, load_file(tmp_path / "gradients-1.safetensors"))


@pytest.mark.parametrize(
    ("size", "options"),
    [(2, {}), (3, {"chunk_size": 2}), pytest.param(3, {"accumulate": 2}, marks=slow)],
)
def test_two_views_are_those_of_one_process(work, spread, tmp_path, size, options):
    options = dict(options)
    settings = {"towers": "rich", "loss": "infonce", "views": {"weight": 0.5, "dropout": 0.3}}
    ended = spread("gradients", size, tmp_path, **settings, **options)
    assert ended.codes == [0] * size, ended.texts
    (tmp_path / "one").mkdir()
    options.pop("chunk_size", None)
    work.alone("gradients", tmp_path / "one", **settings, **options)
    one = load_file(tmp_path / "one" / "gradients-0.safetensors")
    assert {"0/item_nt_xent", "0/user_nt_xent", "0/self_supervision.item.0.weight"} <= one.keys()
    for rank in range(size):
        close(one, load_file(tmp_path / f"gradients-{rank}.safetensors"))


@pytest.mark.parametrize(("size", "dim"), [(2, 7), (3, 1)])
def test_gradients_of_an_odd_number_of_words_arrive_whole(work, spread, tmp_path, size, dim):
    settings = {"towers": "ids", "loss": "infonce", "negatives": "not_in_batch", "dim": dim}
    ended = spread("gradients", size, tmp_path, **settings)
    assert ended.codes == [0] * size, ended.texts
    (tmp_path / "one").mkdir()
    work.alone("gradients", tmp_path / "one", **settings)
    one = load_file(tmp_path / "one" / "gradients-0.safetensors")
    close(one, load_file(tmp_path / "gradients-1.safetensors"))


@pytest.mark.parametrize(
    ("size", "towers", "loss", "negatives", "accumulate"),
    [
        (2, "ids", "infonce", "not_in_batch", 1),
        (3, "rich", "bsl", "mixed", 2),
        (2, "timed", "both_ways", "queue", 1),
    ],
)
def test_what_a_teacher_adds_is_that_of_one_process(
    work, spread, tmp_path, size, towers, loss, negatives, accumulate
):
    settings = {"towers": towers, "loss": loss, "negatives": negatives, "accumulate": accumulate}
    settings |= {"taught": 0.6, "steps": (0, 1)}
    ended = spread("gradients", size, tmp_path, **settings)
    assert ended.codes == [0] * size, ended.texts
    (tmp_path / "one").mkdir()
    work.alone("gradients", tmp_path / "one", **settings)
    one = load_file(tmp_path / "one" / "gradients-0.safetensors")
    assert float(one["1/distillation"]) > 0.01
    for rank in range(size):
        close(one, load_file(tmp_path / f"gradients-{rank}.safetensors"))


@pytest.mark.parametrize(
    ("loss", "negatives"), [("infonce", "mixed"), ("family", "mixed"), ("spread", "none")]
)
def test_ranks_without_any_row_do_not_stop_the_others(work, spread, tmp_path, loss, negatives):
    settings = {"towers": "rich", "loss": loss, "negatives": negatives, "batch_size": 2}
    ended = spread("gradients", 3, tmp_path, **settings)
    assert ended.codes == [0] * 3, ended.texts
    (tmp_path / "one").mkdir()
    work.alone("gradients", tmp_path / "one", **settings)
    one = load_file(tmp_path / "one" / "gradients-0.safetensors")
    close(one, load_file(tmp_path / "gradients-1.safetensors"))


@pytest.mark.parametrize(
    ("size", "towers", "loss", "negatives"),
    [
        (2, "rich", "infonce", "mixed"),
        (2, "ids", "infonce", "own"),
        pytest.param(3, "timed", "bsl", "mixed", marks=slow),
        pytest.param(3, "ids", "full_softmax", "mixed", marks=slow),
    ],
)
def test_a_training_ends_in_the_weights_of_one_process(
    work, spread, tmp_path, size, towers, loss, negatives
):
    settings = {"towers": towers, "loss": loss, "negatives": negatives}
    ended = spread("train", size, tmp_path, **settings, checkpoints="kept")
    assert ended.codes == [0] * size, ended.texts
    (tmp_path / "one").mkdir()
    work.alone("train", tmp_path / "one", **settings)
    one = load_file(tmp_path / "one" / "weights-0.safetensors")
    first = load_file(tmp_path / "weights-0.safetensors")
    # Both optimisers divide by the size of gradients, which lifts roundings of the small ones.
    close(one, first, atol=2e-5)
    for rank in range(1, size):
        other = load_file(tmp_path / f"weights-{rank}.safetensors")
        assert all(torch.equal(first[name], other[name]) for name in first)
    told = json.loads((tmp_path / "steps-0.json").read_text())
    alone = json.loads((tmp_path / "one" / "steps-0.json").read_text())
    assert told[0] == alone[0]
    assert told[1][0]["loss"] == pytest.approx(alone[1][0]["loss"], rel=1e-6)
    assert told[1][0]["masked_share"] == alone[1][0]["masked_share"]
    assert told[1][0]["duplicate_share"] == alone[1][0]["duplicate_share"]
    assert told[1][0]["num_candidates"] == alone[1][0]["num_candidates"]


@pytest.mark.parametrize(
    ("size", "towers", "negatives"),
    [(2, "timed", "queue"), pytest.param(3, "rich", "streaming", marks=slow)],
)
def test_a_queue_holds_the_same_in_the_same_order_on_all_ranks(
    work, spread, tmp_path, size, towers, negatives
):
    settings = {"towers": towers, "negatives": negatives, "checkpoints": "kept"}
    # No checkpoint is written unless the ranks agree on every bit of the queue.
    ended = spread("train", size, tmp_path, **settings)
    assert ended.codes == [0] * size, ended.texts
    (tmp_path / "one").mkdir()
    work.alone("train", tmp_path / "one", **settings)
    found, one = (
        find_checkpoint(folder / "kept").tensors for folder in (tmp_path, tmp_path / "one")
    )
    items = "objective/queue/item_idx"
    assert torch.equal(found[items], one[items])
    assert len(torch.unique(one[items])) > 5
    close(dict(one), dict(found), atol=2e-5)


@pytest.mark.parametrize(("size", "towers"), [(2, "timed"), pytest.param(3, "rich", marks=slow)])
def test_the_first_rank_decides_where_the_rows_are_and_it_changes_no_bit(
    spread, tmp_path, size, towers
):
    weights = {}
    for resident in (True, False):
        folder = tmp_path / str(resident)
        # The others would decide otherwise.
        asked = [resident] + [not resident] * (size - 1)
        ended = spread("train", size, folder, towers=towers, resident=asked)
        assert ended.codes == [0] * size, ended.texts
        for rank in range(size):
            assert json.loads((folder / f"mapped-{rank}.json").read_text()) is not resident
        assert not list(folder.glob(".*"))
        weights[resident] = [
            load_file(folder / f"weights-{rank}.safetensors") for rank in range(size)
        ]
    for one, other in zip(weights[True], weights[False], strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("before", "after"), [(2, 3), pytest.param(1, 2, marks=slow)])
def test_another_number_of_ranks_goes_on_with_the_same_batches(
    work, spread, tmp_path, before, after
):
    for size, steps in ((before, 6), (after, None)):
        arguments = {"towers": "rich", "checkpoints": "kept", "resume": True, "num_steps": steps}
        if size == 1:
            work.alone("train", tmp_path, **arguments)
        else:
            ended = spread("train", size, tmp_path, **arguments)
            assert ended.codes == [0] * size, ended.texts
    (tmp_path / "one").mkdir()
    work.alone("train", tmp_path / "one", towers="rich")
    one = load_file(tmp_path / "one" / "weights-0.safetensors")
    close(one, load_file(tmp_path / "weights-0.safetensors"), atol=2e-5)


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, {"towers": "rich", "chunk": 4}),
        (3, {"towers": "timed", "chunk": 5, "similarity": "euclidean"}),
        (2, {"towers": "history", "chunk": 9}),
        (3, {"towers": "rich", "chunk": 4, "siamese": True}),
        # Fewer chunks than ranks.
        (3, {"towers": "history", "chunk": 9_999}),
    ],
)
def test_ranks_embed_their_part_of_all_entities_to_the_same_bits(
    work, spread, tmp_path, size, options
):
    ended = spread("embeds", size, tmp_path, **options)
    assert ended.codes == [0] * size, ended.texts
    (tmp_path / "one").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recclr.towers._CHUNK", 9_999)
        work.alone("embeds", tmp_path / "one", **options)
    one = load_file(tmp_path / "one" / "vectors-0.safetensors")
    parts = [load_file(tmp_path / f"vectors-{rank}.safetensors") for rank in range(size)]
    for other in parts:
        assert torch.equal(one["items"], other["items"])
        assert torch.equal(one["users"], other["users"])
    assert sum(int(each["asked"]) for each in parts) == int(one["asked"]) == work.NUM_ITEMS


def test_a_bit_that_flips_on_one_rank_reaches_no_checkpoint(spread, tmp_path):
    # Tables that ranks share are the same to all of them; through sockets each has its own.
    ended = spread("train", 3, tmp_path, towers="ids", checkpoints="kept", odd=2, sockets=True)
    assert ended.codes == [4] * 3, ended.texts
    said = [text for text in ended.texts if text]
    assert len(said) == 1
    assert "rank 2 and rank 0 do not agree on the weights" in said[0]
    # The evaluation of step 5 is the first; the checkpoint of step 2 came before it.
    assert {path.name for path in (tmp_path / "kept").glob("step-*")} == {"step-2", "step-4"}


@pytest.mark.parametrize(("size", "num_users"), [(2, 700), (3, 700), (3, 100)])
def test_an_evaluation_is_the_same_for_any_number_of_ranks(work, spread, tmp_path, size, num_users):
    ended = spread("judge", size, tmp_path, num_users=num_users)
    assert ended.codes == [0] * size, ended.texts
    (tmp_path / "one").mkdir()
    work.alone("judge", tmp_path / "one", num_users=num_users)
    one = load_file(tmp_path / "one" / "judged-0.safetensors")
    means, counts, _ = json.loads((tmp_path / "one" / "judged-0.json").read_text())
    assert len(means) == 9
    for rank in range(size):
        other = load_file(tmp_path / f"judged-{rank}.safetensors")
        assert one.keys() == other.keys()
        assert max((one[name] - other[name]).abs().max() for name in one) <= 1e-9
        found = json.loads((tmp_path / f"judged-{rank}.json").read_text())
        assert found[:2] == [means, counts]
        # The work was shared: who had no queries showed no progress.
        num_blocks = -(-num_users // 256)
        has_some = num_blocks * rank // size < num_blocks * (rank + 1) // size
        assert (found[2] > 0) == has_some
