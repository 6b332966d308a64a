"""Charts as SVG strings: histograms and curves, inside a page or as a file of their own (05's loss.svg).

They are kept apart from report.py because training draws a curve: so an edit to a page is no edit to
training's source, which would make its stage out of date.
Fork me to: change the colours (LIGHT, DARK, charts.css), or draw another chart.
"""
import math
import re
import statistics
from html import escape
from itertools import pairwise
from pathlib import Path

import numpy as np

from lib.pages.scale import Scale, number, round_step

# `good` is the one accent: what is trained, and what training made right. `s0`.. are the lines of a chart.
LIGHT = {"paper": "#ffffff", "wash": "#f3f4f6", "rule": "#dfe2e7", "muted": "#59616b", "ink": "#14171a",
         "good": "#08704f", "learnt": "#d7f1e4", "bad": "#b3372b",
         "s0": "#08704f", "s1": "#bf5408", "s2": "#2b62c4", "s3": "#8440b0"}
DARK = {"paper": "#111417", "wash": "#1d2126", "rule": "#2e343b", "muted": "#a0a9b4", "ink": "#e9ebee",
        "good": "#55d6a8", "learnt": "#143d30", "bad": "#ff9182",
        "s0": "#55d6a8", "s1": "#ffab66", "s2": "#86b1ff", "s3": "#d09bf5"}


def histogram(values, label, unit="tokens", marks=()):
    """A histogram with its median and maximum marked. marks: [(value, name)], as for sequence_len."""
    values = np.asarray(values, float)
    start, step, counts = _bins(values)
    end = start + step * len(counts)
    shown = {}
    for value, name in ((float(np.median(values)), "median"), (float(values.max()), "max"), *marks):
        shown[value] = f"{shown[value]}, {name}" if value in shown else name
    near = {value: name for value, name in shown.items() if start <= value <= end + (end - start) / 2}
    far = "".join(f", {name} {number(value, 4)}" for value, name in shown.items() if value not in near)
    x = Scale([start, end, *near], 48, 404, snap=False)
    y = Scale([0, max(counts)], 206, 66)
    x.ticks = [tick for tick in x.ticks if tick % 1 == 0 or step < 1]  # no half tokens,
    y.ticks = [tick for tick in y.ticks if tick % 1 == 0]  # no half samples
    bars = "".join(
        f'<rect class="bar" x="{x.at(low) + .5:.1f}" width="{max(x.at(low + step) - x.at(low) - 1, 1):.1f}" '
        f'y="{y.at(count):.1f}" height="{206 - y.at(count):.1f}"><title>{number(low, 4)} to '
        f'{number(low + step, 4)}: {count:,}</title></rect>'
        for low, count in ((start + n * step, count) for n, count in enumerate(counts)) if count)
    words = ", ".join(f"{name} {number(value, 4)}" for value, name in shown.items())
    svg = drawing(420, 250, f"Histogram of {label}: {len(values):,} values, {words} {unit}",
                  _grid(x, y, unit) + bars + _marks(near, x, 66, 206))
    return _chart(svg, "half", label + far)


def _bins(values):
    """(start, step, counts) of about 16 bins of a round width.

    Where each whole number has a bin of its own, it sits in the bin's middle.
    """
    low, high = float(values.min()), float(values.max())
    whole = bool((values % 1 == 0).all())
    step = round_step((high - low) / 16 or (not whole and abs(high) / 16) or 1)
    step = max(step, 1) if whole else step
    start = math.floor(low / step) * step - (0.5 if whole and step == 1 else 0)
    counts = np.bincount(((values - start) / step).astype(int)).tolist()
    return (start, step, counts) if len(counts) > 1 else (start - 2 * step, step, [0, 0, *counts, 0, 0])


def _marks(marks, x, top, bottom):
    """Dashed lines with their names above; a name that would touch its neighbour goes a row higher."""
    html, row_ends = [], []
    for value, name in sorted(marks.items()):
        words, place = f"{name} {number(value, 4)}", x.at(value)
        width = 7.6 * len(words)
        left = min(max(place - width / 2, 0), 420 - width)
        row = next((n for n, end in enumerate(row_ends) if end < left), len(row_ends))
        row_ends[row:row + 1] = [left + width + 6]
        y = top - 8 - 18 * row
        html.append(f'<line class="mark" x1="{place:.1f}" x2="{place:.1f}" y1="{y + 4}" y2="{bottom}"/>'
                    f'<text class="ink mid" x="{left + width / 2:.1f}" y="{y}">{escape(words)}</text>')
    return "".join(html)


