"""The loop: it learns what was planted, stops where it should, and resumes to the same bits."""

import json
import math

import pytest
import torch
from torch import nn

from recclr import files
from recclr.building import build_model
from recclr.checkpoint import find_checkpoint, load_checkpoint
from recclr.data.log import CategoricalColumn, DenseColumn, EncodedLog, FeatureTable, Prepared
from recclr.errors import (
    CheckpointError,
    ConfigError,
    DivergedError,
    InterruptedTraining,
    StoreError,
)
from recclr.keeping import load_weights
from recclr.losses import automatic_temperature
from recclr.rows import Rows
from recclr.settings import (
    AugmentSettings,
    FeatureSettings,
    HistorySettings,
    IdSettings,
    LossSettings,
    ModelSettings,
    NegativesSettings,
    TowerSettings,
    TrainSettings,
)
from recclr.statistics import DAY_S
from recclr.stepping import needs_time_cells
from recclr.towers import TwoTower
from recclr.train import fit

pytestmark = pytest.mark.usefixtures("no_power_cut")

NUM_USERS, NUM_ITEMS, DIM = 9, 13, 4
NEGATIVES = NegativesSettings(in_batch=True, uniform=5)
# 45 rows in batches of 12: four steps an epoch, the last one shorter; ten steps in all.
SHORT = TrainSettings(batch_size=12, epochs=2.5, dense_lr=0.02, table_lr=0.05)


def prepared(*, timed=True):
    generator = torch.Generator().manual_seed(0)
    log = EncodedLog(
        torch.randint(NUM_USERS, (45,), generator=generator).int(),
        torch.randint(NUM_ITEMS, (45,), generator=generator).int(),
        num_users=NUM_USERS,
        num_items=NUM_ITEMS,
        timestamp=torch.arange(45) * DAY_S if timed else None,
        weight=1 + torch.rand(45, generator=generator),
    )
    items = {
        "kind": CategoricalColumn(torch.randint(4, (NUM_ITEMS,), generator=generator).int(), 4),
        "image": DenseColumn(torch.randn(NUM_ITEMS, 6, generator=generator)),
    }
    return Prepared(log, FeatureTable(NUM_USERS), FeatureTable(NUM_ITEMS, items))


IDS = (TowerSettings(), TowerSettings())
# Everything that draws: dropout of ids, features, histories and coordinates.
RICH = (
    TowerSettings(
        id=IdSettings(dropout=0.2),
        history=HistorySettings(length=3, half_life_d=4.0, dropout=0.3, use="both"),
        mlp=(5,),
    ),
    TowerSettings(
        id=IdSettings(dropout=0.1),
        features={
            "kind": FeatureSettings(kind="categorical", dropout=0.2),
            "image": FeatureSettings(kind="vector", dropout=0.1),
        },
        mlp=(5,),
        dropout=0.2,
    ),
)
# What else draws, at rates that change while the training goes on.
AUGMENTED = (
    TowerSettings(
        history=HistorySettings(
            length=3, half_life_d=4.0, crop=0.7, mask=0.2, reorder=0.8, use="both"
        ),
        augment=AugmentSettings(mode="complementary", dropout=0.5, noise=0.2, end=0.1),
    ),
    TowerSettings(
        features={"kind": FeatureSettings(kind="categorical", swap=0.3)},
        augment=AugmentSettings(dimension_mask=0.3, start=0.2),
    ),
)
RECENT = {"recent": FeatureSettings(kind="statistics", windows_d=(9.0,))}
TIMED = (RICH[0], TowerSettings(id=IdSettings(as_of=True), features=RECENT))


def model_of(towers=IDS, data=None, *, seed=0, similarity="cosine", loss=None, dim=DIM):
    return build_model(
        data or prepared(),
        user=towers[0],
        item=towers[1],
        model=ModelSettings(embedding_dim=dim, similarity=similarity),
        loss=loss or LossSettings(),
        seed=seed,
    )


def run(model, data=None, *, train=SHORT, loss=None, negatives=NEGATIVES, **options):
    log = (data or prepared()).train
    return fit(model, log, loss=loss or LossSettings(), negatives=negatives, train=train, **options)


