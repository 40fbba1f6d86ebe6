"""Parts of a self-contained HTML page: no script, nothing loaded, light and dark."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --muted: #5a6675; --line: #d9dfe6;
  --page: #f5f7f9; --surface: #ffffff; --accent: #1f6f8b; --second: #c2610c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaef; --muted: #9aa7b5;
  --line: #37424f; --page: #12171d; --surface: #1a2129; --accent: #5fb3d0; --second: #f0a35e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main, header, footer { max-width: 1120px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 40px; }
h1 { margin: 0; font-size: 30px; line-height: 1.2; letter-spacing: -.01em;
  overflow-wrap: anywhere; }
h2 { margin: 0 0 4px; font-size: 18px; }
p { margin: 4px 0 12px; }
.brand { margin: 0 0 6px; color: var(--accent); font-weight: 600; font-size: 14px; }
.subtitle, .note, figcaption, footer { color: var(--muted); font-size: 14px;
  overflow-wrap: anywhere; }
.banner { border-left: 4px solid var(--second); background: var(--surface); padding: 12px 16px;
  border-radius: 4px; margin: 20px 0 0; }
.tiles { display: grid; gap: 12px; margin: 24px 0 8px;
  grid-template-columns: repeat(auto-fit, minmax(186px, 1fr)); }
.tiles div, section { background: var(--surface); border: 1px solid var(--line);
  border-radius: 8px; }
.tiles div { padding: 14px 16px; }
dt { color: var(--muted); font-size: 13px; }
dd { margin: 0; color: var(--muted); font-size: 13px; }
dd.value { color: var(--ink); font-size: 25px; line-height: 1.3; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.grid { display: grid; gap: 16px; margin: 20px 0;
  grid-template-columns: repeat(2, minmax(0, 1fr)); }
section { padding: 18px 20px; min-width: 0; }
.wide { grid-column: 1 / -1; }
.pair { display: grid; gap: 20px; align-items: center;
  grid-template-columns: repeat(2, minmax(0, 1fr)); }
.settings { columns: 3 260px; column-gap: 32px; }
.settings table { break-inside: avoid; table-layout: fixed; margin-bottom: 20px; }
.settings caption { color: var(--ink); font-weight: 600; }
figure { margin: 0; overflow-x: auto; }
svg { display: block; width: 100%; height: auto; }
.wide > figure > svg { min-width: 860px; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: inherit !important; font-variant-numeric: tabular-nums; }
.scroll { max-height: 420px; overflow: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); padding-bottom: 6px; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; }
th { color: var(--muted); font-weight: 600; overflow-wrap: normal; }
tr.winner td { font-weight: 600; color: var(--accent); }
summary { cursor: pointer; font-weight: 600; font-size: 18px; }
details[open] summary { margin-bottom: 8px; }
footer { padding-bottom: 40px; }
@media (max-width: 760px) { .grid, .pair { grid-template-columns: minmax(0, 1fr); } }
.pictures { display: grid; gap: 4px 14px; align-items: center;
  grid-template-columns: max-content minmax(0, 1fr) minmax(0, 1fr); font-size: 14px; }
.pictures .head { color: var(--muted); font-weight: 600; }
.pictures img { display: block; max-width: 100%; height: auto; image-rendering: pixelated; }
@media print { section, .tiles div { break-inside: avoid; } .scroll { max-height: none; } }
"""


def document(
    title: str,
    *,
    brand: str,
    heading: str,
    subtitle: str,
    content: str,
    footer: str,
    banner: str = "",
) -> str:
    """A whole page around `content`, which is HTML; everything else is plain text."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    status = f'<p class="banner" role="status">{text(banner)}</p>' if banner else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<p class="brand">{text(brand)}</p>
<h1>{text(heading)}</h1>
<p class="subtitle">{text(subtitle)}</p>
{status}
</header>
<main>
{content}
</main>
<footer><p>{text(footer)}</p></footer>
</body>
</html>
"""


def tiles(facts: Iterable[tuple[str, str, str]]) -> str:
    """A row of large values, from (label, value, note) of each."""
    cells = "\n".join(
        f'<div><dt>{text(label)}</dt><dd class="value">{text(value)}</dd>'
        f"<dd>{text(note)}</dd></div>"
        for label, value, note in facts
    )
    return f'<dl class="tiles">\n{cells}\n</dl>'


def section(title: str | None, content: str, *, wide: bool = False) -> str:
    """A card of the page; `content` is HTML."""
    heading = f"<h2>{text(title)}</h2>" if title else ""
    kind = ' class="wide"' if wide else ""
    return f"<section{kind}>{heading}{content}</section>"


def figure(chart: str, note: str = "") -> str:
    """A chart (an svg element) with a caption of plain text."""
    caption = f"<figcaption>{text(note)}</figcaption>" if note else ""
    return f"<figure>{chart}{caption}</figure>"


def table(
    header: Iterable[str],
    rows: Iterable[Sequence[str]],
    *,
    caption: str = "",
    marked: int | None = None,
    scrolls: str = "",
) -> str:
    """An HTML table of plain text; `scrolls` names it and gives it a height of its own."""
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in header)
    body = "\n".join(
        ('<tr class="winner">' if place == marked else "<tr>")
        + "".join(f"<td>{text(cell)}</td>" for cell in row)
        + "</tr>"
        for place, row in enumerate(rows)
    )
    title = f"<caption>{text(caption)}</caption>" if caption else ""
    whole = f"<table>{title}<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"
    if not scrolls:
        return whole
    name = text(scrolls)
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{name}">{whole}</div>'


def text(value: str) -> str:
    """Plain text as HTML."""
    return html.escape(value, quote=True)
