"""What may vary: a TOML file of keys and their values, or what suits a configuration."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from recclr.config import Config, allows, with_changes
from recclr.errors import ConfigError
from recclr.settings import ChoiceSettings, RangeSettings, TuneSettings
from recclr.trials import encoding_of, refuse_blend

Parameter = RangeSettings | ChoiceSettings
_T = TypeVar("_T")
# What is read, held out and judged is the same for all that are compared; ``refit`` and what says
# when to look at validation change no model of the search.
_FIXED = ("data", "split", "evaluate", "baselines", "export", "seed", "train.refit")
_GOLDEN = 0.3819660112501051


@dataclass(frozen=True)
class Space:
    """Dotted key of the configuration -> what it may be, in the order of the file."""

    parameters: Mapping[str, Parameter]

    def to_json(self) -> dict[str, Any]:
        """As the TOML file says it, complete."""
        return {key: asdict(parameter) for key, parameter in self.parameters.items()}

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether the values of all keys lie in the space."""
        return all(_within(values[key], p) for key, p in self.parameters.items())

    def values_of(self, config: Config) -> dict[str, Any]:
        """What the configuration has at the keys; None where a key is not set."""
        return {key: value_at(config, key) for key in self.parameters}


def value_at(config: Config, key: str) -> Any:
    """The value at a dotted key; None where a section on the way is not set."""
    here: Any = config
    for name in key.split("."):
        here = here.get(name) if isinstance(here, Mapping) else getattr(here, name, None)
    return here


def read_space(path: Path, config: Config) -> tuple[Space, TuneSettings]:
    """Sections ``[space]`` and ``[tune]`` of a TOML file.

    Raises:
        ConfigError: no such file, no TOML, no parameter, an unknown key, a value that the
            configuration refuses, or a key that changes what is read or how it is judged.
    """
    try:
        tree = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read the space {path}: {error}; expected TOML") from error
    unknown = sorted(tree.keys() - {"space", "tune"})
    if unknown:
        raise ConfigError(f"{path}: unknown section {unknown[0]!r}; expected [space] and [tune]")
    found = dict(_leaves(tree.get("space", {}), ""))
    if not found:
        raise ConfigError(f"{path}: [space] names no key; give one, such as {_EXAMPLE}")
    parameters = {key: _parameter(leaf, f"{path}: {key}") for key, leaf in found.items()}
    space = Space(parameters)
    _require_fitting(space, config, str(path))
    return space, tune_settings(tree.get("tune", {}), f"{path}: tune")


_EXAMPLE = '"train.table_lr" = { low = 0.001, high = 0.05, log = true }'


def default_space(config: Config) -> Space:
    """What most often pays, of what the configuration has."""
    found = dict(_of_loss(config)) | dict(_of_towers(config))
    rate = config.train.table_lr
    if rate > 0:
        found["train.table_lr"] = RangeSettings(low=rate / 5, high=min(rate * 5, 1e4), log=True)
    if config.user.id.enabled or config.item.id.enabled:
        found["model.init"] = ChoiceSettings(choices=("random", "spectral"))
    return Space({key: of for key, of in found.items() if _fits(key, of, config)})


def _fits(key: str, parameter: Parameter, config: Config) -> bool:
    """Whether the configuration allows all of its values: some losses have no temperature."""
    return all(allows(config, {key: value}) for value in _probes(parameter))


def _of_loss(config: Config) -> Iterator[tuple[str, Parameter]]:
    # Cosines lie between -1 and 1, dot products where they like.
    low, high = (0.02, 0.5) if config.model.similarity == "cosine" else (0.1, 5.0)
    yield "loss.temperature", RangeSettings(low=low, high=high, log=True)
    second = config.loss.second_temperature
    if second is not None:
        low, high = max(second / 4, 0.01), min(second * 4, 100.0)
        yield "loss.second_temperature", RangeSettings(low=low, high=high, log=True)
    if config.loss.kind == "full_softmax":
        return
    yield "loss.log_q_strength", RangeSettings(low=0.0, high=1.0)
    uniform = config.negatives.uniform
    if uniform >= 4:
        low, high = uniform // 4, min(uniform * 4, 1 << 24)
        yield "negatives.uniform", RangeSettings(low=low, high=high, log=True, int=True)


