"""Settings that nothing reads are said, and only these: with them a training comes to the same."""

from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

import polars as pl
import pytest
import torch

from recclr.config import Config, parse_config
from recclr.data.prepare import prepare_for
from recclr.data.reading import read
from recclr.fitting import fit_model
from recclr.load import ranker_of
from recclr.read_where import READ_WHERE
from recclr.settings import DataSettings, FeatureSettings
from recclr.unread import BY_KIND, unread_settings

NUM_USERS, NUM_ITEMS, NUM_ROWS = 13, 23, 150
DAY_S = 86_400
# Read in every configuration, or refused where they would do nothing; of a section that need not
# be there: wherever it is.
_ALWAYS = """
seed export data.events data.users data.items data.columns.user data.columns.item
data.columns.timestamp data.columns.weight data.id_type data.bad_rows data.where
data.event_weights data.deduplicate data.k_core_user data.k_core_item data.max_per_user
data.decay_half_life_d data.resident split.by split.valid_events split.test_events
split.train_share *.id.enabled *.id.propagation *.id.propagation.weight
*.id.propagation.max_neighbours *.features *.features.kind *.features.dropout *.features.buckets
*.features.min_count *.features.shared *.features.subsample *.features.jitter *.features.swap
*.history *.history.length *.history.dropout *.history.use *.history.crop *.history.mask
*.history.reorder *.mlp *.dropout item.history.half_life_d model.mode model.embedding_dim
model.similarity model.popularity_bias model.init model.init_from loss.kind loss.temperature
loss.initial_temperature loss.min_temperature loss.max_temperature loss.second_temperature
loss.mask_known_positives loss.log_q loss.decoupled loss.hardness loss.top_k loss.symmetric
loss.positives loss.negative_weight loss.margin loss.mining loss.uniformity_weight
negatives.popularity.count negatives.popularity.alpha negatives.mined negatives.mined.count
negatives.mined.depth negatives.mined.skip negatives.mined.drop_popular
negatives.mined.max_train_rows negatives.mined.margin negatives.mined.relative_margin
negatives.mined.share negatives.mined.choice negatives.mined.pool negatives.mined.positive
negatives.mined.warmup_epochs negatives.mined.refresh_epochs negatives.explicit
negatives.explicit.events negatives.explicit.count negatives.explicit.weight negatives.queue
negatives.queue.size negatives.available negatives.available_lead_d negatives.within
self_supervision self_supervision.* self_supervision.*.weight
self_supervision.*.temperature self_supervision.*.batch_size self_supervision.*.distribution
self_supervision.*.dropout self_supervision.*.projection distillation distillation.run
distillation.weight train.batch_size train.chunk_size train.accumulate train.epochs
train.lr_scaling train.warmup train.decay train.checkpoint_every train.refit train.time_cells
train.precision train.cuda_graph train.compile train.sharded_tables train.collective_timeout_s
evaluate.ks evaluate.select evaluate.select_slice evaluate.keep_seen evaluate.num_bootstrap
baselines.names blend.spectral blend.runs blend.seeds blend.compress
"""


def every_key(kind=Config, path=""):
    """Every key there can be, with ``features`` for the name of each of them."""
    hints = get_type_hints(kind)
    names = Config.model_fields if kind is Config else [f.name for f in fields(kind)]
    for name in names:
        key, hint = f"{path}{name}", hints[name]
        inside = [h for h in (hint, *get_args(hint)) if is_dataclass(h)]
        if get_origin(hint) is dict and is_dataclass(get_args(hint)[1]):
            yield key
            yield from every_key(get_args(hint)[1], f"{key}.")
        elif inside:
            if hint is not inside[0]:
                yield key
            yield from every_key(inside[0], f"{key}.")
        else:
            yield key


def test_every_key_is_read_in_any_configuration_or_says_where():
    always = set()
    for key in _ALWAYS.split():
        sides = ("user", "item") if "*" in key else ("",)
        always |= {key.replace("*", side) for side in sides}
    by_kind = {f"{side}.features.{name}" for side in ("user", "item") for name in BY_KIND}
    assert not always & READ_WHERE.keys()
    assert set(every_key()) == always | READ_WHERE.keys() | by_kind
    assert BY_KIND.keys() <= {f.name for f in fields(FeatureSettings)}


KIND = {"kind": {"kind": "categorical"}}
YEAR = {"year": {"kind": "numeric"}}
VIEWS = {"item": {"batch_size": 9, "projection": 0, "dropout": 0.0}}
FULL = {"loss.kind": "full_softmax"}


@dataclass(frozen=True)
class Case:
    """A key with a value that is not its default, and configurations that do not and do read it.

    Attributes:
        timed: whether the log has times where the key is not read. trains: whether it is weights
            that show that it is read.
    """

    key: str
    value: Any
    unread: dict[str, Any] = field(default_factory=dict)
    read: dict[str, Any] = field(default_factory=dict)
    timed: bool = True
    trains: bool = True


