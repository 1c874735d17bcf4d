"""The configuration file: TOML in, frozen settings out; an unknown key is an error with a hint.

``settings`` holds the fields and their ranges; this module reads, overrides, explains and writes.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from recclr.errors import ConfigError
from recclr.settings import (
    WITH_TEMPERATURE,
    DataSettings,
    DistillationSettings,
    EvaluateSettings,
    LossSettings,
    ModelSettings,
    NegativesSettings,
    SelfSupervisionSettings,
    SplitSettings,
    TowerSettings,
    TrainSettings,
    contradictions,
)
from recclr.settings.baselines import BaselineSettings
from recclr.settings.blending import BlendSettings
from recclr.toml_text import dump_section

_EXPECTED = "expected "


class Config(BaseModel):
    """A whole run: what to read, how to split it, what to train, how to judge it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    seed: int = Field(default=0, ge=0, lt=1 << 62)
    data: DataSettings
    split: SplitSettings = SplitSettings()
    user: TowerSettings = TowerSettings()
    item: TowerSettings = TowerSettings()
    model: ModelSettings = ModelSettings()
    loss: LossSettings = LossSettings()
    negatives: NegativesSettings = NegativesSettings()
    self_supervision: SelfSupervisionSettings | None = None
    distillation: DistillationSettings | None = None
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    baselines: BaselineSettings = BaselineSettings()
    blend: BlendSettings = BlendSettings()
    export: tuple[str, ...] = ()
    """Stores written at the end of a run, "lancedb:store" for example; relative to the run."""

    @property
    def served_beside(self) -> str | None:
        """What makes served vectors longer than those of the towers, by its key."""
        if self.model.similarity == "euclidean":
            return 'model.similarity = "euclidean"'
        return "model.popularity_bias" if self.model.popularity_bias else None

    @property
    def spectral_by_default(self) -> bool:
        """Whether nobody said where id tables start, and both sides have one to start."""
        ids = self.user.id.enabled and self.item.id.enabled
        return self.model.init == "auto" and self.model.mode == "user_item" and ids

    @property
    def taught_without_log(self) -> bool:
        """Whether vectors of entities that have no train interaction are taught too."""
        return self.model.init_from is not None or self.self_supervision is not None

    @property
    def served_similarity(self) -> str:
        """Of the vectors that a run serves: several models side by side have no unit length, and
        with a bias of items among the coordinates the score is neither cosine nor distance.
        """
        return "dot" if self.blend.several or self.model.popularity_bias else self.model.similarity


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file and apply ``section.key=value`` overrides.

    Raises:
        ConfigError: no such file, no TOML, an unknown key, a wrong type, a value out of range; one
            line per problem.
    """
    path = Path(path)
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"cannot read the configuration {path}: {reason}; expected a TOML file in UTF-8"
        ) from error
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is no valid TOML: {error}; mend it there") from error
    for override in overrides:
        apply_override(values, override)
    return parse_config(values, source=str(path))


def parse_config(values: Mapping[str, Any], *, source: str = "configuration") -> Config:
    """Validate a nested mapping, as TOML gives it.

    Raises:
        ConfigError: all problems, one per line, each with its key.
    """
    try:
        # Through JSON, whose strict mode takes an array for a tuple and a whole number for a float.
        config = Config.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise ConfigError(
            "\n".join(f"{source}: {line}" for line in _explain_all(error, values))
        ) from None
    _cross_check(config, source)
    return config


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one key in place from ``section.key=value``; the value is TOML, bare words are strings.

    Raises:
        ConfigError: no "=", or the path runs through a value that is no section.
    """
    path, equals, text = override.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not equals or not all(keys):
        raise ConfigError(f"--set {override!r}: expected section.key=value")
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    _section(values, keys[:-1], f"--set {override!r}")[keys[-1]] = value


def with_changes(
    config: Config, values: Mapping[str, Any], *, without: Sequence[str] = ()
) -> Config:
    """The configuration with other values at some keys.

    Args:
        values: "section.key" -> value, as TOML would give it. without: keys that go back to their
            defaults; a table of named entries, such as a feature, goes as a whole.

    Raises:
        ConfigError: an unknown key, a wrong type, a value out of range, or a contradiction.
    """
    tree = tomllib.loads(dump_toml(config))
    for key in without:
        *path, last = key.split(".")
        _section(tree, path, key).pop(last, None)
    for key, value in values.items():
        *path, last = key.split(".")
        _section(tree, path, key)[last] = value
    said = [f"{key} = {value!r}" for key, value in values.items()]
    said += [f"{key} left out" for key in without]
    return parse_config(tree, source=f"with {', '.join(said)}" if said else "configuration")


