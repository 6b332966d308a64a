"""answers: held-out rows before and after training, as cards of a page, and as the figure of a README."""
import math
import textwrap
import unicodedata
from difflib import SequenceMatcher
from html import escape

from PIL import Image

from lib.pages.charts import drawing
from lib.pages.page import arrows, data_uri, folded, heading, note, picture

MOST = 5                                  # rows shown of the most improved, and as many of the most worsened
FOLDED_FROM = 60                          # where more rows than these are left, they are folded away
COMPARED = 400                            # characters compared of an answer: enough to say which came nearer
VERDICTS = {True: ("good", "✓", "right"), False: ("bad", "✗", "wrong"), None: ("", "", "")}


def cards(rows):
    """Cards of held-out rows before and after training, with a count of what changed.

    rows: [{pictures, question, reference, base, tuned, base_right, tuned_right}]. A question that all rows
    share is shown once, and short answers then make a gallery. Of many rows, those that training improved
    and worsened most come first.
    """
    verdicts = [(row["base_right"], row["tuned_right"]) for row in rows]
    counts = [(verdicts.count((False, True)), "put right by training"),
              (verdicts.count((True, False)), "broken by training"),
              (verdicts.count((True, True)), "right before and after"),
              (verdicts.count((False, False)), "wrong before and after")]
    changes = ", ".join(f"{count} {name}" for count, name in counts if count)
    shared = _shared_question(rows)
    brief = shared and all(len(row[name]) <= 12 for row in rows for name in ("reference", "base", "tuned"))

    def gallery(some):
        some = "".join(_answer_card(row, heading=not shared) for row in some)
        return f'<div class="cards{" brief" if brief else ""}">{some}</div>'
    first, rest = _extremes(rows) if len(rows) > 2 * MOST else ({}, rows)
    html = "".join(heading(f"Most {name}") + gallery(some) for name, some in first.items() if some)
    if first:
        others = f"All other {len(rest)} rows"
        html += folded(others, gallery(rest)) if len(rest) > FOLDED_FROM else heading(others) + gallery(rest)
    else:
        html = gallery(rest)
    return (note(f"{len(rows)} row{'s' * (len(rows) != 1)}{': ' if changes else ''}{changes}.")
            + (f'<h3 class="shared" dir="auto">{escape(shared)}</h3>' if shared else "") + html)


def _nearer(row):
    """How much nearer training brought an answer to its reference, from -1 to 1, by characters they share."""
    after, before = (SequenceMatcher(None, row[which][:COMPARED], row["reference"][:COMPARED]).ratio()
                     for which in ("tuned", "base"))
    return after - before


def _extremes(rows):
    """({"improved": the rows that gained most, "worsened": those that lost most}, all other rows)."""
    gains = {n: _nearer(row) for n, row in enumerate(rows)}
    order = sorted(gains, key=gains.get)
    found = {"improved": [n for n in order[::-1][:MOST] if gains[n] > 0],
             "worsened": [n for n in order[:MOST] if gains[n] < 0]}
    shown = {n for some in found.values() for n in some}
    return ({name: [rows[n] for n in some] for name, some in found.items()},
            [row for n, row in enumerate(rows) if n not in shown])


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
    """A standalone SVG of up to eight rows, as `cards` takes them: the figure of a README."""
    rows = rows[:8]
    columns = min(4, len(rows)) or 1
    shared = _shared_question(rows)
    card_height = 304 if shared else 346
    width, height = max(240 * columns - 16, 464), 80 + card_height * math.ceil(len(rows) / columns) + 20
    body = [f'<text x="0" y="22" class="ink strong title">{arrows(title)}</text>',
            f'<text x="0" y="50" class="answer">{escape(shared) or "Held-out rows, before and after"}</text>',
            f'<text x="0" y="{height - 6}">{arrows(caption)}</text>']
    for n, row in enumerate(rows):
        x, y = 240 * (n % columns), 80 + card_height * (n // columns)
        body.append(f'<g transform="translate({x},{y})">{_figure_card(row, question=not shared)}</g>')
    return drawing(width, height, f"{title}. {caption}", "".join(body), standalone=True, margin=24)


def _figure_card(row, question, side=224):
    html = [f'<rect class="wash" width="{side}" height="{side}"/>']
    for image in row["pictures"][:1]:
        factor = max(1, side // max(image.size))  # enlarged here: not every viewer of SVGs keeps pixels crisp
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        scale = side / max(image.size)
        wide, high = image.width * scale, image.height * scale
        html.append(f'<image x="{(side - wide) / 2:.1f}" y="{(side - high) / 2:.1f}" width="{wide:.1f}" '
                    f'height="{high:.1f}" href="{data_uri(image)}"/>')
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
