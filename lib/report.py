"""The pages and figures of the kit, as strings: 02's preview.html, 05's loss.svg, 06's report.html and README figure.

Every function takes plain data and escapes it. What comes out holds everything it shows: pictures are data URIs, charts are
SVG, there is no script, and a page's own security policy forbids it to fetch anything.
Fork me to: change the look (LIGHT, DARK, report.css), or show another thing on a page (one function, a string out).
"""
import base64
import io
import math
import re
import statistics
import textwrap
import unicodedata
from html import escape
from itertools import groupby
from pathlib import Path

from PIL import Image

IGNORE_INDEX = -100

# `good` is the one accent: what is trained, and what training made right. `s0`.. are the lines of a chart.
LIGHT = {"paper": "#ffffff", "wash": "#f3f4f6", "rule": "#dfe2e7", "muted": "#59616b", "ink": "#14171a",
         "good": "#08704f", "learnt": "#d7f1e4", "bad": "#b3372b",
         "s0": "#08704f", "s1": "#bf5408", "s2": "#2b62c4", "s3": "#8440b0"}
DARK = {"paper": "#111417", "wash": "#1d2126", "rule": "#2e343b", "muted": "#a0a9b4", "ink": "#e9ebee",
        "good": "#55d6a8", "learnt": "#143d30", "bad": "#ff9182",
        "s0": "#55d6a8", "s1": "#ffab66", "s2": "#86b1ff", "s3": "#d09bf5"}
CHART_CSS = """
svg text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: var(--muted) }
svg .ink { fill: var(--ink) } svg .good { fill: var(--good) } svg .bad { fill: var(--bad) }
svg .strong { font-weight: 650 } svg .title { font-size: 22px } svg .answer { font-size: 15px }
svg .end { text-anchor: end } svg .mid { text-anchor: middle }
svg .paper { fill: var(--paper) } svg .wash { fill: var(--wash) }
svg .grid { stroke: var(--rule) } svg .mark { stroke: var(--ink); stroke-dasharray: 3 3 } svg .bar { fill: var(--s0) }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round } svg .raw { stroke-width: 1; opacity: .3 }
svg .s0 { stroke: var(--s0) } svg .s1 { stroke: var(--s1); stroke-dasharray: 7 4 }
svg .s2 { stroke: var(--s2); stroke-dasharray: 2 3 } svg .s3 { stroke: var(--s3); stroke-dasharray: 10 3 2 3 }
svg .raw { stroke-dasharray: none }
"""


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
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
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
        f"<div><dt>{escape(label)}</dt><dd>{escape(_cell(value).replace('->', '→'))}</dd></div>"
        for value, label in figures) + "</dl>"


def table(columns, rows, align=None):
    """A table. align: one letter a column, as in "lrr"; left out, columns of numbers go right."""
    rows = [[_cell(value) for value in row] for row in rows]
    if align is None:
        numeric = re.compile(r"(—|[-+−]?[\d,.]+(e[-+]?\d+)?( ?(%|[kMGT]i?B|[a-z]{1,3}))?)$")
        align = ["r" if rows and all(numeric.match(row[n]) for row in rows) else "l" for n in range(len(columns))]
    sides = [' class="right"' if side == "r" else "" for side in align]
    head = "".join(f'<th scope="col"{side}>{escape(name)}</th>' for name, side in zip(columns, sides))
    body = "\n".join("<tr>" + "".join(f"<td{side}>{escape(value)}</td>" for value, side in zip(row, sides)) + "</tr>"
                     for row in rows)
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _cell(value):
    """A value as a person reads it: 12,345 and 0.01235, never 0.012345678."""
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------------- pictures

