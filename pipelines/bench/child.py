"""The process that measures one row: ``python -m bench.child TASK.json RESULT.json``.

A process of its own gives each row its own memory and threads, and lets a row fail alone. It may
run under an interpreter without recclr, so nothing but the standard library is imported here.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path

# Exit code for a library that is not there: the next interpreter may have it.
ABSENT = 66


def main(task_file: str, result_file: str) -> int:
    """Measure what the task file says, and write what came of it."""
    asked = json.loads(Path(task_file).read_text("utf-8"))
    library = asked["library"]
    if library is not None and importlib.util.find_spec(library) is None:
        return ABSENT
    result = importlib.import_module(asked["module"]).measure(asked["task"])
    Path(result_file).write_text(json.dumps(result), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
