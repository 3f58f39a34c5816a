"""The page of a comparison: one HTML file that needs no network and no other file."""

import base64
import html
from pathlib import Path
from typing import Any

STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --back: #ffffff; --line: #d0d0d0; --head: #f2f2f2; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e6e6; --back: #161616; --line: #444444; --head: #262626; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); margin: 2rem auto;
  max-width: 76rem; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .6rem; text-align: right; white-space: nowrap; }
th { background: var(--head); }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; }
td:last-child { white-space: normal; min-width: 8rem; }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
figure { display: inline-block; margin: 1rem 1rem 0 0; }
img { background: #ffffff; border: 1px solid var(--line); max-width: 100%; }
"""

SCRIPT = """
document.querySelectorAll("th button").forEach((button, column) => button.addEventListener("click", () => {
  const head = button.parentElement, body = head.closest("table").tBodies[0];
  const down = head.getAttribute("aria-sort") === "ascending";
  head.parentElement.querySelectorAll("th").forEach(h => h.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = row => row.cells[column].dataset.value;
  const order = (a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === "" || y === "") return (x === "") - (y === "");
    const by = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
    return down ? -by : by;
  };
  [...body.rows].sort(order).forEach(row => body.append(row));
}));
"""


def page(
    title: str,
    heads: list[str],
    rows: list[list[tuple[str, Any]]],
    notes: list[str],
    pictures: list[tuple[str, Path]],
) -> str:
    """The page as text.

    Args:
      heads: of the columns.
      rows: cells as (text, value to sort by; None is last).
      notes: sentences under the table.
      pictures: (caption, PNG); their bytes go into the page.
    """
    e = html.escape
    top = "".join(f'<th scope="col"><button type="button">{e(h)}</button></th>' for h in heads)
    body = "\n".join(
        "<tr>" + "".join(f'<td data-value="{e("" if v is None else str(v))}">{e(t)}</td>' for t, v in row) + "</tr>"
        for row in rows
    )
    said = "\n".join(f"<p>{e(n)}</p>" for n in notes)
    shown = "\n".join(
        f'<figure><img alt="{e(caption)}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}"></figure>'
        for caption, path in pictures
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{e(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{e(title)}</h1>\n"
        f'<div class="wide"><table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>\n'
        f"{said}\n{shown}\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )
