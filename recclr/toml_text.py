"""Plain values as TOML; the standard library reads it only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def dump_section(section: Mapping[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    """Append a section, and those in it, to ``lines``: plain values first, as TOML demands.

    A value that is None is left out.
    """
    values = {k: v for k, v in section.items() if not isinstance(v, Mapping) and v is not None}
    if path and (values or not section):
        lines += ["", "[" + ".".join(_key(key) for key in path) + "]"]
    lines += [f"{_key(key)} = {toml_value(value)}" for key, value in values.items()]
    for key, value in section.items():
        if isinstance(value, Mapping):
            dump_section(value, (*path, key), lines)


def _key(key: str) -> str:
    bare = key and all(c.isascii() and (c.isalnum() or c in "-_") for c in key)
    return key if bare else toml_value(key)


def toml_value(value: Any) -> str:
    """A plain value, list or mapping (inline) as TOML."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(k)} = {toml_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml_value(part) for part in value) + "]"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which TOML wants escaped as well.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value)