def picture(image, alt, max_side=224):
    """An <img> of a PIL image, at most max_side pixels a side; one of a few pixels is enlarged by a whole factor."""
    shown = _rgb(image)
    shown.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    factor = max(1, min(128, max_side) // max(shown.size))
    crisp = ' class="pixel"' if factor > 1 else ""
    return (f'<img{crisp} src="{_data_uri(shown)}" width="{shown.width * factor}" height="{shown.height * factor}"'
            f' alt="{escape(alt)}" title="{image.width} × {image.height} pixels">')


def _rgb(image):
    """A new RGB image: transparency on white, as a model sees it; deep grey stretched to its range; no metadata."""
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
    png = max(image.size) <= 64 or image.getcolors(256) is not None
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True) if png else image.save(data, "JPEG", quality=85)
    return f"data:image/{'png' if png else 'jpeg'};base64,{base64.b64encode(data.getvalue()).decode()}"


# --------------------------------------------------------------------------------------------- tokens

TOKEN_KEY = ('<p class="note">The model learns to write the tokens on '
             '<span class="tokens"><mark><span>green</span></mark></span>, underlined. It reads the others, and they '
             'give no loss. Point at a token to see its id; <span class="tokens"><i>↵</i></span> is a newline, '
             '<span class="tokens"><i>·</i></span> a space that is easily missed.</p>')
SIGNS = {" ": "<i>·</i>", "\n": "<i>↵</i>\n", "\r": "<i>␍</i>", "\t": "<i>⇥</i>"}
# Byte-level vocabularies spell each byte as a printable character: the unprintable ones from U+0100 on.
PRINTABLE_BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_OF = ({chr(byte): byte for byte in PRINTABLE_BYTES}
           | {chr(256 + n): byte for n, byte in enumerate(sorted(set(range(256)) - set(PRINTABLE_BYTES)))})


def token_view(tokens, input_ids, labels, media_tokens=()):
    """Every token of a sample with its id as title; trained ones in <mark>; runs of one media token as one, counted."""
    byte_level = any("Ġ" in token or "Ċ" in token for token in tokens) and not any(t[:1] == "▁" for t in tokens)
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
        return f'<span class="media" title="id {token_id}, {len(same)} times">{escape(token)} ×{len(same)}</span>'
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
        return SIGNS.get(character) or (escape(character) if character.isprintable() else f"<i>U+{ord(character):04X}</i>")
    # A space between words speaks for itself; a doubled, trailing or lonely one does not.
    return re.sub(r"(?<= ) | (?=\s|$)|[^ ]", sign, token)


def sample_card(title, pictures_html, token_html, facts):
    """One sample of the preview: its facts ({label: value}), its pictures, its tokens."""
    facts = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(_cell(value))}</dd></div>"
                    for label, value in dict(facts).items())
    pictures = f'<div class="pictures">{pictures_html}</div>' if pictures_html else ""
    return f'<article class="sample"><h3>{escape(title)}</h3><dl class="facts">{facts}</dl>{pictures}{token_html}</article>'


# -------------------------------------------------------------------------------------------- answers

def answers(rows):
    """Cards of held-out rows before and after training. rows: [{pictures, question, reference, base, tuned, base_right,
    tuned_right}]; a verdict may be None where there is none."""
    verdicts = [(row["base_right"], row["tuned_right"]) for row in rows]
    counts = [(verdicts.count((False, True)), "put right by training"), (verdicts.count((True, True)), "right before and after"),
              (verdicts.count((False, False)), "wrong before and after"), (verdicts.count((True, False)), "broken by training")]
    summary = "; ".join(f"{count} {name}" for count, name in counts if count)
    return (f'<p class="note">{len(rows)} rows{": " if summary else ""}{summary}.</p>'
            f'<div class="cards">{"".join(map(_answer_card, rows))}</div>')


def _answer_card(row):
    pictures = "".join(picture(image, f"Picture {n} of {len(row['pictures'])}: {row['question']}", max_side=128)
                       for n, image in enumerate(row["pictures"], 1))
    lines = "".join(f'<dt>{name}</dt><dd class="{name}" dir="auto">{_verdict(right)}{escape(text) or "(nothing)"}</dd>'
                    for name, text, right in (("reference", row["reference"], None), ("base", row["base"], row["base_right"]),
                                              ("tuned", row["tuned"], row["tuned_right"])))
    return (f'<article class="card"><div class="pictures">{pictures}</div>'
            f'<div><h3 dir="auto">{escape(row["question"])}</h3><dl>{lines}</dl></div></article>')


