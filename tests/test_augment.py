"""Parts of a tower hidden together, in one view or two; embeddings masked and blurred."""

import itertools
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, chisquare

from recclr.augment import Augmentation, augmentation, correlated_halves
from recclr.batches import BatchSource
from recclr.building import build_model
from recclr.data.log import CategoricalColumn
from recclr.errors import ConfigError
from recclr.objective import Objective
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
from recclr.stepping import Stepper
from recclr.train import fit

WORK = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("distributed") / "work.py")))
NAMES = ("id", "features.a", "features.b", "features.c", "history")
NO_COLUMNS = (None,) * len(NAMES)
M = 4000


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def rows_of(count=M, *, seed=0, **fields):
    return Rows(torch.arange(count), generator=draws(seed), **fields)


def is_rate(hits, rate):
    """Exact binomial test of a bool tensor."""
    return binomtest(int(hits.sum()), hits.numel(), rate).pvalue > 1e-6


def augmented(**settings):
    return Augmentation(AugmentSettings(**settings), NAMES, NO_COLUMNS)


def hidden_of(augment, rows):
    """bool [M, parts], and which parts are named at all."""
    found = augment.hidden(rows)
    never = torch.zeros(len(rows.idx), dtype=torch.bool)
    return torch.stack([found.get(name, never) for name in augment.names], 1), set(found)


# who is hidden together


@pytest.mark.parametrize("view", [None, 0, 1])
def test_a_group_is_hidden_by_one_draw_at_its_rate_and_others_by_theirs(view):
    augment = augmented(groups=(("a", "c"), ("id",)), dropout=(0.3, 0.15))
    hidden, named = hidden_of(augment, rows_of(view=view))
    assert named == {"features.a", "features.c", "id"}
    of_id, a, b, c, history = hidden.unbind(1)
    assert torch.equal(a, c)
    assert is_rate(a, 0.3)
    assert is_rate(of_id, 0.15)
    assert is_rate(a & of_id, 0.3 * 0.15)
    assert not (b | history).any()


def test_one_rate_may_serve_all_groups():
    hidden, _ = hidden_of(augmented(groups=(("a",), ("b", "c")), dropout=0.4), rows_of())
    assert is_rate(hidden[:, 1], 0.4)
    assert is_rate(hidden[:, 2], 0.4)
    assert is_rate(hidden[:, 1] & hidden[:, 2], 0.16)


@pytest.mark.parametrize("mode", ["complementary", "correlated"])
@given(share=st.floats(0.01, 0.99), seed=st.integers(0, 99), grouped=st.booleans())
@settings(max_examples=40)
def test_two_views_lack_disjoint_parts_that_are_all_parts(mode, share, seed, grouped):
    groups = (("b", "history"),) if grouped else ()
    augment = augmented(mode=mode, share=share, groups=groups)
    one, other = (hidden_of(augment, rows_of(50, seed=seed, view=view))[0] for view in (0, 1))
    assert not (one & other).any()
    assert (one | other).all()
    if grouped:
        assert torch.equal(one[:, 2], one[:, 4])
    units = one[:, [0, 1, 2, 3]] if grouped else one
    expected = min(max(int(share * units.shape[1]), 1), units.shape[1] - 1)
    assert (units.sum(1) == expected).all()


def test_every_half_is_as_likely_as_any_other():
    hidden, _ = hidden_of(augmented(mode="complementary", share=0.4), rows_of(view=0))
    numbers = (hidden * 2 ** torch.arange(5)).sum(1).bincount(minlength=32)
    counts = numbers[numbers > 0]
    assert len(counts) == 10  # pairs of five
    assert chisquare(counts).pvalue > 1e-6


def test_rows_of_a_step_lack_their_half_at_the_rate_and_views_always():
    augment = augmented(mode="complementary", dropout=0.3, share=0.6)
    hidden, _ = hidden_of(augment, rows_of())
    assert is_rate(hidden.any(1), 0.3)
    assert set(hidden.sum(1).tolist()) == {0, 3}
    for view in (0, 1):
        assert hidden_of(augment, rows_of(view=view))[0].any(1).all()
    assert augmented(mode="complementary").hidden(rows_of()) == {}