def allows(config: Config, values: Mapping[str, Any], *, without: Sequence[str] = ()) -> bool:
    """Whether there is a configuration ``with_changes``: a tower, say, may have no such part."""
    try:
        with_changes(config, values, without=without)
    except ConfigError:
        return False
    return True


def _section(tree: dict[str, Any], path: Sequence[str], key: str) -> dict[str, Any]:
    section = tree
    for name in path:
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            raise ConfigError(f"{key}: {name!r} is a value, not a section")
    return section


def dump_toml(config: Config) -> str:
    """The complete configuration as TOML that ``load_config`` reads back to an equal object.

    A key whose value is None is left out: absent means not set.
    """
    lines: list[str] = []
    plain = {name: _plain(getattr(config, name)) for name in type(config).model_fields}
    # The one key that is set where it is absent; "" is how TOML takes it away.
    columns = plain["data"]["columns"]
    columns["timestamp"] = columns["timestamp"] or ""
    dump_section(plain, (), lines)
    return "\n".join(lines).strip() + "\n"


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _explain_all(error: ValidationError, values: Mapping[str, Any]) -> list[str]:
    """One line per key of the file; the branches of a union that failed share theirs."""
    lines: dict[tuple[str, str], list[str]] = {}
    for problem in error.errors():
        key, message = _explain(problem, values)
        found = f", found {problem['input']!r}" if message.startswith(_EXPECTED) else ""
        lines.setdefault((key, found), []).append(message.removeprefix(_EXPECTED))
    return [
        f"{key}: {_EXPECTED * bool(found)}{' or '.join(dict.fromkeys(messages))}{found}"
        for (key, found), messages in lines.items()
    ]


def _explain(problem: Any, values: Mapping[str, Any]) -> tuple[str, str]:
    """The key of one pydantic error, and what is wrong with it."""
    location = [str(part) for part in problem["loc"]]
    path = _known_path(location, values)
    key = ".".join(path) or "configuration"
    kind, message = problem["type"], str(problem["msg"])
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _siblings(path[:-1])
        hint = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        tail = f"did you mean {hint[0]!r}?" if hint else f"known here: {', '.join(sorted(known))}"
        return key, f"unknown key; {tail}"
    if kind in ("missing", "missing_argument"):
        return ".".join(location), "this key is required"
    if kind == "value_error":
        return key, message.removeprefix("Value error, ")
    return key, message.replace("Input should be ", _EXPECTED, 1)


def _known_path(location: Sequence[str], values: Mapping[str, Any]) -> list[str]:
    """The part of an error's location that follows the file's own keys.

    What comes after it are tags of unions ("float", "literal[…]") and positions in arrays.
    """
    path: list[str] = []
    here: Any = values
    for part in location:
        if not isinstance(here, Mapping) or part not in here:
            break
        path.append(part)
        here = here[part]
    return path


def _siblings(path: Sequence[str]) -> list[str]:
    """Names of the keys that a section may hold."""
    here: Any = Config
    for key in path:
        if here is Config or is_dataclass(here):
            here = _section_type(get_type_hints(here).get(key))
        else:  # a table of named entries, such as item.features
            here = _section_type(get_args(here)[-1]) if get_args(here) else None
    if here is Config:
        return list(Config.model_fields)
    return [f.name for f in fields(here)] if is_dataclass(here) else []


def _section_type(hint: Any) -> Any:
    """The dataclass in ``X | None``; other hints as they are."""
    if get_origin(hint) is dict:
        return hint
    found = (h for h in (hint, *get_args(hint)) if isinstance(h, type) and is_dataclass(h))
    return next(found, hint)


