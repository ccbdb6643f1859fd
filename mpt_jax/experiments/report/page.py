"""HTML page of a report, for light and dark screens, without scripts or external resources."""

from __future__ import annotations

import dataclasses
import html
import itertools
import re
from collections.abc import Mapping, Sequence

from mpt_jax.experiments.report.tables import Rows

# Series colors after Okabe and Ito, made darker or lighter to have a contrast of at least 3:1 on
# both backgrounds.
STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1b1b; --soft: #595959; --line: #d4d4d4;
  --series-1: #0072b2; --series-2: #d55e00; --series-3: #008f68; --series-4: #b5568f;
  --series-5: #a67600; --series-6: #2f93c9; --series-7: #6b6b6b }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181b; --ink: #e4e4e4; --soft: #a8a8a8; --line: #3d4147;
    --series-1: #4ba3dd; --series-2: #ff8a4c; --series-3: #2bc49a; --series-4: #e08fbf;
    --series-5: #e8b53a; --series-6: #9ad6f7; --series-7: #b4b4b4 } }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; background: var(--paper); color: var(--ink);
  max-width: 80rem; margin: 0 auto; padding: 1.5rem 1rem 4rem }
h1 { line-height: 1.2; margin: 0 0 .5rem } h2 { margin: 3rem 0 .5rem; line-height: 1.25 }
h3 { margin: 2rem 0 .5rem; font-size: 1.05rem }
p, li, dd { max-width: 46rem } p { margin: .5rem 0 } a { color: inherit }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; padding: 0; list-style: none }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .45rem; text-align: right;
  font-weight: normal; font-size: .875rem }
thead th { font-weight: 600; vertical-align: bottom }
.many th, .many td { padding: .3rem .2rem; font-size: .75rem }
.many thead th:not(:first-child) { writing-mode: vertical-rl; transform: rotate(180deg);
  text-align: left; vertical-align: top; white-space: nowrap; padding: .25rem .3rem }
th:first-child { text-align: left; padding-left: 0 }
tbody th { position: sticky; left: 0; background: var(--paper); min-width: min(9rem, 26vw) }
figure { margin: 1rem 0 } figcaption, .soft { color: var(--soft); max-width: 46rem }
.panels { display: grid; gap: 1rem 1.5rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 35rem), 1fr)) }
.panel { min-width: 0; overflow-x: auto } .panel svg { max-width: 100%; height: auto }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0; margin: .5rem 0;
  list-style: none } .legend svg { margin-right: .4rem; vertical-align: -2px }
svg { display: block } .legend svg { display: inline-block }
svg * { stroke-linejoin: round; stroke-linecap: butt } svg text { fill: currentColor }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .3rem 1.2rem }
pre { overflow-x: auto; font-size: .8125rem }
dt { font-weight: 600 } dd { margin: 0; overflow-wrap: anywhere }
"""

FEW = 9  # columns of a table whose headers are not rotated


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of the page: a heading, and blocks of HTML."""

    title: str
    blocks: Sequence[str]

    @property
    def anchor(self) -> str:
        """The HTML id of the section."""
        return re.sub(r"\W+", "-", self.title.lower())


def document(title: str, sections: Sequence[Section]) -> str:
    """Returns the HTML of the page."""
    links = "".join(f'<li><a href="#{s.anchor}">{_text(s.title)}</a></li>' for s in sections)
    body = "\n".join(
        f'<section id="{section.anchor}"><h2>{_text(section.title)}</h2>\n'
        + "\n".join(section.blocks)
        + "\n</section>"
        for section in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title><style>{STYLE}</style></head>\n<body>"
        f'<header><h1>{_text(title)}</h1><nav aria-label="Sections"><ul>{links}</ul></nav></header>'
        f"\n<main>{_distinct_ids(body)}</main></body></html>\n"
    )


def paragraph(text: str) -> str:
    """Returns plain text as an HTML paragraph."""
    return f"<p>{_text(text)}</p>"


def heading(text: str) -> str:
    """Returns a heading within a section."""
    return f"<h3>{_text(text)}</h3>"


def table(rows: Rows, name: str) -> str:
    """Returns a table, scrollable sideways if it is wider than the page. `name` describes it to
    screen readers. Cells wrap at spaces, and the headers of more than `FEW` columns are rotated."""
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in rows[0])
    body = "".join(
        f'<tr><th scope="row">{_text(row[0])}</th>'
        + "".join(f"<td>{_text(cell)}</td>" for cell in row[1:])
        + "</tr>\n"
        for row in rows[1:]
    )
    many = ' class="many"' if len(rows[0]) > FEW else ""
    # Focusable, so that it can be scrolled with the keyboard.
    return (
        f'<div class="wide" role="region" aria-label="{_text(name)}" tabindex="0"><table{many}>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def figure(panels: Sequence[str], caption: str, legend: Mapping[str, str]) -> str:
    """Returns a figure of panels side by side, with a caption and a legend (label -> swatch)."""
    entries = "".join(f"<li>{swatch}{_text(label)}</li>" for label, swatch in legend.items())
    listed = f'<ul class="legend">{entries}</ul>' if entries else ""
    drawn = "".join(f'<div class="panel">{panel}</div>\n' for panel in panels)
    return (
        f'<figure>{listed}<div class="panels">{drawn}</div>'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def facts(pairs: Mapping[str, str]) -> str:
    """Returns an HTML list of names with their values."""
    return (
        "<dl>" + "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in pairs.items())
    ) + "</dl>"


def listing(text: str, name: str) -> str:
    """Returns preformatted text in a collapsed block, with `name` as its summary."""
    return f"<details><summary>{_text(name)}</summary><pre>{_text(text)}</pre></details>"


def points(texts: Sequence[str]) -> str:
    """Returns texts as an HTML bullet list."""
    return "<ul>" + "".join(f"<li>{_text(text)}</li>" for text in texts) + "</ul>"


def _text(text: str) -> str:
    return html.escape(text)


def _distinct_ids(body: str) -> str:
    """Makes ids unique in the page, because Matplotlib uses the same ids in every drawing."""
    numbers = itertools.count(1)

    def renumber(drawing: re.Match[str]) -> str:
        number = next(numbers)
        return re.sub(r'(\bid="|url\(#|href="#)', rf"\1d{number}-", drawing.group())

    return re.sub(r"<svg.*?</svg>", renumber, body, flags=re.DOTALL)
