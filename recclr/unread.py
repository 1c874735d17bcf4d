"""Settings that a configuration gives and that nothing reads, said instead of ignored.

They are no mistake that a run is refused for: a file that others start from may well hold a rate
for a schedule that is switched off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any

from recclr.config import Config
from recclr.read_where import READ_WHERE, SIDES, Facts, tower_of
from recclr.settings import TowerSettings
from recclr.toml_text import toml_value

BY_KIND: Mapping[str, tuple[str, ...]] = {
    "column": ("categorical", "multi_hot", "numeric", "vector", "text"),
    "transform": ("numeric",),
    "windows_d": ("statistics",),
    "age": ("statistics",),
}
"""Settings of a feature that some kinds read; the others either all do, or are refused."""


def unread_settings(config: Config, *, timed: bool, validates: bool) -> list[str]:
    """One sentence for each key that has another value than its default and that nothing reads.

    Args:
        timed, validates: see ``read_where.Facts``.
    """
    facts = Facts(config, timed, validates)
    found = [
        (key, value, where.why)
        for section in type(config).model_fields
        if is_dataclass(settings := getattr(config, section))
        for key, value in _given(settings, section)
        if (where := READ_WHERE.get(key)) is not None and not where.holds(facts)
    ]
    found += [entry for side in SIDES for entry in _of_features(side, tower_of(side, config))]
    return [f"{key} = {toml_value(value)} does nothing here: {why}" for key, value, why in found]


def _given(settings: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Each key whose value is not its default, with the value; features are left out."""
    for setting in fields(settings):
        key, value = f"{path}.{setting.name}", getattr(settings, setting.name)
        default = setting.default
        if default is MISSING and setting.default_factory is not MISSING:
            default = setting.default_factory()
        if is_dataclass(value) and not isinstance(value, type):
            if default is None:
                yield key, asdict(value)
            yield from _given(value, key)
        elif default is not MISSING and value != default and not isinstance(value, Mapping):
            yield key, value


def _of_features(side: str, tower: TowerSettings) -> Iterator[tuple[str, Any, str]]:
    for name, feature in tower.features.items():
        for key, value in _given(feature, f"{side}.features.{name}"):
            kinds = BY_KIND.get(key.rpartition(".")[2], (feature.kind,))
            if feature.kind not in kinds:
                yield key, value, f"kind is {feature.kind!r}, not {' or '.join(map(repr, kinds))}"
