"""The report as tables in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_TITLES = {
    "ids": "Training steps, ids only",
    "features": "Training steps with features: multi-hot and numeric items, users' histories",
    "evaluation": "Exact ranking",
    "growth": "Growth: d 64, B 8,192, N 1,024, row-wise Adagrad; generated logs",
    "peers": "Beside other trainers: same log, negatives and threads, rows measured in turn",
}
_NOTE = (
    "floor: the longer of 6·B·C·d (rankings 2·Q·V·d) operations at the GEMM rate and the table "
    "rows' traffic at the copy rate; C: distinct items among the N drawn. memory: peak of the "
    "row's own process while it is measured, interpreter included. cores: processor seconds used "
    "per second. Times are medians."
)


def show(report: dict[str, Any], console: Console) -> None:
    """The machine, then one table per section."""
    load = " ".join(f"{value:.1f}" for value in report["load"]) if report["load"] else "unknown"
    console.print(
        f"{report['device']}, {report['threads']} threads, torch {report['torch']}, "
        f"load {load}, {report['date']}"
    )
    if report["gemm_gflops"] is not None:
        low, high = report["gemm_gflops_range"]
        console.print(
            f"GEMM {report['gemm_gflops']:.0f} GFLOP/s (rows: {low:.0f} to {high:.0f}), "
            f"copy {report['copy_gb_s']:.0f} GB/s"
        )
    console.print(escape(f"log: {report['log']}"))
    for section, title in _TITLES.items():
        rows = [row for row in report["rows"] if row["section"] == section]
        if rows:
            console.print(_table(title, rows, peers=section == "peers"))
    console.print(_NOTE)


def _table(title: str, rows: Sequence[dict[str, Any]], *, peers: bool) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("what")
    last = "recclr is" if peers else "bound"
    for name in (
        "rate",
        "measured",
        "floor",
        "floor / measured",
        last,
        "memory",
        "cores",
        "repeats",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(escape(_name(row)), *_cells(row, peers=peers))
    return table


def _name(row: dict[str, Any]) -> str:
    return row["what"] + (f"\n  not measured: {row['skipped']}" if "skipped" in row else "")


def _cells(row: dict[str, Any], *, peers: bool) -> list[str]:
    if "skipped" in row:
        return []
    floor = "floor_s" in row
    if peers:
        last = f"{row['recclr_times']:.1f} x" if "recclr_times" in row else ""
    else:
        last = row.get("bound", "")
    return [
        f"{row['per_s']:,.0f} {row['unit']}",
        f"{row['measured_s'] * 1e3:,.1f} ms",
        f"{row['floor_s'] * 1e3:,.1f} ms" if floor else "",
        f"{row['ratio']:.2f}" if floor else "",
        last,
        f"{row['peak_memory_mb']:,.0f} MB",
        f"{row['cores']:.1f}",
        str(row["repeats"]),
    ]
