"""Settings without pydantic: ranges hold for whoever makes them, and need the standard library."""

import math
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields

import pytest

from recclr import settings
from recclr.metrics import DEFINITIONS
from recclr.settings import baselines as baseline_settings

# One field per line with its closed range; None where the range has no upper end worth testing.
RANGES = [
    (settings.IdSettings, "dropout", 0.0, 0.95),
    (settings.HistorySettings, "length", 1, 100_000),
    (settings.HistorySettings, "half_life_d", 1e-6, 1e6),
    (settings.HistorySettings, "dropout", 0.0, 0.95),
    (settings.TowerSettings, "dropout", 0.0, 0.95),
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
    (settings.NegativesSettings, "uniform", 0, 1 << 24),
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
    (settings.EvaluateSettings, "num_bootstrap", 0, 1_000_000),
    (baseline_settings.BaselineSettings, "ease_max_items", 1, 200_000),
]


@pytest.mark.parametrize(
    ("kind", "name", "low", "high"), RANGES, ids=lambda v: getattr(v, "__name__", str(v))
)
def test_a_range_is_closed_and_says_itself(kind, name, low, high):
    for value in (low, high):
        assert getattr(kind(**{name: value}), name) == value
    step = 1 if isinstance(low, int) else 1e-7
    for value in (low - step, high + max(step, abs(high) * 1e-6), math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=f"{name} must be between") as caught:
            kind(**{name: value})
        assert f"{low} and {high}, found {value!r}" in str(caught.value)


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