def _of_towers(config: Config) -> Iterator[tuple[str, Parameter]]:
    dropout = RangeSettings(low=0.0, high=0.5)
    yield "user.dropout", dropout
    for side in ("user", "item"):
        tower = getattr(config, side)
        # Without anything else in the tower, a dropped id leaves nothing to learn from.
        if tower.id.enabled and (tower.features or tower.history):
            yield f"{side}.id.dropout", dropout
    if config.user.history is not None:
        yield "user.history.dropout", dropout


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Dotted key -> the table that describes it: the first one that holds something else."""
    nested = isinstance(value, Mapping) and all(isinstance(v, Mapping) for v in value.values())
    if path and not (nested and value):
        yield path, value
        return
    for key, part in value.items() if isinstance(value, Mapping) else ():
        yield from _leaves(part, f"{path}.{key}" if path else key)


def _parameter(leaf: Any, where: str) -> Parameter:
    if not isinstance(leaf, Mapping):
        raise ConfigError(f"{where}: expected {{ low, high }} or {{ choices }}, found {leaf!r}")
    if "choices" in leaf:
        return _checked(ChoiceSettings, leaf, where)
    return _checked(RangeSettings, leaf, where)


def tune_settings(values: Mapping[str, Any], where: str) -> TuneSettings:
    """The settings of a search from JSON or TOML values.

    Raises:
        ConfigError: an unknown key, a wrong type, a value out of range; names ``where``.
    """
    return _checked(TuneSettings, values, where)


def _checked(kind: type[_T], values: Mapping[str, Any], where: str) -> _T:
    try:
        return TypeAdapter(kind).validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
        lines = [f"{where}{_said(problem, known)}" for problem in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def _said(problem: Any, known: list[str]) -> str:
    name = ".".join(map(str, problem["loc"]))
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        hint = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        tail = f"did you mean {hint[0]!r}?" if hint else f"known here: {', '.join(known)}"
        return f".{name}: unknown key; {tail}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f".{name}: {message}" if name else f": {message}"


def _require_fitting(space: Space, config: Config, where: str) -> None:
    """Every end, choice and one value between the ends, each put into the configuration alone."""
    for key, parameter in space.parameters.items():
        refuse_blend(key, where)
        if any(key == fixed or key.startswith(f"{fixed}.") for fixed in _FIXED):
            raise ConfigError(
                f"{where}: {key} cannot be tuned: all trials are trained and judged on the same "
                "rows; take it out of [space]"
            )
        for value in _probes(parameter):
            try:
                changed = with_changes(config, {key: value})
            except ConfigError as error:
                hint = ""
                if isinstance(parameter, RangeSettings) and "integer" in str(error):
                    hint = "; for whole numbers, add int = true"
                raise ConfigError(f"{where}: {error}{hint}") from None
            if encoding_of(changed) != encoding_of(config):
                raise ConfigError(
                    f"{where}: {key} cannot be tuned: it changes how the data are encoded, which "
                    "is done once for all trials; compare it with `recclr ablate --part`"
                )


def _probes(parameter: Parameter) -> list[Any]:
    if isinstance(parameter, ChoiceSettings):
        return list(parameter.choices)
    low, high = parameter.low, parameter.high
    if parameter.int:
        return [int(low), int(high)]
    return [low, high, low + _GOLDEN * (high - low)]


def _within(value: Any, parameter: Parameter) -> bool:
    if isinstance(parameter, ChoiceSettings):
        # "==" would take 1 for True.
        return _text(value) in map(_text, parameter.choices)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    inside = parameter.low <= value <= parameter.high
    step = parameter.step or (1 if parameter.int else None)
    if step is None or not inside:
        return inside
    steps = (value - parameter.low) / step
    return abs(steps - round(steps)) < 1e-9


def _text(value: Any) -> str:
    return json.dumps(value, default=repr)
