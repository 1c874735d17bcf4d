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
    "tables": "An embedding table: lookups of bags, gradient, update; rows measured in turn",
    "growth": "Growth: d 64, B 8,192, N 1,024, row-wise Adagrad; generated logs",
    "peers": "Beside other trainers: same log, negatives and threads, rows measured in turn",
}
# What a section shows beside the columns of all.
_SPECIAL = {"tables": "recclr is", "peers": "recclr is", "growth": "preparing"}
_NOTE = (
    "floor: the longer of 6·B·C·d (rankings 2·Q·V·d) operations at the GEMM rate and the table "
    "rows' traffic at the copy rate; C: distinct items among the N drawn. memory: peak of the "
    "row's own process while it is measured, interpreter included; preparing: before that, while "
    "the log and the model are made. cores: processor seconds used per second. Times are medians."
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
            console.print(_table(title, rows, _SPECIAL.get(section, "bound"), report["torch"]))
    console.print(_NOTE)


def _table(title: str, rows: Sequence[dict[str, Any]], special: str, torch: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("what")
    for name in (
        "rate",
        "measured",
        "floor",
        "floor / measured",
        special,
        "memory",
        "cores",
        "repeats",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(escape(_name(row, torch)), *_cells(row, special))
    return table


def _name(row: dict[str, Any], torch: str) -> str:
    """With the version of other libraries; that of PyTorch stands above the tables."""
    version = f" ({row['version']})" if row.get("version", torch) != torch else ""
    skipped = f"\n  not measured: {row['skipped']}" if "skipped" in row else ""
    return row["what"] + version + skipped


def _cells(row: dict[str, Any], special: str) -> list[str]:
    if "skipped" in row:
        return []
    floor = "floor_s" in row
    prepared = "preparation_peak_mb" in row
    shown = {
        "bound": row.get("bound", ""),
        "recclr is": f"{row['recclr_times']:.1f} x" if "recclr_times" in row else "",
        "preparing": f"{row['preparation_peak_mb']:,.0f} MB" if prepared else "",
    }
    return [
        f"{row['per_s']:,.0f} {row['unit']}",
        f"{row['measured_s'] * 1e3:,.1f} ms",
        f"{row['floor_s'] * 1e3:,.1f} ms" if floor else "",
        f"{row['ratio']:.2f}" if floor else "",
        shown[special],
        f"{row['peak_memory_mb']:,.0f} MB",
        f"{row['cores']:.1f}",
        str(row["repeats"]),
    ]