CASES = [
    Case("data.time_unit", "s", timed=False, trains=False),
    Case("data.max_bad_share", 0.5, {}, {"data.bad_rows": "drop"}, trains=False),
    Case(
        "data.columns.event",
        "what",
        {},
        {"data.event_weights": {"view": 1.0, "buy": 2.0}},
        trains=False,
    ),
    Case("split.seed", 3, {"split.by": "time"}, {"split.by": "random"}, trains=False),
    Case(
        "split.seed",
        3,
        {"split.by": "leave_last", "split.valid": 1.0, "split.test": 1.0},
        {"split.train_share": 0.5},
        trains=False,
    ),
    Case(
        "split.valid",
        0.2,
        {"split.by": "given", "split.valid_events": "v", "split.test_events": "t"},
        {"split.by": "given", "split.test_events": "t"},
        trains=False,
    ),
    Case("split.test", 0.2, {"split.by": "given", "split.test_events": "t"}, trains=False),
    Case("user.id.dropout", 0.5, {"user.id.enabled": False, "user.history": {}}, {}),
    Case("item.id.dropout", 0.5, {"item.id.enabled": False, "item.features": KIND}, {}),
    Case("user.id.as_of", True, {"user.id.enabled": False, "user.history": {}}, {}),
    Case("item.id.as_of", True, {"item.id.enabled": False, "item.features": KIND}, {}),
    Case("item.augment.start", 0.5, {}, {"item.dropout": 0.5}),
    Case("item.augment.end", 0.5, {}, {"item.id.dropout": 0.5}),
    Case("user.augment.start", 0.5, {}, {"user.history": {"mask": 0.5}}),
    Case("user.augment.end", 0.5, {"user.history": {}}, {"user.history": {"crop": 0.5}}),
    Case(
        "user.augment.end",
        0.5,
        {"item.features": KIND},
        {
            "item.features": {"kind": {"kind": "categorical", "dropout": 0.5}},
            "user.history": {"use": "features"},
        },
    ),
    Case(
        "item.augment.mode",
        "complementary",
        {"item.features": KIND},
        {"item.features": KIND, "self_supervision": VIEWS},
    ),
    Case(
        "user.augment.mode",
        "complementary",
        {"user.history": {}},
        {"user.history": {}, "self_supervision": {"user": VIEWS["item"]}},
    ),
    *(
        Case(
            f"{side}.augment.share",
            0.7,
            {
                f"{side}.{parts}": value,
                f"{side}.augment.groups": [["id"]],
                f"{side}.augment.dropout": 0.5,
            },
            {
                f"{side}.{parts}": value,
                f"{side}.augment.dropout": 0.5,
                f"{side}.augment.mode": "complementary",
                **more,
            },
        )
        for side, parts, value, more in (
            ("item", "features", KIND | YEAR, {}),
            ("user", "history", {}, {"user.id.propagation": {}}),
        )
    ),
    *(
        Case(
            f"{side}.augment.{name}",
            value,
            {f"{side}.augment.views_only": True, f"{side}.dropout": 0.1, **more},
            more,
        )
        for side in ("user", "item")
        for name, value, more in (
            ("dimension_mask", 0.5, {}),
            ("noise", 0.5, {}),
        )
    ),
    *(
        Case(
            f"{side}.augment.{name}",
            value,
            {
                f"{side}.{parts}": of,
                f"{side}.augment.mode": "complementary",
                **more,
                f"{side}.augment.views_only": True,
            },
            {
                f"{side}.{parts}": of,
                f"{side}.augment.mode": "complementary",
                **more,
                **({f"{side}.augment.dropout": 0.5} if name == "groups" else {}),
            },
        )
        for side, parts, of, more in (
            ("item", "features", KIND | YEAR, {}),
            ("user", "history", {}, {"user.id.propagation": {}}),
        )
        for name, value in (
            ("groups", [["id", "kind" if side == "item" else "history"]]),
            ("dropout", 0.5),
        )
    ),
    Case(
        "item.augment.views_only",
        True,
        {"self_supervision": VIEWS},
        {"self_supervision": VIEWS, "item.augment.noise": 0.5},
    ),
    Case("user.augment.views_only", True, {}, {"user.augment.noise": 0.5}),
    Case(
        "user.augment.start", 0.5, {"user.history": {}, "item.dropout": 0.3}, {"user.dropout": 0.3}
    ),
    *(
        Case(
            f"item.augment.{name}",
            value,
            {"item.features": KIND, "item.augment.mode": "complementary", **more},
            {
                "item.features": KIND,
                "item.augment.mode": "complementary",
                **more,
                "self_supervision": VIEWS,
            },
            trains=False,
        )
        for name, value, more in (
            ("groups", [["id"]], {}),
            ("share", 0.7, {}),
            ("mode", "correlated", {"item.augment.views_only": True, "item.augment.dropout": 0.5}),
        )
    ),
    Case(
        "item.augment.dropout",
        0.5,
        {
            "item.features": KIND,
            "item.augment.mode": "complementary",
            "item.augment.views_only": True,
            "self_supervision": VIEWS,
        },
        {"item.features": KIND, "item.augment.mode": "complementary"},
    ),
    Case("user.history.half_life_d", 2.0, {"user.history": {}}, {"user.history": {}}, timed=False),
    *(
        Case(f"model.pairs.{name}", value, {}, {"model.mode": "item_item"})
        for name, value in (("window", 1), ("half_life", 0.1), ("query_length", 1))
    ),
    Case("model.pairs.within_d", 1.0, {}, {"model.mode": "item_item"}),
    Case(
        "model.pairs.within_d",
        1.0,
        {"model.mode": "item_item"},
        {"model.mode": "item_item"},
        timed=False,
    ),
    Case("loss.top_k_temperature", 0.1, {}, {"loss.top_k": 3}),
    Case("loss.log_q_strength", 0.3, FULL, {"negatives.in_batch": True}),
    Case("loss.log_q_strength", 0.3, FULL, {**FULL, "loss.symmetric": 0.5}),
    Case("negatives.in_batch", True, FULL, {}),
    Case("negatives.uniform", 3, FULL, {}),
    Case("negatives.popularity", {"count": 5, "alpha": 0.75}, FULL, {}),
    *(
        Case(
            f"negatives.queue.{name}",
            value,
            {"negatives.queue": {"size": 0}, "negatives.in_batch": True},
            {"negatives.queue": {"size": 30}, "negatives.in_batch": True},
        )
        for name, value in (("momentum", 0.2), ("warmup", 0.7))
    ),
    Case(
        "negatives.counts",
        "streaming",
        {"negatives.queue": {"size": 0}},
        {"negatives.in_batch": True},
    ),
    Case(
        "distillation.temperature",
        3.0,
        {"distillation": {"run": "there", "weight": 0.0}},
        {"distillation": {"run": "there"}},
        trains=False,
    ),
    Case("train.base_batch_size", 999, {}, {"train.lr_scaling": "sqrt"}),
    *(
        Case(
            key,
            value,
            {
                "user.id.enabled": False,
                "item.id.enabled": False,
                "item.features": YEAR,
                "user.history": {"use": "features"},
            },
            {},
        )
        for key, value in (
            ("train.table_lr", 0.5),
            ("train.table_optimizer", "rowwise_adam"),
            ("model.init_std", 3.0),
        )
    ),
    Case("loss.log_q_strength", 0.3, FULL, {"loss.kind": "bce"}),
    Case(
        "loss.log_q_strength",
        0.3,
        {"loss.kind": "triplet", "loss.mining": "hardest"},
        {"loss.kind": "triplet", "negatives.in_batch": True},
    ),
    Case("train.final_lr", 0.5, {"train.decay": "none"}, {}),
    Case("train.table_moments", "bfloat16", {"train.table_optimizer": "rowwise_adagrad"}, {}),
    Case("train.patience", 2, {"split.valid": 0.0}, {}, trains=False),
    Case("train.evaluate_every", 2.0, {"split.valid": 0.0}, {}, trains=False),
    Case(
        "train.evaluate_every",
        2.0,
        {"split.valid": 0.0, "negatives.queue": {"size": 0}},
        {},
        trains=False,
    ),
    Case(
        "train.evaluate_every",
        2.0,
        {"split.valid": 0.0},
        {"split.valid": 0.0, "negatives.in_batch": True, "negatives.queue": {}},
        trains=False,
    ),
    Case("baselines.budget", "full", {"split.valid": 0.0}, {}, trains=False),
    Case("train.dense_lr", 0.5, {}, {"item.features": KIND}),
    Case("train.dense_lr", 0.5, {}, {"loss.temperature": "learned"}),
    Case("train.clip_norm", 1e-6, {}, {"user.mlp": [5]}),
    Case("train.weight_decay", 9.0, {"item.features": KIND}, {"item.features": YEAR}),
    Case("train.weight_decay", 9.0, {"user.history": {}}, {"item.mlp": [5]}),
    Case("train.staleness_d", 30.0, {"item.features": YEAR}, {"user.history": {}}),
    Case(
        "train.staleness_d",
        30.0,
        {},
        {"negatives.available": True, "negatives.available_lead_d": 5.0},
    ),
    Case("train.staleness_d", 30.0, {"user.history": {}}, {"item.id.as_of": True}, timed=False),
    Case("blend.spectral_item_power", 0.5, {"blend.seeds": 1}, {"blend.spectral": 4}, trains=False),
    Case("blend.weights", [0.5], {"blend.seeds": 1}, {"blend.runs": ["there"]}, trains=False),
    Case("baselines.ease_max_items", 9, {"baselines.names": ["als"]}, {}, trains=False),
    Case("baselines.budget", "full", {"baselines.names": []}, {}, trains=False),
]


