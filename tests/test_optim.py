"""Table optimisers against dense torch optimisers and loops over rows."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recclr.errors import CheckpointError
from recclr.optim import Table, TableOptimizer, _rounded, summed_rows

pytestmark = pytest.mark.usefixtures("both_kernels")

NUM_ROWS, DIM, LR = 7, 3, 0.05
KINDS = ("adam", "rowwise_adam", "rowwise_adagrad", "sgd")


def table_of(seed=0, num_rows=NUM_ROWS):
    generator = torch.Generator().manual_seed(seed)
    return Table(num_rows, DIM, std=1.0, generator=generator).train()


def targets_of(rows, seed):
    """What the loss of a step pulls each lookup towards; any smooth function will do."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(rows), DIM, generator=generator)


def pull(vectors, rows, seed):
    return ((vectors - targets_of(rows, seed)) ** 2).sum()


def take_step(table, optimizer, rows, seed, lr=LR):
    pull(table(torch.tensor(rows, dtype=torch.int64)), rows, seed).backward()
    optimizer.step(lr)


def gradient_by_row(weight, rows, seed):
    """Slow twin: the gradient of each touched row, its lookups summed one by one."""
    grads = {}
    for row, target in zip(rows, targets_of(rows, seed), strict=True):
        grads[row] = grads.get(row, torch.zeros(DIM)) + 2 * (weight[row] - target)
    return grads


@pytest.mark.parametrize(
    ("kind", "dense"),
    [
        ("adam", lambda weight: torch.optim.Adam([weight], lr=LR)),
        ("sgd", lambda weight: torch.optim.SGD([weight], lr=LR)),
    ],
)
def test_equal_to_dense_torch_optimisers_where_every_row_is_touched(kind, dense):
    table = table_of()
    weight = torch.nn.Parameter(table.weight.detach().clone())
    optimizer, reference = TableOptimizer({"t": table}, kind), dense(weight)
    for step in range(200):
        # Every row, some twice, in another order in each step.
        order = torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(step)).tolist()
        rows = order + order[:3]
        take_step(table, optimizer, rows, step)
        reference.zero_grad()
        pull(weight[torch.tensor(rows)], rows, step).backward()
        reference.step()
    torch.testing.assert_close(table.weight, weight, rtol=2e-5, atol=2e-6)


def updated(kind, weight, grads, state, lr):
    """Slow twin of every kind, row by row, in float64."""
    for row, grad in grads.items():
        grad = grad.double()
        if kind == "sgd":
            weight[row] -= lr * grad
            continue
        mine = state.setdefault(row, {"count": 0, "first": 0.0, "second": 0.0})
        mine["count"] += 1
        square = grad**2 if kind == "adam" else (grad**2).mean()
        if kind == "rowwise_adagrad":
            mine["second"] = mine["second"] + square
            weight[row] -= lr * grad / (math.sqrt(mine["second"]) + 1e-8)
            continue
        mine["first"] = 0.9 * mine["first"] + 0.1 * grad
        mine["second"] = 0.999 * mine["second"] + 0.001 * square
        correction = math.sqrt(1 - 0.999 ** mine["count"]) / (1 - 0.9 ** mine["count"])
        weight[row] -= lr * correction * mine["first"] / (mine["second"] ** 0.5 + 1e-8)


steps = st.lists(st.lists(st.integers(0, NUM_ROWS - 1), max_size=9), min_size=1, max_size=8)


