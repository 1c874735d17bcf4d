"""Parts of a configuration to leave out or add: declared, or everything that is switched on."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from recclr.config import Config, allows, apply_override, with_changes
from recclr.errors import ConfigError
from recclr.settings.objective import WHERE_LEARNED
from recclr.trials import refuse_blend

BASE = "base"
# Who is judged, by what and with which seed is the same for all rows.
_FIXED = ("split", "evaluate", "baselines", "export", "seed")
# Of how, or for how long, a model is trained, not of what it is; or what a feature is read from.
_NO_PARTS = (
    *("train.accumulate", "train.chunk_size", "train.patience", "train.refit", "train.final_lr"),
    *("train.sharded_tables", "train.lr_scaling", "column", "buckets"),
)
# On by default: key -> its value when off.
_ON_BY_DEFAULT: dict[str, Any] = {
    "loss.log_q_strength": 0.0,
    "loss.mask_known_positives": False,
    "negatives.uniform": 0,
    "user.id.enabled": False,
    "item.id.enabled": False,
}
_OF_SAMPLES = ("loss.log_q_strength", "negatives")


@dataclass(frozen=True)
class Part:
    """A row of an ablation.

    Attributes:
        name: of the row. values: dotted key -> value. without: keys that go back to their defaults.
    """

    name: str
    values: Mapping[str, Any]
    without: tuple[str, ...] = ()

    def apply(self, config: Config) -> Config:
        """The configuration of the row.

        Raises:
            ConfigError: an unknown key, a wrong value or a contradiction; names the part.
        """
        try:
            return with_changes(config, self.values, without=self.without)
        except ConfigError as error:
            raise ConfigError(f"part {self.name!r}: {error}") from None


def parse_part(text: str) -> Part:
    """``name=key=value,-key``: values as ``--set`` takes them; ``-key`` takes a key away.

    Raises:
        ConfigError: no name, nothing to change, or a key that all rows must share.
    """
    name, equals, changes = text.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"--part {text!r}: expected name=key=value,key=value or name=-key")
    return _part(name.strip(), _split(changes), f"--part {text!r}")


def read_parts(path: Path) -> list[Part]:
    """Section ``[parts]`` of a TOML file: name = ["key=value", "-key"].

    Raises:
        ConfigError: no such file, no TOML, another section, or as ``parse_part``.
    """
    try:
        tree = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read the parts {path}: {error}; expected TOML") from error
    parts = tree.get("parts")
    if set(tree) != {"parts"} or not isinstance(parts, dict) or not parts:
        raise ConfigError(
            f'{path}: expected a section [parts] of lines such as no_history = ["-user.history"], '
            f"and nothing else; found {sorted(tree)}"
        )
    found = []
    for name, changes in parts.items():
        if not isinstance(changes, list) or not all(isinstance(c, str) for c in changes):
            raise ConfigError(f"{path}: {name}: expected an array of texts, found {changes!r}")
        found.append(_part(name, changes, f"{path}: {name}"))
    return found


def _part(name: str, changes: Sequence[str], where: str) -> Part:
    values: dict[str, Any] = {}
    without = []
    for change in filter(None, map(str.strip, changes)):
        key = change.removeprefix("-").partition("=")[0].strip()
        if any(key == fixed or key.startswith(f"{fixed}.") for fixed in _FIXED):
            raise ConfigError(
                f"{where}: {key} is the same for all rows of an ablation; set it with --set"
            )
        refuse_blend(key, where)
        if change.startswith("-"):
            without.append(key)
            continue
        tree: dict[str, Any] = {}
        try:
            apply_override(tree, change)
        except ConfigError:
            raise ConfigError(f"{where}: {change!r}: expected key=value or -key") from None
        values[key] = reduce(getitem, key.split("."), tree)
    if not values and not without:
        raise ConfigError(f"{where}: nothing to change; give key=value or -key")
    if name == BASE:
        raise ConfigError(f"{where}: {BASE!r} is the row without changes; choose another name")
    return Part(name, values, tuple(without))


def _split(text: str) -> list[str]:
    """At commas that are outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        if letter == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def derived_parts(config: Config) -> list[Part]:
    """Everything that is switched on, switched off one at a time.

    A key counts as on if its default is off (none, false, 0, empty) and its value is not; so do a
    few that are on by default. What the configuration cannot be without is not among them.
    """
    keys = [
        key
        for section in type(config).model_fields
        if is_dataclass(getattr(config, section)) and section not in (*_FIXED, "data", "blend")
        for key in _switched_on(getattr(config, section), section)
        if not _under(key, _NO_PARTS)
    ]
    if config.data.decay_half_life_d is not None:
        keys.append("data.decay_half_life_d")
    found = [Part(f"without {key}", {}, (key,)) for key in keys]
    for key, off in _ON_BY_DEFAULT.items():
        value = reduce(getattr, key.split("."), config)
        if value != off:
            found.append(Part(f"without {key}", {key: off}))
    if config.model.init == "spectral" or config.spectral_by_default:
        found.append(Part("random start", {"model.init": "random"}))
    if config.loss.temperature == "learned":
        without = tuple(f"loss.{name}" for name in ("temperature", *WHERE_LEARNED))
        found.append(Part("fixed temperature", {}, without))
    if config.loss.kind == "full_softmax":
        found = [p for p in found if not _under((*p.values, *p.without)[0], _OF_SAMPLES)]
    return [part for part in found if allows(config, part.values, without=part.without)]


def _switched_on(settings: Any, path: str) -> Iterator[str]:
    """Keys that are on where the default is off; of a whole section or entry also its own."""
    for setting in fields(settings):
        key, value = f"{path}.{setting.name}", getattr(settings, setting.name)
        if isinstance(value, Mapping):
            for name, entry in value.items():
                # A name with a dot cannot be said as a key.
                if "." not in name and is_dataclass(entry):
                    yield f"{key}.{name}"
                    yield from _switched_on(entry, f"{key}.{name}")
        elif is_dataclass(value):
            if setting.default is None:
                yield key
            yield from _switched_on(value, key)
        elif setting.default is not MISSING and _off(setting.default) and not _off(value):
            yield key


def _off(value: Any) -> bool:
    return not value or value in ("none", "random")


def _under(key: str, roots: Sequence[str]) -> bool:
    """Whether a key is one of ``roots`` or lies in one; those without a section name any last."""
    last = key.rpartition(".")[2]
    return any(key == root or key.startswith(f"{root}.") or last == root for root in roots)
