"""Compiled layers: the same numbers, the same names, and no training lost to a compiler."""

import copy
import shutil

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from recclr.building import build_model
from recclr.compiling import _dense_layers, compile_layers
from recclr.data.log import DenseColumn, EncodedLog, FeatureTable, Prepared
from recclr.objective import Objective
from recclr.rows import Rows
from recclr.settings import (
    FeatureSettings,
    LossSettings,
    ModelSettings,
    NegativesSettings,
    TowerSettings,
    TrainSettings,
)
from recclr.statistics import DAY_S
from recclr.train import fit

NUM_USERS, NUM_ITEMS, DIM, NUM_ROWS = 7, 11, 6, 33
NEGATIVES = NegativesSettings(in_batch=True, uniform=5)
COMPILED = TrainSettings(batch_size=9, epochs=1.5, compile=True, dense_lr=0.02)


def prepared():
    draws = torch.Generator().manual_seed(1)
    log = EncodedLog(
        torch.randint(NUM_USERS, (NUM_ROWS,), generator=draws).int(),
        torch.randint(NUM_ITEMS, (NUM_ROWS,), generator=draws).int(),
        num_users=NUM_USERS,
        num_items=NUM_ITEMS,
        timestamp=torch.arange(NUM_ROWS) * DAY_S,
    )
    columns = {"image": DenseColumn(torch.randn(NUM_ITEMS, 3, generator=draws))}
    return Prepared(log, FeatureTable(NUM_USERS), FeatureTable(NUM_ITEMS, columns))


DATA = prepared()


def model_of(seed=0):
    model = build_model(
        DATA,
        user=TowerSettings(mlp=(5,)),
        item=TowerSettings(
            features={
                "image": FeatureSettings(kind="vector"),
                "recent": FeatureSettings(kind="statistics", windows_d=(4.0,)),
            },
            mlp=(8,),
        ),
        model=ModelSettings(embedding_dim=DIM),
        loss=LossSettings(),
        seed=seed,
    )
    draws = torch.Generator().manual_seed(seed)
    for layer in _dense_layers(model):
        for weight in layer.parameters():
            # A block starts as the identity, whose compiled form could be anything.
            torch.nn.init.normal_(weight, std=0.5, generator=draws)
    return model.train()


def forwards(model):
    """Vectors with gradient, as a step asks for them."""
    rows = Rows(torch.arange(7), torch.tensor(30 * DAY_S))
    return model.embed_users(rows), model.embed_items(rows)


class Backend:
    """Of torch.compile: runs what it is given, and fails at the n-th graph and beyond."""

    def __init__(self, fails_at=99):
        self.fails_at, self.graphs, self.runs = fails_at, 0, 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        if self.graphs >= self.fails_at:
            raise RuntimeError("no kernel for this\n  in three lines\n")

        def run(*args):
            self.runs += 1
            return graph.forward(*args)

        return run


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model, backend, said, train=COMPILED, **options):
    return compile_layers(
        model, train, bfloat16=False, emit=said.append, backend=backend, **options
    )


def test_layers_run_compiled_while_they_train_and_plain_otherwise():
    model, plain, backend, said = model_of(), model_of(), Backend(), []
    names = list(model.state_dict())
    make_plain = compiled(model, backend, said)
    # Two blocks, an image's network and that of statistics: each tried once.
    assert backend.runs == 4
    assert all(map(torch.equal, forwards(model), forwards(plain)))
    assert backend.runs == 8
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_parameters()] == [
        name for name, _ in plain.named_parameters()
    ]
    assert all(p.grad is None for p in model.parameters())
    model.all_vectors(30 * DAY_S)
    # One that an evaluation keeps is plain as well.
    forwards(copy.deepcopy(model))
    assert backend.runs == 8
    make_plain()
    forwards(model)
    assert backend.runs == 8
    assert said == []


def test_batches_of_another_size_need_no_other_program():
    model, backend = model_of(), Backend()
    compiled(model, backend, [])
    graphs = backend.graphs
    for size in (5, 3, 6):
        model.embed_items(Rows(torch.arange(size), torch.tensor(30 * DAY_S)))
    assert backend.graphs == graphs


@pytest.mark.slow
def test_many_layers_are_all_compiled():
    """A compiler gives up on a function of which it has made eight variants."""
    widths = tuple(range(2, 12))
    model = build_model(
        DATA,
        user=TowerSettings(mlp=widths),
        item=TowerSettings(),
        model=ModelSettings(embedding_dim=DIM),
        loss=LossSettings(),
        seed=0,
    )
    backend, said = Backend(), []
    compiled(model.train(), backend, said)
    assert backend.runs == len(widths)
    forwards(model)
    assert (backend.runs, said) == (2 * len(widths), [])


