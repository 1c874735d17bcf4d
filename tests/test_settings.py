"""Settings without pydantic: ranges hold for whoever makes them, and need the standard library."""

import math
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from functools import partial
from typing import get_args

import pytest

from recclr import settings
from recclr.metrics import DEFINITIONS
from recclr.settings import baselines as baseline_settings
from recclr.settings import blending

# One field per line with its closed range; None where the range has no upper end worth testing.
RANGES = [
    (settings.IdSettings, "dropout", 0.0, 0.95),
    (settings.HistorySettings, "length", 1, 100_000),
    (settings.HistorySettings, "half_life_d", 1e-6, 1e6),
    (settings.HistorySettings, "dropout", 0.0, 0.95),
    (settings.HistorySettings, "crop", 0.05, 1.0),
    (settings.HistorySettings, "mask", 0.0, 0.95),
    (settings.AugmentSettings, "share", 0.01, 0.99),
    (settings.AugmentSettings, "dimension_mask", 0.0, 0.95),
    (settings.AugmentSettings, "noise", 0.0, 100.0),
    (settings.AugmentSettings, "start", 0.0, 1.0),
    (settings.AugmentSettings, "end", 0.0, 1.0),
    (settings.TowerSettings, "dropout", 0.0, 0.95),
    (settings.PropagationSettings, "weight", 1e-6, 1e3),
    (settings.PropagationSettings, "max_neighbours", 1, 1 << 20),
    (settings.PairSettings, "window", 1, 1000),
    (settings.PairSettings, "within_d", 1e-6, 1e6),
    (settings.PairSettings, "half_life", 1e-3, 1e6),
    (settings.PairSettings, "query_length", 1, 100_000),
    (blending.BlendSettings, "spectral", 0, 8192),
    (blending.BlendSettings, "seeds", 0, 100),
    (blending.BlendSettings, "spectral_item_power", -2.0, 2.0),
    (partial(settings.DistillationSettings, run="there"), "weight", 0.0, 1.0),
    (partial(settings.DistillationSettings, run="there"), "temperature", 1e-3, 1e3),
    (settings.ModelSettings, "embedding_dim", 1, 8192),
    (settings.ModelSettings, "init_std", 1e-6, 100.0),
    (settings.LossSettings, "temperature", 1e-4, 1e4),
    (settings.LossSettings, "second_temperature", 0.01, 100.0),
    (settings.LossSettings, "log_q_strength", 0.0, 1.0),
    (settings.LossSettings, "hardness", 0.0, 10.0),
    (settings.LossSettings, "top_k", 1, 1 << 24),
    (settings.LossSettings, "top_k_temperature", 1e-4, 1e4),
    (settings.LossSettings, "symmetric", 0.0, 1.0),
    (settings.LossSettings, "positives", 1, 64),
    (partial(settings.LossSettings, kind="bce"), "negative_weight", 0.0, 1e6),
    (partial(settings.LossSettings, kind="triplet"), "margin", 0.0, 100.0),
    (partial(settings.LossSettings, kind="alignment_uniformity"), "uniformity_weight", 0.0, 1e4),
    (settings.ModelSettings, "popularity_bias", -100.0, 100.0),
    (settings.NegativesSettings, "uniform", 0, 1 << 24),
    (partial(settings.NegativesSettings, available=True), "available_lead_d", 0.0, 1e5),
    (settings.ViewSettings, "weight", 1e-6, 1e3),
    (settings.ViewSettings, "temperature", 1e-4, 1e4),
    (settings.ViewSettings, "batch_size", 2, 1 << 24),
    (settings.ViewSettings, "dropout", 0.0, 0.95),
    (settings.ViewSettings, "projection", 0, 65_536),
    (settings.MiningSettings, "count", 1, 1 << 10),
    (settings.MiningSettings, "depth", 1, 100_000),
    (settings.MiningSettings, "skip", 0, 99_999),
    (settings.MiningSettings, "drop_popular", 0.0, 0.999),
    (settings.MiningSettings, "max_train_rows", 0, 1 << 40),
    (settings.MiningSettings, "margin", -1e6, 1e6),
    (settings.MiningSettings, "relative_margin", 0.0, 1e3),
    (settings.MiningSettings, "share", 0.0, 1.0),
    (settings.MinedSettings, "pool", 1, 1 << 16),
    (settings.MinedSettings, "warmup_epochs", 0.0, 1e6),
    (settings.MinedSettings, "refresh_epochs", 0.001, 1e6),
    (settings.ExplicitSettings, "count", 1, 1 << 10),
    (settings.ExplicitSettings, "weight", 1e-4, 1e4),
    (settings.QueueSettings, "size", 0, 1 << 24),
    (settings.QueueSettings, "momentum", 0.0, 0.999999),
    (settings.QueueSettings, "warmup", 0.0, 1.0),
    (settings.TrainSettings, "batch_size", 1, 1 << 24),
    (settings.TrainSettings, "chunk_size", 1, 1 << 24),
    (settings.TrainSettings, "accumulate", 1, 1 << 16),
    (settings.TrainSettings, "base_batch_size", 1, 1 << 24),
    (settings.TrainSettings, "epochs", 0.001, 1e6),
    (settings.TrainSettings, "table_lr", 0.0, 1e4),
    (settings.TrainSettings, "dense_lr", 0.0, 1e3),
    (settings.TrainSettings, "weight_decay", 0.0, 10.0),
    (settings.TrainSettings, "warmup", 0.0, 1.0),
    (settings.TrainSettings, "final_lr", 0.0, 1.0),
    (settings.TrainSettings, "clip_norm", 1e-9, 1e9),
    (settings.TrainSettings, "patience", 0, 1 << 20),
    (settings.TrainSettings, "evaluate_every", 0.001, 1e6),
    (settings.TrainSettings, "checkpoint_every", 0.001, 1e6),
    (settings.TrainSettings, "staleness_d", 0.0, 1e5),
    (settings.TrainSettings, "collective_timeout_s", 1.0, 1e6),
    (settings.SplitSettings, "train_share", 1e-6, 1.0),
    (settings.EvaluateSettings, "num_bootstrap", 0, 1_000_000),
    (settings.TuneSettings, "trials", 1, 100_000),
    (settings.TuneSettings, "bracket", 1, 100_000),
    (settings.TuneSettings, "eta", 2, 1000),
    (settings.TuneSettings, "startup", 1, 100_000),
    (baseline_settings.BaselineSettings, "ease_max_items", 1, 200_000),
]
# What else must be set for the ends of a range to make sense, and what has no default.
BESIDE = {
    (settings.MiningSettings, "count"): {"depth": 9999},
    (settings.MiningSettings, "depth"): {"count": 1, "skip": 0},
    (settings.MiningSettings, "skip"): {"count": 1, "depth": 100_000},
    (settings.MinedSettings, "pool"): {"count": 1},
    (settings.NegativesSettings, "uniform"): {"in_batch": True},
    (settings.ExplicitSettings, "count"): {"events": ("shown",)},
    (settings.ExplicitSettings, "weight"): {"events": ("shown",)},
}


