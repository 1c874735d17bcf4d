"""What to train, as plain frozen dataclasses: validated by ``config``, usable without pydantic.

Standard library only, so that the trainer also starts in a bare PyTorch container. Ranges are
checked here once, for the TOML file, ``--set`` and Python callers alike.
"""

from recclr.settings.augment import AugmentSettings
from recclr.settings.data import ColumnSettings, DataSettings, SplitSettings
from recclr.settings.distillation import DistillationSettings
from recclr.settings.judging import METRIC_NAMES, EvaluateSettings
from recclr.settings.mining import ExplicitSettings, MinedSettings, MiningSettings
from recclr.settings.objective import (
    WITH_TEMPERATURE,
    LossKind,
    LossSettings,
    NegativesSettings,
    PopularitySettings,
    QueueSettings,
    contradictions,
)
from recclr.settings.self_supervision import SelfSupervisionSettings, ViewSettings
from recclr.settings.towers import (
    FeatureKind,
    FeatureSettings,
    HistorySettings,
    IdSettings,
    ModelSettings,
    PairSettings,
    PropagationSettings,
    TowerSettings,
)
from recclr.settings.training import SHARDED_OPTIMIZERS, TrainSettings
from recclr.settings.tuning import ChoiceSettings, RangeSettings, TuneSettings

__all__ = [
    "METRIC_NAMES",
    "SHARDED_OPTIMIZERS",
    "WITH_TEMPERATURE",
    "AugmentSettings",
    "ChoiceSettings",
    "ColumnSettings",
    "DataSettings",
    "DistillationSettings",
    "EvaluateSettings",
    "ExplicitSettings",
    "FeatureKind",
    "FeatureSettings",
    "HistorySettings",
    "IdSettings",
    "LossKind",
    "LossSettings",
    "MinedSettings",
    "MiningSettings",
    "ModelSettings",
    "NegativesSettings",
    "PairSettings",
    "PopularitySettings",
    "PropagationSettings",
    "QueueSettings",
    "RangeSettings",
    "SelfSupervisionSettings",
    "SplitSettings",
    "TowerSettings",
    "TrainSettings",
    "TuneSettings",
    "ViewSettings",
    "contradictions",
]