def config_of(values):
    """From dotted keys, whose features are sections of their own."""
    tree: dict[str, Any] = {
        "data": {"events": "unused.parquet"},
        "model": {"embedding_dim": 6},
        "train": {"epochs": 3.0, "batch_size": 16},
        "negatives": {},
    }
    for key, value in values.items():
        section = tree
        *path, last = key.split(".")
        for name in path:
            section = section.setdefault(name, {})
        section[last] = dict(value) if isinstance(value, dict) else value
    if not any(key.startswith("negatives") for key in values) and not tree["negatives"]:
        tree["negatives"] = {"uniform": 7} if "loss.kind" not in values else {}
    return parse_config(tree)


@cache
def the_log(timed):
    draws = torch.Generator().manual_seed(5)
    frame = pl.DataFrame(
        {
            "user_id": torch.randint(NUM_USERS, (NUM_ROWS,), generator=draws).numpy(),
            "item_id": (NUM_ITEMS * torch.rand(NUM_ROWS, generator=draws) ** 2).int().numpy(),
            "timestamp": 1_500_000_000 + DAY_S * torch.arange(NUM_ROWS).numpy(),
        }
    )
    items = pl.DataFrame(
        {
            "item_id": list(range(NUM_ITEMS)),
            "kind": [str(item % 4) for item in range(NUM_ITEMS)],
            "year": [float(item * 7 % 11) for item in range(NUM_ITEMS)],
        }
    )
    return read(frame if timed else frame.drop("timestamp"), items=items)