@pytest.mark.parametrize(
    ("kind", "name", "low", "high"), RANGES, ids=lambda v: getattr(v, "__name__", str(v))
)
def test_a_range_is_closed_and_says_itself(kind, name, low, high):
    for value in (low, high):
        assert getattr(kind(**BESIDE.get((kind, name), {}), **{name: value}), name) == value
    step = 1 if isinstance(low, int) else 1e-7
    for value in (low - step, high + max(step, abs(high) * 1e-6), math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=f"{name} must be between") as caught:
            kind(**BESIDE.get((kind, name), {}), **{name: value})
        assert f"{low} and {high}, found {value!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("made", "name", "low", "high"),
    [
        (partial(settings.FeatureSettings, kind="multi_hot"), "subsample", 0.05, 1.0),
        (partial(settings.FeatureSettings, kind="numeric"), "jitter", 0.0, 10.0),
        (partial(settings.FeatureSettings, kind="vector"), "swap", 0.0, 0.95),
        (partial(settings.HistorySettings, half_life_d=3.0), "reorder", 0.0, 1.0),
    ],
)
def test_what_needs_another_setting_has_a_range_as_well(made, name, low, high):
    test_a_range_is_closed_and_says_itself(made, name, low, high)


def test_every_number_of_the_training_has_a_range():
    tested = {(kind, name) for kind, name, _, _ in RANGES}
    numbers = [f.name for f in fields(settings.TrainSettings) if f.type in ("int", "float")]
    assert len(numbers) > 5
    for name in numbers:
        assert (settings.TrainSettings, name) in tested


