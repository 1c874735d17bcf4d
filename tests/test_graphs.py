"""Steps of fixed shapes, and their capture: what a GPU will do, as far as a CPU can show it."""

import math
from dataclasses import fields, replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import recclr.graphs as graphs
from recclr.batches import BatchSource
from recclr.building import build_model
from recclr.checkpoint import find_checkpoint
from recclr.data.log import (
    CategoricalColumn,
    Csr,
    DenseColumn,
    EncodedLog,
    FeatureTable,
    Prepared,
    RaggedColumn,
)
from recclr.errors import InterruptedTraining
from recclr.graphs import CudaDevice, StepGraph
from recclr.objective import Objective
from recclr.optimizers import Optimizers
from recclr.settings import (
    AugmentSettings,
    FeatureSettings,
    HistorySettings,
    IdSettings,
    LossSettings,
    ModelSettings,
    NegativesSettings,
    PopularitySettings,
    TowerSettings,
    TrainSettings,
)
from recclr.statistics import DAY_S
from recclr.stepping import needs_time_cells
from recclr.train import fit

pytestmark = pytest.mark.usefixtures("no_power_cut")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

NUM_USERS, NUM_ITEMS, DIM, NUM_ROWS = 9, 17, 4, 51
# 51 rows in batches of 12: four full steps and one of three rows.
TRAIN = TrainSettings(batch_size=12, epochs=4.0, dense_lr=0.02, table_lr=0.05)


def prepared():
    draws = torch.Generator().manual_seed(0)
    log = EncodedLog(
        torch.randint(NUM_USERS, (NUM_ROWS,), generator=draws).int(),
        # Two items that nobody has, and some that come several times in a batch.
        torch.randint(NUM_ITEMS - 2, (NUM_ROWS,), generator=draws).int(),
        num_users=NUM_USERS,
        num_items=NUM_ITEMS,
        timestamp=torch.arange(NUM_ROWS) * DAY_S,
        weight=1 + torch.rand(NUM_ROWS, generator=draws),
    )
    lengths = torch.tensor([0, 1, 2]).repeat(6)[:NUM_ITEMS]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    columns = {
        "kind": CategoricalColumn(torch.randint(4, (NUM_ITEMS,), generator=draws).int(), 4),
        "image": DenseColumn(torch.randn(NUM_ITEMS, 6, generator=draws)),
        "words": RaggedColumn(Csr(offsets, torch.arange(int(offsets[-1])).int() % 5), 5),
    }
    return Prepared(log, FeatureTable(NUM_USERS), FeatureTable(NUM_ITEMS, columns))


DATA = prepared()
IDS = (TowerSettings(), TowerSettings())
# Users draw first, and of items only the ids: the other form of a step then draws the same.
FEATURES = (
    TowerSettings(id=IdSettings(dropout=0.2), mlp=(7,), dropout=0.1),
    TowerSettings(
        id=IdSettings(dropout=0.4),
        features={
            "kind": FeatureSettings(kind="categorical"),
            "image": FeatureSettings(kind="vector"),
        },
        mlp=(5,),
    ),
)
DENSE = (
    TowerSettings(mlp=(7,)),
    TowerSettings(features={"image": FeatureSettings(kind="vector")}, mlp=(5,)),
)
RECENT = {"recent": FeatureSettings(kind="statistics", windows_d=(9.0,))}
TIMED = (TowerSettings(), TowerSettings(id=IdSettings(as_of=True), features=RECENT))
LISTS = (TowerSettings(), TowerSettings(features={"words": FeatureSettings(kind="multi_hot")}))
HISTORY = (TowerSettings(history=HistorySettings(length=3)), TowerSettings())
BOTH = (
    TowerSettings(
        history=HistorySettings(length=3, half_life_d=4.0, dropout=0.3, use="both"), mlp=(7,)
    ),
    LISTS[1],
)
# Items that dropout hides, in histories as well.
DROPPED = (
    BOTH[0],
    TowerSettings(
        id=IdSettings(dropout=0.3),
        features={"words": FeatureSettings(kind="multi_hot", dropout=0.2)},
    ),
)
# Of items the first draw alone, which both forms of a step draw alike.
SWAPPED = (
    TowerSettings(
        history=HistorySettings(length=3, half_life_d=4.0, crop=0.6, mask=0.2, reorder=0.9),
        augment=AugmentSettings(mode="complementary", dropout=0.4, dimension_mask=0.3, noise=0.2),
    ),
    TowerSettings(features={"kind": FeatureSettings(kind="categorical", swap=0.4)}),
)
# Whatever draws.
AUGMENTED = (
    TowerSettings(
        history=replace(SWAPPED[0].history, use="both"),
        augment=AugmentSettings(mode="correlated", dropout=0.4, dimension_mask=0.3, noise=0.2),
    ),
    TowerSettings(
        features={
            "kind": FeatureSettings(kind="categorical", swap=0.4),
            "image": FeatureSettings(kind="numeric", swap=0.2, jitter=0.3),
            "words": FeatureSettings(kind="multi_hot", swap=0.2, subsample=0.5),
        },
        augment=AugmentSettings(groups=(("kind", "words"), ("id",)), dropout=(0.2, 0.3)),
    ),
)
RAGGED = {"lists": LISTS, "history": HISTORY, "both": BOTH}
ALL = {"ids": IDS, "features": FEATURES, "time cells": TIMED, "swapped": SWAPPED, **RAGGED}

