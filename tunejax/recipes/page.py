"""A table and pictures as one HTML file that needs nothing beside it."""

import base64
import html as escape
from collections.abc import Sequence
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid #8884; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { cursor: pointer; }
img { max-width: 100%; background: #fff; margin: 1rem 0; }
"""
SORT = """
for (const head of document.querySelectorAll('th')) head.onclick = () => {
  const at = [...head.parentNode.children].indexOf(head), body = document.querySelector('tbody');
  const key = row => {
    const text = row.children[at].textContent.replace(/[,%]/g, '');
    return isNaN(parseFloat(text)) ? text : parseFloat(text);
  };
  const rows = [...body.rows].sort((a, b) => key(a) > key(b) ? 1 : key(a) < key(b) ? -1 : 0);
  head.dataset.down = head.dataset.down ? '' : '1';
  for (const row of head.dataset.down ? rows.reverse() : rows) body.append(row);
};
"""


def html(title: str, rows: Sequence[dict[str, str]], pictures: Sequence[Path], notes: Sequence[str] = ()) -> str:
    """The page. rows: cells by column, all with the same columns; pictures: PNG files, put into the page."""
    head = "".join(f"<th>{escape.escape(k)}</th>" for k in (rows[0] if rows else {}))
    body = "".join("<tr>" + "".join(f"<td>{escape.escape(v)}</td>" for v in r.values()) + "</tr>\n" for r in rows)
    images = "".join(
        f'<img alt="{escape.escape(p.stem)}" src="data:image/png;base64,{base64.b64encode(p.read_bytes()).decode()}">\n'
        for p in pictures
    )
    said = "".join(f"<p>{escape.escape(n)}</p>\n" for n in notes)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{escape.escape(title)}</title>'
        f"<style>{STYLE}</style>\n<h1>{escape.escape(title)}</h1>\n"
        f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>\n{said}{images}"
        f"<script>{SORT}</script></html>\n"
    )