def test_views_of_one_row_draw_apart_whatever_is_not_shared():
    one, other = (rows_of(view=view) for view in (0, 1))
    assert torch.equal(one.uniform(3, shared=True), other.uniform(3, shared=True))
    first, second = one.dropped(0.5), other.dropped(0.5)
    assert is_rate(first & second, 0.25)
    assert not torch.equal(one.seeds(), other.seeds())
    assert abs(float((one.normal() * other.normal()).mean())) < 6 / M**0.5
    again = [rows_of(view=0).uniform(2) for _ in range(2)]
    assert torch.equal(*again)


def test_a_planted_partner_is_hidden_with_its_seed():
    """Of six columns each is a renaming of one other, and knows nothing of the rest."""
    generator = draws(5)
    pairs = []
    for _ in range(3):
        column = torch.randint(5, (600,), generator=generator)
        renamed = torch.randperm(5, generator=generator)[column]
        pairs += [CategoricalColumn(each.int(), 5) for each in (column, renamed)]
    # a and d, b and e, c and f.
    columns = [None, *pairs[0::2], *pairs[1::2]]
    names = ("id", *(f"features.{name}" for name in "abcdef"))
    # Two of seven; what has no column is hidden with the first of its equals.
    settings = AugmentSettings(mode="correlated", share=0.3)
    augment = Augmentation(settings, names, columns)
    one, _ = hidden_of(augment, rows_of(view=0))
    other, _ = hidden_of(augment, rows_of(view=1))
    assert torch.equal(one, ~other)
    with_id = one[:, 0]
    assert is_rate(with_id, 1 / 7)
    for left, right in ((1, 4), (2, 5), (3, 6)):
        assert torch.equal(one[~with_id, left], one[~with_id, right])
        assert is_rate(one[~with_id, left], 2 / 6)


def test_of_a_group_counts_the_member_that_tells_most():
    information = torch.zeros(5, 5, dtype=torch.float64)
    for one, other, value in ((0, 1, 0.1), (0, 3, 0.4), (1, 2, 0.3), (2, 4, 0.2)):
        information[one, other] = information[other, one] = value
    halves = correlated_halves(information, [[0], [1], [2, 3], [4]], 2)
    expected = [[1, 0, 1, 0], [0, 1, 1, 0], [1, 0, 1, 0], [0, 0, 1, 1]]
    assert torch.equal(halves, torch.tensor(expected, dtype=torch.bool))


# embeddings


def test_masked_coordinates_are_those_of_the_whole_step_and_the_rest_is_scaled():
    augment = augmented(dimension_mask=0.3)
    x = torch.randn(7, 900, generator=draws())
    found = augment.blurred(x, rows_of(7))
    masked = (found == 0).all(0)
    assert torch.equal(found == 0, masked.expand(7, -1))
    assert is_rate(masked, 0.3)
    torch.testing.assert_close(found[:, ~masked], x[:, ~masked] / 0.7)
    views = [(augment.blurred(x, rows_of(7, view=view)) == 0)[0] for view in (0, 1)]
    assert is_rate(views[0] & views[1], 0.09)


def test_noise_has_its_length_and_the_signs_of_the_embedding():
    x = torch.randn(300, 40, generator=draws())
    found = augmented(noise=0.7).blurred(x, rows_of(300))
    noise = found - x
    torch.testing.assert_close(noise.norm(dim=1), torch.full((300,), 0.7))
    assert (noise * x.sign() >= -1e-6).all()
    # Directions are those of uniform draws, and differ from row to row.
    drawn = rows_of(300).uniform(40)
    torch.testing.assert_close(noise, 0.7 * x.sign() * drawn / drawn.norm(dim=1, keepdim=True))


# whole towers


def tower_of(side, towers=None, **changes):
    user, item = towers or WORK.TOWERS["augmented"]
    settings = {"user": user, "item": item}
    if changes:
        settings[side] = replace(settings[side], **changes)
    model = build_model(
        WORK.prepared(),
        **settings,
        model=ModelSettings(embedding_dim=6),
        loss=LossSettings(),
        seed=2,
    ).train()
    with torch.no_grad():
        for parameter in model.dense_parameters().values():
            parameter += torch.randn(parameter.shape, generator=draws(1))
    return model.user_tower if side == "user" else model.item_tower


def seen(side, *, count=40, **fields):
    """Rows with repeats, each at a moment of its own."""
    num_rows = WORK.NUM_USERS if side == "user" else WORK.NUM_ITEMS
    generator = draws(3)
    idx = torch.randint(num_rows, (count,), generator=generator)
    at = torch.randint(WORK.NUM_ROWS, (count,), generator=generator) * 86_400
    without = torch.randint(WORK.NUM_ITEMS, (count,), generator=generator)
    return Rows(idx, at, without if side == "user" else None, **fields)