def _verdict(right):
    if right is None:
        return ""
    name, sign, word = ("good", "✓", "right") if right else ("bad", "✗", "wrong")
    return f'<span class="tick {name}" role="img" aria-label="{word}:">{sign}</span>'


def figure(rows, title, caption):
    """A standalone SVG of up to eight rows as answers() takes them: the figure of a README."""
    rows = rows[:8]
    columns = min(4, len(rows)) or 1
    same_question = len({row["question"] for row in rows}) == 1
    card_width, card_height, top = 224, 272 if same_question else 316, 104
    height = top + card_height * math.ceil(len(rows) / columns) + 44
    width = 40 + card_width * columns + 16 * (columns - 1)
    body = [f'<text x="20" y="44" class="ink strong title">{escape(title)}</text>']
    lead = rows[0]["question"] if same_question else "held-out pictures, before and after training"
    body.append(f'<text x="20" y="70" class="answer">{escape(lead)}</text>')
    for n, row in enumerate(rows):
        x, y = 20 + (card_width + 16) * (n % columns), top + card_height * (n // columns)
        body.append(f'<g transform="translate({x},{y})">{_figure_card(row, same_question)}</g>')
    body.append(f'<text x="20" y="{height - 20}">{escape(caption)}</text>')
    return _svg(width, height, f"{title}. {caption}", "".join(body), standalone=True)


def _figure_card(row, same_question):
    image = _rgb(row["pictures"][0]) if row["pictures"] else Image.new("RGB", (1, 1), "white")
    factor = max(1, 184 // max(image.size))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((184, 184), Image.Resampling.LANCZOS)
    x, y = 112 - image.width / 2, 108 - image.height / 2
    lines = [] if same_question else _wrapped(row["question"], 30, 2)
    text = [f'<text x="20" y="{230 + 18 * n}">{escape(line)}</text>' for n, line in enumerate(lines)]
    for n, name in enumerate(("base", "tuned")):
        right, answer = row[f"{name}_right"], "".join(_wrapped(row[name], 17, 1)) or "(nothing)"
        sign, kind = ("✓", "good") if right else ("✗", "bad")
        kind = f"answer {kind}" + (" strong" if name == "tuned" else "")
        base_line = 228 + 22 * n + (44 if lines else 0)
        text.append(f'<text x="20" y="{base_line}">{name}</text><text x="64" y="{base_line}" class="{kind}">{sign}</text>'
                    f'<text x="82" y="{base_line}" class="{kind} ink">{escape(answer)}</text>')
    return (f'<rect class="wash" width="224" height="216" rx="4"/>'
            f'<image x="{x}" y="{y}" width="{image.width}" height="{image.height}" href="{_data_uri(image)}"/>{"".join(text)}')


def _wrapped(text, columns, lines):
    """At most so many lines of about so many columns; East Asian characters take two."""
    wide = any(unicodedata.east_asian_width(character) in "WF" for character in text)
    return textwrap.wrap(text, columns // 2 if wide else columns, max_lines=lines, placeholder=" …")


# --------------------------------------------------------------------------------------------- charts

def histogram(values, label, unit="tokens", marks=()):
    """A histogram with its median and maximum; marks: [(value, name)] adds lines such as the context length."""
    kept, left_out = _usable(values)
    if not kept:
        return _figure(f'<p class="note">{escape(label)}: no values.</p>', "", "half")
    start, step, counts = _bins(kept)
    shown = [(statistics.median(kept), "median"), (max(kept), "max"), *marks]
    edges = [start, start + step * len(counts)]
    inside = [(value, name) for value, name in shown if value <= edges[1] + 0.5 * (edges[1] - edges[0])]
    x = Scale(edges + [value for value, _ in inside], 48, 408, snap=False)
    y = Scale([0, max(counts)], 206, 62)
    bars = "".join(
        f'<rect class="bar" x="{x.at(start + n * step) + .5:.1f}" width="{max(x.at(step) - x.at(0) - 1, 1):.1f}" '
        f'y="{y.at(count):.1f}" height="{206 - y.at(count):.1f}"><title>{_tick(start + n * step)} to '
        f'{_tick(start + (n + 1) * step)}: {count:,}</title></rect>' for n, count in enumerate(counts) if count)
    body = _grid(x, y, 48, 408, unit, "") + bars + _marks(inside, x, 62, 206)
    beyond = "".join(f", {name} {_tick(value)}" for value, name in shown if (value, name) not in inside)
    text = ", ".join(f"{name} {_tick(value)}" for value, name in shown)
    svg = _svg(420, 250, f"Histogram of {label}: {len(kept):,} values, {text} {unit}", body)
    note = f"{label}{beyond}" + (f" ({left_out} not a number)" if left_out else "")
    return _figure(svg, note, "half")


def _bins(values):
    """(start, step, counts) of about 16 bins of a round width, whole numbers in the middle of bins of one."""
    low, high = min(values), max(values)
    whole = all(float(value).is_integer() for value in values)
    step = _round_step((high - low) / 16 or abs(high) / 16 or 1)
    step = max(step, 1) if whole else step
    start = math.floor(low / step) * step - (step / 2 if whole and step == 1 else 0)
    count = int((high - start) / step) + 1
    counts = [0] * count
    for value in values:
        counts[min(int((value - start) / step), count - 1)] += 1
    return start, step, counts


def _marks(marks, x, top, bottom):
    """Dashed lines with a name above; a name that would touch its neighbour goes a row higher."""
    html, row_ends = [], []
    for value, name in sorted(marks):
        words, place = f"{name} {_tick(value)}", x.at(value)
        width = 7.2 * len(words)
        left = min(max(place - width / 2, 0), 416 - width)
        row = next((n for n, end in enumerate(row_ends) if end < left), len(row_ends))
        row_ends[row:row + 1] = [left + width + 8]
        base_line = top - 8 - 17 * row
        html.append(f'<line class="mark" x1="{place:.1f}" x2="{place:.1f}" y1="{base_line + 4}" y2="{bottom}"/>'
                    f'<text class="ink mid" x="{left + width / 2:.1f}" y="{base_line}">{escape(words)}</text>')
    return "".join(html)


def curve(series, x_label, y_label, log_y=False, standalone=False):
    """A line chart of {name: [(x, y), ...]}: smoothed over faint raw where there are many points."""
    usable = {name: [(x, y) for x, y in points if _is_usable(x) and _is_usable(y) and (y > 0 or not log_y)]
              for name, points in series.items()}
    usable = {name: points for name, points in usable.items() if points}
    if not usable:
        words = f"{y_label}: no values."
        svg = _svg(720, 60, words, f'<text x="20" y="34">{escape(words)}</text>', standalone)
        return svg if standalone else _figure(svg, "", "chart")
    points = [point for line in usable.values() for point in line]
    x = Scale([x for x, _ in points], 70, 704, snap=False)
    y = Scale([y for _, y in points], 296, 44, log=log_y)
    body = [_grid(x, y, 70, 704, x_label, y_label)]
    legend_x = 704
    for n, (name, line) in enumerate(usable.items()):
        body.append(_line(line, x, y, f"s{n % 4}"))
    for n, name in reversed(list(enumerate(usable))):
        legend_x -= 11 * len(name) + 14
        body.append(f'<line class="line s{n % 4}" x1="{legend_x - 34}" x2="{legend_x - 8}" y1="18" y2="18"/>'
                    f'<text class="ink" x="{legend_x}" y="23">{escape(name)}</text>')
        legend_x -= 34
    last = ", ".join(f"{name} ends at {_cell(float(line[-1][1]))}" for name, line in usable.items())
    svg = _svg(720, 350, f"{y_label} by {x_label}: {last}", "".join(body), standalone)
    return svg if standalone else _figure(svg, "", "chart")


def _line(points, x, y, colour):
    def path(line, kind):
        places = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in line)
        return f'<polyline class="line {kind}{colour}" points="{places}"/>'
    if len(points) <= 40:
        return path(points, "") + "".join(
            f'<circle class="line {colour}" cx="{x.at(a):.1f}" cy="{y.at(b):.1f}" r="2.5"/>' for a, b in points)
    reach = max(2, len(points) // 50)  # a centred mean: unlike a running one it doesn't lag behind
    windows = [points[max(0, n - reach):n + reach + 1] for n in range(len(points))]
    smooth = [(a, sum(value for _, value in window) / len(window)) for (a, _), window in zip(points, windows)]
    return path(points, "raw ") + path(smooth, "")


class Scale:
    """Places of values on a line of pixels, and the round values that get a tick."""

    def __init__(self, values, start, end, log=False, snap=True):
        values = [math.log10(value) for value in values] if log else values
        low, high = min(values), max(values)
        if not log and 0 <= low <= high / 2:
            low = 0
        if high - low <= 1e-9 * max(abs(high), abs(low)):  # one value: give it room on both sides
            low, high = low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1)
        step = _round_step((high - low) / 5)
        step = max(1, round(step)) if log and high - low > 3 else step
        first, last = low / step, high / step
        first, last = (math.floor(first + 1e-9), math.ceil(last - 1e-9)) if snap else (math.ceil(first), math.floor(last))
        ticks = [n * step for n in range(first, last + 1)]
        self.low, self.high = (ticks[0], ticks[-1]) if snap else (low, high)
        self.ticks = [10 ** tick for tick in ticks] if log else ticks
        self.start, self.end, self.log = start, end, log

    def at(self, value):
        value = math.log10(value) if self.log else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _round_step(step):
    """The next of 1, 2, 5, 10, 20, 50 … that is no smaller than step."""
    power = 10 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def _grid(x, y, left, right, x_label, y_label):
    bottom = max(y.start, y.end)
    lines = "".join(f'<line class="grid" x1="{left}" x2="{right}" y1="{y.at(t):.1f}" y2="{y.at(t):.1f}"/>'
                    f'<text class="end" x="{left - 8}" y="{y.at(t) + 4.5:.1f}">{_tick(t)}</text>' for t in y.ticks)
    ticks = "".join(f'<text class="mid" x="{x.at(t):.1f}" y="{bottom + 20}">{_tick(t)}</text>' for t in x.ticks)
    return (lines + ticks + f'<text class="mid" x="{(left + right) / 2}" y="{bottom + 40}">{escape(x_label)}</text>'
            + (f'<text class="ink strong" x="4" y="23">{escape(y_label)}</text>' if y_label else ""))


def _tick(value):
    """A number in at most about six characters: 1,024 as it is, 12,500 as 12.5k."""
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if limit <= abs(value) < 1e15:
            return f"{value / (1e3 if letter == 'k' else limit):.4g}{letter}"
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e15 else f"{value:.4g}"


def _usable(values):
    kept = [value for value in values if _is_usable(value)]
    return kept, len(values) - len(kept)


def _is_usable(value):
    """True for a number that a chart can place: not NaN, not infinite, and squares still fit a float."""
    return value is not None and abs(value) < 1e150


def _figure(content, caption, kind):
    caption = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="chart {kind}">{caption}{content}</figure>'


def _svg(width, height, label, body, standalone=False):
    """An <svg>. Standalone it carries its own paper and colours, for it may be shown on any ground."""
    if not standalone:
        return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{body}</svg>'
    light, dark = (re.sub(r"var\(--(\w+)\)", lambda name: colours[name[1]], CHART_CSS) for colours in (LIGHT, DARK))
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img"><title>{escape(label)}</title>\n<style>{light}\n'
            f'@media (prefers-color-scheme: dark) {{{dark}}}</style>\n'
            f'<rect class="paper" width="{width}" height="{height}" rx="8"/>{body}</svg>\n')
