"""preview: the samples as training will see them, for a person: on a page, in the terminal, and as JSON."""
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from PIL import Image
from rich.text import Text

from lib.data import summary
from lib.data.samples import inner
from lib.media.media import poster
from lib.pages import charts, page, tokens
from lib.pages.seen import in_words, seen
from lib.run import terminal
from lib.run.ledger import in_lines
from lib.text.chat import Encoder
from lib.text.processor import placeholders, tokenizer_of

FIRST, EXTREMES, HELD_OUT = 16, 3, 3      # samples shown of each kind
MOST_MEDIA = 8                            # media shown of one sample, frames of one clip


def share(sample: dict) -> float:
    """The share of a sample's tokens that is trained."""
    return sample["supervised_tokens"] / sample["input_tokens"]


def extremes(samples) -> dict[str, list[dict]]:
    """{name: samples} in which mistakes show first: the longest, the shortest and the least trained.

    A sample that a weight repeats counts once.
    """
    table = samples.with_format("arrow")[:]
    again = pc.match_substring_regex(table["sample_id"], r"~\d+$").to_numpy()
    length, _, trained = (table[name].to_numpy() for name in summary.SUMS)
    orders = {"longest": -length, "shortest": length, "least trained": trained / length}
    once = np.flatnonzero(~again)
    return {name: list(samples.select(once[np.argsort(order[once], kind="stable")[:EXTREMES]]))
            for name, order in orders.items()}


# ---- the page --------------------------------------------------------------------------------------------


def write_previews(folder: Path, encoder: Encoder, train, held_out, report: dict, knobs) -> None:
    """Write preview.jsonl (the first samples, token by token) and preview.html (to read before training)."""
    cards = Cards(encoder, knobs.report_media)
    firsts = "".join(map(cards.of, train.take(min(FIRST, len(train)))))        # which fills cards.rows
    (folder / "preview.jsonl").write_text(in_lines(cards.rows.values()), encoding="utf-8")
    kinds = "".join(page.heading(f"The {name}") + "".join(map(cards.of, found))
                    for name, found in extremes(train).items())
    held = "".join(cards.of(sample, held_out=True) for sample in held_out.take(min(HELD_OUT, len(held_out))))
    words = {"train_samples": "samples to train on", "held_out_samples": "held out",
             "rejected_rows": "rows rejected", "supervised_tokens": "trained tokens",
             "longest_sample_tokens": "tokens in the longest"}
    html = page.document("What the model will learn", [
        ("In short", page.tiles([(report["counts"][name], word) for name, word in words.items()])),
        ("Data sets", datasets(report)),
        ("Lengths", histograms(train, knobs.sequence_len)),
        ("First samples", tokens.KEY + firsts),
        ("Extremes", kinds),
        *([("Held out", held)] if held else []),
    ], "Samples exactly as training sees them.", page.MEDIA_SHOWN[knobs.report_media])
    (folder / "preview.html").write_text(html, encoding="utf-8")


def datasets(report: dict) -> str:
    """Tables, as HTML, of data sets, of rejected rows, and of what the template writes by itself."""
    html = page.table(summary.DATASET_COLUMNS, summary.dataset_rows(report["datasets"].items()))
    if report["rejects"]:
        html += page.paragraph("What can't be used, by the way in which it is mended:") + page.table(
            ["rows", "such as", "mend it"], [list(kind.values()) for kind in report["rejects"]])
    if report["template_says"]:
        html += page.paragraph("What the chat template says by itself; no row holds it:") + page.table(
            ["rows", "words"], [[said["rows"], said["words"]] for said in report["template_says"]])
    return html


def histograms(samples, sequence_len: int) -> str:
    """Histograms of samples' lengths, their media tokens and trained shares, and of pictures' sizes."""
    table = samples.with_format("arrow")[:]
    length, of_media, trained = (table[name].to_numpy() for name in summary.SUMS)
    media, shown_by = inner(table["media"])
    width, height = (pc.struct_field(media, name).to_numpy() for name in ("width", "height"))
    sides = np.maximum(width, height)[pc.equal(pc.struct_field(media, "kind"), "image").to_numpy()]
    html = charts.histogram(length, "tokens per sample", marks=[(sequence_len, "sequence_len")])
    html += charts.histogram(100 * (trained / length), "trained share of a sample", "%")
    if len(media):
        html += charts.histogram(of_media[np.unique(shown_by)], "media tokens per sample that has media")
    if len(sides):
        html += charts.histogram(sides, "longer side of a picture, as given", "pixels")
    return html