def trained(values, *, timed=True):
    """Every weight after a short training, and what is served."""
    config, log = config_of(values), the_log(timed)
    prepared = prepare_for(config, log, None, [])
    model, _ = fit_model(config, prepared.tensors, None, device="cpu", on_event=lambda event: None)
    ranker = ranker_of(model, prepared.tensors.cutoff)
    return {**model.weights(), "served": ranker.item_vectors, "users": ranker.user_vectors}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def said(values, *, timed=True):
    config = config_of(values)
    return unread_settings(config, timed=timed, validates=config.split.valid > 0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.key)
def test_a_key_is_said_where_nothing_reads_it_and_there_only(case):
    (sentence,) = [
        s
        for s in said({**case.unread, case.key: case.value}, timed=case.timed)
        if s.startswith(f"{case.key} = ")
    ]
    assert " does nothing here: " in sentence
    assert not [s for s in said({**case.read, case.key: case.value}) if s.startswith(case.key)]
    # At its default nobody set it.
    if case.key not in case.unread:
        assert not [s for s in said(case.unread, timed=case.timed) if s.startswith(f"{case.key} ")]


@pytest.mark.parametrize("case", [c for c in CASES if c.trains], ids=lambda case: case.key)
def test_what_is_said_to_do_nothing_does_nothing_and_anything_else_does(case):
    without = trained(case.unread, timed=case.timed)
    assert same(without, trained({**case.unread, case.key: case.value}, timed=case.timed))
    assert not same(trained(case.read), trained({**case.read, case.key: case.value}))


def test_a_full_softmax_reads_the_strength_for_explicit_negatives():
    explicit = {
        "negatives.explicit": {"events": ["hide"]},
        "data.columns.event": "what",
        "data.event_weights": {"buy": 1.0},
    }
    assert said({**FULL, **explicit, "loss.log_q_strength": 0.3}) == []


def test_every_key_of_the_table_has_a_case():
    assert {case.key for case in CASES} == READ_WHERE.keys()


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        ("column", {"kind": "statistics", "column": "year"}),
        ("transform", {"kind": "categorical", "transform": "quantile"}),
        ("windows_d", {"kind": "numeric", "windows_d": [3.0]}),
        ("age", {"kind": "numeric", "age": False}),
    ],
)
def test_settings_of_another_kind_of_feature_are_said(name, feature):
    (sentence,) = said({"item.features": {"year": feature}})
    assert sentence.startswith(f"item.features.year.{name} = ")
    assert f"kind is '{feature['kind']}', not '{BY_KIND[name][0]}'" in sentence
    kinds = {"column": "numeric", "transform": "numeric", "windows_d": "statistics"}
    right = feature | {"kind": kinds.get(name, "statistics")}
    assert said({"item.features": {"year": right}}) == []


def test_defaults_are_said_to_do_nothing_nowhere():
    assert said({}) == said({}, timed=False) == []
    assert isinstance(config_of({}).data, DataSettings)
