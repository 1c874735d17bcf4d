"""``recclr mine``: its options, which are the fields of ``MiningSettings``, and what it prints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from recclr.console import print_json, say_if_unfinished, working
from recclr.errors import ConfigError
from recclr.settings import MiningSettings

_DEFAULT = MiningSettings()


def mine(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder that `train` wrote.")],
    out: Annotated[Path, typer.Option(help="File to write: .parquet, .csv or .jsonl.")],
    count: Annotated[int, typer.Option(help="Negatives for each positive.")] = _DEFAULT.count,
    depth: Annotated[int, typer.Option(help="Ranks that are looked at.")] = _DEFAULT.depth,
    skip: Annotated[int, typer.Option(help="Best ranks that are left out.")] = _DEFAULT.skip,
    drop_popular: Annotated[
        float, typer.Option(help="Share of the items, most popular first, never taken.")
    ] = _DEFAULT.drop_popular,
    max_train_rows: Annotated[
        int, typer.Option(help="Never take items with more train rows; 0: no bound.")
    ] = _DEFAULT.max_train_rows,
    margin: Annotated[
        float, typer.Option(help="Least score of the positive minus that of the negative.")
    ] = _DEFAULT.margin,
    relative_margin: Annotated[
        float, typer.Option(help="The same, times the size of the positive's score; 0: no bound.")
    ] = _DEFAULT.relative_margin,
    share: Annotated[
        float,
        typer.Option(help="Take items below this share of a positive score above 0; 0: no bound."),
    ] = _DEFAULT.share,
    choice: Annotated[
        str, typer.Option(help="Of what is left: uniform, score or top.")
    ] = _DEFAULT.choice,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON for a machine to read.")
    ] = False,
) -> None:
    """Write hard negatives of every train pair, found by the model behind guards, and a report.

    Under torchrun, its processes share the work.
    """
    from recclr.joining import joined
    from recclr.triplets import mine_run

    with joined() as ranks, working("mining", quiet=not ranks.first) as progress:
        settings = _settings(
            count=count,
            depth=depth,
            skip=skip,
            drop_popular=drop_popular,
            max_train_rows=max_train_rows,
            margin=margin,
            relative_margin=relative_margin,
            share=share,
            choice=choice,
        )
        report = mine_run(
            run, out, settings, seed=seed, device=device, progress=progress, ranks=ranks
        )
    if not ranks.first:
        return
    say_if_unfinished(run)
    if as_json:
        print_json(report.to_json())
    else:
        sys.stdout.write(f"{report}\n")


def _settings(**options: Any) -> MiningSettings:
    try:
        return MiningSettings(**options)
    except ValueError as error:
        raise ConfigError(f"recclr mine: {error}") from error
