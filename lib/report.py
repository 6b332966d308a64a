"""Pages as strings: 02's preview.html, 06's report.html and figure.svg. Their charts are lib/charts.py's.

Every function takes plain data and escapes it. What comes out holds everything it shows: pictures are data
URIs, charts are SVG, there is no script, and a page's own security policy forbids it to fetch anything.
Fork me to: change the look (report.css; colours in charts.py), or another thing (one function, a string).
"""
import base64
import io
import math
import re
import textwrap
import unicodedata
from html import escape
from itertools import groupby
from pathlib import Path

from PIL import Image

from lib.charts import CHART_CSS, DARK, LIGHT, curve, drawing, histogram, number  # noqa: F401

IGNORE_INDEX = -100


# ---------------------------------------------------------------------------------------------- pages

def page(title, sections, subtitle=""):
    """One HTML document that needs nothing beside it. sections: [(heading, html)]."""
    anchors = [f"{n}-" + re.sub(r"\W+", "-", heading.lower()).strip("-")
               for n, (heading, _) in enumerate(sections, 1)]
    links = "".join(f'<li><a href="#{anchor}">{escape(heading)}</a></li>'
                    for anchor, (heading, _) in zip(anchors, sections))
    contents = f'<nav aria-label="Contents"><ol>{links}</ol></nav>' if len(sections) > 3 else ""
    body = "\n".join(f'<section id="{anchor}"><h2>{escape(heading)}</h2>\n<div>{content}</div></section>'
                     for anchor, (heading, content) in zip(anchors, sections))
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    subtitle = f"<p>{escape(subtitle)}</p>" if subtitle else ""
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
{style}{CHART_CSS}</style></head>
<body><header><h1>{escape(title)}</h1>{subtitle}{contents}</header>
<main>
{body}
</main></body></html>
"""


def _variables(colours):
    return "; ".join(f"--{name}: {colour}" for name, colour in colours.items())


def paragraph(text):
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def code(text):
    """A block of code or of a command's output."""
    return f'<pre tabindex="0"><code>{escape(text)}</code></pre>'


def tiles(figures):
    """Key figures in a row. figures: [(value, label)]; an arrow may be written ->."""
    return '<dl class="tiles">' + "".join(
        f"<div><dt>{escape(label)}</dt><dd>{_arrows(_cell(value))}</dd></div>"
        for value, label in figures) + "</dl>"


def table(columns, rows, align=None):
    """A table. align: one letter a column, as in "lrr"; left out, columns of numbers go right."""
    rows = [[_cell(value) for value in row] for row in rows]
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


def _arrows(text):
    return escape(text.replace("->", "→"))


def _cell(value):
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


# ------------------------------------------------------------------------------------------- pictures

def picture(image, alt, max_side=224):
    """An <img> of a PIL image, at most max_side pixels a side; a tiny one is enlarged by a whole factor."""
    shown = _rgb(image)
    shown.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    factor = max(1, min(128, max_side) // max(shown.size))
    crisp = ' class="pixel"' if factor > 1 else ""
    width, height = shown.width * factor, shown.height * factor
    return (f'<img{crisp} src="{_data_uri(shown)}" width="{width}" height="{height}"'
            f' alt="{escape(alt)}" title="{image.width} × {image.height} pixels">')


def _rgb(image):
    """A new RGB image without metadata: transparency on white, as models see it; deep grey stretched."""
    if image.mode.startswith(("I", "F")):
        low, high = image.getextrema()
        scale = 255 / ((high - low) or 1)
        image = image.convert("F").point(lambda value: value * scale - low * scale)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    clean = Image.new("RGB", image.size)
    clean.paste(image.convert("L" if image.mode == "F" else "RGB"))
    return clean


def _data_uri(image):
    """A data URI: PNG for few pixels or few colours, where JPEG would smear, and JPEG for photographs."""
    png = max(image.size) <= 64 or image.getcolors(64) is not None
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True) if png else image.save(data, "JPEG", quality=85)
    return f"data:image/{'png' if png else 'jpeg'};base64,{base64.b64encode(data.getvalue()).decode()}"


# --------------------------------------------------------------------------------------------- tokens

