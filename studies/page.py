"""The report as one HTML file that opens anywhere: pictures inside, tables sorted by a click.

Reads the Markdown that studies.report writes and no other: headings, paragraphs, lists, tables,
pictures, **bold**, `code`. Nothing is fetched: no fonts, no styles, no scripts from elsewhere."""

import base64
import html
import re
from pathlib import Path

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 80em; padding: 0 1em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px; }
th, td { border: 1px solid #ccc; padding: .3em .6em; text-align: left; vertical-align: top; }
th { background: #f3f3f3; cursor: pointer; user-select: none; }
th[aria-sort=ascending]::after { content: " \\25b2"; }
th[aria-sort=descending]::after { content: " \\25bc"; }
tbody tr:nth-child(even) { background: #fafafa; }
img { max-width: 100%; }
code { background: #f3f3f3; padding: 0 .2em; }
"""

# A column is sorted by the first number of its cells if all that are filled begin with one, else
# as text; empty cells stay at the end. The second click turns it round.
SCRIPT = """
const number = /^[-+\\u2212]?[\\d,]*\\.?\\d+/;
const value = text => parseFloat(text.match(number)[0].replace(/,/g, "").replace("\\u2212", "-"));
document.querySelectorAll("th").forEach(head => head.addEventListener("click", () => {
  const body = head.closest("table").tBodies[0], at = head.cellIndex;
  const text = row => row.cells[at].textContent.trim();
  const rows = [...body.rows], filled = rows.filter(text), empty = rows.filter(r => !text(r));
  const numeric = filled.every(row => number.test(text(row)));
  const compare = numeric ? (a, b) => value(text(a)) - value(text(b))
                          : (a, b) => text(a).localeCompare(text(b));
  const down = head.getAttribute("aria-sort") === "ascending";
  head.parentNode.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  filled.sort((a, b) => down ? compare(b, a) : compare(a, b));
  body.append(...filled, ...empty);
}));
"""


def inline(text: str) -> str:
    """Escaped, with `code` and **bold**."""
    text = html.escape(text, quote=True)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    return re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", text)


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip()[1:-1].split("|")]


def table_html(lines: list[str]) -> str:
    head = "".join(f"<th>{inline(cell)}</th>" for cell in cells_of(lines[0]))
    rows = ["".join(f"<td>{inline(c)}</td>" for c in cells_of(line)) for line in lines[2:]]
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def picture_html(title: str, file: Path) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'


def block_kind(line: str) -> str:
    if line.startswith("|"):
        return "table"
    if line.startswith("- "):
        return "list"
    if line.startswith("#"):
        return "heading"
    return "picture" if line.startswith("![") else "paragraph"


def block_html(kind: str, lines: list[str], folder: Path) -> str:
    if kind == "table":
        return table_html(lines)
    if kind == "list":
        items = "\n".join(f"<li>{inline(line[2:].strip())}</li>" for line in lines)
        return f"<ul>\n{items}\n</ul>"
    if kind == "paragraph":
        return f"<p>{inline(' '.join(lines))}</p>"
    parts = []
    for line in lines:
        if kind == "picture":
            title, file = re.fullmatch(r"!\[(.*)\]\((.*)\)", line).groups()
            parts.append(picture_html(title, folder / file))
        else:
            level = len(line) - len(line.lstrip("#"))
            parts.append(f"<h{level}>{inline(line[level:].strip())}</h{level}>")
    return "\n".join(parts)


def page(markdown: str, folder: Path) -> str:
    """The whole HTML document; pictures are read from the folder that the Markdown stands in."""
    blocks: list[tuple[str, list[str]]] = []
    gap = True
    for line in markdown.splitlines():
        if not line.strip():
            gap = True
            continue
        kind = block_kind(line)
        if gap or blocks[-1][0] != kind:
            blocks.append((kind, []))
        blocks[-1][1].append(line)
        gap = False
    body = "\n".join(block_html(kind, lines, folder) for kind, lines in blocks)
    title = html.escape(markdown.splitlines()[0].lstrip("# "))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n"
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )
