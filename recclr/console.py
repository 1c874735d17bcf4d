"""What a person at a terminal sees: progress on stderr, tables on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

_PREVIEW_ROWS = 20
_FILE_WIDTH = 240


class RunProgress:
    """Shows the events of a run: a line per stage and evaluation, one bar for what is running.

    Where stderr is no terminal only the lines are written.
    """

    def __init__(self, select: str = "recall@20", *, quiet: bool = False) -> None:
        self.select = select
        # No wrapping: lines with paths in them end up in the logs of nightly jobs.
        self.console = Console(stderr=True, highlight=False, quiet=quiet, soft_wrap=True)
        self.bar = _bar(self.console, quiet=quiet)
        self.task: TaskID | None = None
        self.notes: set[str] = set()

    def __enter__(self) -> RunProgress:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        """One event, as ``run.train_run`` gives them; kinds it does not know are passed over."""
        show = getattr(self, f"_{event['kind']}", None)
        if show is not None:
            show(event)

    def _stage(self, event: dict[str, Any]) -> None:
        self._clear()
        self.console.print(f"[bold]{escape(str(event['name']))}[/bold]")

    def _data(self, event: dict[str, Any]) -> None:
        self.console.print(f"  {escape(event['log'])}; split by {event['split']}")

    def _share(self, event: dict[str, Any]) -> None:
        self._stage({"name": f"share {event['share']:g} of the train rows"})

    def _step(self, event: dict[str, Any]) -> None:
        text = (
            f"loss {event['loss']:.4f}  temperature {event['temperature']:.3f}  "
            f"{event['positives_per_s']:,.0f} positives/s"
        )
        if self.task is None:
            self.task = self.bar.add_task(text, total=event["num_steps"])
        self.bar.update(self.task, description=text, completed=event["step"])

    def _evaluation(self, event: dict[str, Any]) -> None:
        value = event["metrics"].get(self.select)
        shown = "" if value is None else f"{self.select} {value:.4f}"
        self.console.print(f"  epoch {event['epoch']:.1f}  {shown}")

    def _warning(self, event: dict[str, Any]) -> None:
        self.console.print(f"  warning: {escape(event['text'])}; {escape(event['advice'])}")

    def _mining(self, event: dict[str, Any]) -> None:
        skipped = sum(event["skipped"].values())
        shown = (
            f"  epoch {event['epoch']:.1f}  mined {event['mined']:,} negatives for "
            f"{event['queries']:,} users, {skipped / max(event['candidates'], 1):.0%} refused"
        )
        if event["false_negatives"] is not None:
            shown += f", {event['false_negatives']['share']:.2%} known to be false"
        self.console.print(shown)

    def _note(self, event: dict[str, Any]) -> None:
        self.console.print(f"  note: {escape(event['text'])}")

    def _graph(self, event: dict[str, Any]) -> None:
        if not event["captured"]:
            self._once(f"steps are not captured as a CUDA graph: {event['reason']}")

    def _compile(self, event: dict[str, Any]) -> None:
        self._once(f"dense layers are not compiled: {event['reason']}")

    def _once(self, text: str) -> None:
        """A note that the stages of a run, and a resumed one, have in common."""
        if text not in self.notes:
            self.notes.add(text)
            self._note({"text": text})

    def _baseline(self, event: dict[str, Any]) -> None:
        self._waiting(f"{event['name']} {event['value']:.4f}")

    def _judging(self, event: dict[str, Any]) -> None:
        """``done`` of ``total`` queries of a ranker; without them, that its turn has come."""
        if "done" in event:
            text = f"judging {event['name']}: {event['done']:,} of {event['total']:,} users"
            self._waiting(text)
            return
        self._waiting(f"fitting {event['name']}")
        if not self.console.is_terminal:
            self.console.print(f"  {escape(event['name'])}")

    def _waiting(self, text: str) -> None:
        if self.task is None:
            self.task = self.bar.add_task(escape(text), total=None)
        self.bar.update(self.task, description=escape(text))

    def _clear(self) -> None:
        if self.task is not None:
            self.bar.remove_task(self.task)
            self.task = None


class CompareProgress:
    """Shows many trainings that are compared: one bar of all, with the best so far beside it.

    Where stderr is no terminal, a line per training.
    """

    def __init__(self, select: str) -> None:
        self.select = select
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.bar = _bar(self.console)
        self.task: TaskID | None = None
        self.best: tuple[int, float, str] | None = None

    def __enter__(self) -> CompareProgress:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        """One event: a ``stage``, a ``note``, something ``known`` from an earlier call, or
        ``trained`` or ``repeated`` with ``done`` of ``total``; others are passed over.
        """
        if event["kind"] == "stage":
            self._clear()
            self.console.print(f"[bold]{escape(str(event['name']))}[/bold]")
        elif event["kind"] == "note":
            self.console.print(f"  note: {escape(event['text'])}")
        elif event["kind"] == "known":
            self._compare(event)
        elif event["kind"] == "trained":
            self._trained(event)
        elif event["kind"] == "repeated":
            self._shown(event, str(event.get("name", "")))

    def _compare(self, event: Mapping[str, Any]) -> None:
        rung, value = event["rung"], event["value"]
        if value is not None and (self.best is None or (rung, value) > self.best[:2]):
            self.best = (rung, value, f"trial {event['number']}")

    def _trained(self, event: Mapping[str, Any]) -> None:
        self._compare(event)
        value = event["value"]
        shown = "came to nothing" if value is None else f"{self.select} {value:.4f}"
        text = f"trial {event['number']}, rung {event['rung']}: {shown}"
        if self.best is not None:
            text += f"; best: {self.best[1]:.4f} (rung {self.best[0]}, {self.best[2]})"
        self._shown(event, text)

    def _shown(self, event: Mapping[str, Any], text: str) -> None:
        if self.task is None:
            self.task = self.bar.add_task(escape(text), total=event["total"])
        self.bar.update(self.task, description=escape(text), completed=event["done"])
        if not self.console.is_terminal:
            self.console.print(f"  {event['done']:,} of {event['total']:,}  {escape(text)}")

    def _clear(self) -> None:
        if self.task is not None:
            self.bar.remove_task(self.task)
            self.task = None


def _bar(console: Console, *, quiet: bool = False) -> Progress:
    """What is being done and how much of it, at a terminal only; gone when it ends."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )


