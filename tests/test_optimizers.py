"""One schedule over row-wise tables and AdamW: rates, decay, clipping, temperature, state."""

import math

import pytest
import torch
from torch import nn

from recclr.errors import CheckpointError
from recclr.optim import Table
from recclr.optimizers import Optimizers
from recclr.settings import LossSettings, TrainSettings
from recclr.towers import TwoTower


class Projected(nn.Module):
    """A table, a layer and a vector: one of each kind of weight."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = Table(6, 4, std=1.0, generator=generator)
        self.layer = nn.Linear(4, 5)
        self.norm = nn.LayerNorm(5)
        self.idle = nn.Parameter(torch.ones(2, 2))

    def forward(self, rows):
        return self.norm(self.layer(self.table(rows)))


BOUNDS = {"min_temperature": 0.05, "max_temperature": 0.2}


def model_of(seed=0, **loss):
    torch.manual_seed(seed)
    return TwoTower(
        Projected(1),
        Projected(2),
        num_users=5,
        num_items=6,
        similarity="cosine",
        loss=LossSettings(**loss),
    ).train()


def backward(model, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    users = torch.randint(6, (8,), generator=generator)
    items = torch.randint(6, (8,), generator=generator)
    scores = (model.user_tower(users) * model.item_tower(items)).sum(1)
    (scale * (scores / model.temperature()).sin().mean()).backward()


def rates(total_steps, **settings):
    optimizers = Optimizers(model_of(), TrainSettings(**settings), total_steps)
    return [optimizers.rate(step) for step in range(total_steps + 1)]


@pytest.mark.parametrize("decay", ["linear", "cosine", "none"])
@pytest.mark.parametrize("final_lr", [0.0, 0.1])
def test_the_rate_warms_up_then_decays_to_its_end(decay, final_lr):
    found = rates(40, warmup=0.25, decay=decay, final_lr=final_lr)
    assert found[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    for step in range(10, 41):
        done = (step - 10) / 30
        left = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "none": 1}[decay]
        assert found[step] == pytest.approx(final_lr + (1 - final_lr) * left)
    assert found[10] == 1.0
    assert max(found) == 1.0
    assert min(found[:-1]) > 0
    assert found[40] == pytest.approx(1.0 if decay == "none" else final_lr)


@pytest.mark.parametrize(("scaling", "factor"), [("none", 1.0), ("sqrt", 3.0), ("linear", 9.0)])
def test_rates_grow_with_the_batch_where_asked(scaling, factor):
    plain = rates(12, warmup=0.3)
    for size, accumulate in ((900, 1), (300, 3)):
        batch = {"batch_size": size, "accumulate": accumulate, "base_batch_size": 100}
        found = rates(12, warmup=0.3, lr_scaling=scaling, **batch)
        assert found == pytest.approx([factor * rate for rate in plain])


def test_without_warm_up_the_first_step_is_at_the_peak_and_one_step_is_enough():
    assert rates(1, warmup=0.0)[0] == 1.0
    assert rates(1, warmup=1.0)[0] == 0.5
    # Beyond the planned end the rate stays where it ended.
    optimizers = Optimizers(model_of(), TrainSettings(final_lr=0.2), 10)
    assert optimizers.rate(10) == pytest.approx(optimizers.rate(99)) == pytest.approx(0.2)


def test_both_optimisers_follow_the_schedule_from_their_own_peak():
    settings = TrainSettings(
        table_optimizer="sgd", table_lr=0.5, dense_lr=0.02, warmup=0.5, weight_decay=0.0
    )
    model = model_of()
    optimizers = Optimizers(model, settings, 8)
    table, layer = model.user_tower.table, model.user_tower.layer
    for step in range(8):
        backward(model, step)
        rows, vectors = table.lookups[0].rows, table.lookups[0].vectors
        grad = torch.zeros_like(table.weight).index_add_(0, rows, vectors.grad)
        expected = table.weight - 0.5 * optimizers.rate(step) * grad
        before = layer.weight.detach().clone()
        optimizers.step(step)
        torch.testing.assert_close(table.weight, expected)
        assert {group["lr"] for group in optimizers.adamw.param_groups} == {
            0.02 * optimizers.rate(step)
        }
        if step == 0:
            # Adam's first step is as long as its rate.
            moved = (layer.weight - before).abs()
            assert moved.max().item() == pytest.approx(0.02 * optimizers.rate(0), rel=1e-3)


def test_only_matrices_decay():
    model = model_of()
    settings = TrainSettings(weight_decay=0.5, dense_lr=0.1, warmup=0.0)
    optimizers = Optimizers(model, settings, 10)
    for parameter in model.dense_parameters().values():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: value.detach().clone() for name, value in model.weights().items()}
    optimizers.step(0)
    for name, value in model.weights().items():
        matrix = value.ndim > 1 and "table" not in name
        torch.testing.assert_close(value.detach(), before[name] * (0.95 if matrix else 1.0))
    matrices = {name for name in before if name.endswith(("layer.weight", "idle"))}
    assert len(matrices) == 4


@pytest.mark.parametrize("clip_norm", [None, 20.0])
def test_dense_weights_move_as_torch_adamw_moves_them(clip_norm):
    model, twin = model_of(), model_of()
    settings = TrainSettings(
        clip_norm=clip_norm, weight_decay=0.1, dense_lr=0.01, warmup=0.2, table_lr=0.0
    )
    optimizers = Optimizers(model, settings, 10)
    params = list(twin.dense_parameters().values())
    reference = torch.optim.AdamW(
        [
            {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
        ]
    )
    norms = []
    for step in range(10):
        for one in (model, twin):
            # Of very different size, or Adam would not notice that they were clipped.
            backward(one, step, scale=10.0 ** (step % 3 - 1))
        optimizers.step(step)
        limit = math.inf if clip_norm is None else clip_norm
        norms.append(float(nn.utils.clip_grad_norm_(params, limit)))
        for group in reference.param_groups:
            group["lr"] = 0.01 * optimizers.rate(step)
        reference.step()
        reference.zero_grad()
    assert min(norms) < 20 < max(norms)
    for name, value in twin.dense_parameters().items():
        torch.testing.assert_close(model.dense_parameters()[name], value)


def test_a_learned_temperature_is_learned_held_at_its_bound_and_comes_back():
    model = model_of(temperature="learned", initial_temperature=0.1, **BOUNDS)
    optimizers = Optimizers(model, TrainSettings(dense_lr=0.2, warmup=0.0, decay="none"), 100)

    def push(sign, steps):
        for step in range(steps):
            (sign * model.temperature()).backward()
            optimizers.step(step)
        return model.temperature().item()

    assert push(1.0, 1) < 0.1
    assert push(1.0, 40) == pytest.approx(0.05)
    # Adam's momentum fades within some twenty steps; without a gradient it would stay for ever.
    assert push(-1.0, 60) == pytest.approx(0.2)


def test_an_initial_temperature_outside_the_bounds_still_learns():
    model = model_of(temperature="learned", initial_temperature=0.01, **BOUNDS)
    optimizers = Optimizers(model, TrainSettings(dense_lr=0.2, warmup=0.0, decay="none"), 100)
    for step in range(20):
        (-model.temperature()).backward()
        optimizers.step(step)
    assert model.temperature().item() == pytest.approx(0.2)


def test_a_forgotten_step_leaves_no_gradient_anywhere():
    model, twin = model_of(), model_of()
    for one in (model, twin):
        optimizers = Optimizers(one, TrainSettings(), 10)
        if one is twin:
            backward(one, 7)
            optimizers.forget()
        backward(one, 0)
        optimizers.step(0)
    for name, value in model.weights().items():
        assert torch.equal(value, twin.weights()[name])


def trained(kind, steps, *, fixed_shapes=False):
    model = model_of()
    settings = TrainSettings(table_optimizer=kind, clip_norm=1.0)
    optimizers = Optimizers(model, settings, 12, fixed_shapes=fixed_shapes)
    for step in range(steps):
        backward(model, step)
        optimizers.step(step)
    return model, optimizers


@pytest.mark.parametrize("fixed_shapes", [False, True])
@pytest.mark.parametrize("kind", ["adam", "rowwise_adam", "rowwise_adagrad", "sgd"])
def test_restored_state_is_all_state_and_goes_on_to_the_same_bits(kind, fixed_shapes):
    model, optimizers = trained(kind, 5, fixed_shapes=fixed_shapes)
    saved = {name: value.clone() for name, value in optimizers.state_dict().items()}
    # A parameter that no loss used so far has no moments to save.
    assert not any("idle" in name for name in saved)
    assert {f"dense/{name}/exp_avg" for name in model.dense_parameters() if "idle" not in name} == {
        name for name in saved if name.endswith("/exp_avg")
    }
    # Restored over a state that has seen other steps, of which nothing may be left.
    other, restored = trained(kind, 9, fixed_shapes=fixed_shapes)
    with torch.no_grad():
        for name, value in other.weights().items():
            value.copy_(model.weights()[name])
    other.user_tower.idle.sum().backward()
    restored.step(0)
    with torch.no_grad():
        other.weights()["user_tower.idle"].copy_(model.user_tower.idle)
        for name, value in other.weights().items():
            value.copy_(model.weights()[name])
    restored.load_state_dict(saved)
    again = restored.state_dict()
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[name], saved[name]) for name in saved)
    assert all(again[name].dtype == saved[name].dtype for name in saved)
    for one, of in ((model, optimizers), (other, restored)):
        for step in range(5, 9):
            backward(one, step)
            of.step(step)
    for name, value in model.weights().items():
        assert torch.equal(value, other.weights()[name])
    for name, value in optimizers.state_dict().items():
        assert torch.equal(value, restored.state_dict()[name])


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.pop("tables/user_tower.table/first"),
        lambda state: state.pop("dense/user_tower.layer.weight/exp_avg_sq"),
        lambda state: state.update({"dense/gone/step": torch.tensor(1.0)}),
        lambda state: state.update({"elsewhere": torch.tensor(1.0)}),
        lambda state: state.update({"dense/log_temperature/exp_avg": torch.zeros(2)}),
        lambda state: state.update({"dense/user_tower.layer.weight/max": torch.zeros(5, 4)}),
    ],
)
def test_state_of_another_model_is_refused(damage):
    _, optimizers = trained("adam", 3)
    state = dict(optimizers.state_dict())
    damage(state)
    _, fresh = trained("adam", 0)
    with pytest.raises(CheckpointError, match="optimiser state"):
        fresh.load_state_dict(state)
    assert not fresh.adamw.state


def test_a_model_of_tables_alone_has_no_dense_optimiser():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = Table(6, 4, std=1.0, generator=torch.Generator().manual_seed(0))

        def forward(self, rows):
            return self.table(rows)

    model = TwoTower(
        Bare(),
        Bare(),
        num_users=5,
        num_items=6,
        similarity="dot",
        loss=LossSettings(temperature=0.5),
    ).train()
    optimizers = Optimizers(model, TrainSettings(), 4)
    assert optimizers.adamw is None
    before = model.user_tower.table.weight.clone()
    backward(model, 0)
    optimizers.step(0)
    assert not torch.equal(model.user_tower.table.weight, before)
    assert all(name.startswith("tables/") for name in optimizers.state_dict())
    optimizers.load_state_dict(optimizers.state_dict())
    with pytest.raises(CheckpointError, match="expected none"):
        optimizers.load_state_dict({**optimizers.state_dict(), "dense/x/step": torch.tensor(1.0)})