@pytest.mark.parametrize("fails_at", [1, 3])
def test_a_compiler_that_fails_leaves_all_layers_plain_and_is_named_once(fails_at):
    model, plain, backend, said = model_of(), model_of(), Backend(fails_at), []
    compiled(model, backend, said)
    runs = backend.runs
    assert all(map(torch.equal, forwards(model), forwards(plain)))
    assert backend.runs == runs
    (event,) = said
    assert (event["kind"], event["compiled"]) == ("compile", False)
    assert "no kernel for this" in event["reason"]
    assert "\n" not in event["reason"]


def test_a_backward_pass_that_fails_to_compile_is_seen_before_training():
    def refuse(graph, inputs):
        raise RuntimeError("no backward kernel")

    model, plain, said = model_of(), model_of(), []
    backend = aot_autograd(fw_compiler=lambda graph, inputs: graph.forward, bw_compiler=refuse)
    compiled(model, backend, said)
    assert ["no backward kernel" in event["reason"] for event in said] == [True]
    sum(vectors.sum() for vectors in forwards(model)).backward()
    sum(vectors.sum() for vectors in forwards(plain)).backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)


def test_a_failure_in_the_middle_of_a_training_is_survived():
    model, plain, said = model_of(), model_of(), []
    compiled(model, Backend(), said)

    def break_down(x):
        raise RuntimeError("recompiling failed")

    model.user_tower.blocks[0]._compiled_call_impl.compiled = break_down
    for _ in range(2):
        assert all(map(torch.equal, forwards(model), forwards(plain)))
    assert [event["reason"] for event in said] == ["RuntimeError: recompiling failed"]


def test_memory_that_does_not_suffice_is_no_fault_of_the_compiler():
    model, said = model_of(), []
    compiled(model, Backend(), said)

    def exhaust(x):
        raise torch.OutOfMemoryError("none left")

    model.user_tower.blocks[0]._compiled_call_impl.compiled = exhaust
    with pytest.raises(torch.OutOfMemoryError):
        forwards(model)
    assert said == []


@pytest.mark.parametrize("wanted", ["auto", False])
def test_on_a_cpu_nothing_is_compiled_unless_asked_for(wanted):
    model, backend, said = model_of(), Backend(), []
    compiled(model, backend, said, TrainSettings(compile=wanted))
    forwards(model)
    assert (backend.graphs, said) == (0, [])


def run(train, **options):
    model = model_of()
    fit(model, DATA.train, loss=LossSettings(), negatives=NEGATIVES, train=train, **options)
    return model


def test_a_training_without_a_compiler_is_the_plain_one(monkeypatch):
    def absent(*args, **options):
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(torch, "compile", absent)
    events = []
    model = run(COMPILED, on_event=events.append)
    plain = run(TrainSettings(**{**vars(COMPILED), "compile": False}))
    said = [event for event in events if event["kind"] == "compile"]
    assert [event["reason"] for event in said] == ["RuntimeError: no C++ compiler found"]
    assert all(map(torch.equal, model.state_dict().values(), plain.state_dict().values()))


def test_a_training_leaves_the_model_plain(monkeypatch):
    backend, compile_ = Backend(), torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda call, **options: compile_(call, **{**options, "backend": backend})
    )
    model = run(COMPILED)
    assert backend.runs > 4 * 6
    assert all(layer._compiled_call_impl is None for layer in _dense_layers(model))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("bfloat16", [False, True])
def test_compiled_layers_equal_plain_ones_in_value_and_gradient(bfloat16):
    model, plain, said = model_of(), model_of(), []
    compile_layers(model, COMPILED, bfloat16=bfloat16, emit=said.append)
    assert said == []
    losses = []
    for each in (model, plain):
        objective = Objective(DATA.train, LossSettings(), NEGATIVES, seed=2, bfloat16=bfloat16)
        batch = batch_of()
        loss = objective(each, batch, 0).loss
        loss.backward()
        losses.append(loss.detach())
    # Compiled code keeps more digits between two roundings to bfloat16.
    exact = {"rtol": 5e-2, "atol": 2e-2} if bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(losses[0], losses[1], **exact)
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, other.grad, msg=name, **exact)
    assert model.user_tower.blocks[0]._compiled_call_impl is not None


def batch_of():
    from recclr.batches import BatchSource

    return BatchSource(DATA.train, COMPILED, seed=2, time_cells=True).batch(1)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_compiled_training_comes_to_the_weights_of_the_plain_one():
    events = []
    model = run(COMPILED, on_event=events.append)
    assert [event["kind"] for event in events] == ["step"]
    plain = run(TrainSettings(**{**vars(COMPILED), "compile": False}))
    for (name, one), other in zip(
        model.state_dict().items(), plain.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=2e-3, msg=name)
