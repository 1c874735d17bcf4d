"""Two views as a term of the loss: who is shown, what it adds, and that it is all keyed."""

import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import binom

from recclr.batches import Batch
from recclr.building import build_model
from recclr.data.log import DenseColumn, EncodedLog, FeatureTable, Prepared
from recclr.keeping import load_weights
from recclr.ntxent import nt_xent
from recclr.rows import Rows
from recclr.settings import (
    FeatureSettings,
    IdSettings,
    LossSettings,
    ModelSettings,
    NegativesSettings,
    SelfSupervisionSettings,
    TowerSettings,
    TrainSettings,
    ViewSettings,
)
from recclr.stepping import Stepper
from recclr.train import fit
from recclr.views import EntityDraws

WORK = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("distributed") / "work.py")))
LOG = WORK.prepared().train
LOSS = WORK.LOSSES["infonce"]
PLAIN = ViewSettings(dropout=0.0, projection=0, batch_size=9, temperature=0.3, weight=0.7)


def stepper_of(views, *, towers="rich", model=None, log=LOG, **train):
    model = model or WORK.model_of(towers, LOSS)
    model.train()
    return Stepper(
        model,
        log,
        loss=LOSS,
        negatives=NegativesSettings(in_batch=True, uniform=5),
        train=TrainSettings(batch_size=13, **train),
        self_supervision=views,
        seed=4,
    )


def both(**options):
    of = ViewSettings(batch_size=7, **options)
    return SelfSupervisionSettings(item=of, user=replace(of, distribution="batch", weight=0.3))


def gradients(views, step=2, **options):
    """Statistics and every gradient of one step, tables as whole tensors."""
    stepper = stepper_of(views, **options)
    stats = stepper.objective.backward(stepper.model, stepper.source.step(step))
    found = {}
    for name, rows, grad in stepper.optimizers.tables.gradients():
        found[name] = torch.zeros_like(stepper.model.tables()[name].weight).index_add(0, rows, grad)
    dense = stepper.optimizers.dense.items()
    found |= {name: p.grad.clone() for name, p in dense if p.grad is not None}
    return stats, found


def is_likely(hits, trials, probability):
    low, high = binom.interval(1 - 1e-6, trials, probability)
    return low <= hits <= high


# what is added


def test_without_anything_hidden_the_term_is_nt_xent_of_equal_views():
    stats, _ = gradients(SelfSupervisionSettings(item=PLAIN), towers="ids")
    model = WORK.model_of("ids", LOSS)
    drawn, _ = stepper_of(SelfSupervisionSettings(item=PLAIN)).objective.self_supervision.draws[
        "item"
    ](stepper_of(None).source.batch(2), 2)
    items = model.all_vectors(None)[1][drawn].detach()
    assert (LOG.item_counts()[drawn] > 0).all(), "an unknown id is served another vector"
    expected = nt_xent(items, items, 0.3)
    torch.testing.assert_close(stats.auxiliary["item_nt_xent"], expected)
    plain, _ = gradients(None, towers="ids")
    torch.testing.assert_close(stats.loss, plain.loss + 0.7 * expected)
    assert plain.auxiliary == {}


@pytest.mark.parametrize("similarity", ["dot", "euclidean"])
def test_views_are_told_apart_by_the_angles_of_what_towers_give(similarity):
    """Whatever the lengths, of which the coordinates of a lift are made."""
    model = build_model(
        WORK.prepared(),
        user=TowerSettings(),
        item=TowerSettings(),
        model=ModelSettings(embedding_dim=6, similarity=similarity),
        loss=LOSS,
        seed=2,
    )
    views = SelfSupervisionSettings(item=PLAIN, user=replace(PLAIN, distribution="batch"))
    batch = stepper_of(None).source.batch(2)
    for length in (0.01, 30.0):
        with torch.no_grad():
            for table in model.tables().values():
                table.weight.mul_(length / table.weight.norm(dim=1).mean())
        stepper = stepper_of(views, model=model)
        terms = stepper.objective.backward(stepper.model, stepper.source.step(2)).auxiliary
        stepper.optimizers.forget()
        for side, tower in (("item", model.item_tower), ("user", model.user_tower)):
            drawn, _ = stepper.objective.self_supervision.draws[side](batch, 2)
            own = tower.parts[0].table.weight[drawn + 1].detach()
            expected = nt_xent(own, own, 0.3, entity_idx=drawn)
            torch.testing.assert_close(terms[f"{side}_nt_xent"], expected)