def _cross_check(config: Config, source: str) -> None:
    """Refuse settings that contradict each other, before any data are read."""
    problems = []
    needing = {side: _needs_time(side, getattr(config, side)) for side in ("item", "user")}
    split = config.split
    for names in needing.values():
        if names and config.data.columns.timestamp is None:
            problems.append(f"{names[0]}: needs timestamps, but data.columns.timestamp is not set")
    if config.item.history is not None:
        problems.append("item.history: only users have a history")
    if config.model.init_from is not None and not config.item.features:
        problems.append("model.init_from: starts item.features, and there are none")
    if config.model.mode == "item_item":
        problems += _siamese_problems(config)
    if config.model.init == "spectral" and not (config.user.id.enabled or config.item.id.enabled):
        problems.append('model.init = "spectral" starts tables of ids, and both are switched off')
    if config.blend.several and config.served_beside:
        problems.append(
            f"blend: lays vectors side by side, and {config.served_beside} has coordinates that "
            "are no part of an item; leave one of them out"
        )
    if config.train.time_cells is False and needing["item"]:
        problems.append(
            f"train.time_cells: {needing['item'][0]} needs time cells; leave the key out"
        )
    problems += _contradictions(config)
    if config.train.sharded_tables != "none" and config.model.embedding_dim % 4:
        problems.append(
            "train.sharded_tables: needs a model.embedding_dim that is a multiple of 4, found "
            f"{config.model.embedding_dim}"
        )
    problems += contradictions(config.loss, config.negatives, config.model.similarity)
    if config.data.event_weights and config.data.columns.event is None:
        problems.append(
            "data.event_weights: name the column of the event type in data.columns.event"
        )
    problems += _explicit_problems(config)
    if split.by == "leave_last" and split.valid % 1 + split.test % 1:
        problems.append(
            "split: leave_last counts rows per user, so valid and test must be whole numbers; "
            f"found {split.valid:g} and {split.test:g}"
        )
    if split.by != "given":
        problems += [
            f"split.{name}: is read with split.by = 'given' only, found {split.by!r}"
            for name in ("valid_events", "test_events")
            if getattr(split, name) is not None
        ]
    if split.valid == 0 and split.valid_events is None and config.train.refit:
        problems.append("train.refit: there is no validation to select on; set split.valid")
    if problems:
        raise ConfigError("\n".join(f"{source}: {problem}" for problem in problems))


def _contradictions(config: Config) -> list[str]:
    """What is wrong with the objective and its sources of negatives beside the other sections."""
    problems, negatives = [], config.negatives
    if config.distillation is not None and config.loss.kind not in WITH_TEMPERATURE:
        kinds = " or ".join(map(repr, WITH_TEMPERATURE))
        problems.append(
            "distillation: compares scores over a temperature with those of a teacher; set "
            f"loss.kind = {kinds}, found {config.loss.kind!r}"
        )
    if negatives.available and config.data.columns.timestamp is None:
        problems.append(
            "negatives.available: needs timestamps, but data.columns.timestamp is not set"
        )
    if negatives.available and config.train.time_cells is False:
        problems.append("train.time_cells: negatives.available needs time cells; leave the key out")
    feature = config.item.features.get(negatives.within or "")
    if negatives.within is not None and (feature is None or feature.kind != "categorical"):
        problems.append(
            f"negatives.within: expected a categorical feature of [item.features], found "
            f"{negatives.within!r}"
        )
    return problems


def _needs_time(side: str, tower: TowerSettings) -> list[str]:
    """Keys of a tower that make sense with timestamps only."""
    names = [f"{side}.features.{n}" for n, f in tower.features.items() if f.kind == "statistics"]
    return names + ([f"{side}.id.as_of"] if tower.id.as_of else [])


def _siamese_problems(config: Config) -> list[str]:
    """What is about users, of whom one tower of items knows nothing."""
    views, negatives = config.self_supervision, config.negatives
    about_users = {
        "user": config.user != TowerSettings(),
        "item.id.propagation": config.item.id.propagation is not None,
        "negatives.mined": negatives.mined is not None,
        "negatives.explicit": negatives.explicit is not None,
        "loss.positives": config.loss.positives > 1,
        "distillation": config.distillation is not None,
        "self_supervision.user": views is not None and views.user is not None,
    }
    return [
        f'{key}: model.mode = "item_item" has one tower, that of items, and serves users by their '
        "last items; leave it out"
        for key, is_set in about_users.items()
        if is_set
    ]


def _explicit_problems(config: Config) -> list[str]:
    """What keeps event types from being negatives."""
    explicit, weights = config.negatives.explicit, config.data.event_weights
    if explicit is None:
        return []
    both = sorted(set(explicit.events) & set(weights))
    if both:
        return [
            f"negatives.explicit.events: {both[0]!r} has a weight in data.event_weights, which "
            "makes it a positive; take it out of one of the two"
        ]
    if not weights:
        return [
            "negatives.explicit: name the event types that are positives in data.event_weights; "
            "without, every row is one"
        ]
    return []
