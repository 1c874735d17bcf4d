"""``recclr ablate``: one configuration, and each of its parts left out or added, side by side.

Every row is trained with the same seeds on train and judged on validation; differences from the
base are paired by user. Test is judged where that was declared, once, with the rest.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from recclr.ablation_parts import BASE, Part, derived_parts
from recclr.checking import read_data
from recclr.config import Config, with_changes
from recclr.data.log import Prepared
from recclr.data.prepare import PreparedLog
from recclr.errors import ConfigError, DivergedError, InterruptedTraining
from recclr.evaluate import EvaluationSet
from recclr.files import write_bytes_atomic, write_json_atomic
from recclr.judge import judged_by
from recclr.load import fresh_model, pick_device
from recclr.metrics import DEFINITIONS
from recclr.other_runs import require_runs
from recclr.run_folder import fingerprints, read_json
from recclr.settings.judging import leading_slice
from recclr.stopping import signals
from recclr.trials import (
    OnEvent,
    Place,
    Repeat,
    averaged,
    difference,
    encoding_of,
    left_out,
    repeat,
    with_seed,
)
from recclr.work_folder import RUNNING, work_folder

RESULT, PAGE = "ablation.json", "report.html"


def ablate(
    config: Config,
    out: Path,
    *,
    parts: Sequence[Part] = (),
    seeds: int = 3,
    test: bool = False,
    resume: bool = False,
    device: str = "auto",
    on_event: OnEvent = lambda event: None,
) -> dict[str, Any]:
    """Train the base and every part with each seed, and compare them.

    Args:
        parts: rows beside the base; none: everything that is switched on is switched off in turn.
        seeds: trainings of each row, of the configuration's seed and those that follow.
        test: judge test as well. It cannot be added when the work is resumed.
        resume: go on with an ablation that was stopped; a finished one is only read.

    Returns:
        Contents of ablation.json; report.html is beside it.

    Raises:
        ConfigError: a part, the configuration or the folder is refused, before anything is trained.
        DataError: the data are refused. InterruptedTraining: a signal asked to end.
    """
    if seeds < 1:
        raise ConfigError(f"--seeds must be at least 1, found {seeds}")
    device = pick_device(device)
    # No row is shipped, so none is trained on validation.
    config = with_changes(config, {"train.refit": False})
    rows = _rows(config, parts)
    inputs: dict[str, Any] = {}

    def declared() -> dict[str, Any]:
        require_runs(config)
        inputs.update(fingerprints(config, start=True))
        changes = {p.name: {"values": p.values, "without": p.without} for p in rows}
        return {"work": "ablate", "parts": changes, "seeds": seeds, "test": test, "inputs": inputs}

    with (
        work_folder(out, config, declared, finished=RESULT, resume=resume) as to_do,
        signals() as stop,
    ):
        if not to_do:
            return read_json(out / RESULT)
        place = Place(out / RUNNING, out / "rows", device, stop, on_event=lambda event: None)
        on_event({"kind": "stage", "name": "read"})
        materials = Materials(config, inputs, test=test)
        rows, notes = _trainable(rows, config, materials, derived=not parts)
        notes = [*left_out(config), *notes]
        for note in notes:
            on_event({"kind": "note", "text": note})
        on_event({"kind": "stage", "name": f"{len(rows)} rows, {seeds} seeds"})
        repeats = _train(rows, config, materials, place, seeds, on_event)
        found = _results(rows, repeats, config, seeds, notes)
        from recclr.report.ablation import ablation_page

        write_bytes_atomic(out / PAGE, ablation_page(found, config, out.name).encode("utf-8"))
        # Last of all: its presence is what makes an ablation a finished one.
        write_json_atomic(out / RESULT, found)
        return found


def _rows(config: Config, parts: Sequence[Part]) -> list[Part]:
    """The base and its parts, each of which can be put into the configuration."""
    rows = [Part(BASE, {}), *(parts or derived_parts(config))]
    names = [row.name for row in rows]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"two parts are called {twice[0]!r}; give each a name of its own")
    for row in rows[1:]:
        if row.apply(config) == config:
            raise ConfigError(
                f"part {row.name!r} changes nothing: the configuration has these values already, "
                "or no such key to leave out"
            )
    if len(rows) == 1:
        raise ConfigError("nothing of the configuration can be switched off; give --part")
    return rows


class Materials:
    """Prepared logs by what they follow from: that of the base, and the last other one.

    Args:
        inputs: fingerprints of the files. test: whether test is prepared for judging.
    """

    def __init__(self, config: Config, inputs: Mapping[str, Any], *, test: bool) -> None:
        self.base, self.inputs, self.test = config, inputs, test
        self.logs: dict[str, PreparedLog] = {}
        self.made: dict[str, tuple[Prepared, dict[str, EvaluationSet]]] = {}
        self.of(Part(BASE, {}))

    def of(self, part: Part) -> tuple[Prepared, dict[str, EvaluationSet]]:
        """What a row is trained on, and what it is judged by: "valid", and "test" if asked for.

        Raises:
            ConfigError: there is no validation or no test; or the row would be judged by others
            than the base.
        """
        config = part.apply(self.base)
        key = repr(encoding_of(config))
        if key not in self.made:
            for other in list(self.made)[1:]:
                del self.made[other]
            self.made[key] = self._read(config, part.name)
        return self.made[key]

    def _read(self, config: Config, name: str) -> tuple[Prepared, dict[str, EvaluationSet]]:
        data = read_data(config, self.inputs, with_test=self.test)
        if data.examples is None:
            raise ConfigError("ablate needs validation to judge by: set split.valid above 0")
        judged = {"valid": data.examples}
        if self.test:
            if data.split.test is None:
                raise ConfigError("--test: there is no test part; set split.test above 0")
            _, judged["test"] = judged_by(
                data.prepared, data.split.test, config, also=data.split.valid
            )
        base = next(iter(self.made.values()), None)
        known = self.logs.setdefault("base", data.prepared)
        if base is not None and not (
            known.users.ids.equals(data.prepared.users.ids)
            and known.items.ids.equals(data.prepared.items.ids)
            and all(_alike(base[1][split], judged[split]) for split in judged)
        ):
            raise ConfigError(
                f"part {name!r} changes who is judged, or by which items; rows of an ablation are "
                "judged by the same"
            )
        return data.prepared.tensors, judged


def _alike(first: EvaluationSet, second: EvaluationSet) -> bool:
    """Whether figures on the two can be paired."""
    return all(
        torch.equal(a, b)
        for a, b in (
            (first.user_idx, second.user_idx),
            (first.relevant.offsets, second.relevant.offsets),
            (first.relevant.values, second.relevant.values),
            (first.item_counts, second.item_counts),
        )
    )


def _trainable(
    rows: Sequence[Part], config: Config, materials: Materials, *, derived: bool
) -> tuple[list[Part], list[str]]:
    """Rows whose models can be built, which shows before hours of training; and what was left out.

    Raises:
        ConfigError: a declared part cannot be built.
    """
    kept, notes = [], []
    for row in rows:
        try:
            prepared, _ = materials.of(row)
            fresh_model(row.apply(config), prepared)
        except ConfigError as error:
            if not derived or row.name == BASE:
                raise ConfigError(f"part {row.name!r}: {error}") from None
            notes.append(f"{row.name}: left out: {error}")
        else:
            kept.append(row)
    return kept, notes


def _train(
    rows: Sequence[Part],
    config: Config,
    materials: Materials,
    place: Place,
    seeds: int,
    on_event: OnEvent,
) -> dict[str, list[Repeat] | str]:
    """Row -> its trainings, or why it has none; row by row, so that a log is prepared once."""
    found: dict[str, list[Repeat] | str] = {}
    total = len(rows) * seeds
    for row in rows:
        prepared, judged = materials.of(row)
        changed, done = row.apply(config), list[Repeat]()
        for number in range(seeds):
            if place.stop():
                raise InterruptedTraining(
                    "stopped by a signal; what is finished is kept, and the same command with "
                    "--resume goes on"
                )
            try:
                done.append(repeat(with_seed(changed, number), prepared, judged, place))
            except DivergedError as error:
                if row.name == BASE:
                    raise
                found[row.name] = f"seed {config.seed + number}: {error}"
                break
            count = len(found) * seeds + number + 1
            on_event({"kind": "repeated", "name": row.name, "done": count, "total": total})
        found.setdefault(row.name, done)
        shutil.rmtree(place.running, ignore_errors=True)
    return found


def _results(
    rows: Sequence[Part],
    repeats: Mapping[str, list[Repeat] | str],
    config: Config,
    seeds: int,
    notes: Sequence[str],
) -> dict[str, Any]:
    base = repeats[BASE]
    assert not isinstance(base, str)
    return {
        "select": config.evaluate.select,
        "select_slice": config.evaluate.select_slice,
        "seeds": [config.seed + number for number in range(seeds)],
        "counts": {split: e.counts for split, e in base[0].evaluations.items()},
        "rows": [_row(row, repeats[row.name], base, config) for row in rows],
        "notes": list(notes),
        "definitions": DEFINITIONS,
    }


def _row(row: Part, done: list[Repeat] | str, base: list[Repeat], config: Config) -> dict[str, Any]:
    changes = {"name": row.name, "values": dict(row.values), "without": list(row.without)}
    if isinstance(done, str):
        return {**changes, "reason": done}
    found = dict(_by_split(row.name, done, base, config))
    return {
        **changes,
        "metrics": {split: values["metrics"] for split, values in found.items()},
        "by_seed": {split: values["by_seed"] for split, values in found.items()},
        "differences": {split: values["difference"] for split, values in found.items()},
        "best_steps": [one.best_step for one in done],
        "seconds": round(sum(one.seconds for one in done) / len(done), 3),
    }


def _by_split(
    name: str, done: list[Repeat], base: list[Repeat], config: Config
) -> Iterator[tuple[str, dict[str, Any]]]:
    for split in base[0].evaluations:
        part = leading_slice(base[0].evaluations[split].counts, config.evaluate.select_slice)
        ours = averaged(name, [one.evaluations[split] for one in done])
        theirs = averaged(BASE, [one.evaluations[split] for one in base])
        yield (
            split,
            {
                "metrics": ours.metrics,
                "by_seed": [one.evaluations[split].metrics[part] for one in done],
                "difference": {} if name == BASE else difference(ours, theirs, config),
            },
        )
