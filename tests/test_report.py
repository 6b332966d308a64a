"""The pages and figures: what they show, that they need nothing else, and that no value breaks them."""

import base64
import io
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from PIL import Image

from lib.pages import answers, charts, page, tokens

HOSTILE = "<script>alert('x')</script> \"&amp; <img src=x onerror=y>"
VOID = {"meta", "img", "br", "link"}
PHOTO = Image.effect_noise((300, 200), 80).convert("RGB")
DIGIT = Image.linear_gradient("L").resize((8, 8))


class Reader(HTMLParser):
    """The tags of a page with their attributes, its text and its tokens; unbalanced tags are an error."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text, self.tokens = [], [], "", []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        title = dict(attributes).get("title", "")
        if tag == "span" and title.startswith("id "):
            self.tokens.append({"id": int(title[3:]), "trained": "mark" in self.open, "text": ""})

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if "style" not in self.open:
            self.text += text
        if self.tokens and "span" in self.open:
            self.tokens[-1]["text"] += text

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def row(question="Which digit is this?", base="shirt", tuned="7", **others):
    return {"pictures": [DIGIT], "question": question, "reference": "7", "base": base, "tuned": tuned,
            "base_right": False, "tuned_right": True, **others}


def read(names, labels=None, media=()):
    ids = list(range(100, 100 + len(names)))
    return Reader(tokens.view(names, ids, labels or [-100] * len(names), media)).tokens


def everything(text):
    """A page on which every function shows the text."""
    view = tokens.view([text, text, "<image>"], [1, 2, 3], [-100, 2, -100], {"<image>"})
    sample = tokens.card(text, page.picture(PHOTO, text), view, [(text, text)])
    series = {text: [(n, n % 7) for n in range(100)], "other": [(1, 2)]}
    rows = [row(text, text, text), row(), row(pictures=[PHOTO, DIGIT])]
    return page.document(text, [
        (text, page.tiles([(text, text)]) + page.table([text], [[text]]) + page.paragraph(text)),
        ("Samples", tokens.KEY + sample),
        ("Charts", charts.histogram([1, 2, 3], text, text, [(2, text)]) + charts.curve(series, text, text)),
        ("Answers", answers.cards(rows) + page.code(text)),
    ], text)


def svgs(html):
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.S)]


def places(html):
    """Every coordinate and size that the drawings of a page use."""
    names = ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height", "points")
    values = [element.get(name, "0") for svg in svgs(html) for element in svg.iter() for name in names]
    return [float(number) for value in values for number in re.split(r"[ ,]", value)]


# ------------------------------------------------------------------------------------------- the page

def test_text_is_escaped_wherever_it_goes_in():
    shown = Reader(everything(HOSTILE))
    assert not shown.all("script") and all("onerror" not in attributes for _, attributes in shown.tags)
    assert shown.text.count(HOSTILE) >= 15


def test_text_in_a_standalone_figure_is_escaped():
    for svg in (answers.figure([row(HOSTILE, HOSTILE, HOSTILE), row()], HOSTILE, HOSTILE),
                charts.curve({HOSTILE: [(1, 2)]}, HOSTILE, HOSTILE, standalone=True)):
        root = ElementTree.fromstring(svg)
        assert HOSTILE in "".join(root.itertext())
        assert not [element for element in root.iter() if "script" in element.tag]


def test_a_page_refers_to_nothing_outside_itself():
    html = everything("text")
    shown = Reader(html)
    links = [tag[name] for _, tag in shown.tags for name in ("src", "href") if name in tag]
    assert links and all(link.startswith(("data:image/", "#")) for link in links)
    assert not re.search(r"https?://|url\(|@import", re.sub(r'"data:[^"]*"', "", html))


def test_a_page_forbids_itself_scripts_and_fetches():
    policy = [meta["content"] for meta in Reader(everything("text")).all("meta") if "http-equiv" in meta]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_a_page_is_balanced_and_every_picture_and_drawing_has_a_description():
    shown = Reader(everything("text"))
    assert all(image["alt"] for image in shown.all("img"))
    assert all(svg["aria-label"] and svg["role"] == "img" for svg in shown.all("svg"))
    assert svgs(everything("text"))


def test_contents_are_listed_when_there_are_more_than_three_sections_and_every_link_has_its_target():
    shown = Reader(page.document("t", [("Same", ""), ("Same", ""), ("Ünï & co", ""), ("→", "")]))
    targets = [section["id"] for section in shown.all("section")]
    assert [link["href"] for link in shown.all("a")] == ["#" + target for target in targets]
    assert len(set(targets)) == 4
    assert not Reader(page.document("t", [("One", ""), ("Two", ""), ("Three", "")])).all("nav")


@pytest.mark.parametrize("colours", [charts.LIGHT, charts.DARK], ids=["light", "dark"])
@pytest.mark.parametrize("ink, ground", [
    ("ink", "paper"), ("muted", "paper"), ("good", "paper"), ("bad", "paper"),
    ("ink", "wash"), ("muted", "wash"), ("ink", "learnt")])
def test_text_has_a_contrast_of_at_least_four_and_a_half(colours, ink, ground):
    def brightness(colour):
        parts = [int(colour[n:n + 2], 16) / 255 for n in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    low, high = sorted((brightness(colours[ink]), brightness(colours[ground])))
    assert (high + 0.05) / (low + 0.05) >= 4.5


def test_columns_of_numbers_go_right_and_values_read_well():
    def sides(html):
        return [th.get("class") for th in Reader(html).all("th")]
    rows = [["a", 1234567, "12%", 3], ["b", None, "3.5%", "x"], ["c", 2e-4, "0%", True]]
    html = page.table(["name", "count", "share", "mixed"], rows)
    assert sides(html) == [None, "right", "right", None]
    assert all(shown in html for shown in ("1,234,567", "—", "2e-4", "yes"))
    assert sides(page.table(["a", "b"], [[1, "x"]], "lr")) == [None, "right"]


def test_key_figures_are_shown_with_a_real_arrow():
    assert "3% → 94%" in page.tiles([("3% -> 94%", "exact match")])


# ----------------------------------------------------------------------------------------- the tokens

def test_trained_tokens_are_marked_and_no_others():
    found = read(list("abcdef"), [-100, 101, 102, -100, -100, 0])
    assert [token["id"] for token in found if token["trained"]] == [101, 102, 105]
    assert [token["id"] for token in found] == [100, 101, 102, 103, 104, 105]


def test_trained_tokens_are_underlined_as_well_as_coloured():
    style = page.document("t", [])
    assert re.search(r"\.tokens mark span \{[^}]*background[^}]*border-bottom: 2px solid", style)


def test_a_run_of_media_tokens_is_folded_with_its_exact_count():
    found = read(["a", *["<image>"] * 256, "b", *["<image>"] * 4], media={"<image>"})
    assert [token["text"] for token in found] == ["a", "<image> ×256", "b", "<image> ×4"]


def test_a_media_token_that_is_trained_by_mistake_is_not_folded_away():
    found = read(["<image>"] * 5, [-100, -100, 7, -100, -100], {"<image>"})
    assert [(token["text"], token["trained"]) for token in found] == [
        ("<image> ×2", False), ("<image>", True), ("<image> ×2", False)]


def test_neighbouring_media_tokens_of_two_kinds_are_counted_apart():
    found = read(["<row>", "<image>", "<image>", "<row>"], media={"<row>", "<image>"})
    assert [token["text"] for token in found] == ["<row>", "<image> ×2", "<row>"]


@pytest.mark.parametrize("names, shown", [
    (["<|im_start|>", "Hello", "Ġworld", "Ċ", "ĊĊ"], ["<|im_start|>", "Hello", " world", "↵\n", "↵\n↵\n"]),
    (["Ġthe", "çĮ«", "Ã©", "æ¸"], [" the", "猫", "é", "\\xe6\\xb8"]),
    (["Ġa", "<｜begin▁of▁sentence｜>"], [" a", "<｜begin▁of▁sentence｜>"]),
    (["▁Hello", "▁▁▁", "Ġ", "<0x0A>"], [" Hello", "···", "Ġ", "↵\n"]),
    (["plain", " text", "\n", "é"], ["plain", " text", "↵\n", "é"]),
], ids=["byte level", "bytes of other scripts", "added tokens", "sentencepiece", "decoded"])
def test_tokens_of_every_kind_of_vocabulary_read_as_text(names, shown):
    assert [token["text"] for token in read(names)] == shown


@pytest.mark.parametrize("token, shown", [
    (" one", " one"), ("two words", "two words"), ("end ", "end·"), (" ", "·"), ("  x", "··x"),
    ("a  b", "a··b"), ("\t", "⇥"), ("\r\n", "␍↵\n"), ("\u202eabc", "U+202Eabc"),
    ("\u200b", "U+200B"), ("·", "·")])
def test_a_space_or_sign_that_would_be_missed_is_shown(token, shown):
    assert read([token])[0]["text"] == shown


def test_tokens_and_labels_of_different_lengths_are_an_error():
    with pytest.raises(ValueError):
        tokens.view(["a", "b"], [1, 2], [-100])


# --------------------------------------------------------------------------------------- the pictures

def decoded(html):
    """The pictures of a page, as a browser gets them."""
    uris = re.findall(r'(?:src|href)="data:image/(\w+);base64,([^"]*)"', html)
    return [(kind, Image.open(io.BytesIO(base64.b64decode(data)))) for kind, data in uris]


@pytest.mark.parametrize("mode", "1 L LA P PA RGB RGBA RGBX CMYK YCbCr HSV I F I;16".split())
@pytest.mark.parametrize("size", [(1, 1), (40, 30), (900, 3)])
def test_a_picture_of_any_mode_and_size_is_shown(mode, size):
    (_, image), = decoded(page.picture(Image.new(mode, size), "a picture"))
    assert image.mode in ("RGB", "L", "P") and max(image.size) <= 224


def test_transparency_is_shown_on_white():
    (_, clear), = decoded(page.picture(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), "clear"))
    assert clear.getpixel((0, 0)) == (255, 255, 255)


def test_a_tiny_picture_keeps_its_pixels_and_a_large_one_is_made_smaller():
    html = page.picture(DIGIT, "a digit")
    assert Reader(html).all("img")[0].items() >= {"class": "pixel", "width": "128", "height": "128"}.items()
    assert decoded(html)[0][1].size == (8, 8)
    (kind, image), = decoded(page.picture(PHOTO, "a photo", max_side=100))
    assert kind == "jpeg" and image.size == (100, 67)


def test_a_drawing_of_few_colours_is_not_smeared():
    drawing = Image.new("RGB", (500, 500), "white")
    drawing.paste("red", (100, 100, 300, 300))
    (kind, image), = decoded(page.picture(drawing, "a drawing", max_side=500))
    assert kind == "png" and image.getcolors() is not None and len(image.convert("RGB").getcolors()) == 2


def test_a_picture_takes_no_metadata_along_and_stays_as_it_was():
    exif = Image.Exif()
    exif[0x010E] = "where I live"
    data = io.BytesIO()
    PHOTO.save(data, "JPEG", exif=exif, comment=b"where I live")
    given = Image.open(data)
    html = page.picture(given, "a photo")
    assert b"where I live" in data.getvalue()
    assert b"where I live" not in base64.b64decode(re.search(r'base64,([^"]*)', html)[1])
    assert given.size == PHOTO.size


# ------------------------------------------------------------------------------------------ the charts

@pytest.mark.parametrize("values", [
    [], [0], [5], [7, 7, 7], [0.25, 0.25], [0, 1], [-3, -1, 2], [1, 2, 2.5], [1e-300, 2e-300], [0, 5e-324],
    [1, 1e149], [1e16, 1e16 + 2], [1.5, 1.5 + 2e-16], [math.nan], [math.inf, 1, -math.inf, None, 1e308],
], ids=str)
def test_no_values_break_a_histogram_or_a_curve(values):
    points = list(enumerate(values))
    html = (charts.curve({"a": points, "b": []}, "x", "y")
            + (charts.histogram(values, "values") if values and None not in values and math.nan not in values else "")
            + charts.curve({"a": [(y, x) for x, y in points]}, "x", "y", standalone=True))
    assert Reader(html)
    assert all(math.isfinite(place) for place in places(html))


def test_a_histogram_counts_every_value_once():
    values = [n * 0.37 for n in range(-200, 800)]
    html = charts.histogram(values, "values")
    counts = [int(count) for count in re.findall(r": (\d+)</title>", html)]
    assert sum(counts) == 1000 and 8 <= len(counts) <= 20


def test_a_histogram_says_its_median_its_maximum_and_its_marks_though_they_coincide_or_lie_far_off():
    marks = [(310, "limit"), (8192, "sequence_len")]
    html = charts.histogram([100, 200, 300], "length", marks=marks)
    named = ("median 200", "max 300", "limit 310", "length, sequence_len 8,192")
    assert all(words in html for words in named)
    assert "median, max, limit 5" in charts.histogram([5, 5], "length", marks=[(5, "limit")])


def test_names_of_neighbouring_marks_do_not_share_a_row():
    html = charts.histogram([100, 101, 102], "length", marks=[(101.1, "one"), (101.2, "two")])
    rows = re.findall(r'class="ink mid" x="([\d.]+)" y="(\d+)"', html)
    assert len({y for _, y in rows}) > 1


def test_whole_numbers_get_no_half_ticks():
    html = charts.histogram([1, 2, 2], "turns", "turns")
    assert not re.search(r">\d\.5<", html)


def test_a_jumpy_line_is_smoothed_over_its_raw_values_and_a_smooth_one_left_alone():
    jumpy = charts.curve({"loss": [(n, n % 5) for n in range(200)]}, "step", "loss")
    assert jumpy.count("<polyline") == 2 and 'class="line raw s0 d0"' in jumpy
    corner = charts.curve({"rate": [(n, min(n, 20) / 20) for n in range(200)]}, "step", "rate")
    assert corner.count("<polyline") == 1 and "raw" not in corner


def test_a_long_line_is_drawn_small_and_keeps_its_spike():
    points = [(n, 9.0 if n == 45_678 else 1 + n % 3 / 10) for n in range(100_000)]
    svg = charts.curve({"loss": points}, "step", "loss", standalone=True)
    raw = re.search(r'raw s0 d0" points="([^"]*)', svg)[1]
    heights = [float(place.split(",")[1]) for place in raw.split()]
    assert len(svg) < 60_000
    assert min(heights) < 80 and sorted(heights)[1] > 200


def test_sixteen_lines_are_told_apart_by_colour_and_dash():
    html = charts.curve({f"role{n}": [(0, n), (1, n)] for n in range(16)}, "step", "norm")
    assert len(set(re.findall(r'<polyline class="line ([^"]*)"', html))) == 16


def test_a_standalone_svg_brings_its_own_paper_for_light_and_dark_grounds():
    for svg in (charts.curve({"loss": [(1, 2), (2, 1)]}, "step", "loss", standalone=True),
                answers.figure([row()], "title", "caption")):
        root = ElementTree.fromstring(svg)
        assert root.find("{*}rect").get("class") == "paper"
        assert "prefers-color-scheme: dark" in svg and "var(" not in svg
        assert charts.LIGHT["paper"] in svg and charts.DARK["paper"] in svg
        assert root.find("{*}title").text


# ----------------------------------------------------------------------------------------- the answers

def test_answers_are_told_right_or_wrong_by_sign_and_word_and_counted():
    html = answers.cards([
        row("a?"), row("b?", base_right=True), row("c?", base_right=True, tuned_right=False),
        row("d?", tuned_right=False)])
    marks = [span["aria-label"] for span in Reader(html).all("span") if "aria-label" in span]
    assert marks.count("right:") == 4 and marks.count("wrong:") == 4
    assert html.count("✓") == 4 and html.count("✗") == 4
    assert ("4 rows: 1 put right by training, 1 broken by training, 1 right before and after, "
            "1 wrong before and after.") in html


def test_a_question_that_all_rows_share_is_said_once():
    assert Reader(answers.cards([row(), row(), row()])).text.count("Which digit is this?") == 1
    assert Reader(answers.cards([row(), row("Which animal?")])).text.count("Which digit is this?") == 1


def test_an_empty_answer_and_a_row_without_pictures_are_shown_as_such():
    html = answers.cards([row(base="", tuned=" \n"), row("Is it?", pictures=[])])
    assert html.count("(nothing)") == 2
    assert len(Reader(html).all("img")) == 1
    assert "0 rows." in answers.cards([])


def test_a_figure_shows_up_to_eight_rows_with_their_pictures():
    rows = [row(pictures=[DIGIT if n % 2 else PHOTO]) for n in range(12)]
    svg = answers.figure(rows, "before -> after", "caption")
    root = ElementTree.fromstring(svg)
    images = root.findall(".//{*}image")
    assert len(images) == 8 and all(image.get("href").startswith("data:image/") for image in images)
    assert svg.count("✓") == 8 and "before → after" in svg
    assert not re.search(r"https?://", svg.replace("http://www.w3.org/2000/svg", ""))


@pytest.mark.parametrize("rows", [
    [], [row()], [row("q " * 200, "word " * 99, "长" * 99), row(pictures=[])]], ids=len)
def test_a_figure_of_few_or_odd_rows_is_a_drawing_all_the_same(rows):
    assert ElementTree.fromstring(answers.figure(rows, "title", "caption")) is not None


# ----------------------------------------------------------------------------------------- the browser

@pytest.mark.parametrize("dark, colours", [(False, charts.LIGHT), (True, charts.DARK)], ids=["light", "dark"])
def test_a_real_browser_shows_the_page_in_the_readers_colours_and_complains_of_nothing(
        browser, tmp_path, dark, colours):
    (tmp_path / "page.html").write_text(everything(HOSTILE), encoding="utf-8")
    browser.open(tmp_path / "page.html", dark=dark)
    assert browser.complaints == [] and browser.requests == []
    assert browser.find("document.body.innerText").count(HOSTILE) >= 12
    assert browser.find("document.querySelectorAll('script').length") == 0
    image = Image.open(io.BytesIO(browser.screenshot())).convert("RGB")
    painted = {"#" + bytes(colour).hex() for _, colour in image.getcolors(image.width * image.height)}
    assert {colours[name] for name in ("paper", "ink", "learnt", "good", "s0")} <= painted
