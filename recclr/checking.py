"""Data as a run takes them, read and accepted before anything is written; ``recclr check``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recclr.batch_size import fastest, try_batch_sizes
from recclr.config import Config, apply_override, load_config, parse_config
from recclr.data.interactions import Log
from recclr.data.prepare import PreparedLog, prepare_for
from recclr.data.reading import read_log
from recclr.data.split import Split
from recclr.errors import ConfigError
from recclr.evaluate import EvaluationSet
from recclr.files import write_bytes_atomic
from recclr.fitting import fresh_stepper
from recclr.judge import judged_by
from recclr.kernels import native
from recclr.little_data import advise
from recclr.load import fresh_model, pick_device
from recclr.negatives import lost_negatives
from recclr.other_runs import require_runs, require_same_rows, with_teacher
from recclr.run_folder import weights_folder
from recclr.starting import start_from_catalogue
from recclr.unread import unread_settings


@dataclass(frozen=True)
class Data:
    """What was read and accepted.

    Attributes:
        prepared: encoded for the stage of selection. examples: validation, if there is any.
        notes: what nobody refused, one sentence each.
        inputs: fingerprints of the files.
    """

    log: Log
    split: Split
    prepared: PreparedLog
    examples: EvaluationSet | None
    notes: tuple[str, ...]
    inputs: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Contents of data.json."""
        split = self.split
        return {
            "inputs": dict(self.inputs),
            "log": repr(self.log),
            "steps": [asdict(step) for step in self.log.steps],
            "quarantined": self.log.bad_rows,
            "notes": list(self.notes),
            "split": {"by": split.by, "cutoffs": split.cutoffs, "counts": split.counts},
        }


def read_data(
    config: Config,
    inputs: Mapping[str, Any],
    *,
    with_test: bool = True,
    workspace: Path | None = None,
) -> Data:
    """Read, split and encode, and refuse what cannot be trained on or judged.

    Args:
        inputs: fingerprints of the files, taken before.
        workspace: see ``reading.read_log``.
        with_test: refuse a test part that cannot be judged; without, nobody looks at its rows.

    Raises:
        ConfigError: settings that the data do not allow. DataError: the data are refused.
    """
    require_runs(config)
    if inputs:
        require_same_rows(config, inputs)
    wanted = config.negatives.explicit
    explicit = () if wanted is None else wanted.events
    log = read_log(config.data, explicit=explicit, workspace=workspace)
    split = log.split(config.split)
    # Without a refit the test users seen in validation must be known by their index.
    extra = [] if refits(config, split) or split.valid is None else [split.valid]
    # Items that a sample of train leaves out stay candidates.
    extra += [] if split.left_out is None else [split.left_out]
    prepared = prepare_for(config, split.train, split.valid, extra)
    prepared = with_teacher(prepared, config, of_selection=True)
    examples = None
    if split.valid is not None:
        _, examples = judged_by(prepared, split.valid, config, also=split.had_before("valid"))
        examples.require_slice(config.evaluate.select_slice)
    if with_test and split.test is not None:
        # Hours of training are a high price for a test that turns out to be empty.
        judged_by(prepared, split.test, config, also=split.had_before("test"))
    notes = [*log.notes, *_long_rankings(config, len(prepared.items))]
    notes += advice_on(config, timed=log.has_time, validates=split.valid is not None)
    return Data(log, split, prepared, examples, tuple(notes), inputs)


def advice_on(config: Config, *, timed: bool, validates: bool) -> list[str]:
    """What of a configuration costs more than it seems to, or does nothing; one sentence each.

    Args:
        timed, validates: see ``read_where.Facts``.
    """
    lost = lost_negatives(config.loss, config.negatives, config.train)
    unread = unread_settings(config, timed=timed, validates=validates)
    return [*([] if lost is None else [lost]), *unread]


def refits(config: Config, split: Split) -> bool:
    """Whether the model that is shipped is trained afresh on train + validation."""
    return config.train.refit and split.valid is not None


def require_validation(config: Config, examples: EvaluationSet | None) -> None:
    """Refuse a blend that nothing can choose the weights of.

    Raises:
        ConfigError: there is no validation to judge them by.
    """
    if config.blend.parts and examples is None:
        raise ConfigError(
            "blend chooses its weights on validation, but the split holds none out; set "
            "split.valid, or leave [blend] out"
        )