def copied(model):
    return {name: value.detach().clone() for name, value in model.weights().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# it learns


def planted(num_blocks=5, per_block=6, users_per_block=12):
    """Users who take items of their own block only; two of each user's block are held out."""
    num_users, num_items = num_blocks * users_per_block, num_blocks * per_block
    users = torch.arange(num_users).repeat_interleave(per_block)
    places = torch.arange(per_block).repeat(num_users)
    items = users % num_blocks * per_block + places
    out = (places + users // num_blocks) % per_block < 2
    log = EncodedLog(users[~out].int(), items[~out].int(), num_users=num_users, num_items=num_items)
    return Prepared(log, FeatureTable(num_users), FeatureTable(num_items)), users[out], items[out]


@pytest.mark.parametrize(
    ("towers", "loss"),
    [
        (IDS, LossSettings(temperature=0.2)),
        (IDS, LossSettings(temperature=0.2, kind="full_softmax")),
        ((TowerSettings(id=IdSettings(enabled=False), history=HistorySettings()), IDS[1]), None),
    ],
    ids=["ids", "full softmax", "history"],
)
def test_a_planted_taste_is_found_without_an_error(towers, loss):
    data, users, items = planted()
    model = model_of(towers, data, loss=loss, dim=16)

    def recall():
        user_vectors, item_vectors = model.all_vectors(None)
        scores = user_vectors[:-1] @ item_vectors.T
        scores[data.train.user_idx.long(), data.train.item_idx.long()] = -torch.inf
        best = scores.topk(2, dim=1).indices
        return (best[users] == items[:, None]).any(1).float().mean().item()

    assert recall() < 0.4
    train = TrainSettings(batch_size=90, epochs=30, table_lr=0.03)
    run(model, data, train=train, loss=loss, negatives=NegativesSettings(in_batch=True, uniform=24))
    assert recall() == 1.0


def test_bfloat16_towers_learn_with_every_kind_of_part():
    losses = []
    train = TrainSettings(batch_size=45, epochs=60, dense_lr=0.02, precision="bfloat16")
    features = TowerSettings(id=IdSettings(enabled=False), features=RICH[1].features)
    history = TowerSettings(history=HistorySettings(use="features", half_life_d=4.0))
    model = model_of((history, features))
    for _ in range(2):
        result = run(model, train=train, on_event=lambda event: losses.append(event["loss"]))
        assert result.steps == 60
    assert losses[1] < losses[0]
    assert all(weight.dtype == torch.float32 for weight in model.weights().values())


# stopping


def scripted(values, kept=None):
    """An evaluation with given values that keeps the weights it saw."""
    left = list(values)

    def evaluate(model):
        # As a careless one would leave it.
        model.eval()
        if kept is not None:
            kept.append(copied(model))
        return {"recall@20": left.pop(0), "other": 0.0}

    return evaluate


@pytest.mark.parametrize("on_disk", [False, True])
def test_patience_ends_training_and_the_best_weights_come_back(tmp_path, on_disk):
    kept = []
    model = model_of(RICH)
    result = run(
        model,
        train=TrainSettings(batch_size=12, epochs=9, patience=2),
        evaluate=scripted([0.1, 0.4, 0.4, 0.3, 0.9], kept),
        checkpoints=tmp_path / "c" if on_disk else None,
    )
    assert (result.steps, result.best_step, result.best_value) == (16, 8, 0.4)
    assert result.steps_per_epoch == 4
    assert [e["metrics"]["recall@20"] for e in result.evaluations] == [0.1, 0.4, 0.4, 0.3]
    assert [e["epoch"] for e in result.evaluations] == [1.0, 2.0, 3.0, 4.0]
    assert same(copied(model), kept[1])
    assert not same(kept[1], kept[3])
    assert not model.training
    if on_disk:
        best = find_checkpoint(tmp_path / "c", "BEST")
        assert best.folder.name == "step-8"
        assert same({f"model/{name}": w for name, w in kept[1].items()}, model_part(best))


def model_part(checkpoint):
    return {name: w for name, w in checkpoint.tensors.items() if name.startswith("model/")}


def test_without_patience_it_runs_to_the_end_and_is_judged_there():
    kept = []
    model = model_of()
    result = run(model, evaluate=scripted([0.5, 0.2, 0.1], kept), select="recall@20")
    assert (result.steps, result.best_step) == (10, 4)
    assert [e["step"] for e in result.evaluations] == [4, 8, 10]
    assert same(copied(model), kept[0])


def test_the_metric_named_by_select_decides():
    model, kept = model_of(), []
    result = run(model, evaluate=scripted([0.5, 0.2, 0.9], kept), select="other")
    assert (result.best_step, result.best_value) == (4, 0.0)
    with pytest.raises(ConfigError, match=r"'recall@9'.*other, recall@20"):
        run(model_of(), evaluate=scripted([0.5]), select="recall@9")


def test_a_metric_that_is_not_finite_is_no_best():
    with pytest.raises(DivergedError, match="recall@20 is nan at step 8"):
        run(model_of(), evaluate=scripted([0.5, math.nan, 0.9]))


def test_without_evaluation_the_last_step_is_the_result():
    result = run(model_of())
    assert (result.steps, result.best_step, result.best_value) == (10, 10, None)
    assert result.evaluations == []


def test_num_steps_ends_early_under_the_same_schedule():
    train = TrainSettings(**{**vars(SHORT), "warmup": 0.5})
    full, weights = model_of(RICH), []

    def watch():
        weights.append(copied(full))
        return False

    run(full, train=train, stop=watch)
    assert len(weights) == 10
    for num_steps in (1, 7, 10, 99):
        cut = model_of(RICH)
        result = run(cut, train=train, num_steps=num_steps)
        assert result.steps == min(num_steps, 10)
        assert same(copied(cut), weights[result.steps - 1])


# resuming


def settings_for(optimizer):
    return TrainSettings(
        **{**vars(SHORT), "table_optimizer": optimizer, "clip_norm": 1.0, "checkpoint_every": 0.5}
    )


def recall_like(model):
    """A metric that moves up and down with the weights, without any data."""
    users, items = model.all_vectors(60 * DAY_S)
    return {"recall@20": float((users @ items.T).sin().sum())}


def arguments(towers, optimizer, root):
    return {
        "train": settings_for(optimizer),
        "evaluate": recall_like,
        "checkpoints": root,
        "seed": 3,
    }


def final(root, model, result):
    """All there is to compare at the end of a run."""
    last, best = find_checkpoint(root), find_checkpoint(root, "BEST")
    return {
        "last": (last.folder.name, last.digest, last.state),
        "best": (best.folder.name, best.digest, best.state),
        "weights": copied(model),
        "result": (result.steps, result.best_step, result.best_value, result.evaluations),
    }


def assert_identical(one, other):
    assert same(one.pop("weights"), other.pop("weights"))
    assert one == other


CASES = {
    "ids, adam": (IDS, "adam"),
    "all parts, adam": (RICH, "adam"),
    "augmented, adam": (AUGMENTED, "adam"),
    "all parts, rowwise": (RICH, "rowwise_adam"),
    "time cells, adagrad": (TIMED, "rowwise_adagrad"),
    "time cells, sgd": (TIMED, "sgd"),
}


@pytest.mark.parametrize(
    "case",
    [
        "ids, adam",
        "all parts, adam",
        "augmented, adam",
        "time cells, adagrad",
        pytest.param("all parts, rowwise", marks=pytest.mark.slow),
        pytest.param("time cells, sgd", marks=pytest.mark.slow),
    ],
)
def test_resumed_at_any_step_it_is_the_uninterrupted_run(tmp_path, case):
    towers, optimizer = CASES[case]
    model = model_of(towers)
    whole = run(model, **arguments(towers, optimizer, tmp_path / "whole"))
    expected = final(tmp_path / "whole", model, whole)
    for interrupted_at in range(1, whole.steps):
        root = tmp_path / str(interrupted_at)
        asked = iter(range(1, 99))
        with pytest.raises(InterruptedTraining, match=f"after step {interrupted_at} of"):
            run(
                model_of(towers),
                **arguments(towers, optimizer, root),
                stop=lambda asked=asked, at=interrupted_at: next(asked) == at,
            )
        assert find_checkpoint(root).state["step"] == interrupted_at
        # Another start: nothing of it may survive the resume.
        again = model_of(towers, seed=1)
        result = run(again, **arguments(towers, optimizer, root), resume=True)
        assert_identical(final(root, again, result), dict(expected))


@pytest.mark.parametrize("case", ["all parts, adam", "time cells, adagrad"])
def test_interrupted_in_every_step_it_is_still_the_uninterrupted_run(tmp_path, case):
    towers, optimizer = CASES[case]
    model = model_of(towers)
    whole = run(model, **arguments(towers, optimizer, tmp_path / "whole"))
    root = tmp_path / "parts"
    for step in range(whole.steps - 1):
        with pytest.raises(InterruptedTraining):
            run(
                model_of(towers, seed=min(step, 1)),
                **arguments(towers, optimizer, root),
                resume=True,
                stop=lambda: True,
            )
    again = model_of(towers, seed=1)
    # At the last step there is nothing left to interrupt.
    result = run(again, **arguments(towers, optimizer, root), resume=True, stop=lambda: True)
    assert_identical(final(root, again, result), final(tmp_path / "whole", model, whole))


def test_a_crash_between_checkpoints_costs_the_steps_since_and_nothing_else(tmp_path, monkeypatch):
    model = model_of(RICH)
    whole = run(model, **arguments(RICH, "adam", tmp_path / "whole"))
    for crashed_at in range(1, whole.steps + 1):
        root = tmp_path / str(crashed_at)
        monkeypatch.setattr(files, "_reached", {})
        monkeypatch.setenv("RECCLR_FAULT", f"train.step:{crashed_at}:eio")
        with pytest.raises(OSError, match="Input/output"):
            run(model_of(RICH), **arguments(RICH, "adam", root))
        monkeypatch.delenv("RECCLR_FAULT")
        last = find_checkpoint(root)
        # One every half epoch, which is two steps.
        assert (last.state["step"] if last else 0) == (crashed_at - 1) // 2 * 2
        again = model_of(RICH) if last is None else model_of(RICH, seed=1)
        result = run(again, **arguments(RICH, "adam", root), resume=True)
        assert_identical(final(root, again, result), final(tmp_path / "whole", model, whole))


@pytest.mark.parametrize("point", ["checkpoint.renamed", "checkpoint.best", "checkpoint.manifest"])
def test_a_crash_while_a_checkpoint_is_written_changes_nothing_in_the_end(
    tmp_path, monkeypatch, point
):
    model = model_of(RICH)
    whole = run(model, **arguments(RICH, "adam", tmp_path / "whole"))
    for count in (1, 2, 5):
        root = tmp_path / str(count)
        monkeypatch.setattr(files, "_reached", {})
        monkeypatch.setenv("RECCLR_FAULT", f"{point}:{count}:eio")
        with pytest.raises((OSError, StoreError)):
            run(model_of(RICH), **arguments(RICH, "adam", root))
        monkeypatch.delenv("RECCLR_FAULT")
        again = model_of(RICH, seed=min(count - 1, 1))
        result = run(again, **arguments(RICH, "adam", root), resume=True)
        assert_identical(final(root, again, result), final(tmp_path / "whole", model, whole))


def test_a_damaged_last_costs_the_steps_since_the_one_before(tmp_path):
    options = {"train": settings_for("adam"), "seed": 3}
    model = model_of(RICH)
    run(model, **options)
    root = tmp_path / "c"
    asked = iter(range(1, 99))
    with pytest.raises(InterruptedTraining):
        run(model_of(RICH), **options, checkpoints=root, stop=lambda: next(asked) == 7)
    path = root / "step-7" / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    again = model_of(RICH, seed=1)
    run(again, **options, checkpoints=root, resume=True)
    assert same(copied(again), copied(model))


def test_a_finished_run_is_resumed_to_its_result_without_a_step(tmp_path):
    model = model_of(RICH)
    whole = run(model, **arguments(RICH, "adam", tmp_path))
    again, events = model_of(RICH, seed=1), []
    result = run(again, **arguments(RICH, "adam", tmp_path), resume=True, on_event=events.append)
    assert events == []
    assert_identical(final(tmp_path, again, result), final(tmp_path, model, whole))


class Normalised(nn.Module):
    """Somebody's own tower whose running statistics are state as well."""

    def __init__(self, num_rows):
        super().__init__()
        self.embedding = nn.Embedding(num_rows, DIM)
        self.norm = nn.BatchNorm1d(DIM)

    def forward(self, rows):
        return self.norm(self.embedding(rows.idx))


def normalised(seed):
    torch.manual_seed(seed)
    return TwoTower(
        Normalised(NUM_USERS + 1),
        Normalised(NUM_ITEMS),
        num_users=NUM_USERS,
        num_items=NUM_ITEMS,
        similarity="cosine",
        loss=LossSettings(),
    )


def test_buffers_of_other_peoples_towers_are_resumed_and_restored(tmp_path):
    model, kept = normalised(0), []
    run(model, evaluate=scripted([0.1, 0.9, 0.2], kept))
    assert same(copied(model), kept[1])
    assert kept[1]["user_tower.norm.num_batches_tracked"] == 8
    asked = iter(range(1, 99))
    root = tmp_path / "c"
    with pytest.raises(InterruptedTraining):
        run(normalised(0), checkpoints=root, stop=lambda: next(asked) == 5)
    again = normalised(1)
    run(again, checkpoints=root, resume=True, evaluate=scripted([0.9, 0.2]))
    assert same(copied(again), kept[1])


def test_checkpoints_of_an_earlier_run_are_never_mixed_with_a_new_one(tmp_path):
    run(model_of(), checkpoints=tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ConfigError, match="earlier run"):
        run(model_of(), checkpoints=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_resume_with_another_model_or_optimiser_is_refused(tmp_path):
    run(model_of(), checkpoints=tmp_path, train=settings_for("adam"))
    with pytest.raises(CheckpointError, match="does not fit"):
        run(model_of(RICH), checkpoints=tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="table_optimizer"):
        run(model_of(), checkpoints=tmp_path, resume=True, train=settings_for("sgd"))
    state = tmp_path / find_checkpoint(tmp_path).folder.name / "state.json"
    manifest = state.with_name("manifest.json")
    state.write_text(json.dumps({"step": 10, "unheard_of": 1}))
    signed = json.loads(manifest.read_text())
    signed["files"]["state.json"]["sha256"] = files.sha256_of(state)
    manifest.write_text(json.dumps(signed))
    with pytest.raises(CheckpointError, match="unheard_of"):
        run(model_of(), checkpoints=tmp_path, resume=True, train=settings_for("adam"))


def test_a_best_that_is_gone_is_an_error_and_not_another_model(tmp_path):
    options = {"evaluate": scripted([0.9, 0.2, 0.1]), "checkpoints": tmp_path}
    asked = iter(range(1, 99))
    with pytest.raises(InterruptedTraining):
        run(model_of(), **options, stop=lambda: next(asked) == 9)
    (tmp_path / "step-4" / "tensors.safetensors").unlink()
    with pytest.raises(CheckpointError, match="step-4"):
        run(model_of(), **options, resume=True)


def test_weights_that_do_not_fit_load_nothing():
    model = model_of(RICH)
    tensors = {f"model/{name}": value + 1 for name, value in copied(model).items()}
    before = copied(model)
    name = next(iter(tensors))
    for change in (
        {name: torch.zeros(1)},
        {name: tensors[name] * torch.nan},
        {"model/more": torch.zeros(1)},
    ):
        with pytest.raises(CheckpointError, match="does not fit"):
            load_weights(model, {**tensors, **change})
        assert same(copied(model), before)
    with pytest.raises(CheckpointError, match="missing"):
        load_weights(model, {k: value for k, value in tensors.items() if k != name})
    load_weights(model, {**tensors, "optimizers/tables/x": torch.zeros(1)})
    assert same(copied(model), {k.removeprefix("model/"): v for k, v in tensors.items()})


# diverging


def broken(model, name):
    with torch.no_grad():
        model.weights()[name].view(-1)[0] = torch.nan
    return model


def weight_named(model, part):
    return next(name for name in model.weights() if part in name)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (["log_temperature"], "learned temperature is not finite; set loss.temperature"),
        (["table.weight"], r"embedding table .*table\.weight is not finite; lower train.table_lr"),
        (["network"], r"layer .*network\..* is not finite; lower train.dense_lr"),
        (["table.weight", "network"], "lower train.table_lr and train.dense_lr"),
    ],
)
def test_a_loss_that_is_not_finite_names_the_weight_that_broke_first(parts, words):
    model = model_of(RICH)
    for part in parts:
        broken(model, weight_named(model, part))
    with pytest.raises(DivergedError, match=words) as caught:
        run(model)
    assert "nan at step 1:" in str(caught.value)


def huge_feature():
    data = prepared()
    values = torch.full((NUM_ITEMS, 6), 1e38)
    data.items.columns["image"] = DenseColumn(values)
    return data


@pytest.mark.parametrize(
    ("temperature", "words"), [(0.5, "all weights are finite.*numeric features"), (0.002, "0.002;")]
)
def test_finite_weights_leave_a_feature_or_the_temperature_as_the_cause(temperature, words):
    loss, data = LossSettings(temperature=temperature), huge_feature()
    model = model_of(RICH, data, similarity="dot", loss=loss)
    with pytest.raises(DivergedError, match=words):
        run(model, data, loss=loss)


def broken_after(model, step):
    """A ``stop`` that breaks the item table once so many steps are done, and never stops."""
    done = iter(range(1, 99))

    def stop():
        if next(done) == step:
            with torch.no_grad():
                model.item_tower.parts[0].table.weight.fill_(torch.nan)
        return False

    return stop


def test_the_cause_is_looked_for_before_an_update_spreads_it(tmp_path):
    # After the update of step 7, the users and the temperature would be broken as well.
    model = model_of()
    with pytest.raises(DivergedError, match="at step 7: embedding table item_tower") as caught:
        run(model, stop=broken_after(model, 6), checkpoints=tmp_path)
    assert "checkpoint is untouched" in str(caught.value)
    found = find_checkpoint(tmp_path)
    assert found.state["step"] == 4
    assert all(torch.isfinite(value).all() for value in found.tensors.values())
    assert torch.isfinite(model.user_tower.parts[0].table.weight).all()


def test_an_update_that_overflows_is_not_written(tmp_path):
    # Users so long that scores just fit float32, and the gradient of an item times the rate
    # does not: the loss of this step is finite, and its weights are lost.
    loss = LossSettings(temperature=0.01)
    model = model_of(similarity="dot", loss=loss)
    users, items = (tower.parts[0].table for tower in (model.user_tower, model.item_tower))
    with torch.no_grad():
        users.weight.copy_(1e34 * users.weight.sign())
        items.weight.sign_()
    train = TrainSettings(batch_size=4, table_optimizer="sgd", table_lr=1e4, warmup=0.0)
    with pytest.raises(DivergedError, match="overflowed at step 1: embedding table item_tower"):
        run(model, train=train, loss=loss, num_steps=1, checkpoints=tmp_path)
    assert find_checkpoint(tmp_path) is None


# events, settings, and what is left behind


def test_events_tell_of_the_first_step_and_of_every_evaluation(tmp_path):
    events = []
    result = run(
        model_of(RICH),
        evaluate=scripted([0.1, 0.5, 0.2]),
        on_event=events.append,
        checkpoints=tmp_path,
    )
    assert [event["kind"] for event in events] == ["step"] + ["evaluation"] * 3
    step, *evaluations = json.loads(json.dumps(events, allow_nan=False))
    assert (step["step"], step["num_steps"], step["epoch"]) == (1, 10, 0.25)
    assert step["temperature"] == pytest.approx(automatic_temperature(NUM_ITEMS))
    assert 0 < step["loss"] < 20
    assert step["positives_per_s"] > 0
    assert 0 < step["masked_share"] < 1
    assert 0 < step["num_candidates"] <= NUM_ITEMS
    assert step["information"] < math.log(NUM_ITEMS + 1)
    assert [event["best"] for event in evaluations] == [True, True, False]
    kept = [{k: event[k] for k in ("step", "epoch", "metrics")} for event in evaluations]
    assert kept == result.evaluations == find_checkpoint(tmp_path).state["evaluations"]


def test_steps_are_logged_as_time_passes(monkeypatch):
    monkeypatch.setattr("recclr.watching._LOG_EVERY_S", 0.0)
    events = []
    run(model_of(), on_event=events.append)
    assert [event["step"] for event in events] == list(range(1, 11))
    # Half a cosine over ten steps, from the peak.
    rates = [event["lr"] for event in events]
    expected = [0.05 * (1 + math.cos(math.pi * step / 10)) / 2 for step in range(10)]
    assert rates[1:] == pytest.approx(expected[1:], rel=0.05)


def test_needs_of_statistics_and_as_of_ids_are_met_or_refused():
    assert not needs_time_cells(model_of(RICH))
    for towers in (
        TIMED,
        (IDS[0], TowerSettings(id=IdSettings(as_of=True))),
        (TowerSettings(features=RECENT), IDS[1]),
    ):
        assert needs_time_cells(model_of(towers))
    off = TrainSettings(**{**vars(SHORT), "time_cells": False})
    for item in (
        TIMED[1],
        TowerSettings(features=RECENT),
        TowerSettings(id=IdSettings(as_of=True)),
    ):
        with pytest.raises(ConfigError, match="time_cells"):
            run(model_of((IDS[0], item)), train=off)
    # Each user stands at its own event, with or without cells.
    run(model_of((TowerSettings(features=RECENT), IDS[1])), train=off)


def test_too_few_negatives_are_refused_before_any_step():
    log = EncodedLog(torch.zeros(3).int(), torch.zeros(3).int(), num_users=1, num_items=1)
    data = Prepared(log, FeatureTable(1), FeatureTable(1))
    with pytest.raises(ConfigError, match="in-batch negatives"):
        run(model_of(data=data), data, negatives=NegativesSettings(in_batch=True, uniform=0))


def test_batches_of_one_row_need_negatives_from_elsewhere():
    alone = TrainSettings(batch_size=1, epochs=0.2)
    with pytest.raises(ConfigError, match="batches of at least 2 rows, found 1"):
        run(model_of(), train=alone, negatives=NegativesSettings(in_batch=True, uniform=0))
    run(model_of(), train=alone)
    whole = LossSettings(kind="full_softmax")
    run(model_of(), train=alone, loss=whole, negatives=NegativesSettings(in_batch=True, uniform=0))


def touch(model):
    """A gradient that somebody else left in the model."""
    model.train()
    rows = Rows(torch.tensor([0, 1]), torch.tensor(60 * DAY_S))
    (model.embed_users(rows).sum() + model.embed_items(rows).sum()).backward()


def test_a_gradient_left_in_the_model_does_not_leak_into_training():
    clean, dirty, dirtied = (model_of(RICH) for _ in range(3))
    rising = [0.1, 0.2, 0.3]
    run(clean, evaluate=scripted(rising))
    touch(dirty)
    run(dirty, evaluate=scripted(rising))
    judge = scripted(rising)

    def leave_a_gradient(model):
        touch(model)
        return judge(model)

    result = run(dirtied, evaluate=leave_a_gradient)
    assert result.best_step == 10
    assert same(copied(clean), copied(dirty))
    assert same(copied(clean), copied(dirtied))


def is_free_of_steps(model):
    return all(not table.lookups for table in model.tables().values()) and all(
        parameter.grad is None for parameter in model.parameters()
    )


@pytest.mark.parametrize("how", ["finished", "interrupted", "diverged", "crashed"])
def test_no_step_is_left_in_the_model_however_training_ends(tmp_path, monkeypatch, how):
    model = model_of(RICH)
    options = {}
    if how == "interrupted":
        options = {"stop": lambda: True, "checkpoints": tmp_path}
    elif how == "diverged":
        broken(model, weight_named(model, "network"))
    elif how == "crashed":

        def fail(*args):
            raise RuntimeError("out of memory")

        monkeypatch.setattr("recclr.optimizers.Optimizers.step", fail)
    try:
        run(model, **options)
    except (InterruptedTraining, DivergedError, RuntimeError):
        assert how != "finished"
    else:
        assert how == "finished"
    assert is_free_of_steps(model)


def test_checkpoints_are_whole_runs_by_themselves(tmp_path):
    model = model_of(RICH)
    run(model, checkpoints=tmp_path, train=settings_for("adam"))
    found = load_checkpoint(tmp_path / "step-10")
    assert found.state["step"] == 10
    fresh = model_of(RICH, seed=5)
    load_weights(fresh, found.tensors)
    assert same(copied(fresh), copied(model))
    # Both optimisers: three moments of each table, three of each trained weight.
    moments = [name for name in found.tensors if name.startswith("optimizers/")]
    tables, dense = len(model.tables()), len(model.dense_parameters())
    assert len(moments) == 3 * (tables + dense)