@pytest.mark.parametrize("towers", ["rich", "timed", "history"])
def test_loss_and_gradients_are_those_of_the_main_term_and_weight_times_those_of_the_others(towers):
    plain, without = gradients(None, towers=towers)
    one, twice = (
        gradients(
            SelfSupervisionSettings(
                item=replace(both().item, weight=weight),
                user=replace(both().user, weight=2 * weight),
            ),
            towers=towers,
        )
        for weight in (0.4, 0.8)
    )
    terms = one[0].auxiliary
    assert terms.keys() == {"item_nt_xent", "user_nt_xent"}
    assert all(float(term) > 0.1 for term in terms.values())
    expected = plain.loss + 0.4 * terms["item_nt_xent"] + 0.8 * terms["user_nt_xent"]
    torch.testing.assert_close(one[0].loss, expected)
    assert plain.num_masked == one[0].num_masked
    for name, grad in one[1].items():
        main = without.get(name, torch.zeros_like(grad))
        # Linear in the weight, from what the main term gives.
        torch.testing.assert_close(2 * grad - main, twice[1][name], atol=2e-6, rtol=2e-5)
    heads = {name for name in one[1] if name.startswith("self_supervision.")}
    assert len(heads) == 8
    assert all(one[1][name].abs().max() > 1e-5 for name in heads)


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.2},
        {"batch_size": 5},
        {"distribution": "batch"},
        {"distribution": "popularity"},
        {"dropout": 0.4},
        {"projection": 6},
        {"projection": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("side", ["item", "user"])
def test_every_setting_changes_the_term(side, change):
    of = ViewSettings(batch_size=7, projection=5)
    terms = [
        gradients(SelfSupervisionSettings(**{side: settings}))[0].auxiliary[f"{side}_nt_xent"]
        for settings in (of, of, replace(of, **change))
    ]
    assert terms[0] == terms[1] != terms[2]


def test_views_differ_from_each_other_and_from_step_to_step():
    views = stepper_of(both(dropout=0.3)).objective.self_supervision.views
    idx = torch.arange(500) % 17
    masks = {
        (side, step, view): views[side].rows(idx, None, step, view).uniform()
        for side in views
        for step in (0, 1)
        for view in (0, 1)
    }
    for key, mask in masks.items():
        assert torch.equal(mask, views[key[0]].rows(idx, None, *key[1:]).uniform())
        assert all(key == other or not torch.equal(mask, masks[other]) for other in masks)


@pytest.mark.parametrize("own", [0.0, 0.3])
@pytest.mark.parametrize("hidden", [0.0, 0.25])
def test_a_part_is_hidden_at_both_rates(own, hidden):
    count = 20_000
    rows = Rows(torch.arange(count), generator=torch.Generator().manual_seed(5), hide_rate=hidden)
    for shown in (rows, rows.part(0, count), rows.part(0, count).part(0, count)):
        found = shown.dropped(own)
        rate = 1 - (1 - own) * (1 - hidden)
        assert found is None if rate == 0 else is_likely(int(found.sum()), count, rate)
    assert Rows(torch.arange(3), hide_rate=hidden).dropped(own) is None


def test_an_id_without_dropout_is_hidden_in_a_view_as_the_unknown_one():
    model = WORK.model_of("ids", LOSS).train()
    part = model.item_tower.parts[0]
    assert part.always
    rows = Rows(torch.arange(17), generator=torch.Generator().manual_seed(1), hide_rate=0.5)
    found = part(rows)
    unknown = (found == part.table.weight[0]).all(1)
    known = (found == part.table.weight[1:]).all(1)
    assert (unknown ^ known).all()
    assert 0 < int(unknown.sum()) < 17


# who is shown


def batch_of(num_rows=6, *, time=True):
    users, items = torch.arange(num_rows) % 3, torch.arange(num_rows) % 2
    at = 100 + torch.arange(num_rows) if time else None
    return Batch(users, items, None, at, torch.tensor(77) if time else None, None)


def drawn_of(
    distribution, *, side="item", size=4, num_entities=10, counts=None, steps=400, **batch
):
    counts = torch.arange(num_entities) if counts is None else counts
    of = ViewSettings(distribution=distribution, batch_size=size)
    draws = EntityDraws(side, of, num_entities, counts, seed=3)
    return [draws(batch_of(**batch), step) for step in range(steps)]


def test_uniform_draws_reach_everybody_alike_and_each_once_a_step():
    found = [idx for idx, _ in drawn_of("uniform")]
    assert all(len(set(idx.tolist())) == 4 for idx in found)
    counts = torch.bincount(torch.cat(found), minlength=10)
    assert all(is_likely(int(count), 400, 0.4) for count in counts)
    everybody, _ = drawn_of("uniform", size=99, steps=1)[0]
    assert sorted(everybody.tolist()) == list(range(10))


def test_popular_ones_are_drawn_by_their_counts_and_the_unseen_never():
    counts = torch.tensor([0, 5, 0, 1, 14, 0])
    found = torch.cat([i for i, _ in drawn_of("popularity", num_entities=6, counts=counts)])
    assert len(found) == 1600
    for number, count in enumerate(torch.bincount(found, minlength=6).tolist()):
        assert is_likely(count, 1600, counts[number].item() / 20)


def test_the_batch_gives_its_own_rows_with_their_moments():
    every = {(int(u), int(a)) for u, a in zip(*vars_of(batch_of()), strict=True)}
    seen = set()
    for idx, at in drawn_of("batch", side="user"):
        assert len(idx) == 4
        pairs = set(zip(idx.tolist(), at.tolist(), strict=True))
        assert len(pairs) == 4
        seen |= pairs
    assert seen == every
    idx, at = drawn_of("batch", side="user", size=99, steps=1)[0]
    assert set(zip(idx.tolist(), at.tolist(), strict=True)) == every
    items, at = drawn_of("batch", size=99, steps=1)[0]
    assert sorted(items.tolist()) == [0, 0, 0, 1, 1, 1]
    assert at == 77


def vars_of(batch):
    return batch.user_idx.tolist(), batch.user_at.tolist()


@pytest.mark.parametrize("distribution", ["uniform", "popularity"])
def test_others_are_shown_at_the_moment_of_some_row(distribution):
    found = drawn_of(distribution, side="user")
    moments = torch.bincount(torch.cat([at for _, at in found]) - 100, minlength=6)
    assert len(moments) == 6
    assert all(is_likely(int(count), 1600, 1 / 6) for count in moments)
    assert all(at == 77 for _, at in drawn_of(distribution))
    assert all(at is None for _, at in drawn_of(distribution, side="user", time=False, steps=3))


def test_draws_follow_from_seed_step_and_side():
    first, again, later, users = (
        drawn_of("popularity", steps=9, side=side)[step][0].tolist()
        for side, step in (("item", 1), ("item", 1), ("item", 8), ("user", 1))
    )
    assert first == again
    assert first != later
    assert first != users


# chunks, accumulation, checkpoints


@pytest.mark.parametrize("chunk_size", [1, 5])
def test_chunks_give_every_gradient_of_the_whole(chunk_size):
    whole, expected = gradients(both())
    chunked, found = gradients(both(), chunk_size=chunk_size)
    assert found.keys() == expected.keys()
    for name, term in whole.auxiliary.items():
        torch.testing.assert_close(chunked.auxiliary[name], term)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, atol=2e-6, rtol=2e-5, msg=name)


