"""preview: what training will see of a sample, for a person: in the terminal, on a page and as JSON lines."""
from pathlib import Path

from rich.text import Text

from lib import report, terminal
from lib.chat import Encoder, placeholders, tokenizer_of
from lib.media import open_image
from lib.samples import write_lines

PREVIEW_ROWS = 16


def preview_row(encoder: Encoder, sample: dict) -> dict:
    """One sample exactly as training will see it, as plain data."""
    encoded = encoder(sample)
    ids = encoded["input_ids"][0].tolist()
    return {"sample_id": sample["sample_id"], "row": sample["row"], "dataset": sample["dataset"],
            "input_ids": ids, "labels": encoded["labels"][0].tolist(),
            "tokens": tokenizer_of(encoder.processor).convert_ids_to_tokens(ids),
            "images": len(sample["media"]), "media_tokens": sample["media_tokens"]}


def write_previews(folder: Path, encoder: Encoder, train: list[dict], counts: dict) -> None:
    """preview.jsonl (the first rows as tensors) and preview.html (the same to look at, with histograms)."""
    rows = [preview_row(encoder, sample) for sample in train[:PREVIEW_ROWS]]
    write_lines(folder / "preview.jsonl", rows)
    media_tokens = tokenizer_of(encoder.processor).convert_ids_to_tokens(list(encoder.never_trained))
    cards = [sample_card(sample, row, media_tokens) for sample, row in zip(train, rows)]
    page = report.page("What the model will learn", [
        ("In short", report.tiles([(counts["train_samples"], "samples to train on"), (counts["held_out_samples"], "held out"),
                                   (counts["rejected_rows"], "rows rejected"), (counts["supervised_tokens"], "trained tokens")])),
        ("Samples", report.TOKEN_KEY + "".join(cards)),
        ("Lengths", report.histogram([sample["input_tokens"] for sample in train], "tokens per sample")
         + report.histogram([sample["supervised_tokens"] for sample in train], "trained tokens per sample")),
    ], subtitle=f"The first {len(rows)} samples as training sees them. Trained tokens are marked.")
    (folder / "preview.html").write_text(page, encoding="utf-8")


def sample_card(sample: dict, row: dict, media_tokens: list[str]) -> str:
    """A sample on the page: its pictures, every token, and its counts."""
    pictures = "".join(report.picture(open_image(medium), f"picture {number} of {row['sample_id']}")
                       for number, medium in enumerate(sample["media"], start=1))
    facts = [(f"row {row['row']}", row["dataset"]), ("tokens", sample["input_tokens"]),
             ("trained", sample["supervised_tokens"]), ("media", sample["media_tokens"])]
    tokens = report.token_view(row["tokens"], row["input_ids"], row["labels"], media_tokens)
    return report.sample_card(row["sample_id"], pictures, tokens, facts)


def show(samples: list[dict], processor) -> None:
    """Print the texts of samples, what is trained in green, media placeholders dim."""
    for sample in samples:
        text = Text(sample["text"])
        text.highlight_words(placeholders(processor).values(), "dim")
        for span in sample["spans"]:
            text.stylize("bold green", span["start"], span["end"])
        terminal.say(f"{sample['sample_id']}: {sample['input_tokens']} tokens, {sample['media_tokens']} of them media, "
                     f"{sample['supervised_tokens']} trained (green)", "bold")
        terminal.console.print(text)
