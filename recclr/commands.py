"""The commands that train many models to compare them: ``recclr tune``, ``recclr ablate``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from recclr.console import CompareProgress, print_json, print_table, say
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
    final, select = found["final"], found["select"]
    k = select.partition("@")[2]
    metrics = list(dict.fromkeys([select, f"recall@{k}", f"ndcg@{k}"]))
    rows = [
        [name, *(f"{final['metrics'][name]['all'][m]:.4f}" for m in metrics)]
        for name in ("tuned", "default")
    ]
    found_all = final["difference"].get("all", {})
    if found_all:
        cells = [_difference(found_all[m]) for m in metrics]
        rows.append(["tuned - default", *cells])
    users, seeds = final["counts"]["all"]["users"], len(final["seeds"])
    print_table(["", *metrics], rows, f"validation: {users:,} users, mean over {seeds} seeds")
    changed = [
        [key, str(found["default"][key]), str(value)]
        for key, value in found["winner"]["params"].items()
    ]
    if changed:
        print_table(["setting", "default", "tuned"], changed)


def _difference(difference: Mapping[str, float]) -> str:
    return f"{difference['difference']:+.4f}  [{difference['low']:+.4f}, {difference['high']:+.4f}]"
