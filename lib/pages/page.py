"""page: HTML pages as strings, of headings, tables, figures and pictures: preview.html and report.html.

Every function takes plain data and escapes it. A page holds everything that it shows: pictures are data URIs,
charts are SVG (charts.py), there is no script, and the page's own security policy forbids it to fetch
anything.
Fork me to: change the look (page.css; colours in charts.py), or add an element (a function that gives HTML).
"""
import base64
import io
import re
from html import escape
from pathlib import Path

from PIL import Image

from lib.media.pictures import to_rgb
from lib.pages.charts import DARK, LIGHT
from lib.pages.scale import number


def document(title, sections, subtitle="", about=""):
    """One HTML document that needs no other file. sections: [(heading, html)]; about: what it holds."""
    anchors = [anchor(f"{n} {heading}") for n, (heading, _) in enumerate(sections, 1)]
    links = "".join(f'<li><a href="#{place}">{escape(heading)}</a></li>'
                    for place, (heading, _) in zip(anchors, sections))
    contents = f'<nav aria-label="Contents"><ol>{links}</ol></nav>' if len(sections) > 3 else ""
    body = "\n".join(f'<section id="{place}"><h2>{escape(heading)}</h2>\n<div>{content}</div></section>'
                     for place, (heading, content) in zip(anchors, sections))
    style = "".join(Path(__file__).with_name(name).read_text(encoding="utf-8")
                    for name in ("page.css", "charts.css"))
    subtitle = "".join(f"<p>{escape(text)}</p>" for text in (subtitle, about) if text)
    # Dark is for screens only: a page printed from a dark desktop comes out as ink on paper.
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<style>
:root {{ {_variables(LIGHT)} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}
{style}</style></head>
<body><header><h1>{escape(title)}</h1>{subtitle}{contents}</header>
<main>
{body}
</main></body></html>
"""


def _variables(colours):
    return "; ".join(f"--{name}: {colour}" for name, colour in colours.items())


def anchor(text):
    """The id by which a link finds a place on the page, made of its title."""
    return re.sub(r"\W+", "-", text.lower()).strip("-")


def link(to, text):
    """A link to the place on the page with this title."""
    return f'<p class="note"><a href="#{anchor(to)}">{escape(text)}</a></p>'


def paragraph(text):
    """A paragraph of plain text; text between backticks is shown as code."""
    return "<p>" + re.sub("`([^`]+)`", r"<code>\1</code>", escape(text)) + "</p>"


def note(text):
    """A paragraph in small print."""
    return f'<p class="note">{escape(text)}</p>'


def heading(text):
    """A heading inside a section."""
    return f'<h3 class="kind">{escape(text)}</h3>'


def small(html):
    """HTML of charts, shown side by side."""
    return f'<div class="small">{html}</div>'


def folded(summary, html):
    """HTML that is folded away under its summary until somebody opens it."""
    return f"<details><summary>{escape(summary)}</summary>{html}</details>"


def code(text):
    """A block of code or of a command's output."""
    return f'<pre tabindex="0"><code>{escape(text)}</code></pre>'


def tiles(figures):
    """Key figures in a row. figures: [(value, label)]; an arrow may be written ->."""
    return '<dl class="tiles">' + "".join(
        f"<div><dt>{escape(label)}</dt><dd>{arrows(cell(value))}</dd></div>"
        for value, label in figures) + "</dl>"


def table(columns, rows, align=None):
    """A table. align: one letter a column, as in "lrr"; left out, columns of numbers are right-aligned."""
    rows = [[cell(value) for value in row] for row in rows]
    if align is None:
        number = re.compile(r"—|[-+−]?[\d,.]+(e[-+]?\d+)?( ?(%|[kMGT]i?B|[a-z]{1,3}))?")
        align = ["r" if column and all(map(number.fullmatch, column)) else "l"
                 for column in ([row[n] for row in rows] for n in range(len(columns)))]
    sides = [' class="right"' if side == "r" else "" for side in align]
    head = "".join(f'<th scope="col"{side}>{escape(name)}</th>' for name, side in zip(columns, sides))
    cells = ["".join(f"<td{side}>{escape(value)}</td>" for value, side in zip(row, sides)) for row in rows]
    body = "\n".join(f"<tr>{row}</tr>" for row in cells)
    return ('<div class="scroll" tabindex="0"><table>'
            f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>")


def arrows(text):
    """Escaped text, with each -> as an arrow."""
    return escape(text.replace("->", "→"))


def cell(value):
    """A value as a person reads it: 12,345 and 0.01235, never 0.012345678."""
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else number(value, 4)
    return str(value)


# ---- pictures ----

MOST_PIXELS = 1280                        # a side of an embedded picture: no screen shows more of it
MEDIA_SHOWN = {"none": "No picture, sound or clip of the data is in this page (report_media: none).",
               "eval": "This page may hold pictures of held-out rows, and of no other (report_media: eval).",
               "all": "This page may hold pictures of any row (report_media: all)."}


def may_show(report_media, held_out):
    """Whether a page may embed the media of a row, by the knob report_media and whether it is held out."""
    return report_media == "all" or held_out and report_media == "eval"


def withheld(caption):
    """The caption of a medium that the page may not hold, and a word that it isn't there."""
    return f'<p class="withheld">{escape(caption)}<br>not in this page</p>'


def shot(pictures, caption):
    """Pictures with one caption below them."""
    return (f'<figure class="shot"><div class="pictures">{"".join(pictures)}</div>'
            f"<figcaption>{escape(caption)}</figcaption></figure>")


def picture(image, alt, max_side=224, enlarged_to=128):
    """An <img> of a PIL image, at most max_side pixels a side; a tiny one is enlarged by a whole factor."""
    shown = to_rgb(image)
    shown.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    factor = max(1, min(enlarged_to, max_side) // max(shown.size))
    crisp = ' class="pixel"' if factor > 1 else ""
    width, height = shown.width * factor, shown.height * factor
    return (f'<img{crisp} src="{data_uri(shown)}" width="{width}" height="{height}"'
            f' alt="{escape(alt)}" title="{image.width} × {image.height} pixels">')


def data_uri(image):
    """A picture as a data URI without metadata: JPEG, or PNG for few pixels or colours, which JPEG blurs."""
    image = Image.frombytes(image.mode, image.size, image.tobytes())
    png = max(image.size) <= 64 or image.getcolors(64) is not None
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True) if png else image.save(data, "JPEG", quality=85)
    return f"data:image/{'png' if png else 'jpeg'};base64,{base64.b64encode(data.getvalue()).decode()}"