SIDES = ("user", "item")


@pytest.mark.parametrize("side", SIDES)
def test_at_inference_nothing_changes_bit_for_bit(side):
    plain = {
        "user": TowerSettings(
            id=IdSettings(dropout=0.1),
            features={"tags": FeatureSettings(kind="multi_hot")},
            history=HistorySettings(length=5, half_life_d=4.0, use="both"),
        ),
        "item": TowerSettings(
            id=IdSettings(dropout=0.1),
            features={
                "kind": FeatureSettings(kind="categorical"),
                "size": FeatureSettings(kind="numeric"),
            },
        ),
    }
    rows = seen(side)
    expected = tower_of(side, (plain["user"], plain["item"]))(rows)
    tower = tower_of(side)
    assert torch.equal(tower(rows), expected)
    assert not torch.allclose(tower(replace(rows, generator=draws())), expected)


@pytest.mark.parametrize("side", SIDES)
def test_a_share_of_nothing_leaves_everything_as_it_is(side):
    augment = replace(WORK.TOWERS["augmented"][SIDES.index(side)].augment, start=0.0, end=1.0)
    tower = tower_of(side, augment=augment)
    torch.testing.assert_close(tower(seen(side, generator=draws())), tower(seen(side)))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("view", [None, 0, 1])
@pytest.mark.parametrize("cuts", [(0, 40), (0, 13, 40), (0, 0, 7, 8, 29, 40)])
def test_parts_of_a_step_draw_what_the_whole_draws(side, view, cuts):
    tower = tower_of(side)
    fields = {"view": view, "progress": 0.3}
    whole = tower(seen(side, generator=draws(4), **fields))
    found = []
    for start, stop in itertools.pairwise(cuts):
        # As on a rank, each of which draws for all.
        rows = seen(side, generator=draws(4), **fields).part(start, stop)
        assert (rows.view, rows.progress) == (view, 0.3)
        found.append(tower(rows))
    torch.testing.assert_close(torch.cat(found), whole)


@pytest.mark.parametrize("view", [None, 1])
def test_padded_towers_draw_what_ragged_ones_draw(view):
    """Users; of the items of histories a padded step draws for as many as there could be."""
    _, item = WORK.TOWERS["augmented"]
    quiet = replace(
        item, augment=AugmentSettings(), features={"kind": FeatureSettings(kind="categorical")}
    )
    tower = tower_of("user", (WORK.TOWERS["augmented"][0], quiet))
    for seed in range(5):
        one, other = (
            tower(seen("user", generator=draws(seed), view=view, fixed_shapes=fixed))
            for fixed in (False, True)
        )
        torch.testing.assert_close(one, other)


def test_views_show_of_a_tower_what_the_masks_say():
    tower = tower_of(
        "item",
        features={"kind": FeatureSettings(kind="categorical")},
        augment=AugmentSettings(mode="complementary"),
        dropout=0.0,
        id=IdSettings(),
    )
    of_id, of_kind = tower.parts
    rows = seen("item")
    ids, kinds = of_id.table.weight[rows.idx + 1], of_kind.table.weight[of_kind.idx[rows.idx]]
    without_id, without_kind = of_id.table.weight[0] + kinds, ids + of_kind.table.weight[0]
    found = [tower(replace(rows, generator=draws(), view=v)) - tower.bias for v in (0, 1)]
    first = torch.isclose(found[0], without_id).all(1)
    torch.testing.assert_close(found[0], torch.where(first[:, None], without_id, without_kind))
    torch.testing.assert_close(found[1], torch.where(first[:, None], without_kind, without_id))
    assert 0 < first.sum() < len(first)


def test_only_views_are_changed_where_it_is_said_so():
    settings = AugmentSettings(
        groups=(("kind", "size"),), dropout=0.5, dimension_mask=0.4, noise=0.3, views_only=True
    )
    quiet = {
        "features": {name: FeatureSettings(kind=kind) for name, kind in KINDS.items()},
        "id": IdSettings(),
        "dropout": 0.0,
    }
    tower = tower_of("item", augment=settings, **quiet)
    expected = tower(seen("item"))
    assert torch.equal(tower(seen("item", generator=draws())), expected)
    assert not torch.allclose(tower(seen("item", generator=draws(), view=0)), expected)
    halves = AugmentSettings(mode="complementary", dropout=0.5, views_only=True)
    tower = tower_of("item", augment=halves, **quiet)
    assert torch.equal(tower(seen("item", generator=draws())), expected)