def curve(series, x_label, y_label, standalone=False):
    """A line chart of {name: [(x, y), ...]}; where a line jumps about, smoothed over the faint raw one."""
    usable = {name: [(x, y) for x, y in points if _is_usable(x) and _is_usable(y)]
              for name, points in series.items()}
    lines = {name: sorted(points) for name, points in usable.items() if points}
    if not lines:
        words = f"{y_label}: no values"
        svg = drawing(720, 40, words, f'<text x="0" y="24">{escape(words)}</text>', standalone)
        return svg if standalone else _chart(svg)
    x = Scale([x for points in lines.values() for x, _ in points], 64, 706, snap=False)
    names = {name: f"s{n % 4} d{(n + n // 4) % 4}" for n, name in enumerate(lines)}  # colour, dash: 16 pairs
    legend, top = _legend(names, y_label)
    y = Scale([y for points in lines.values() for _, y in points], 300, top)
    body = legend + _grid(x, y, x_label) + "".join(_line(lines[name], x, y, names[name]) for name in lines)
    last = ", ".join(f"{name} ends at {number(points[-1][1], 3)}" for name, points in lines.items())
    svg = drawing(720, 350, f"{y_label} by {x_label}: {last}", body, standalone)
    return svg if standalone else _chart(svg)


def _legend(names, y_label):
    """(html, the y at which the chart may begin): the label, then each line's colour and name, in rows."""
    html = [f'<text class="ink strong" x="0" y="20">{escape(y_label)}</text>']
    left, y = 40 + 11 * len(y_label), 20  # 11 a letter leaves room for the larger ones of a phone
    for name, kind in names.items() if len(names) > 1 or y_label not in names else ():
        if left + 36 + 11 * len(name) > 720:
            left, y = 0, y + 24
        html.append(f'<line class="line {kind}" x1="{left}" x2="{left + 28}" y1="{y - 4.5}" y2="{y - 4.5}"/>'
                    f'<text x="{left + 36}" y="{y}">{escape(name)}</text>')
        left += 68 + 11 * len(name)
    return "".join(html), y + 28


def _line(points, x, y, colour):
    """One line. A long one is thinned: raw, to its extremes, so that a spike stays; smoothed, to means."""
    def path(line, kind=""):
        places = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in line)
        return f'<polyline class="line {kind}{colour}" points="{places}"/>'
    size = math.ceil(len(points) / 600)
    chunks = [points[n:n + size] for n in range(0, len(points), size)]
    raw = [point for chunk in chunks for point in
           sorted({min(chunk, key=lambda p: p[1]), max(chunk, key=lambda p: p[1])})]
    if len(points) <= 40:
        return path(points) + "".join(
            f'<circle class="line {colour}" cx="{x.at(a):.1f}" cy="{y.at(b):.1f}" r="3"/>' for a, b in points)
    heights = [b for _, b in points]
    if sum(abs(b - a) for a, b in pairwise(heights)) <= 3 * (max(heights) - min(heights)):
        return path(raw)  # it is smooth: a learning rate's corner stays a corner
    means = [tuple(statistics.fmean(column) for column in zip(*chunk)) for chunk in chunks]
    reach = max(2, len(means) // 40)
    smooth = []
    for n, (a, _) in enumerate(means):  # a centred mean: unlike a running one it doesn't lag behind
        near = max(reach // 2, min(reach, n, len(means) - 1 - n))
        smooth.append((a, statistics.fmean(b for _, b in means[max(0, n - near):n + near + 1])))
    return path(raw, "raw ") + path(smooth)


def _grid(x, y, x_label):
    html = [f'<text class="mid" x="{(x.start + x.end) / 2}" y="{y.start + 41}">{escape(x_label)}</text>']
    for tick in y.ticks:
        at = y.at(tick)
        html.append(f'<line class="grid" x1="{x.start}" x2="{x.end}" y1="{at:.1f}" y2="{at:.1f}"/>'
                    f'<text class="end" x="{x.start - 8}" y="{at + 4.5:.1f}">{number(tick)}</text>')
    html += [f'<text class="mid" x="{x.at(tick):.1f}" y="{y.start + 20}">{number(tick)}</text>'
             for tick in x.ticks]
    return "".join(html)


def _is_usable(value):
    """True for a number that a chart can place: not None, NaN or infinite, and its square fits a float."""
    return value is not None and abs(value) < 1e150


def _chart(content, kind="", caption=""):
    caption = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="chart {kind}">{caption}{content}</figure>'


def drawing(width, height, label, body, standalone=False, margin=16):
    """An <svg>. A standalone one brings its own background and colours, as it may be shown anywhere."""
    if not standalone:
        return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{body}</svg>'
    style = Path(__file__).with_name("charts.css").read_text(encoding="utf-8")
    light, dark = (re.sub(r"var\(--(\w+)\)", lambda name: colours[name[1]], style)
                   for colours in (LIGHT, DARK))
    wide, high = width + 2 * margin, height + 2 * margin
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{-margin} {-margin} {wide} {high}" '
            f'width="{wide}" height="{high}" role="img"><title>{escape(label)}</title>\n<style>{light}'
            f'@media (prefers-color-scheme: dark) {{{dark}}}</style>\n'
            f'<rect class="paper" x="{.5 - margin}" y="{.5 - margin}" rx="8" '
            f'width="{wide - 1}" height="{high - 1}"/>{body}</svg>\n')