SOURCES = {
    "in_batch": NegativesSettings(in_batch=True, uniform=0),
    "uniform": NegativesSettings(in_batch=False, uniform=7),
    "popularity": NegativesSettings(
        in_batch=False, uniform=0, popularity=PopularitySettings(count=5)
    ),
    "mixed": NegativesSettings(in_batch=True, uniform=7, popularity=PopularitySettings(count=5)),
}


def model_of(towers=IDS, *, loss=None, seed=0, similarity="cosine", dim=DIM):
    return build_model(
        DATA,
        user=towers[0],
        item=towers[1],
        model=ModelSettings(embedding_dim=dim, similarity=similarity),
        loss=loss or LossSettings(),
        seed=seed,
    )


def parts_of(model, *, fixed, loss=None, negatives=SOURCES["mixed"], train=TRAIN):
    """Source, objective, optimisers of a training by hand."""
    source = BatchSource(DATA.train, train, seed=5, time_cells=needs_time_cells(model))
    loss = loss or LossSettings()
    objective = Objective(DATA.train, loss, negatives, seed=5, fixed_shapes=fixed)
    return source, objective, Optimizers(model, train, 20, fixed_shapes=fixed)


def one_step(model, objective, optimizers, batch, step):
    objective.prepare(step)
    optimizers.prepare(step)
    stats = objective(model, batch, step)
    stats.loss.backward()
    optimizers.apply()
    return stats


def trained(towers=IDS, *, num_steps=7, fixed, loss=None, **options):
    """Losses and counts of some steps, weights and optimiser state after them."""
    model = model_of(towers, loss=loss).train()
    source, objective, optimizers = parts_of(model, fixed=fixed, loss=loss, **options)
    said = []
    for step in range(num_steps):
        stats = one_step(model, objective, optimizers, source.batch(step), step)
        said.append((float(stats.loss.detach()), int(stats.num_candidates), int(stats.num_masked)))
    return said, copied(model), optimizers.state_dict()


def copied(model):
    return {name: value.detach().clone() for name, value in model.weights().items()}


def assert_alike(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, msg=lambda m: f"{name}: {m}", **tolerance)  # noqa: B023


def gradients(model, objective, batch, step):
    """Loss of a step, and its gradient by every weight, tables as if they were dense."""
    objective.prepare(step)
    stats = objective(model, batch, step)
    stats.loss.backward()
    found = {name: p.grad for name, p in model.dense_parameters().items()}
    for name, table in model.tables().items():
        found[name] = torch.zeros_like(table.weight)
        for lookup in table.lookups:
            grad = lookup.vectors.grad
            grad = grad if lookup.places is None else grad[lookup.places]
            found[name].index_add_(0, lookup.rows, grad)
        table.lookups.clear()
    return {"loss": stats.loss.detach(), **found}