def test_optimizers_without_a_twin_for_parts_of_tables_are_refused():
    for found in ("adam", "rowwise_adam"):
        for sharded in ("all", 9):
            with pytest.raises(ValueError, match=f"rowwise_adagrad or sgd; found {found!r}"):
                settings.TrainSettings(table_optimizer=found, sharded_tables=sharded)
        settings.TrainSettings(table_optimizer=found, sharded_tables="none")
    for fine in settings.SHARDED_OPTIMIZERS:
        assert settings.TrainSettings(table_optimizer=fine, sharded_tables=1).sharded_tables == 1
        for rows in (0, -1):
            with pytest.raises(ValueError, match="sharded_tables must be between 1 and"):
                settings.TrainSettings(table_optimizer=fine, sharded_tables=rows)


def test_mining_that_cannot_find_enough_is_refused():
    with pytest.raises(ValueError, match="at least count = 4 ranks, found depth = 12 and skip = 9"):
        settings.MiningSettings(depth=12, skip=9)
    with pytest.raises(ValueError, match="pool must be at least count = 4, found 3"):
        settings.MinedSettings(pool=3)
    with pytest.raises(ValueError, match="choice must be uniform, score or top, found 'best'"):
        settings.MiningSettings(choice="best")
    with pytest.raises(ValueError, match="names no event type"):
        settings.ExplicitSettings(events=())
    assert settings.MinedSettings(pool=70, depth=60, skip=20).width == 40
    assert settings.MinedSettings(pool=30, depth=60, skip=20).width == 30


def test_mined_negatives_and_a_full_softmax_clash():
    mined = settings.NegativesSettings(in_batch=True, mined=settings.MinedSettings())
    full = settings.LossSettings(kind="full_softmax")
    (clash,) = settings.contradictions(full, mined, "cosine")
    assert "scores every item" in clash
    assert settings.contradictions(settings.LossSettings(), mined, "cosine") == []
    assert settings.contradictions(full, settings.NegativesSettings(), "cosine") == []


@pytest.mark.parametrize("similarity", ["dot", "euclidean"])
def test_a_second_temperature_needs_scores_with_a_bound(similarity):
    plain = settings.NegativesSettings()
    for second, clashes in ((1.2, 1), (0.8, 1), (1.0, 0), (None, 0)):
        loss = settings.LossSettings(second_temperature=second)
        assert len(settings.contradictions(loss, plain, similarity)) == clashes
        assert settings.contradictions(loss, plain, "cosine") == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"decoupled": True, "second_temperature": 1.2}, "decoupled is second_temperature = 1"),
        ({"log_q": "classic", "decoupled": True}, "corrects the positive in the denominator"),
        ({"log_q": "classic", "second_temperature": 2.0}, "corrects the positive in the denom"),
        ({"log_q": "classic", "kind": "full_softmax"}, "samples nothing"),
        ({"positives": 3, "mask_known_positives": False}, "positives = 3 takes other train items"),
    ],
    ids=str,
)
def test_losses_that_contradict_themselves_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        settings.LossSettings(**options)
    for name in options:
        fine = {key: value for key, value in options.items() if key != name}
        settings.LossSettings(**fine)


@pytest.mark.parametrize(
    "options",
    [
        {"log_q": "classic"},
        {"second_temperature": 1.0},
        {"decoupled": True},
        {"hardness": 0.1},
        {"top_k": 9},
        {"symmetric": 0.1},
    ],
    ids=str,
)
def test_a_bound_follows_from_plain_losses_only(options):
    assert not settings.LossSettings(**options).is_plain
    for kind in ("infonce", "full_softmax"):
        assert settings.LossSettings(kind=kind, positives=3, log_q_strength=0.2).is_plain


# A value other than the default, and the kinds that read it.
READ_BY = [
    ("temperature", 0.2, ("infonce", "full_softmax", "bpr", "bce")),
    ("initial_temperature", 0.3, ("infonce", "full_softmax", "bpr", "bce")),
    ("min_temperature", 0.01, ("infonce", "full_softmax", "bpr", "bce")),
    ("max_temperature", 2.0, ("infonce", "full_softmax", "bpr", "bce")),
    ("second_temperature", 1.2, ("infonce", "full_softmax")),
    ("decoupled", True, ("infonce", "full_softmax")),
    ("hardness", 0.3, ("infonce", "full_softmax")),
    ("top_k", 7, ("infonce", "full_softmax")),
    ("top_k_temperature", 0.5, ("infonce", "full_softmax")),
    ("symmetric", 0.5, ("infonce", "full_softmax")),
    ("positives", 2, ("infonce", "full_softmax")),
    ("negative_weight", 2.0, ("bce", "ccl")),
    ("margin", 0.4, ("ccl", "margin", "triplet")),
    ("mining", "hardest", ("triplet",)),
    ("uniformity_weight", 0.4, ("alignment_uniformity",)),
]
KINDS = get_args(settings.LossKind)