class Cards:
    """Makes HTML cards of samples: in full the first time, later as a link. rows: the same as plain data."""

    def __init__(self, encoder: Encoder, report_media: str):
        self.encoder, self.report_media, self.rows = encoder, report_media, {}
        never_trained = list(encoder.never_trained)
        self.media_tokens = tokenizer_of(encoder.processor).convert_ids_to_tokens(never_trained)

    def of(self, sample: dict, held_out: bool = False) -> str:
        """A sample's card: its counts, its media as the model sees them, every token."""
        name = sample["sample_id"]
        facts = [(f"row {sample['row']} of", sample["dataset"]), ("tokens", sample["input_tokens"]),
                 ("media", sample["media_tokens"]), ("trained", sample["supervised_tokens"]),
                 ("trained share", f"{share(sample):.1%}")]
        if name in self.rows:
            return tokens.card(name, "", page.link(name, "shown above"), facts)
        row = self.rows[name] = preview_row(self.encoder, sample)
        shown = page.may_show(self.report_media, held_out)
        encoder = self.encoder.bounded(sample["image_bounds"])
        media = "".join(medium_shown(encoder, record, f"{record['kind']} {number} of {name}", shown)
                        for number, record in enumerate(sample["media"][:MOST_MEDIA], start=1))
        if len(sample["media"]) > MOST_MEDIA:
            media += page.note(f"and {len(sample['media']) - MOST_MEDIA} more")
        view = tokens.view(row["tokens"], row["input_ids"], row["labels"], self.media_tokens)
        return tokens.card(name, media, view, facts, anchor=page.anchor(name))


def medium_shown(encoder: Encoder, record: dict, name: str, shown: bool) -> str:
    """A medium with a caption: a picture as the model sees it, a clip's frames, a sound's loudness.

    shown: whether the page may hold the medium; else the caption stands alone.
    """
    (medium,) = encoder.open([record])
    if record["kind"] == "image":
        pictures = seen(encoder.processor, medium)
        caption, pictures = in_words(record, pictures), pictures or [medium]
    elif record["kind"] == "audio":
        pictures, caption = [poster(record)], f"{record['seconds']:.1f} s of sound"
    else:
        frames, every = medium.frames, -(-len(medium.frames) // MOST_MEDIA)
        pictures = [Image.fromarray(frame) for frame in frames[::every]]
        caption = f"{len(frames)} frames of a clip of {record['seconds']:.1f} s"
    if not shown:
        return page.withheld(caption)
    sizes = {"max_side": page.MOST_PIXELS, "enlarged_to": 256} if record["kind"] == "image" else {}
    return page.shot([page.picture(each, name, **sizes) for each in pictures], caption)


def preview_row(encoder: Encoder, sample: dict) -> dict:
    """One sample exactly as training will see it, as plain data."""
    encoded = encoder(sample)
    ids, labels = (encoded[name][0].tolist() for name in ("input_ids", "labels"))
    return {"sample_id": sample["sample_id"], "row": sample["row"], "dataset": sample["dataset"],
            "input_ids": ids, "labels": labels,
            "tokens": tokenizer_of(encoder.processor).convert_ids_to_tokens(ids),
            "images": len(sample["media"]), "media_tokens": sample["media_tokens"]}


# ---- the terminal ----------------------------------------------------------------------------------------


def show(samples, processor) -> None:
    """Print the texts of samples, what is trained in green, media placeholders dim."""
    for sample in samples:
        text = Text(sample["text"])
        text.highlight_words(placeholders(processor).values(), "dim")
        for span in sample["spans"]:
            text.stylize("bold green", span["start"], span["end"])
        terminal.say(f"{sample['sample_id']}: {sample['input_tokens']} tokens, {sample['media_tokens']} of "
                     f"them media, {sample['supervised_tokens']} trained (green)", "bold")
        terminal.console.print(text)


def show_extremes(samples) -> None:
    """Print which samples are the longest, the shortest and the least trained."""
    terminal.table("where mistakes show first", ["", "sample", "tokens", "media", "trained", "share"],
                   [[name, sample["sample_id"], sample["input_tokens"], sample["media_tokens"],
                     sample["supervised_tokens"], f"{share(sample):.1%}"]
                    for name, found in extremes(samples).items() for sample in found])