TOKEN_KEY = ('<p class="note">The model learns to write the tokens on '
             '<span class="tokens"><mark><span>green</span></mark></span>, underlined. '
             'The others it reads, and they give no loss. Point at a token to see its id; '
             '<span class="tokens"><i>↵</i></span> is a newline, '
             '<span class="tokens"><i>·</i></span> a space that is easily missed.</p>')
SIGNS = {" ": "<i>·</i>", "\n": "<i>↵</i>\n", "\r": "<i>␍</i>", "\t": "<i>⇥</i>"}
# Byte-level vocabularies spell each byte as a printable character: the unprintable ones from U+0100 on.
PRINTABLE_BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_OF = ({chr(byte): byte for byte in PRINTABLE_BYTES}
           | {chr(256 + n): byte for n, byte in enumerate(sorted(set(range(256)) - set(PRINTABLE_BYTES)))})


def token_view(tokens, input_ids, labels, media_tokens=()):
    """Every token with its id as title; trained ones in <mark>; a run of one media token as one, counted."""
    byte_level = any(sign in token for token in tokens for sign in "ĠĊ") and all(t[:1] != "▁" for t in tokens)
    rows = [(label != IGNORE_INDEX, token if token in media_tokens else n, token, token_id)
            for n, (token, token_id, label) in enumerate(zip(tokens, input_ids, labels, strict=True))]
    html = []
    for trained, run in groupby(rows, key=lambda row: row[0]):
        spans = "".join(_token_span(list(same), media_tokens, byte_level)
                        for _, same in groupby(run, key=lambda row: row[1]))
        html.append(f"<mark>{spans}</mark>" if trained else spans)
    return f'<div class="tokens">{"".join(html)}</div>'


def _token_span(same, media_tokens, byte_level):
    _, _, token, token_id = same[0]
    if token in media_tokens:
        times = f" ×{len(same)}" if len(same) > 1 else ""
        return f'<span class="media" title="id {token_id}">{escape(token)}{times}</span>'
    return f'<span title="id {token_id}">{_readable(token, byte_level)}</span>'


def _readable(token, byte_level):
    """Escaped text of one token, where nothing is invisible."""
    if not byte_level:
        token = token.replace("▁", " ")
        token = "\n" if token == "<0x0A>" else token
    elif all(character in BYTE_OF for character in token):  # added tokens are stored as plain text
        token = bytes(BYTE_OF[character] for character in token).decode("utf-8", "backslashreplace")

    def sign(match):
        character = match[0]
        plain = escape(character) if character.isprintable() else f"<i>U+{ord(character):04X}</i>"
        return SIGNS.get(character, plain)
    # A space between words speaks for itself; a doubled, trailing or lonely one does not.
    return re.sub(r"(?<= ) | (?=\s|$)|[^ ]", sign, token)


def sample_card(title, pictures_html, token_html, facts):
    """One sample of the preview: its facts ({label: value}), its pictures, its tokens."""
    facts = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(_cell(value))}</dd></div>"
                    for label, value in dict(facts).items())
    pictures = f'<div class="pictures">{pictures_html}</div>' if pictures_html else ""
    return (f'<article class="sample"><h3>{escape(title)}</h3><dl class="facts">{facts}</dl>'
            f"{pictures}{token_html}</article>")


# -------------------------------------------------------------------------------------------- answers

VERDICTS = {True: ("good", "✓", "right"), False: ("bad", "✗", "wrong"), None: ("", "", "")}


def answers(rows):
    """Cards of held-out rows before and after training, with a count of what changed.

    rows: [{pictures, question, reference, base, tuned, base_right, tuned_right}]; a verdict is None where
    there is none. A question that all rows share is said once, and short answers then make a gallery.
    """
    verdicts = [(row["base_right"], row["tuned_right"]) for row in rows]
    counts = [(verdicts.count((False, True)), "put right by training"),
              (verdicts.count((True, False)), "broken by training"),
              (verdicts.count((True, True)), "right before and after"),
              (verdicts.count((False, False)), "wrong before and after")]
    changes = ", ".join(f"{count} {name}" for count, name in counts if count)
    shared = _shared_question(rows)
    brief = shared and all(len(row[name]) <= 12 for row in rows for name in ("reference", "base", "tuned"))
    return (f'<p class="note">{len(rows)} row{"s" * (len(rows) != 1)}{": " if changes else ""}{changes}.</p>'
            + (f'<h3 class="shared" dir="auto">{escape(shared)}</h3>' if shared else "")
            + f'<div class="cards{" brief" if brief else ""}">'
            + "".join(_answer_card(row, heading=not shared) for row in rows) + "</div>")