KINDS = {"kind": "categorical", "size": "numeric"}


# rates that change


def test_rates_are_linear_in_progress():
    augment = augmented(groups=(("a",),), dropout=0.8, start=0.2, end=0.7)
    for progress, share in ((0.0, 0.2), (0.4, 0.4), (1.0, 0.7)):
        rows = augment.scaled(rows_of(progress=progress))
        assert rows.share == pytest.approx(share)
        assert is_rate(hidden_of(augment, rows)[0][:, 1], 0.8 * share)
        assert is_rate(rows.dropped(0.5), 0.5 * share)


def test_the_progress_of_a_training_is_that_of_its_batches():
    settings = TrainSettings(batch_size=13, epochs=2.5, accumulate=2)
    model = WORK.model_of("ids", WORK.LOSSES["infonce"])
    stepper = Stepper(
        model,
        WORK.prepared().train,
        loss=LossSettings(),
        negatives=NegativesSettings(in_batch=True, uniform=5),
        train=settings,
        seed=4,
    )
    # Five batches an epoch; steps of two, two and one.
    assert stepper.objective.num_batches == round(2.5 * stepper.source.batches_per_epoch)
    found = [
        stepper.objective.progress(number)
        for step in range(stepper.num_steps)
        for number in stepper.source.step(step)
    ]
    assert found[0] == 0.0
    assert found[-1] == 1.0
    assert found == sorted(found)
    stepper.objective.num_batches = None
    assert stepper.objective.progress(99) == 0.0


def test_a_step_shows_its_towers_the_progress():
    model = WORK.model_of("ids", WORK.LOSSES["infonce"])
    log = WORK.prepared().train
    objective = Objective(log, LossSettings(), NegativesSettings(in_batch=True, uniform=5), seed=1)
    objective.num_batches, said = 5, []
    for tower in (model.user_tower, model.item_tower):
        tower.register_forward_pre_hook(lambda _, rows: said.append(rows[0].progress))
    source = BatchSource(log, TrainSettings(batch_size=13), seed=1, time_cells=False)
    objective(model, source.batch(3), 3)
    assert said == [0.75, 0.75]


# every key changes what is learned

BASE = (
    TowerSettings(
        features={"tags": FeatureSettings(kind="multi_hot")},
        history=HistorySettings(length=5, half_life_d=4.0),
    ),
    TowerSettings(features={name: FeatureSettings(kind=kind) for name, kind in KINDS.items()}),
)


def changed(side, field, **values):
    towers = list(BASE)
    old = towers[side]
    if field == "history":
        new = replace(old, history=replace(old.history, **values))
    elif field == "augment":
        new = replace(old, augment=AugmentSettings(**values))
    else:
        feature = replace(old.features[field], **values)
        new = replace(old, features={**old.features, field: feature})
    towers[side] = new
    return tuple(towers)


GROUPS = {"groups": (("kind", "size"),), "dropout": 0.4}
KEYS = {
    "subsample": (BASE, changed(0, "tags", subsample=0.4)),
    "swap of lists": (BASE, changed(0, "tags", swap=0.4)),
    "swap of categories": (BASE, changed(1, "kind", swap=0.4)),
    "swap of numbers": (BASE, changed(1, "size", swap=0.4)),
    "jitter": (BASE, changed(1, "size", jitter=0.4)),
    "crop": (BASE, changed(0, "history", crop=0.4)),
    "mask": (BASE, changed(0, "history", mask=0.4)),
    "reorder": (BASE, changed(0, "history", reorder=0.9)),
    "groups": (BASE, changed(1, "augment", **GROUPS)),
    "rates": (
        changed(1, "augment", **GROUPS),
        changed(1, "augment", groups=(("kind", "size"),), dropout=(0.6,)),
    ),
    "mode": (BASE, changed(1, "augment", mode="complementary", dropout=0.4)),
    "correlated": (
        changed(1, "augment", mode="complementary", dropout=0.4, share=0.7),
        changed(1, "augment", mode="correlated", dropout=0.4, share=0.7),
    ),
    "share": (
        changed(1, "augment", mode="complementary", dropout=0.4),
        changed(1, "augment", mode="complementary", dropout=0.4, share=0.7),
    ),
    "views_only": (
        changed(1, "augment", **GROUPS),
        changed(1, "augment", **GROUPS, views_only=True),
    ),
    "dimension_mask": (BASE, changed(0, "augment", dimension_mask=0.4)),
    "noise": (BASE, changed(0, "augment", noise=0.4)),
    "start": (changed(0, "augment", noise=0.4), changed(0, "augment", noise=0.4, start=0.1)),
    "end": (changed(0, "augment", noise=0.4), changed(0, "augment", noise=0.4, end=0.1)),
}


