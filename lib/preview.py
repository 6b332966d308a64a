"""preview: what training will see, for a person: in the terminal, on a page, as JSON, and in numbers."""
import json
from collections import Counter
from pathlib import Path

from rich.text import Text

from lib import report, terminal
from lib.chat import Encoder
from lib.media import poster
from lib.messages import shortened
from lib.processor import placeholders, tokenizer_of
from lib.samples import write_lines

PREVIEW_ROWS = 16
MOST_WORDS = 20                           # more kinds than these are no template's, they vary with the rows


def write_report(path: Path, train: list[dict], held_out: list[dict], rejects: list[dict]) -> dict[str, int]:
    """The counts of everything, written as report.json together with those by data set and kind of reject."""
    every = train + held_out
    sums = {name: sum(sample[name] for sample in every)
            for name in ("input_tokens", "media_tokens", "supervised_tokens")}
    counts = {"train_samples": len(train), "held_out_samples": len(held_out), "rejected_rows": len(rejects),
              "rows_over_sequence_len": sum(reject["too_long"] for reject in rejects),
              "samples_cut_to_sequence_len": sum(sample["cut_tokens"] > 0 for sample in every),
              **sums, "tokens_per_picture": tokens_per_picture(every),
              "longest_sample_tokens": max(sample["input_tokens"] for sample in every),
              "replies_ended_by_the_kit": sum(sample["ends_added"] for sample in every),
              "rows_that_tell_the_day": len({row_of(sample) for sample in every if sample["tells_day"]})}
    content = {"counts": counts, "by_dataset": dict(Counter(sample["dataset"] for sample in every)),
               "rejects": kinds_of(rejects),
               "template_says": [{"words": words, "rows": rows} for words, rows in own_words(every)]}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return counts


def tokens_per_picture(samples: list[dict]) -> int:
    """The average of those samples that have pictures and no other media, 0 where none has."""
    seen = [sample for sample in samples if {medium["kind"] for medium in sample["media"]} == {"image"}]
    pictures = sum(len(sample["media"]) for sample in seen)
    return round(sum(sample["media_tokens"] for sample in seen) / pictures) if pictures else 0


def row_of(sample: dict) -> tuple[str, int]:
    """The row that a sample was made of: several may be of one."""
    return sample["dataset"], sample["row"]


def own_words(samples: list[dict]) -> list[tuple[str, int]]:
    """[(what the chat template says by itself, in how many rows)], the most frequent first."""
    said = {(row_of(sample), words) for sample in samples for words in sample["put_in"]}
    numbers = Counter(words for _, words in said)
    return sorted(numbers.items(), key=lambda item: (-item[1], item[0]))[:MOST_WORDS]


def show_own_words(samples: list[dict]) -> None:
    """Print what the chat template says by itself: no row holds it, and the model reads it all the same."""
    if found := own_words(samples):
        terminal.table("what the chat template says by itself", ["rows", "words"],
                       [[rows, shortened(words)] for words, rows in found])


def kinds_of(rejects: list[dict]) -> list[dict]:
    """[{rows, such_as, fix}], the most frequent kind first: what is mended in one way is of one kind."""
    first = {reject["fix"]: f"{reject['where']}: {reject['reason']}" for reject in reversed(rejects)}
    numbers = Counter(reject["fix"] for reject in rejects)
    return [{"rows": number, "such_as": first[fix], "fix": fix} for fix, number in numbers.most_common()]


def write_previews(folder: Path, encoder: Encoder, train: list[dict], counts: dict[str, int]) -> None:
    """preview.jsonl (the first rows as tensors) and preview.html (the same to look at, with histograms)."""
    rows = [preview_row(encoder, sample) for sample in train[:PREVIEW_ROWS]]
    write_lines(folder / "preview.jsonl", rows)
    media_tokens = tokenizer_of(encoder.processor).convert_ids_to_tokens(list(encoder.never_trained))
    cards = [sample_card(sample, row, media_tokens) for sample, row in zip(train, rows)]
    words = {"train_samples": "samples to train on", "held_out_samples": "held out",
             "rejected_rows": "rows rejected", "supervised_tokens": "trained tokens"}
    lengths = [report.histogram([sample[f"{name}_tokens"] for sample in train], f"{word} per sample")
               for name, word in (("input", "tokens"), ("supervised", "trained tokens"))]
    page = report.page("What the model will learn", [
        ("In short", report.tiles([(counts[name], word) for name, word in words.items()])),
        ("Samples", report.TOKEN_KEY + "".join(cards)),
        ("Lengths", "".join(lengths)),
    ], subtitle=f"The first {len(rows)} samples as training sees them.")
    (folder / "preview.html").write_text(page, encoding="utf-8")


def preview_row(encoder: Encoder, sample: dict) -> dict:
    """One sample exactly as training will see it, as plain data."""
    encoded = encoder(sample)
    ids, labels = (encoded[name][0].tolist() for name in ("input_ids", "labels"))
    return {"sample_id": sample["sample_id"], "row": sample["row"], "dataset": sample["dataset"],
            "input_ids": ids, "labels": labels,
            "tokens": tokenizer_of(encoder.processor).convert_ids_to_tokens(ids),
            "images": len(sample["media"]), "media_tokens": sample["media_tokens"]}


def sample_card(sample: dict, row: dict, media_tokens: list[str]) -> str:
    """A sample on the page: its counts, its media, every token."""
    pictures = "".join(report.picture(poster(medium), f"{medium['kind']} {number} of {row['sample_id']}")
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
        terminal.say(f"{sample['sample_id']}: {sample['input_tokens']} tokens, {sample['media_tokens']} of "
                     f"them media, {sample['supervised_tokens']} trained (green)", "bold")
        terminal.console.print(text)