@pytest.mark.parametrize(("name", "value", "kinds"), READ_BY)
def test_a_key_that_a_kind_would_not_read_is_refused(name, value, kinds):
    bounds = ("initial_temperature", "min_temperature", "max_temperature")
    learned = {"temperature": "learned"} if name in bounds else {}
    for kind in KINDS:
        if kind in kinds:
            made = settings.LossSettings(kind=kind, **{name: value}, **learned)
            assert getattr(made, name) == value
            continue
        with pytest.raises(ValueError, match=f"{name} = {value!r} does nothing with kind") as told:
            settings.LossSettings(kind=kind, **{name: value})
        assert all(repr(other) in str(told.value) for other in kinds)


@pytest.mark.parametrize("temperature", ["auto", 0.2])
def test_where_a_learned_temperature_starts_is_refused_of_another(temperature):
    for name, value in (("initial_temperature", 0.2), ("min_temperature", 0.01)):
        with pytest.raises(ValueError, match=f"{name} = {value} is read with temperature = 'learn"):
            settings.LossSettings(temperature=temperature, **{name: value})


def test_what_has_no_negatives_reads_neither_their_correction_nor_their_mask():
    for options in ({"log_q_strength": 0.5}, {"mask_known_positives": False}):
        settings.LossSettings(kind="triplet", **options)
        with pytest.raises(ValueError, match="does nothing with kind = 'alignment_uniformity'"):
            settings.LossSettings(kind="alignment_uniformity", **options)


def test_margins_within_which_no_negative_lies():
    with pytest.raises(ValueError, match=r"below 1 with kind = 'ccl', found 1\.0"):
        settings.LossSettings(kind="ccl", margin=1.0)
    with pytest.raises(ValueError, match="above 0 with kind = 'margin'"):
        settings.LossSettings(kind="margin", margin=0.0)
    settings.LossSettings(kind="ccl", margin=0.99)
    settings.LossSettings(kind="triplet", margin=0.0)


def test_lists_are_checked_value_by_value():
    with pytest.raises(ValueError, match=r"mlp widths .*\[8, 0\]"):
        settings.TowerSettings(mlp=(8, 0))
    for ks in ((), (5, 0), (100_001,)):
        with pytest.raises(ValueError, match="ks must be cut-offs"):
            settings.EvaluateSettings(ks=ks, select="recall@5")
    for days in ((0.0,), (3.0, -1.0), (math.inf,)):
        with pytest.raises(ValueError, match="windows_d must be positive"):
            settings.FeatureSettings(kind="statistics", windows_d=days)


def test_a_statistics_feature_of_nothing():
    with pytest.raises(ValueError, match="windows_d, or age"):
        settings.FeatureSettings(kind="statistics", windows_d=(), age=False)
    settings.FeatureSettings(kind="statistics", windows_d=(), age=True)
    settings.FeatureSettings(kind="numeric", windows_d=(), age=False)


def test_one_resample_is_no_interval():
    with pytest.raises(ValueError, match="0 for none, or 2 and more"):
        settings.EvaluateSettings(num_bootstrap=1)
    assert settings.EvaluateSettings(num_bootstrap=2).num_bootstrap == 2


def test_every_metric_to_select_by_has_a_definition():
    for name in settings.METRIC_NAMES:
        assert settings.EvaluateSettings(ks=(7,), select=f"{name}@7").select == f"{name}@7"
        assert f"{name}@k" in DEFINITIONS


def test_names_that_are_none_and_settings_that_cannot_change():
    assert settings.ColumnSettings(timestamp="").timestamp is None
    assert settings.ColumnSettings(timestamp="t").timestamp == "t"
    with pytest.raises(FrozenInstanceError):
        settings.ModelSettings().embedding_dim = 3
    with pytest.raises(ValueError, match=r"unknown baselines \['svd'\]"):
        baseline_settings.BaselineSettings(names=("als", "svd"))


def test_the_standard_library_is_enough():
    program = (
        "import sys; before = set(sys.modules); import recclr.settings\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(new - set(sys.stdlib_module_names) - {'recclr'})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