@pytest.mark.parametrize("kind", KINDS)
@given(lookups=steps)
@settings(max_examples=40, deadline=None)
def test_every_kind_equals_a_loop_over_rows_with_their_own_clocks(kind, lookups):
    table = table_of()
    optimizer = TableOptimizer({"t": table}, kind)
    weight, state = table.weight.double().clone(), {}
    for step, rows in enumerate(lookups):
        grads = gradient_by_row(table.weight, rows, step)
        take_step(table, optimizer, rows, step)
        updated(kind, weight, grads, state, LR)
    torch.testing.assert_close(table.weight, weight.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@given(lookups=steps)
@settings(max_examples=25, deadline=None)
def test_rows_that_were_not_looked_up_never_move(kind, lookups):
    table = table_of()
    optimizer = TableOptimizer({"t": table}, kind)
    # Momentum for all of them, which a dense optimiser would go on applying.
    take_step(table, optimizer, list(range(NUM_ROWS)), 0)
    for step, rows in enumerate(lookups):
        before = table.weight.clone()
        state = {name: value.clone() for name, value in optimizer.state_dict().items()}
        take_step(table, optimizer, rows, 1 + step)
        still = [row for row in range(NUM_ROWS) if row not in rows]
        assert torch.equal(table.weight[still], before[still])
        for name, value in optimizer.state_dict().items():
            assert torch.equal(value[still], state[name][still])
        assert (table.weight[rows] != before[rows]).any(1).all()


@pytest.mark.parametrize("kind", KINDS)
@given(lookups=steps.map(lambda each: [rows for rows in each if rows]))
@settings(max_examples=40, deadline=None)
def test_at_a_fixed_shape_the_same_rows_move_the_same_way(kind, lookups):
    tables = table_of(), table_of()
    loose = TableOptimizer({"t": tables[0]}, kind)
    fixed = TableOptimizer({"t": tables[1]}, kind, fixed_shapes=True)
    for step, rows in enumerate(lookups):
        take_step(tables[0], loose, rows, step)
        # The rate as a GPU has it.
        take_step(tables[1], fixed, rows, step, torch.tensor(LR))
        torch.testing.assert_close(tables[1].weight, tables[0].weight, rtol=1e-5, atol=1e-6)
    for name, value in loose.state_dict().items():
        torch.testing.assert_close(fixed.state_dict()[name], value, rtol=1e-5, atol=1e-7)


def test_at_a_fixed_shape_sums_are_padded_with_the_last_row():
    grads = torch.arange(15.0).view(5, 3)
    rows, sums = summed_rows(
        [(torch.tensor([4, 1, 4]), grads[:3], None), (torch.tensor([1, 0]), grads[3:], None)],
        num_rows=NUM_ROWS,
    )
    assert rows.tolist() == [0, 1, 4, 4, 4]
    last = grads[0] + grads[2]
    assert torch.equal(sums, torch.stack([grads[4], grads[1] + grads[3], last, last, last]))
    # A gradient that stands for several rows, as that of a bag does.
    places = torch.tensor([1, 1, 0])
    rows, sums = summed_rows([(torch.tensor([2, 5, 2]), grads[:2], places)], num_rows=2)
    assert rows.tolist() == [2, 5]
    assert torch.equal(sums, torch.stack([grads[0] + grads[1], grads[1]]))


def test_a_row_that_is_written_twice_is_rounded_once():
    """On a GPU either of two writes may be the last."""
    table = table_of()
    optimizer = TableOptimizer({"t": table}, "adam", "bfloat16", fixed_shapes=True)
    rows, seen = [3, 6, 6, 6, 6, 6], []
    patch = pytest.MonkeyPatch()
    keep = torch.Tensor.index_copy_
    patch.setattr(
        torch.Tensor,
        "index_copy_",
        lambda self, dim, index, source: (seen.append(source), keep(self, dim, index, source))[1],
    )
    take_step(table, optimizer, rows, 0)
    patch.undo()
    assert len(seen) == 4
    for written in seen:
        assert (written[1:] == written[1]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_one_lookup_of_a_sum_is_several_lookups_summed(kind):
    one, several = table_of(), table_of()
    for table, calls in ((one, [[2, 2, 2, 5]]), (several, [[2, 5], [2], [2]])):
        optimizer = TableOptimizer({"t": table}, kind)
        for _ in range(3):
            sum((table(torch.tensor(rows)) ** 2).sum() for rows in calls).backward()
            optimizer.step(LR)
    torch.testing.assert_close(one.weight, several.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_owners_of_a_share_each_move_all_rows_together_to_the_same_bits(kind):
    """Three optimisers on the same memory beside one that moves every row."""
    whole, split = table_of(num_rows=100), table_of(num_rows=100)
    alone = TableOptimizer({"t": whole}, kind)
    owners = [TableOptimizer({"t": split}, kind) for _ in range(3)]
    for rank, owner in enumerate(owners):
        owner.state, owner.share = owners[0].state, (rank, 3)
    for step in range(4):
        draws = torch.Generator().manual_seed(step)
        rows = torch.randint(100, (61,), generator=draws)
        first = rows, torch.randn(61, DIM, generator=draws), None
        # Nobody owns some of these but rank 1; the last one's gradient comes from two look-ups.
        more = torch.tensor([17, 18, 30, 30])
        second = more, torch.randn(3, DIM, generator=draws), torch.tensor([0, 2, 1, 2])
        moved = ({"t": [first, second]} if step else {"t": [second]}).items()
        alone.step(LR, moved)
        before = split.weight.detach().clone()
        for owner in owners:
            owner.step(LR, moved)
        assert torch.equal(split.weight, whole.weight)
        touched = torch.cat([rows, more] if step else [more]).unique()
        assert torch.equal((split.weight != before).any(1).nonzero().squeeze(1), touched)
        for name, value in alone.state["t"].items():
            assert torch.equal(owners[0].state["t"][name], value)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_steps_give_the_same_bits(kind):
    weights = []
    for _ in range(2):
        table = table_of(num_rows=300)
        optimizer = TableOptimizer({"t": table}, kind)
        for step in range(5):
            generator = torch.Generator().manual_seed(step)
            take_step(table, optimizer, torch.randint(300, (900,), generator=generator).tolist(), 1)
        weights.append(table.weight)
    assert torch.equal(*weights)


def test_a_rare_row_makes_a_first_step_of_full_size():
    table = table_of()
    optimizer = TableOptimizer({"t": table}, "adam")
    for step in range(50):
        take_step(table, optimizer, [0], step)
    before = table.weight[3].clone()
    take_step(table, optimizer, [3], 50)
    torch.testing.assert_close((table.weight[3] - before).abs(), torch.full((DIM,), LR))


def test_bags_are_sums_and_only_the_rows_in_them_move():
    table = table_of()
    values, offsets = torch.tensor([4, 1, 4, 0]), torch.tensor([0, 3, 3])
    w = table.weight.clone()
    found = table.bag(values, offsets)
    torch.testing.assert_close(found, torch.stack([2 * w[4] + w[1], torch.zeros(DIM), w[0]]))
    found.sum().backward()
    TableOptimizer({"t": table}, "sgd").step(1.0)
    moved = torch.zeros(NUM_ROWS, DIM)
    moved[[4, 1, 0]] = torch.tensor([[2.0], [1.0], [1.0]])
    torch.testing.assert_close(w - table.weight, moved)
    empty = table.bag(values[:0], torch.zeros(2, dtype=torch.int64))
    assert torch.equal(empty, torch.zeros(2, DIM))


def test_lookups_are_kept_for_a_training_step_only_and_freed_by_it():
    table = table_of()
    optimizer = TableOptimizer({"t": table}, "adam")
    rows = torch.tensor([1, 2])
    with torch.no_grad():
        table(rows)
    table.eval()
    table(rows)
    assert table.lookups == []
    table.train()
    table(rows).sum().backward()
    table(rows)
    assert len(table.lookups) == 2
    optimizer.step(LR)
    assert table.lookups == []


def test_a_lookup_that_no_loss_used_moves_nothing():
    table = table_of()
    before = table.weight.clone()
    table(torch.tensor([1, 2]))
    TableOptimizer({"t": table}, "adam").step(LR)
    assert torch.equal(table.weight, before)


def test_a_forgotten_step_does_not_reach_the_next_one():
    clean, aborted = table_of(), table_of()
    for table in (clean, aborted):
        optimizer = TableOptimizer({"t": table}, "adam")
        if table is aborted:
            pull(table(torch.tensor([1, 5])), [1, 5], 99).backward()
            optimizer.forget()
            assert table.lookups == []
        take_step(table, optimizer, [2, 5], 0)
    assert torch.equal(clean.weight, aborted.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_state_goes_around_and_training_goes_on_to_the_same_bits(kind):
    table = table_of()
    optimizer = TableOptimizer({"a": table, "b.c": table_of(1)}, kind)
    for step in range(4):
        take_step(table, optimizer, [1, 2, 1], step)
    saved = {name: value.clone() for name, value in optimizer.state_dict().items()}
    twin = table_of(2)
    with torch.no_grad():
        twin.weight.copy_(table.weight)
    restored = TableOptimizer({"a": twin, "b.c": table_of(3)}, kind)
    restored.load_state_dict(saved)
    assert restored.state_dict().keys() == saved.keys()
    assert all(torch.equal(restored.state_dict()[name], saved[name]) for name in saved)
    for name, one in ((table, optimizer), (twin, restored)):
        take_step(name, one, [0, 1], 9)
    assert torch.equal(table.weight, twin.weight)
    # Restored by value: going on did not write into what was loaded.
    assert all(
        torch.equal(saved[name], value) or name.startswith("a/")
        for name, value in restored.state_dict().items()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_state_of_the_size_that_each_kind_needs(kind):
    sizes = {
        "adam": {"first": DIM, "second": DIM, "count": 1},
        "rowwise_adam": {"first": DIM, "second": 1, "count": 1},
        "rowwise_adagrad": {"second": 1},
        "sgd": {},
    }[kind]
    state = TableOptimizer({"t": table_of()}, kind).state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert shapes == {f"t/{name}": (NUM_ROWS, width) for name, width in sizes.items()}


def test_state_of_another_optimiser_or_of_other_tables_is_refused():
    optimizer = TableOptimizer({"t": table_of()}, "adam")
    before = {name: value.clone() for name, value in optimizer.state_dict().items()}
    others = [
        TableOptimizer({"t": table_of()}, "rowwise_adagrad"),
        TableOptimizer({"other": table_of()}, "adam"),
        TableOptimizer({"t": table_of(), "more": table_of()}, "adam"),
    ]
    for other in others:
        with pytest.raises(CheckpointError, match="table_optimizer changed"):
            optimizer.load_state_dict(other.state_dict())
    smaller = TableOptimizer({"t": table_of(num_rows=5)}, "adam")
    with pytest.raises(CheckpointError, match=r"t/first: expected shape \(7, 3\), found \(5, 3\)"):
        optimizer.load_state_dict(smaller.state_dict())
    assert all(torch.equal(optimizer.state_dict()[name], before[name]) for name in before)


def test_moments_in_bfloat16_take_half_the_room_and_follow_float32():
    tables = {kind: table_of() for kind in ("float32", "bfloat16")}
    optimizers = {
        kind: TableOptimizer({"t": table}, "adam", kind) for kind, table in tables.items()
    }
    for step in range(1500):
        for kind, table in tables.items():
            pull(table(torch.tensor([1, 2])), [1, 2], step % 7).backward()
            optimizers[kind].step(0.01, number=step)
    full, half = (optimizers[kind].state["t"] for kind in ("float32", "bfloat16"))
    assert half["second"].dtype == half["first"].dtype == torch.bfloat16
    assert half["count"].dtype == torch.float32
    # Rounded to the nearest, the second moment would stop where 0.1 % of a square is below half a
    # step, at no more than half a square, and be a third too small by now. Rounded at random, its
    # errors of 0.2 % each walk to about 6 %.
    torch.testing.assert_close(half["second"].float(), full["second"], rtol=0.2, atol=0)
    moved = (tables["float32"].weight - table_of().weight).abs().max()
    difference = (tables["float32"].weight - tables["bfloat16"].weight).abs().max()
    assert 0 < difference < 0.05 * moved


@pytest.mark.parametrize("kind", ["adam", "rowwise_adam"])
def test_counts_are_exact_for_tables_with_one_column_too(kind):
    """In bfloat16 a count would stand still at 256, and the bias correction with it."""
    table = Table(3, 1, std=1.0, generator=torch.Generator().manual_seed(0)).train()
    optimizer = TableOptimizer({"t": table}, kind, "bfloat16")
    state = optimizer.state["t"]
    assert state["first"].dtype == torch.bfloat16
    assert state["second"].dtype == (torch.bfloat16 if kind == "adam" else torch.float32)
    for _ in range(300):
        table(torch.tensor([1])).sum().backward()
        optimizer.step(0.01)
    assert state["count"].flatten().tolist() == [0.0, 300.0, 0.0]


def test_rounding_at_random_is_right_on_average_and_the_same_again():
    value = torch.tensor([1.0 + 2**-9, -3.0e-20, 0.0, 1.0, -torch.inf]).repeat(4096, 1)
    again = [_rounded(value, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*again)
    assert again[0].dtype == torch.bfloat16
    found = again[0].double()
    assert torch.equal(found[:, 2:].float(), value[:, 2:])
    # A quarter of the way from 1 to its neighbour 1 + 2^-7: four standard errors of the mean.
    assert set(found[:, 0].tolist()) == {1.0, 1 + 2**-7}
    assert float(found[:, 0].mean() - value[0, 0]) == pytest.approx(0, abs=4 * 2**-7 * 0.433 / 64)
    assert float(found[:, 1].mean()) == pytest.approx(-3e-20, rel=1e-3)


def test_moments_of_another_precision_are_refused():
    half = TableOptimizer({"t": table_of()}, "adam", "bfloat16")
    with pytest.raises(CheckpointError, match="table_moments changed"):
        half.load_state_dict(TableOptimizer({"t": table_of()}, "adam").state_dict())


def test_a_value_in_several_bags_and_lookups_beside_them_are_summed():
    """Against autograd's dense gradient of the same lookups."""
    table = table_of()
    values, offsets = torch.tensor([4, 1, 4, 0, 1, 4]), torch.tensor([0, 3, 3, 4])
    rows = torch.tensor([1, 6, 1])
    draws = torch.Generator().manual_seed(2)
    ours, theirs = (torch.randn(4, DIM, generator=draws), torch.randn(3, DIM, generator=draws))
    weight = table.weight.clone().requires_grad_()
    bags = torch.nn.functional.embedding_bag(values, weight, offsets, mode="sum")
    ((bags * ours).sum() + (weight[rows] * theirs).sum()).backward()
    ((table.bag(values, offsets) * ours).sum() + (table(rows) * theirs).sum()).backward()
    TableOptimizer({"t": table}, "sgd").step(1.0)
    torch.testing.assert_close(table.weight, (weight - weight.grad).detach())