@contextmanager
def working(text: str, *, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Show at a terminal that something is being done; elsewhere nothing.

    Yields:
        To be called with (done, in all), for a bar that fills.
    """
    with _bar(Console(stderr=True), quiet=quiet) as bar:
        task = bar.add_task(escape(text), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def say(text: str) -> None:
    """A line on stderr: for the person, not for the pipe."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(escape(text))


def say_if_unfinished(run: Path) -> None:
    """That the training of a run folder has not come to its end, where it has not."""
    from recclr.run_folder import METRICS

    if not (run / METRICS).exists():
        say(
            f"{run} is not finished: what follows is of its best model so far; recclr train with "
            "--resume goes on"
        )


def print_json(value: Any) -> None:
    """A JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> None:
    """A table on stdout; the first column is text, the others are numbers."""
    table = Table(title=title or None, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(escape(name), justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    # In a file or a pipe there is no edge that cells would have to be cut at.
    width = None if sys.stdout.isatty() else _FILE_WIDTH
    Console(highlight=False, width=width).print(table)


def print_results(metrics: Mapping[str, Any], k: str, select_slice: str = "all") -> None:
    """The model among its baselines, from the contents of metrics.json."""
    from recclr.settings.judging import leading_slice

    shown = [f"recall@{k}", f"ndcg@{k}"]
    for split in ("test", "valid"):
        if split not in metrics:
            continue
        rows, part = [], leading_slice(metrics["counts"][split], select_slice)
        for name, slices in metrics[split].items():
            if part not in slices:
                continue
            intervals = metrics["intervals"][split].get(name, {}).get(part, {})
            rows.append([name, *(_cell(slices[part][m], intervals.get(m)) for m in shown)])
        rows.sort(key=lambda row: row[1], reverse=True)
        counts = metrics["counts"][split][part]
        title = (
            f"{split}{whose(part)}: {counts['users']:,} users, {counts['candidates']:,} candidates"
        )
        print_table(["ranker", *shown], rows, title)
        return


def whose(part: str) -> str:
    """For the title of a table: the slice it is about, where it is not about everybody."""
    return "" if part == "all" else f", {part}"


def print_curve(curve: Mapping[str, Any]) -> None:
    """A learning curve: a row per ranker, a column per share of the train rows."""
    from recclr.report.curve import names

    rows = []
    for name in names(curve):
        found = [point["rankers"].get(name) for point in curve["shares"]]
        rows.append([name, *("n/a" if f is None else _cell(f["value"], None) for f in found)])
    title = f"{curve['select']} on validation{whose(curve['select_slice'])} by share of train rows"
    heads = [f"{point['rows_share']:.1%}" for point in curve["shares"]]
    print_table(["ranker", *heads], rows, title)


def print_batch_sizes(trials: Sequence[Mapping[str, Any]], fastest: int) -> None:
    """Speed and memory of each batch size that fits."""
    rows = [
        [
            f"{trial['batch_size']:,}",
            f"{trial['positives_per_s']:,.0f}",
            "" if trial["peak_bytes"] is None else f"{trial['peak_bytes'] / 1e6:,.0f} MB",
            f"{trial['duplicate_share']:.1%}",
            f"{trial['masked_share']:.2%}",
        ]
        for trial in trials
    ]
    columns = ["batch size", "positives/s", "peak memory", "duplicates", "masked"]
    print_table(columns, rows, "steps by batch size")
    say(
        f"{fastest:,} rows are as fast as it gets; {trials[-1]['batch_size']:,} is the largest "
        'tried that fits. train.lr_scaling = "sqrt" takes the rates along.'
    )


def print_amount(found: Mapping[str, Any]) -> None:
    """Whether data are little, by which criteria; the proposed settings on stdout, to be pasted."""
    say(f"note: {found['sentence']}" if found["verdict"] == "plenty" else found["sentence"])
    for reason in found["reasons"]:
        say(f"  {reason}")
    if found["toml"]:
        sys.stdout.write(found["toml"] + "\n")


def print_frame(frame: pl.DataFrame) -> None:
    """The first rows of a result on stdout."""
    head = frame.head(_PREVIEW_ROWS)
    print_table(head.columns, [[_plain(value) for value in row] for row in head.iter_rows()])
    if frame.height > _PREVIEW_ROWS:
        say(f"{frame.height - _PREVIEW_ROWS:,} more rows; write them all with --out FILE")


def _cell(value: float, interval: Sequence[float] | None) -> str:
    shown = f"{value:.4f}"
    return shown if interval is None else f"{shown}  [{interval[0]:.4f}, {interval[1]:.4f}]"


def _plain(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
