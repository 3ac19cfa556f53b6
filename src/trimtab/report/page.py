"""A self-contained HTML page: no script, no network, readable in light and dark, on a phone and on paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from trimtab.report.tables import Table

_STYLE = """
:root { color-scheme: light dark; --ink: #1b2430; --soft: #566173; --ground: #fbfbf9; --card: #ffffff;
  --line: #dfe3e8; --accent: #0b6e8f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #9aa5b4; --ground: #12161c;
  --card: #1a2028; --line: #2f3843; --accent: #63c3e2; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); line-height: 1.55;
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 54rem; margin: 0 auto; padding: 2.5rem 1.2rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; }
p, ul, ol { max-width: 46rem; }
li { margin: .3rem 0; }
.lead { font-size: 1.1rem; color: var(--soft); margin: 0 0 1.6rem; }
.verdict { border-left: 4px solid var(--accent); background: var(--card); padding: .9rem 1.2rem;
  font-size: 1.08rem; border-radius: 0 8px 8px 0; box-shadow: 0 1px 3px rgb(0 0 0 / .08); }
.verdict ul { margin: .4rem 0 0; padding-left: 1.2rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr));
  gap: .8rem; margin: 1.4rem 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; }
.card b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: .9rem; line-height: 1.35; display: block; }
figure { margin: 1.2rem 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .8rem; }
figure svg { width: 100%; height: auto; display: block; color: var(--ink); }
figcaption, .note { color: var(--soft); font-size: .9rem; margin: .5rem .2rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { padding: .42rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; }
th:first-child, td:first-child { text-align: left; } thead th { color: var(--soft); font-weight: 600; }
.words td { text-align: left; } .words th { text-align: left; }
.range { display: block; color: var(--soft); font-size: .85em; white-space: nowrap; }
code, kbd { font: .88em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--accent); }
footer { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: .8rem; color: var(--soft);
  font-size: .88rem; }
@media print { body { background: none; } .verdict, .card, figure { box-shadow: none; break-inside: avoid; } }
"""


@dataclass(frozen=True)
class Section:
    """A part of the page: a title and HTML made by the functions of this module."""

    title: str
    body: str


def page(title: str, lead: str, opening: str, sections: Sequence[Section], footer: str) -> str:
    """Return a whole page.

    Args:
        title: Text of the page's head line.
        lead: Text under it.
        opening: HTML between the lead and the first section.
        sections: The parts.
        footer: Text at the end.
    """
    parts = "\n".join(f"<section><h2>{escape(s.title)}</h2>\n{s.body}\n</section>" for s in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n{opening}\n{parts}\n'
        f"<footer>{escape(footer)}</footer>\n</main>\n</body>\n</html>\n"
    )


def paragraph(text: str) -> str:
    """Return a paragraph of text."""
    return f"<p>{escape(text)}</p>"


def verdict_box(head: str, sentences: Sequence[str], note: str) -> str:
    """Return the sentences that matter most, set apart, with a note on how to read them."""
    note = f'<p class="note">{escape(note)}</p>'
    return f'<div class="verdict"><b>{escape(head)}</b>{bullets(sentences)}{note}</div>'


def cards(items: Sequence[tuple[str, str]]) -> str:
    """Return a row of (figure, what it is) cards."""
    inner = "".join(
        f'<div class="card"><b>{escape(big)}</b><span>{escape(small)}</span></div>' for big, small in items
    )
    return f'<div class="cards">{inner}</div>'


def bullets(items: Sequence[str]) -> str:
    """Return a list of texts."""
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def figure(svg: str, caption: str) -> str:
    """Return an inline picture with its caption."""
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def folded(summary: str, body: str) -> str:
    """Return HTML that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def html_table(table: Table, *, words: bool = False) -> str:
    """Return a table as HTML.

    Args:
        table: The table.
        words: Whether the cells are text rather than numbers: all columns are then left-aligned.
    """
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    rows = []
    for row in table.rows:
        cells = [escape(cell) if words else _stacked(cell) for cell in row]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    kind = ' class="words"' if words else ""
    return (
        f'<div class="scroll"><table{kind}><caption>{escape(table.title)}</caption>'
        f"<thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>{note}"
    )


def _stacked(cell: str) -> str:
    """Put what stands in brackets on a line of its own."""
    mean, bracket, rest = cell.partition(" (")
    if not bracket:
        return escape(cell)
    return f'{escape(mean)}<span class="range">{escape(rest.removesuffix(")"))}</span>'
