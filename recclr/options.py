"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder that `train` wrote.")]
Set = Annotated[
    list[str], typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one setting.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a machine to read.")]
K = Annotated[int, typer.Option("-k", "--k", min=1, max=100_000, help="Items per row.")]
OutFile = Annotated[
    Path | None, typer.Option("--out", help="Write all rows: .parquet, .csv or .jsonl.")
]