def _shared_question(rows):
    questions = {row["question"] for row in rows}
    return questions.pop() if len(rows) > 1 and len(questions) == 1 else ""


def _answer_card(row, heading):
    count = len(row["pictures"])
    pictures = "".join(picture(image, f"Picture {n} of {count} for: {row['question']}", max_side=128)
                       for n, image in enumerate(row["pictures"], 1))
    lines = [("reference", row["reference"], None), ("base", row["base"], row["base_right"]),
             ("tuned", row["tuned"], row["tuned_right"])]
    html = "".join(f'<dt>{name}</dt><dd class="{name}" dir="auto">{_verdict(right)}{_answer(text)}</dd>'
                   for name, text, right in lines)
    question = f'<h3 dir="auto">{escape(row["question"])}</h3>' if heading and row["question"] else ""
    card = f"<div>{question}<dl>{html}</dl></div></article>"
    if not pictures:
        return f'<article class="card bare">{card}'
    return f'<article class="card"><div class="pictures">{pictures}</div>{card}'


def _verdict(right):
    name, sign, word = VERDICTS[right]
    heard = f' role="img" aria-label="{word}:"' if word else ""
    return f'<span class="tick {name}"{heard}>{sign}</span>'


def _answer(text):
    return escape(text) if text.strip() else '<span class="note">(nothing)</span>'


def figure(rows, title, caption):
    """A standalone SVG of up to eight rows, as answers() takes them: the figure of a README."""
    rows = rows[:8]
    columns = min(4, len(rows)) or 1
    shared = _shared_question(rows)
    card_height = 304 if shared else 346
    width, height = max(240 * columns - 16, 464), 80 + card_height * math.ceil(len(rows) / columns) + 20
    body = [f'<text x="0" y="22" class="ink strong title">{_arrows(title)}</text>',
            f'<text x="0" y="50" class="answer">{escape(shared) or "Held-out rows, before and after"}</text>',
            f'<text x="0" y="{height - 6}">{_arrows(caption)}</text>']
    for n, row in enumerate(rows):
        x, y = 240 * (n % columns), 80 + card_height * (n // columns)
        body.append(f'<g transform="translate({x},{y})">{_figure_card(row, question=not shared)}</g>')
    return drawing(width, height, f"{title}. {caption}", "".join(body), standalone=True, margin=24)


def _figure_card(row, question, side=224):
    html = [f'<rect class="wash" width="{side}" height="{side}"/>']
    for picture_of_row in row["pictures"][:1]:
        image = _rgb(picture_of_row)
        factor = max(1, side // max(image.size))  # enlarged here: not every viewer of SVGs keeps pixels crisp
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        scale = side / max(image.size)
        wide, high = image.width * scale, image.height * scale
        html.append(f'<image x="{(side - wide) / 2:.1f}" y="{(side - high) / 2:.1f}" width="{wide:.1f}" '
                    f'height="{high:.1f}" href="{_data_uri(image)}"/>')
    html.append(f'<rect class="frame" x=".5" y=".5" width="{side - 1}" height="{side - 1}"/>')
    lines = _wrapped(row["question"], 33, 2) if question else []
    html += [f'<text x="0" y="{246 + 17 * n}">{escape(line)}</text>' for n, line in enumerate(lines)]
    for n, (name, kind) in enumerate((("base", ""), ("tuned", "ink strong"))):
        y = (250 if not question else 290) + 22 * n
        colour, sign, _ = VERDICTS[row[f"{name}_right"]]
        answer = "".join(_wrapped(row[name], 17, 1)) or "(nothing)"
        html.append(f'<text x="0" y="{y}">{name}</text>'
                    f'<text x="46" y="{y}" class="answer {colour}">{sign}</text>'
                    f'<text x="65" y="{y}" class="answer {kind}">{escape(answer)}</text>')
    return "".join(html)


def _wrapped(text, columns, lines):
    """At most so many lines of about so many columns; East Asian characters take two."""
    wide = any(unicodedata.east_asian_width(character) in "WF" for character in text)
    return textwrap.wrap(text, columns // 2 if wide else columns, max_lines=lines, placeholder="…")