def weights_after(towers):
    model = build_model(
        WORK.prepared(),
        user=towers[0],
        item=towers[1],
        model=ModelSettings(embedding_dim=6),
        loss=LossSettings(),
        seed=2,
    )
    fit(
        model,
        WORK.prepared().train,
        loss=LossSettings(),
        negatives=NegativesSettings(in_batch=True, uniform=5),
        train=TrainSettings(batch_size=26, epochs=1),
    )
    return {name: value.detach().clone() for name, value in model.weights().items()}


@pytest.mark.parametrize("key", KEYS)
def test_each_key_changes_the_training(key):
    one, other, again = (weights_after(KEYS[key][number]) for number in (0, 1, 1))
    assert one.keys() == other.keys()
    assert any(not torch.equal(value, other[name]) for name, value in one.items())
    assert all(torch.equal(value, again[name]) for name, value in other.items())


# what is refused


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"dropout": 0.2}, "needs groups and dropout, or neither"),
        ({"groups": (("a",),)}, "needs groups and dropout, or neither"),
        ({"groups": (("a",),), "dropout": 0.96}, "dropout must be between 0.0 and 0.95"),
        ({"groups": (("a",),), "dropout": (-0.1,)}, "dropout must be between 0.0 and 0.95"),
        ({"groups": (("a",),), "dropout": float("nan")}, "dropout must be between"),
        ({"groups": (("a",),), "dropout": (0.1, 0.2)}, "2 rates for 1 groups"),
        ({"groups": (("a",), ()), "dropout": 0.1}, "a group is empty"),
        ({"groups": (("a",), ("b", "a")), "dropout": 0.1}, r"\['a'\] more than once"),
        ({"mode": "correlated", "groups": (("a",),), "dropout": (0.1,)}, "has one dropout"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        AugmentSettings(**values)


def test_groups_name_parts_of_their_tower():
    features = {"a": FeatureSettings(kind="categorical"), "b": FeatureSettings(kind="numeric")}
    augment = AugmentSettings(groups=(("a", "z"),), dropout=0.1)
    with pytest.raises(ValueError, match="names 'z', which the tower lacks; it has: id, a, b"):
        TowerSettings(features=features, augment=augment)
    with pytest.raises(ValueError, match="names 'history'"):
        TowerSettings(augment=AugmentSettings(groups=(("history",),), dropout=0.1))
    for groups in ((), (("id", "a", "b"),)):
        settings = AugmentSettings(mode="complementary", groups=groups)
        with pytest.raises(ValueError, match="needs two parts of which one can be hidden, found 1"):
            TowerSettings(features=features if groups else {}, augment=settings)
    # A feature goes before the part whose name it bears.
    named = {"id": FeatureSettings(kind="categorical")}
    tower = TowerSettings(features=named, augment=AugmentSettings(groups=(("id",),), dropout=0.1))
    assert tower.augment.units(tower.part_names()) == [[1]]


def test_features_refuse_what_their_kind_cannot_do():
    with pytest.raises(ValueError, match=r"subsample is for lists.*'categorical'"):
        FeatureSettings(kind="categorical", subsample=0.5)
    with pytest.raises(ValueError, match=r"jitter is for scaled numbers.*'vector'"):
        FeatureSettings(kind="vector", jitter=0.5)
    with pytest.raises(ValueError, match="no effect without half_life_d"):
        HistorySettings(reorder=0.5)
    untimed = replace(WORK.prepared().train, timestamp=None)
    with pytest.raises(ConfigError, match=r"history\.reorder: needs timestamps"):
        WORK.model_of("augmented", LossSettings(), log=untimed)


def test_nothing_asked_for_is_nothing_built():
    assert augmentation(AugmentSettings(), NAMES, NO_COLUMNS) is None
    assert tower_of("item", WORK.TOWERS["ids"]).augment is None