def assert_twins(towers=IDS, *, rtol=1e-3, atol=2e-5, **options):
    """Weights after some steps, each form on its own."""
    said, weights, state = trained(towers, fixed=False, **options)
    fixed_said, fixed_weights, fixed_state = trained(towers, fixed=True, **options)
    for (loss, *counts), (fixed_loss, *fixed_counts) in zip(said, fixed_said, strict=True):
        assert fixed_loss == pytest.approx(loss, abs=atol)
        assert fixed_counts == counts
    assert_alike(weights, fixed_weights, rtol=rtol, atol=atol)
    assert_alike(state, fixed_state, rtol=rtol, atol=atol)
    # Rows that were touched, to the bit: a spare place must not move what nobody asked for.
    counted = [name for name in state if name.endswith("/count")]
    assert all(torch.equal(state[name], fixed_state[name]) for name in counted)


# a fixed step is the step


# Every source with ids, every kind of part with all sources together.
CASES = [("ids", source) for source in SOURCES] + [(name, "mixed") for name in ALL if name != "ids"]


@pytest.mark.parametrize(
    ("towers", "source"), [*CASES, ("features", "uniform"), ("both", "uniform")]
)
def test_a_fixed_step_equals_the_ordinary_one_in_loss_and_gradient(towers, source):
    model = model_of(ALL[towers]).train()
    batches, objective, optimizers = parts_of(model, fixed=False, negatives=SOURCES[source])
    _, fixed, _ = parts_of(model, fixed=True, negatives=SOURCES[source])
    for step in range(8):
        expected = gradients(model, objective, batches.batch(step), step)
        optimizers.forget()
        found = gradients(model, fixed, batches.batch(step), step)
        optimizers.forget()
        assert_alike(expected, found, rtol=1e-4, atol=1e-5)
        one_step(model, objective, optimizers, batches.batch(step), step)


@pytest.mark.parametrize(("towers", "source"), [case for case in CASES if case[0] != "time cells"])
def test_fixed_steps_lead_to_the_weights_of_ordinary_ones(towers, source):
    assert_twins(ALL[towers], negatives=SOURCES[source])


@pytest.mark.parametrize("kind", ["adam", "rowwise_adam", "rowwise_adagrad", "sgd"])
def test_with_every_optimiser_of_tables(kind):
    train = TrainSettings(**{**vars(TRAIN), "table_optimizer": kind, "clip_norm": 0.5})
    assert_twins(FEATURES, train=train)


def test_with_moments_in_bfloat16():
    # Draws for rounding are of another shape: moments differ by a unit of 2^-8.
    train = TrainSettings(**{**vars(TRAIN), "table_moments": "bfloat16"})
    assert_twins(IDS, train=train, num_steps=3, rtol=2e-2, atol=5e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "full_softmax"},
        {"mask_known_positives": False},
        {"second_temperature": 1.2, "temperature": 0.3},
        {"log_q_strength": 0.4},
    ],
    ids=str,
)
def test_with_every_loss(options):
    assert_twins(IDS, loss=LossSettings(**options))


def test_spare_places_leave_no_gradient_and_repeat_what_dropout_hides():
    model = model_of((IDS[0], TowerSettings(id=IdSettings(dropout=0.5)))).train()
    source, objective, _ = parts_of(model, fixed=True)
    for step in range(4):
        objective.prepare(step)
        objective(model, source.batch(step), step).loss.backward()
        (lookup,) = model.item_tower.parts[0].table.lookups
        objective.prepare(step)
        places = objective._candidates(source.batch(step), step).places
        num_distinct = int(places[-1]) + 1
        assert num_distinct < len(places) == NUM_ITEMS < 12 + 7 + 5
        spare = slice(num_distinct, None)
        assert torch.equal(lookup.vectors.grad[spare], torch.zeros_like(lookup.vectors[spare]))
        assert lookup.rows[spare].unique().tolist() == [int(lookup.rows[num_distinct - 1])]
        model.item_tower.parts[0].table.lookups.clear()


# nothing reaches the host