def require_targets(config: Config) -> None:
    """Refuse a store that does not exist before hours of training, not after them.

    Raises:
        ConfigError: ``export`` names one.
    """
    if config.export:
        from recclr.export import parse_target

        for target in config.export:
            parse_target(target)


def check_data(
    events: str | None,
    *,
    users: str | None = None,
    items: str | None = None,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    batch_sizes: bool = False,
    device: str = "auto",
    write_config: Path | None = None,
) -> dict[str, Any]:
    """Read, split and encode as a run would, and train nothing.

    Args:
        batch_sizes: also try steps of rising batch size on ``device``, on a model thrown away.
        write_config: new file for the whole configuration, with what is proposed for little data.

    Returns:
        JSON values: log, steps, quarantined, notes, split, encoded counts, whether data
        are little (``amount``, see ``little_data.Advice``); where asked for, batch_sizes (one
        object per size) and fastest_batch_size.

    Raises:
        ConfigError: neither or both of ``events`` and ``config``; what a run would refuse; no such
            device; no batch fits; ``write_config`` exists, or has no folder.
        DataError: the data are refused.
    """
    settings = _config(events, users, items, config, overrides)
    if write_config is not None:
        _require_new(write_config)
    require_targets(settings)
    starts = settings.model.init_from
    weights = None if starts is None else weights_folder(starts)
    data = read_data(settings, inputs={})
    require_validation(settings, data.examples)
    if weights is not None:
        model = fresh_model(settings, data.prepared.tensors)
        start_from_catalogue(model, data.prepared.item_encoder, weights)
    # What a trainer refuses is told here too; it is handed the towers, and takes no step.
    place = pick_device(device)
    fresh_stepper(settings, data.prepared.tensors, device=place).close()
    found = data.to_json()
    del found["inputs"]
    found["encoded"] = data.prepared.counts
    train = data.prepared.tensors.train
    found["notes"] += [*data.log.whereabouts, *_slow_kernels(place)]
    advice = advise(data.log, train, data.examples, settings)
    found["amount"] = advice.to_json()
    if batch_sizes:
        found |= _batch_sizes(settings, data, place)
    if write_config is not None:
        write_bytes_atomic(write_config, advice.configuration(settings).encode())
    return found


def _require_new(path: Path) -> None:
    if os.path.lexists(path):
        raise ConfigError(f"{path} exists already; name a new file for the configuration")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent} to write to")


def _batch_sizes(config: Config, data: Data, device: str) -> dict[str, Any]:
    trials = try_batch_sizes(config, data.prepared.tensors, device=device)
    if not trials:
        raise ConfigError(
            "not even a step of 256 rows fits the memory that is free; lower model.embedding_dim "
            "or negatives, or free some"
        )
    return {
        "batch_sizes": [asdict(trial) for trial in trials],
        "fastest_batch_size": fastest(trials).batch_size,
    }


def _slow_kernels(device: str) -> list[str]:
    reason = native.why_not()
    if reason is None or not native.kernels_exist() or device != "cpu":
        return []
    return [f"training on this CPU takes two to three times as long as it could: {reason}"]


def _long_rankings(config: Config, num_items: int) -> list[str]:
    longest = max(config.evaluate.ks)
    if longest <= num_items:
        return []
    return [
        f"evaluate.ks has {longest:,}, but the catalogue has {num_items:,} items: every ranking "
        "ends there"
    ]


def _config(
    events: str | None,
    users: str | None,
    items: str | None,
    config: Path | None,
    overrides: Sequence[str],
) -> Config:
    if (events is None) == (config is None):
        raise ConfigError("give either EVENTS or --config FILE")
    if config is not None:
        if users is not None or items is not None:
            raise ConfigError("--users and --items go with EVENTS; a --config names its own tables")
        return load_config(config, overrides)
    tables = {"events": events, "users": users, "items": items}
    values: dict[str, Any] = {"data": {name: path for name, path in tables.items() if path}}
    for override in overrides:
        apply_override(values, override)
    return parse_config(values, source="check")
