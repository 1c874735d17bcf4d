"""The option that every benchmark has: a file for the result as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

JsonFile = Annotated[
    Path | None, typer.Option("--json", dir_okay=False, help="write the result here too")
]


def require_place(json_file: Path | None) -> None:
    """Refuse, before anything is measured, a file that has no folder.

    Raises:
        BadParameter: the folder.
    """
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise typer.BadParameter(f"--json {json_file}: there is no folder {json_file.parent}")