class Watch(TorchDispatchMode):
    """Operations with the shapes they give, in order; those that wait for a GPU."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique", "item")
    WAITING += ("is_nonzero", "equal", "bincount", "histc", "allclose")

    def __init__(self):
        super().__init__()
        self.seen, self.waits = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        waits = name.startswith(self.WAITING)
        if name.startswith("index") and isinstance(args[1], (list, tuple)):
            waits |= any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        if name == "repeat_interleave":
            waits |= kwargs.get("output_size") is None
        if waits:
            self.waits.append(name)
        result = func(*args, **kwargs)
        each = result if isinstance(result, (list, tuple)) else [result]
        shapes = [tuple(t.shape) for t in each if isinstance(t, torch.Tensor)]
        self.seen.append((name, shapes))
        return result


def test_the_watch_sees_what_waits():
    values = torch.tensor([3, 1, 1])
    for act in (
        lambda: values[0].item(),
        lambda: values[values > 1],
        lambda: bool((values > 1).all()),
        lambda: values.unique(),
        lambda: torch.unique_consecutive(values),
        lambda: torch.bincount(values),
        lambda: values.repeat_interleave(values),
        lambda: (values > 1).nonzero(),
    ):
        with Watch() as watch:
            act()
        assert watch.waits, act


def watched_steps(towers, negatives, loss, train, steps, *, fixed=True):
    model = model_of(towers, loss=loss).train()
    source, objective, optimizers = parts_of(
        model, fixed=fixed, loss=loss, negatives=negatives, train=train
    )
    batches = {step: source.batch(step) for step in range(max(steps) + 1)}
    found = []
    for step, batch in batches.items():
        with Watch() as watch:
            one_step(model, objective, optimizers, batch, step)
        if step in steps:
            found.append(watch)
    return found


@pytest.mark.parametrize(
    ("towers", "loss", "options"),
    [
        (IDS, {}, {"source": "in_batch"}),
        (IDS, {}, {"source": "uniform"}),
        (IDS, {}, {"source": "popularity"}),
        (FEATURES, {}, {"clip_norm": 0.5, "table_moments": "bfloat16"}),
        (FEATURES, {"mask_known_positives": False}, {"table_optimizer": "rowwise_adagrad"}),
        (IDS, {"kind": "full_softmax", "second_temperature": 1.1}, {"table_optimizer": "sgd"}),
        (TIMED, {}, {"batch_size": 4, "table_optimizer": "rowwise_adam"}),
        (BOTH, {}, {}),
        (DROPPED, {}, {}),
        (AUGMENTED, {}, {}),
    ],
    ids=[
        "in_batch",
        "uniform",
        "popularity",
        "features",
        "own only",
        "full softmax",
        "time cells",
        "ragged",
        "dropped",
        "augmented",
    ],
)
def test_a_fixed_step_waits_for_nothing_and_has_one_shape(towers, loss, options):
    changes = {"source": "mixed", **options}
    source = changes.pop("source")
    train = TrainSettings(**{**vars(TRAIN), **changes})
    # Of time cells, those away from both ends of the log have pools of one size.
    steps = (1, 2, 3) if towers is not TIMED else inner_cells(train)
    watches = watched_steps(towers, SOURCES[source], LossSettings(**loss), train, steps)
    assert [watch.waits for watch in watches] == [[], [], []]
    assert len(watches[0].seen) > 50
    assert watches[0].seen == watches[1].seen == watches[2].seen


def inner_cells(train):
    source = BatchSource(DATA.train, train, seed=5, time_cells=True)
    inner = [step for step in range(12) if len(source.batch(step).pool) == 5 * train.batch_size]
    return tuple(inner[1:4])


def test_the_ordinary_step_waits_and_changes_its_shape():
    watches = watched_steps(IDS, SOURCES["mixed"], LossSettings(), TRAIN, (1, 2, 3), fixed=False)
    assert all(watch.waits for watch in watches)
    assert watches[0].seen != watches[1].seen or watches[1].seen != watches[2].seen


# capture and replay


class Stage:
    """Stands in for a GPU: records nothing, and runs the step again at each replay.

    As on one, a replay reads the batch, rates and seeds of the moment, and writes its numbers where
    those of the first were.
    """

    def __init__(self, fails=None):
        self.fails, self.calls = fails, []
        self.inside = False

    def aside(self, step):
        self.calls.append("aside")
        return step()

    def capture(self, step, generators):
        self.calls.append("capture")
        self.generators = list(generators)
        if self.fails is not None:
            self.fails()
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        first = []

        def replay():
            self.calls.append("replay")
            self.inside = True
            stats = step()
            self.inside = False
            if not first:
                first.append(stats)
            for field in fields(stats):
                value = getattr(stats, field.name)
                if isinstance(value, torch.Tensor):
                    getattr(first[0], field.name).copy_(value)
            return first[0]

        return replay


def graph_of(model, stage, said, **options):
    source, objective, optimizers = parts_of(model, fixed=True, **options)
    graph = StepGraph(model, objective, optimizers, emit=said.append, device=stage)
    return source, graph


@pytest.mark.parametrize(
    "towers",
    [FEATURES, TIMED, BOTH, AUGMENTED],
    ids=["features", "time cells", "both", "augmented"],
)
def test_replayed_steps_are_the_eager_ones(towers):
    model, stage, said, losses = model_of(towers).train(), Stage(), [], []
    # Cells of four rows, so that some lie away from both ends of the log.
    train = TRAIN if towers is not TIMED else TrainSettings(**{**vars(TRAIN), "batch_size": 4})
    source, graph = graph_of(model, stage, said, train=train)
    for step in range(24):
        losses.append(float(graph(source.batch(step), step).loss))
    expected, weights, state = trained(towers, fixed=True, num_steps=24, train=train)
    assert stage.calls.count("replay") > 5
    assert losses == [loss for loss, *_ in expected]
    assert all(map(torch.equal, copied(model).values(), weights.values()))
    assert all(map(torch.equal, graph.optimizers.state_dict().values(), state.values()))
    assert stage.calls.count("capture") == 1
    assert said == [{"kind": "graph", "captured": True, "reason": None}]


def test_some_steps_warm_up_and_batches_of_another_shape_stay_eager():
    model, stage = model_of().train(), Stage()
    source, graph = graph_of(model, stage, [])
    for step in range(10):
        before = len(stage.calls)
        stats = graph(source.batch(step), step)
        assert stats.num_rows == (3 if step % 5 == 4 else 12)
        assert not stats.loss.requires_grad
        done = stage.calls[before:]
        if step < 3:
            assert done == ["aside"]
        elif step == 3:
            assert done == ["capture", "replay"]
        else:
            assert done == ([] if step % 5 == 4 else ["replay"])
    assert stage.generators == list(graph.objective.draws.values())


def test_a_replay_is_given_its_rows_and_nothing_is_seeded_inside(monkeypatch):
    """What the host does in a replayed step is lost: seeds and rates must be set before."""
    model, stage = model_of(FEATURES).train(), Stage()
    train = TrainSettings(**{**vars(TRAIN), "table_moments": "bfloat16"})
    source, graph = graph_of(model, stage, [], train=train)
    held, seeded = [], []
    prepare = graph.optimizers.prepare
    monkeypatch.setattr(
        graph.optimizers, "prepare", lambda step: (seeded.append(stage.inside), prepare(step))
    )
    for step in range(9):
        graph(source.batch(step), step)
        if graph.batch is not None:
            held.append(graph.batch)
            if step != 4:
                assert torch.equal(graph.batch.user_idx, source.batch(step).user_idx)
                assert torch.equal(graph.batch.user_at, source.batch(step).user_at)
    assert seeded == [False] * 9
    assert all(each is held[0] for each in held)
    # Two of the step, and one for each table whose moments are rounded.
    assert len(stage.generators) == 2 + len(model.tables())


def test_the_device_is_asked_again_only_where_something_moved():
    model, stage, said = model_of(FEATURES).train(), Stage(), []
    source, graph = graph_of(model, stage, said)
    for step in range(6):
        graph(source.batch(step), step)
    model.all_vectors(None)
    graph.look_again()
    graph(source.batch(6), 6)
    assert stage.calls.count("capture") == 1
    table = model.item_tower.parts[0].table
    table.weight.data = table.weight.data.clone()
    graph.look_again()
    graph(source.batch(7), 7)
    assert stage.calls.count("capture") == 2
    assert stage.calls[-1] == "replay"
    assert [event["captured"] for event in said] == [True]
    # A later one may fail where the first did not.
    table.weight.data = table.weight.data.clone()
    stage.fails = lambda: None
    graph.look_again()
    graph(source.batch(8), 8)
    assert [event["captured"] for event in said] == [True, False]


def test_a_capture_that_fails_trains_on_and_says_why_once():
    model, stage, said = model_of(FEATURES).train(), Stage(lambda: touch()), []
    source, graph = graph_of(model, stage, said)

    def touch():
        """What a capture had recorded until it failed."""
        graph.objective(model, source.batch(3), 3).loss.backward()

    draws = list(graph.objective.draws.values())
    losses = [float(graph(source.batch(step), step).loss) for step in range(9)]
    assert losses == [loss for loss, *_ in trained(FEATURES, fixed=True, num_steps=9)[0]]
    reason = "operation not permitted when stream is capturing"
    assert said == [{"kind": "graph", "captured": False, "reason": reason}]
    assert stage.calls == ["aside", "aside", "aside", "capture"]
    # Those that the failed graph knows may be of no use any more.
    assert not set(draws) & set(graph.objective.draws.values())
    assert all(not table.lookups for table in model.tables().values())


# the loop


@pytest.fixture
def staged(monkeypatch):
    """``fit`` as on a GPU, with a stage in its place."""
    stages = []

    def make(device):
        stages.append(Stage())
        return stages[-1]

    monkeypatch.setattr("recclr.stepping.plan_graph", lambda *args, **options: True)
    monkeypatch.setattr(graphs, "CudaDevice", make)
    return stages


def run(model, *, train=TRAIN, **options):
    options = {"loss": LossSettings(), "negatives": SOURCES["mixed"], "seed": 5, **options}
    return fit(model, DATA.train, train=train, **options)


def recall_like(model):
    users, items = model.all_vectors(60 * DAY_S)
    return {"recall@20": float((users @ items.T).sin().sum())}


@pytest.mark.parametrize("kind", ["adam", "rowwise_adagrad"])
def test_a_replayed_training_equals_the_ordinary_one(staged, monkeypatch, kind):
    train = TrainSettings(**{**vars(TRAIN), "table_optimizer": kind})
    model, events = model_of(FEATURES), []
    found = run(model, train=train, evaluate=recall_like, on_event=events.append)
    assert [event["kind"] for event in events[:2]] == ["step", "graph"]
    assert 0 < events[0]["masked_share"] < 1
    assert events[0]["num_candidates"] <= NUM_ITEMS
    assert staged[0].calls.count("replay") == 20 - 4 - 3
    monkeypatch.undo()
    plain = model_of(FEATURES)
    expected = run(plain, train=train, evaluate=recall_like)
    assert found.best_step == expected.best_step
    assert_alike(copied(plain), copied(model), rtol=2e-3, atol=1e-4)


def test_an_evaluation_that_moves_the_model_is_noticed(staged):
    def move(model):
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        return recall_like(model)

    run(model_of(), evaluate=move)
    # In each of the four epochs, whose evaluations are at their ends.
    assert staged[0].calls.count("capture") == 4
    run(model_of(), evaluate=recall_like)
    assert staged[1].calls.count("capture") == 1


def test_resumed_at_any_step_a_replayed_run_is_the_uninterrupted_run(staged, tmp_path):
    train = TrainSettings(**{**vars(TRAIN), "epochs": 2.0, "table_moments": "bfloat16"})
    options = {"train": train, "evaluate": recall_like}
    whole = model_of(FEATURES)
    run(whole, checkpoints=tmp_path / "whole", **options)
    digest = find_checkpoint(tmp_path / "whole").digest
    for at in (1, 3, 4, 6, 9):
        root, asked = tmp_path / str(at), iter(range(1, 99))
        with pytest.raises(InterruptedTraining):
            run(
                model_of(FEATURES),
                checkpoints=root,
                stop=lambda asked=asked, at=at: next(asked) == at,
                **options,
            )
        run(model_of(FEATURES, seed=1), checkpoints=root, resume=True, **options)
        assert find_checkpoint(root).digest == digest


def test_what_one_form_of_a_run_wrote_the_other_resumes(staged, monkeypatch, tmp_path):
    asked = iter(range(1, 99))
    with pytest.raises(InterruptedTraining):
        run(model_of(FEATURES), checkpoints=tmp_path, stop=lambda: next(asked) == 8)
    monkeypatch.undo()
    resumed, plain = model_of(FEATURES, seed=1), model_of(FEATURES)
    run(resumed, checkpoints=tmp_path, resume=True)
    run(plain)
    assert_alike(copied(plain), copied(resumed), rtol=2e-3, atol=1e-4)


def test_inside_an_epoch_the_host_reads_where_a_step_is_logged_and_nowhere_else(
    staged, monkeypatch
):
    waits, logged = {}, []
    call = StepGraph.__call__

    def counted(graph, batch, step):
        waits[step] = len(watch.waits)
        return call(graph, batch, step)

    monkeypatch.setattr(StepGraph, "__call__", counted)
    now = iter(range(0, 999))
    # A clock by which every fourth step is logged.
    monkeypatch.setattr("recclr.watching.time.perf_counter", lambda: 0.5 * next(now))

    def hear(event):
        if event["kind"] == "step":
            logged.append(event["step"])

    with Watch() as watch:
        run(model_of(FEATURES), num_steps=15, on_event=hear)
    read = [step for step in range(1, 15) if waits[step] > waits[step - 1]]
    # At the end of an epoch weights are looked at, to be written.
    assert read == sorted({step for step in logged if step < 15} | {5, 10})
    assert 2 <= len(set(logged) - {5, 10}) <= 7


# on a GPU


def on_gpu(captured, towers=FEATURES):
    """Losses of a training and its weights; fixed shapes both times."""
    device = torch.device("cuda")
    model, events = model_of(towers).to(device).train(), []
    log = DATA.train.to(device)
    source = BatchSource(log, TRAIN, seed=5, time_cells=needs_time_cells(model))
    objective = Objective(log, LossSettings(), SOURCES["mixed"], seed=5, fixed_shapes=True)
    optimizers = Optimizers(model, TRAIN, 20, fixed_shapes=True)
    graph = StepGraph(model, objective, optimizers, emit=events.append, device=CudaDevice(device))
    losses = []
    for step in range(20):
        batch = source.batch(step)
        quiet = step > 5 and step % 5 != 4 and captured
        torch.cuda.set_sync_debug_mode("error" if quiet else "default")
        stats = (
            graph(batch, step) if captured else one_step(model, objective, optimizers, batch, step)
        )
        torch.cuda.set_sync_debug_mode("default")
        losses.append(float(stats.loss.detach()))
    if captured:
        assert events == [{"kind": "graph", "captured": True, "reason": None}]
    return losses, {name: value.cpu() for name, value in copied(model).items()}


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("towers", [IDS, FEATURES, TIMED, BOTH, DROPPED])
def test_captured_training_equals_eager_training_and_waits_for_nothing(towers):
    losses, weights = on_gpu(True, towers)
    expected, expected_weights = on_gpu(False, towers)
    assert losses == pytest.approx(expected, abs=1e-5)
    assert_alike(expected_weights, weights, rtol=1e-4, atol=1e-5)
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_training_on_a_gpu_is_captured_and_equals_that_of_a_cpu(compiled, tmp_path):
    options = {"precision": "float32", "cuda_graph": True, "compile": compiled}
    train = TrainSettings(**{**vars(TRAIN), **options})
    # What is drawn differs between the two devices: everything is a candidate, nothing is dropped.
    loss = LossSettings(kind="full_softmax")
    asked, events = iter(range(1, 99)), []
    with pytest.raises(InterruptedTraining):
        run(
            model_of(DENSE),
            train=train,
            loss=loss,
            device="cuda",
            on_event=events.append,
            checkpoints=tmp_path,
            stop=lambda: next(asked) == 8,
        )
    assert {"kind": "graph", "captured": True, "reason": None} in events
    assert all(event["kind"] != "compile" for event in events)
    # Resumed, AdamW counts on the device again.
    model = model_of(DENSE, seed=1)
    run(model, train=train, loss=loss, device="cuda", checkpoints=tmp_path, resume=True)
    plain = model_of(DENSE)
    run(plain, loss=loss)
    assert_alike(copied(plain), copied(model.cpu()), rtol=1e-3, atol=1e-4)
