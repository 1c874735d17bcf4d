"""The few pieces of HTML that the report is made of; every text from outside is escaped here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --paper: #ffffff;
  --line: #d8dde5; --model: #1f6feb; --second: #b35900; --other: #9aa7b8; --good: #1a7f37;
  --bad: #b42318;
  --shade: 31, 111, 235; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #9aa7b8; --paper: #12161c;
  --line: #2d3541; --model: #6ea8fe; --second: #e8a15c; --other: #5b6675; --good: #57c276;
  --bad: #f1857b;
  --shade: 110, 168, 254; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p.lead { font-size: 1.1rem; } .soft, figcaption, caption { color: var(--soft); }
figure { margin: 1rem 0; } svg { width: 100%; height: auto; font: 12px system-ui, sans-serif; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .75rem 0; font-size: .875rem;
  min-width: min(100%, 32rem); font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .25rem; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th { vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
.facts th { white-space: nowrap; vertical-align: top; font-weight: 400; color: var(--soft); }
.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
td small { color: var(--soft); display: block; font-size: .7rem; font-weight: 400; }
tr.model td { font-weight: 600; } td.best { color: var(--good); }
.note { border-left: 3px solid var(--bad); padding: .25rem .75rem; margin: .4rem 0; }
pre { overflow-x: auto; border: 1px solid var(--line); padding: .75rem; font-size: .8rem; }
.better { color: var(--good); } .worse { color: var(--bad); }
summary { cursor: pointer; color: var(--soft); }
"""


@dataclass(frozen=True)
class Cell:
    """A table cell: text, a second line in small type, a class, and a shade from 0 to 1."""

    text: str
    small: str = ""
    css: str = ""
    shade: float | None = None

    def html(self) -> str:
        css = f' class="{escape(self.css)}"' if self.css else ""
        style = "" if self.shade is None else f' style="background: {_shade(self.shade)}"'
        small = f"<small>{escape(self.small)}</small>" if self.small else ""
        return f"<td{css}{style}>{escape(self.text)}{small}</td>"


def document(title: str, body: str) -> str:
    """A whole page that needs nothing but itself.

    Args:
        title: plain text. body: HTML.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>recclr: {escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}</body>\n</html>\n"
    )


def table(
    columns: Sequence[str],
    rows: Iterable[tuple[str, Sequence[Cell]]],
    caption: str = "",
) -> str:
    """A table; each row is its class and its cells. Nothing where there are no rows.

    A column whose cells are all of class ``text`` is aligned as text; so is the first one.
    """
    rows = list(rows)
    if not rows:
        return ""
    head = "".join(_heading(name, number, rows) for number, name in enumerate(columns))
    body = "".join(
        f'<tr class="{escape(css)}">{"".join(cell.html() for cell in cells)}</tr>\n'
        for css, cells in rows
    )
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table>{title}<thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>\n"
    )


def pairs(values: Iterable[tuple[str, str]], caption: str = "") -> str:
    """A table of two columns without a head, for facts; nothing where there are none."""
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>\n'
        for name, value in values
    )
    if not rows:
        return ""
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table class="facts">{title}<tbody>{rows}</tbody></table></div>\n'


def section(title: str, *parts: str) -> str:
    """A section; nothing at all if all its parts are empty."""
    body = "".join(parts)
    return f"<section><h2>{escape(title)}</h2>\n{body}</section>\n" if body else ""


def paragraph(text: str, css: str = "") -> str:
    """A paragraph of plain text."""
    attribute = f' class="{escape(css)}"' if css else ""
    return f"<p{attribute}>{escape(text)}</p>\n"


def figure(svg: str, caption: str) -> str:
    """A chart with its caption; nothing where there is no chart."""
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>\n" if svg else ""


def folded(summary: str, body: str) -> str:
    """Something to open on demand; nothing where there is nothing inside."""
    return f"<details><summary>{escape(summary)}</summary>\n{body}</details>\n" if body else ""


def _heading(name: str, number: int, rows: Sequence[tuple[str, Sequence[Cell]]]) -> str:
    """A column's head, which may break after an underscore: names of rankers are long."""
    text = all("text" in cells[number].css.split() for _, cells in rows)
    css = ' class="text"' if text else ""
    return f'<th scope="col"{css}>{escape(name).replace("_", "_<wbr>")}</th>'


def _shade(value: float) -> str:
    return f"rgba(var(--shade), {0.5 * min(max(value, 0.0), 1.0):.2f})"
