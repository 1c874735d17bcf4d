"""What to train, as plain frozen dataclasses: validated by ``config``, usable without pydantic.

Standard library only, so that the trainer also starts in a bare PyTorch container. Ranges are
checked here once, for the TOML file, ``--set`` and Python callers alike.
"""

from recclr.settings.data import ColumnSettings, DataSettings, SplitSettings
from recclr.settings.judging import METRIC_NAMES, EvaluateSettings
from recclr.settings.objective import (
    LossSettings,
    NegativesSettings,
    PopularitySettings,
    QueueSettings,
)
from recclr.settings.towers import (
    FeatureKind,
    FeatureSettings,
    HistorySettings,
    IdSettings,
    ModelSettings,
    TowerSettings,
)
from recclr.settings.training import SHARDED_OPTIMIZERS, TrainSettings

__all__ = [
    "METRIC_NAMES",
    "SHARDED_OPTIMIZERS",
    "ColumnSettings",
    "DataSettings",
    "EvaluateSettings",
    "FeatureKind",
    "FeatureSettings",
    "HistorySettings",
    "IdSettings",
    "LossSettings",
    "ModelSettings",
    "NegativesSettings",
    "PopularitySettings",
    "QueueSettings",
    "SplitSettings",
    "TowerSettings",
    "TrainSettings",
]
