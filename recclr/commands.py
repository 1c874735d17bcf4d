"""The commands beside those of a run: comparing many trainings, and pre-training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from recclr.console import (
    CompareProgress,
    RunProgress,
    print_curve,
    print_json,
    print_table,
    say,
    whose,
)
from recclr.errors import ConfigError
from recclr.options import Device, Json, Set

Seeds = Annotated[int, typer.Option(min=1, max=1000, help="Trainings of each that is compared.")]
Resume = Annotated[bool, typer.Option(help="Go on with work that was stopped.")]
Out = Annotated[Path, typer.Option(help="Folder; new or empty, or with --resume begun.")]
Start = Annotated[Path, typer.Option(help="TOML file that describes the run to start from.")]


def tune(
    config: Start,
    out: Out,
    space: Annotated[
        Path | None,
        typer.Option(help="TOML file of what may vary; without it, what suits the configuration."),
    ] = None,
    trials: Annotated[
        int | None, typer.Option(help="Configurations tried, instead of the space's.")
    ] = None,
    budget_s: Annotated[
        float | None,
        typer.Option(
            "--budget-s", min=0, help="Begin no further training of the search after so long."
        ),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, max=1024, help="Trainings at once.")] = 1,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the search, instead of the configuration's.")
    ] = None,
    seeds: Seeds = 3,
    overrides: Set = [],  # noqa: B006 - typer copies it
    resume: Resume = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Search settings: many trained a little, the best of them more; judged on validation only.

    OUT/best.toml is what `recclr train` takes; OUT/report.html shows what was tried.
    """
    from recclr.config import load_config
    from recclr.tune import tune as search

    settings = load_config(config, overrides)
    with CompareProgress(settings.evaluate.select) as progress:
        found = search(
            settings,
            out,
            space=space,
            trials=trials,
            budget_s=budget_s,
            processes=processes,
            seed=seed,
            seeds=seeds,
            resume=resume,
            device=device,
            on_event=progress,
        )
    if as_json:
        print_json(found)
        return
    _print_tuned(found)
    say(f"configuration: {out / 'best.toml'}\nreport: {out / 'report.html'}")


def _print_tuned(found: Mapping[str, Any]) -> None:
    final, select, part = found["final"], found["select"], found["select_slice"]
    k = select.partition("@")[2]
    metrics = list(dict.fromkeys([select, f"recall@{k}", f"ndcg@{k}"]))
    rows = [
        [name, *(f"{final['metrics'][name][part][m]:.4f}" for m in metrics)]
        for name in ("tuned", "default")
    ]
    paired = final["difference"].get(part, {})
    if paired:
        cells = [_difference(paired[m]) for m in metrics]
        rows.append(["tuned - default", *cells])
    users, seeds = final["counts"][part]["users"], len(final["seeds"])
    title = f"validation{whose(part)}: {users:,} users, mean over {seeds} seeds"
    print_table(["", *metrics], rows, title)
    changed = [
        [key, str(found["default"][key]), str(value)]
        for key, value in found["winner"]["params"].items()
    ]
    if changed:
        print_table(["setting", "default", "tuned"], changed)


def _difference(difference: Mapping[str, float]) -> str:
    return f"{difference['difference']:+.4f}  [{difference['low']:+.4f}, {difference['high']:+.4f}]"


def ablate(
    config: Start,
    out: Out,
    part: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=KEY=VALUE,-KEY",
            help="A row beside the base; -KEY goes back to its default. May be repeated.",
        ),
    ] = [],  # noqa: B006
    parts: Annotated[
        Path | None, typer.Option(help="TOML file whose section parts holds the rows.")
    ] = None,
    seeds: Seeds = 3,
    test: Annotated[bool, typer.Option("--test", help="Judge test as well, once.")] = False,
    overrides: Set = [],  # noqa: B006
    resume: Resume = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train the configuration and each of its parts left out, and compare them by user.

    Without --part and --parts, everything that is switched on is switched off in turn.
    """
    from recclr.ablation import ablate as compare
    from recclr.ablation_parts import parse_part, read_parts
    from recclr.config import load_config

    rows = [*map(parse_part, part), *([] if parts is None else read_parts(parts))]
    settings = load_config(config, overrides)
    with CompareProgress(settings.evaluate.select) as progress:
        found = compare(
            settings,
            out,
            parts=rows,
            seeds=seeds,
            test=test,
            resume=resume,
            device=device,
            on_event=progress,
        )
    if as_json:
        print_json(found)
        return
    for split in found["counts"]:
        _print_rows(found, split)
    say(f"report: {out / 'report.html'}")


def _print_rows(found: Mapping[str, Any], split: str) -> None:
    from recclr.settings.judging import leading_slice

    select, rows = found["select"], []
    part = leading_slice(found["counts"][split], found["select_slice"])
    for row in found["rows"]:
        if "reason" in row:
            rows.append([row["name"], "diverged", "", ""])
            continue
        value = f"{row['metrics'][split][part][select]:.4f}"
        difference = row["differences"][split].get(part, {}).get(select)
        shown = _difference(difference) if difference else ""
        rows.append([row["name"], value, shown, f"{row['seconds']:,.1f}"])
    users = found["counts"][split][part]["users"]
    title = f"{split}{whose(part)}: {users:,} users, mean over {len(found['seeds'])} seeds"
    print_table(["row", select, "row - base", "s"], rows, title)


def curve(
    config: Annotated[Path, typer.Option(help="TOML file that describes the run.")],
    out: Annotated[Path, typer.Option(help="Folder; new or empty, or with --resume begun.")],
    shares: Annotated[str, typer.Option(help="Shares of the train rows.")] = "0.01,0.05,0.2,1",
    overrides: Set = [],  # noqa: B006
    resume: Annotated[bool, typer.Option(help="Go on with a curve, or add shares to it.")] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train and judge on growing samples of the rows: what more data would bring."""
    from recclr.config import load_config
    from recclr.curves import learning_curve

    settings, parts = load_config(config, overrides), _numbers(shares)
    with RunProgress(settings.evaluate.select) as progress:
        found = learning_curve(
            settings, out, parts, resume=resume, device=device, on_event=progress
        )
    if as_json:
        print_json(found)
    else:
        print_curve(found)
        say(f"page: {out / 'curve.html'}")


def pretrain_items(
    config: Annotated[Path, typer.Option(help="TOML file with data.items and item.features.")],
    out: Annotated[Path, typer.Option(help="Folder for the weights; new, empty or begun.")],
    overrides: Set = [],  # noqa: B006
    resume: Annotated[bool, typer.Option(help="Go on with one that was stopped.")] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Teach the item tower a catalogue without interactions, for model.init_from to start from."""
    from recclr.config import load_config
    from recclr.pretrain import pretrain_items as pretrain

    settings = load_config(config, overrides)
    with RunProgress() as progress:
        report = pretrain(settings, out, resume=resume, device=device, on_event=progress)
    if as_json:
        print_json(report)
        return
    shown = ("untrained", "trained", "chance")
    rows = [
        [name, *("" if name not in report[of] else f"{report[of][name]:.4f}" for of in shown)]
        for name in report["trained"]
    ]
    title = f"two views: {report['queries']:,} of {report['items']:,} items against all"
    print_table(["", *shown], rows, title)
    say(f'start from it: [model] init_from = "{out}"')


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--shares {text!r}: expected shares such as 0.05,0.2,1") from None
