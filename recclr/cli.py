"""The command line: each command reads its arguments, calls one function, and prints.

Results go to stdout, progress and messages to stderr. A mistake of the caller ends with one
message and the exit code of its error class, never with a traceback.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from recclr import __version__
from recclr.cli_mine import mine
from recclr.commands import ablate, curve, pretrain_items, tune
from recclr.console import (
    RunProgress,
    print_amount,
    print_batch_sizes,
    print_frame,
    print_json,
    print_results,
    print_table,
    say,
    working,
)
from recclr.errors import ConfigError, PeerError, RecclrError
from recclr.options import Device, Json, K, OutFile, Run, Set

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train, judge and ship two-tower retrieval models from interaction logs.",
)

# How long other processes leave rank 0 to say why it refuses; it ends them when it has.
_RANK_0_S = 20.0
# What every process would do again, and write to the same place.
_ALONE = (
    "check",
    "curve",
    "pretrain-items",
    "tune",
    "ablate",
    "report",
    "demo",
)


def main() -> None:
    """Entry point of ``recclr``; returns by ``sys.exit`` with the code of DESIGN, "Commands"."""
    try:
        app()
    except PeerError as error:
        # The process that failed first has said why.
        sys.exit(error.exit_code)
    except RecclrError as error:
        say(f"error: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"recclr {__version__}\n")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it, end.")
    ] = False,
) -> None:
    """Two-tower retrieval models: train, judge, ship."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1" or context.invoked_subcommand not in _ALONE:
        return
    if os.environ.get("RANK", "0") != "0":
        # torchrun ends all processes once one ends, and rank 0, maybe slower, is to be heard.
        time.sleep(_RANK_0_S)
        raise PeerError("rank 0 refuses", exit_code=ConfigError.exit_code)
    raise ConfigError(
        f"recclr {context.invoked_subcommand} runs in one process, found WORLD_SIZE = {size}; "
        "start it without torchrun"
    )