def test_a_step_of_several_batches_has_the_term_once():
    views = SelfSupervisionSettings(item=PLAIN)
    stats, _ = gradients(views, step=1, towers="ids", accumulate=2)
    plain, _ = gradients(None, step=1, towers="ids", accumulate=2)
    assert stats.num_rows == plain.num_rows > 13
    torch.testing.assert_close(stats.loss - plain.loss, 0.7 * stats.auxiliary["item_nt_xent"])


def trained(folder, views, *, num_steps=None, resume=False):
    model, events = WORK.model_of("rich", LOSS), []
    fit(
        model,
        LOG,
        loss=LOSS,
        negatives=NegativesSettings(in_batch=True, uniform=5),
        train=TrainSettings(batch_size=13, epochs=2.5, dense_lr=0.02, clip_norm=0.5),
        self_supervision=views,
        checkpoints=folder,
        num_steps=num_steps,
        resume=resume,
        on_event=events.append,
    )
    return model, events


def test_a_resumed_training_is_the_uninterrupted_one_and_the_head_learns(tmp_path):
    trained(tmp_path / "whole", both())
    trained(tmp_path / "cut", both(), num_steps=4)
    trained(tmp_path / "cut", both(), resume=True)
    last = (tmp_path / "whole" / "LAST").read_text().strip()
    ends = [load_file(tmp_path / f / last / "tensors.safetensors") for f in ("whole", "cut")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    heads = {n: v for n, v in ends[0].items() if n.startswith("objective/self_supervision.")}
    assert len(heads) == 8
    for name, start in stepper_of(both()).objective.state.items():
        assert not torch.equal(heads[f"objective/{name}"], start)
    assert {n for n in ends[0] if n.startswith("optimizers/dense/self_supervision.")}


def test_the_head_is_no_part_of_the_model(tmp_path):
    model, events = trained(tmp_path, both())
    assert {"item_nt_xent", "user_nt_xent"} <= events[0].keys()
    plain = WORK.model_of("rich", LOSS)
    assert model.weights().keys() == plain.weights().keys()
    last = (tmp_path / "LAST").read_text().strip()
    load_weights(plain, load_file(tmp_path / last / "tensors.safetensors"))
    for one, other in zip(plain.all_vectors(99)[:2], model.all_vectors(99)[:2], strict=True):
        assert torch.equal(one, other)


def test_nothing_of_a_training_changes_without_it(tmp_path):
    ends = [trained(None, None)[0].weights() for _ in range(2)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    objective = stepper_of(None).objective
    assert objective.state == {}


# what it is for


def planted_catalogue():
    """Items of two features that tell the same of them: which of eight groups they are in.

    The log shows users of a group items of it, but the second feature it never shows: items with an
    interaction have the first one only, those without have the second one only, and a few, without
    interactions as well, have both.
    """
    draws, groups = torch.Generator().manual_seed(0), 8
    group = torch.arange(160) % groups
    kind = torch.arange(160) // 40  # 0, 1: in the log; 2: second feature only; 3: both
    codes = torch.nn.functional.one_hot(group, groups).float()
    shown = codes + 0.05 * torch.randn(160, groups, generator=draws)
    first = torch.where((kind == 2)[:, None], 0.0, shown)
    second = torch.where((kind < 2)[:, None], 0.0, shown.roll(1, 1))
    user = torch.arange(80).repeat_interleave(6)
    inside = torch.randint(10, (len(user),), generator=draws)
    item = (user % groups) + groups * inside
    log = EncodedLog(user.int(), item.int(), 80, 160)
    items = {"first": DenseColumn(first), "second": DenseColumn(second)}
    return Prepared(log, FeatureTable(80), FeatureTable(160, items)), group, kind


def cold_share(views):
    """Of users' first five among the items that only the second feature describes, the share of
    their own group; by chance one in eight.
    """
    prepared, group, kind = planted_catalogue()
    vector = FeatureSettings(kind="vector")
    model = build_model(
        prepared,
        user=TowerSettings(),
        item=TowerSettings(
            id=IdSettings(enabled=False), features={"first": vector, "second": vector}
        ),
        model=ModelSettings(embedding_dim=16),
        loss=LossSettings(),
        seed=1,
    )
    fit(
        model,
        prepared.train,
        loss=LossSettings(),
        negatives=NegativesSettings(in_batch=True, uniform=20),
        train=TrainSettings(batch_size=80, epochs=40, dense_lr=0.01, table_lr=0.05),
        self_supervision=views,
    )
    users, items = model.all_vectors(None)
    cold = (kind == 2).nonzero().squeeze(1)
    best = (users[:-1] @ items[cold].T).topk(5).indices
    return float((group[cold[best]] == (torch.arange(80) % 8)[:, None]).float().mean())


@pytest.mark.slow
def test_what_items_without_interactions_say_reaches_users_through_views():
    """Only views of the items that have both features tell that these mean the same."""
    without = cold_share(None)
    views = ViewSettings(weight=3.0, batch_size=160, dropout=0.4, projection=0)
    found = cold_share(SelfSupervisionSettings(item=views))
    assert without < 0.2
    assert found > 0.6