@app.command()
def check(
    events: Annotated[
        str | None, typer.Argument(help="Events: file, folder of shards or glob.")
    ] = None,
    users: Annotated[str | None, typer.Option(help="Table of users.")] = None,
    items: Annotated[str | None, typer.Option(help="Table of items.")] = None,
    config: Annotated[Path | None, typer.Option(help="Check the data of this file.")] = None,
    overrides: Set = [],  # noqa: B006 - typer copies it
    batch_sizes: Annotated[
        bool, typer.Option(help="Try steps of rising batch size: speed and memory of each.")
    ] = False,
    write_config: Annotated[
        Path | None,
        typer.Option(help="New file for the whole configuration, with what is proposed."),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Read the data and say what a run would find: rows per step, bad rows, split, features."""
    from recclr.checking import check_data

    with working("trying batch sizes" if batch_sizes else "reading"):
        found = check_data(
            events,
            users=users,
            items=items,
            config=config,
            overrides=overrides,
            batch_sizes=batch_sizes,
            device=device,
            write_config=write_config,
        )
    if as_json:
        print_json(found)
        return
    rows = [[s["name"], f"{s['rows_in']:,}", f"{s['rows_out']:,}"] for s in found["steps"]]
    print_table(["step", "rows in", "rows out"], rows, found["log"])
    print_table(
        ["part", "rows", "users", "items"],
        [
            [name, *(f"{counts[key]:,}" for key in ("rows", "users", "items"))]
            for name, counts in found["split"]["counts"].items()
            if "users" in counts
        ],
        f"split by {found['split']['by']}",
    )
    if batch_sizes:
        print_batch_sizes(found["batch_sizes"], found["fastest_batch_size"])
    for reason, count in found["quarantined"].items():
        say(f"bad rows: {count:,} {reason}")
    for note in found["notes"]:
        say(f"note: {note}")
    print_amount(found["amount"])
    if write_config is not None:
        say(f"configuration: {write_config}")


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="TOML file that describes the run.")],
    out: Annotated[Path, typer.Option(help="Run folder; new or empty, or with --resume begun.")],
    overrides: Set = [],  # noqa: B006
    resume: Annotated[bool, typer.Option(help="Go on with a run that was stopped.")] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train both towers, judge them against the baselines, report, export.

    Under torchrun, its processes share the work.
    """
    from recclr.config import load_config
    from recclr.joining import joined
    from recclr.run import train_run
    from recclr.run_folder import METRICS, read_json

    with joined() as ranks:
        settings = load_config(config, overrides)
        with RunProgress(settings.evaluate.select, quiet=not ranks.first) as progress:
            train_run(settings, out, resume=resume, device=device, on_event=progress, ranks=ranks)
    if not ranks.first:
        return
    metrics = read_json(out / METRICS)
    if as_json:
        print_json(metrics)
    else:
        judging = settings.evaluate
        print_results(metrics, judging.select.partition("@")[2], judging.select_slice)
        say(f"report: {out / 'report.html'}")


app.command()(curve)
app.command()(pretrain_items)


@app.command()
def evaluate(
    run: Run,
    split: Annotated[str, typer.Option(help="Held-out part of the run: test or valid.")] = "test",
    events: Annotated[
        str | None, typer.Option(help="Judge on these events instead (same columns).")
    ] = None,
    ks: Annotated[str | None, typer.Option(help="Cut-offs, for example 10,20.")] = None,
    as_json: Json = False,
) -> None:
    """Judge the model of a run on held-out events, exactly, over the whole catalogue.

    Under torchrun, its processes share the work.
    """
    from recclr.evaluate import left_out
    from recclr.judge import evaluate_run
    from recclr.run_folder import fingerprints, require_same_inputs
    from recclr.served import served_by

    with served_by(run, "judging", lambda: _ks(ks)) as served:
        ranks = served.ranks
        if events is None:
            # Other rows would be split elsewhere, and train rows judged as test.
            require_same_inputs(run, fingerprints(served.config))
        found = evaluate_run(
            served.config,
            served.prepared,
            served.ranker,
            split=split,
            events=events,
            ks=_ks(ks),
            progress=served.progress,
            ranks=ranks,
        )
    if not ranks.first:
        return
    if as_json:
        print_json(found.to_json())
    else:
        sys.stdout.write(f"{found}\n")
        for note in left_out(found.counts):
            say(f"note: {note}")


app.command()(tune)
app.command()(ablate)
app.command()(mine)


@app.command()
def recommend(
    run: Run,
    users: Annotated[str | None, typer.Option(help="User ids, separated by commas.")] = None,
    users_from: Annotated[
        str | None, typer.Option(help="Table with the users' ids; without either, all users.")
    ] = None,
    k: K = 10,
    items_from: Annotated[
        str | None, typer.Option(help="Table with the item ids to choose from.")
    ] = None,
    keep_seen: Annotated[bool, typer.Option(help="Also what the user has there.")] = False,
    out: OutFile = None,
    as_json: Json = False,
) -> None:
    """The best items of users, but those that they have in the rows the model was trained on.

    Under torchrun, its processes share the work.
    """
    from recclr.ids_input import read_ids, require_ending, write_rows
    from recclr.recommend import recommend as rank
    from recclr.served import served_by

    with served_by(run, "ranking", lambda: require_ending(out)) as served:
        prepared, columns = served.prepared, served.config.data.columns
        wanted = read_ids(users, users_from, prepared.users, columns.user)
        subset = read_ids(None, items_from, prepared.items, columns.item)
        found = rank(
            prepared,
            served.ranker,
            wanted,
            k=k,
            items=subset,
            keep_seen=keep_seen,
            ranks=served.ranks,
        )
    if not served.ranks.first:
        return
    _say_if_short(k, len(prepared.items) if subset is None else subset.n_unique())
    if wanted is not None:
        unknown = int((prepared.users.encode(wanted) < 0).sum())
        if unknown:
            say(f"{unknown:,} of {len(wanted):,} users are unknown: ranked for an empty history")
    write_rows(found, out, show=print_json if as_json else print_frame, as_json=as_json)


@app.command()
def similar(
    run: Run,
    items: Annotated[str | None, typer.Option(help="Item ids, separated by commas.")] = None,
    items_from: Annotated[
        str | None, typer.Option(help="Table with the item ids; without either, all items.")
    ] = None,
    k: K = 10,
    out: OutFile = None,
    as_json: Json = False,
) -> None:
    """The items that are most like given items.

    Under torchrun, its processes share the work.
    """
    from recclr.ids_input import read_ids, require_ending, write_rows
    from recclr.recommend import similar as rank
    from recclr.served import served_by

    with served_by(run, "ranking", lambda: require_ending(out)) as served:
        prepared, column = served.prepared, served.config.data.columns.item
        wanted = read_ids(items, items_from, prepared.items, column)
        found = rank(prepared, served.ranker, wanted, k=k, ranks=served.ranks)
    if not served.ranks.first:
        return
    _say_if_short(k, len(prepared.items) - 1)
    write_rows(found, out, show=print_json if as_json else print_frame, as_json=as_json)


@app.command()
def export(
    run: Run,
    to: Annotated[str, typer.Option(help="parquet:DIR or lancedb:DIR.")],
    name: Annotated[str, typer.Option(help="Name of the embeddings in the store.")] = "catalogue",
    as_json: Json = False,
) -> None:
    """Write both towers' embeddings to a store, and verify what it holds.

    Under torchrun, its processes share the embedding; the first one writes.
    """
    from dataclasses import asdict

    from recclr.distributed import LONG_S
    from recclr.export import parse_target
    from recclr.served import served_by
    from recclr.shipping import ship

    with served_by(run, "exporting", lambda: parse_target(to)) as served:
        if served.ranks.first:
            prepared, config = served.prepared, served.config
            report = ship(prepared, served.ranker, to, run=None, config=config, name=name)
        served.ranks.meet("the export", LONG_S)
    if not served.ranks.first:
        return
    if as_json:
        print_json(asdict(report))
    else:
        sys.stdout.write(f"{report}\n")


@app.command()
def report(run: Run) -> None:
    """Write report.html of a finished run again."""
    from recclr.report import write_report

    sys.stdout.write(f"{write_report(run)}\n")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for data, run and store.")] = Path(
        "recclr-demo"
    ),
    device: Device = "auto",
) -> None:
    """Generate a log, train on it, and query the store it was exported to. Works offline."""
    from recclr.demo import run_demo

    with RunProgress() as progress:
        result = run_demo(out, device=device, on_event=progress)
    print_results(result.metrics, "20")
    print_frame(result.answer)
    say(f"report: {result.report}\nstore:  {result.store}")


def _ks(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        ks: tuple[Any, ...] = tuple(int(part) for part in text.split(","))
    except ValueError:
        ks = ()
    if not ks or min(ks) < 1:
        raise ConfigError(f"--ks {text!r}: expected cut-offs such as 10,20")
    return ks


def _say_if_short(k: int, num_choices: int) -> None:
    if k > num_choices:
        say(f"note: {k:,} were asked for, but there are {num_choices:,} items to choose from")
