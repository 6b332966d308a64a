"""02_data: turn rows of conversations and pictures into samples, and show what the model will learn from them.

    python 02_data.py runs/demo [--show 3] [--force]

Reads:  01_config/config.json; the data files and pictures that the recipe names; the base model's processor and template.
Writes: 02_data/train, eval (samples, Arrow), processor/, report.json, rejects.jsonl, preview.html, preview.jsonl.
Source: labels follow the chat template's render; see lib/chat.py.
Fork me to: accept another shape of row (lib/sources.py:normalise), or train other words (lib/chat.py:conversations).
"""
import json
import random
from collections import Counter
from pathlib import Path

from rich.text import Text

from lib import chat, media, registry, report, sources, stage, terminal
from lib.chat import IGNORE_INDEX, Encoder, Template, load_processor, tokenizer_of
from lib.sources import RowError
from lib.stage import StageError

PREVIEW_ROWS = 16


def main(argv=None):
    """Measure every row once, keep what can be learnt from, list the rest with a reason, and show it."""
    parser = stage.arguments(__doc__)
    parser.add_argument("--show", type=int, metavar="N", help="only print N samples, trained tokens coloured")
    args = parser.parse_args(argv)
    run = stage.resolve_run(args.run)
    if args.show is not None:
        return show(stage.view("02_data", run, own=True), args.show)

    # 1. Start the stage, unless its outputs are still true.
    work = stage.begin(stage.decide("02_data", run, force=args.force))
    if work is None:
        return
    config = work.config
    # 2. Load the processor, which brings tokenizer, chat template and image sizes, and save it as training will use it.
    processor = recipe_processor(config, work)
    family = registry.family_of(model_type(config))
    encoder = Encoder.of(processor, family)
    encoder.save(work.path / "processor")
    # 3. Read, render and measure every row; the bad ones are listed, not dropped on the way.
    template = Template(processor)
    rejects: list[dict] = []
    train = measure(config.datasets, work, template, encoder, config.sequence_len, rejects)
    held_out = measure(config.test_datasets or [], work, template, encoder, config.sequence_len, rejects)
    write_lines(work.path / "rejects.jsonl", rejects)
    stop_at_rejects(config, work, rejects)
    # 4. Split off the held-out rows, if no file of their own was named.
    if config.val_set_size:
        train, held_out = split(train, config.val_set_size, config.seed)
    if not train:
        raise StageError("datasets: no row is left to train on", f"see {work.path / 'rejects.jsonl'} for the reasons")
    # 5. Write the samples, and pages on which a person sees what will be learnt.
    save_samples(train, work.path / "train")
    save_samples(held_out, work.path / "eval")
    summary = summarise(config, train, held_out, rejects, template)
    (work.path / "report.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    write_previews(work.path, encoder, train, summary)
    terminal.table("02_data", ["what", "count"], [[key.replace("_", " "), value] for key, value in summary["counts"].items()])
    show_samples(encoder, train[:1])
    work.finish()


# ------------------------------------------------------------------------------------------------ the processor

def recipe_processor(config, work):
    """The base model's processor with the recipe's options and chat template."""
    if Path(config.base_model).is_dir():
        for path in sorted(Path(config.base_model).glob("*.[jm]*")):   # *.json, *.jinja, *.model; not the weights
            work.uses(path)
    options = {"revision": config.revision, "trust_remote_code": config.trust_remote_code, **config.processor_kwargs}
    processor = load_processor(config.base_model, kind=config.processor_type, **options)
    if config.chat_template and config.chat_template != "tokenizer_default":
        given = config.chat_template
        if given.endswith(".jinja"):
            work.uses(given)
            given = Path(given).read_text(encoding="utf-8")
        processor.chat_template = tokenizer_of(processor).chat_template = given
    return processor


def model_type(config) -> str:
    """The base model's type, by which the registry knows its family."""
    from lib.model import load_config
    return load_config(config.base_model, config.revision, config.trust_remote_code).model_type


# ------------------------------------------------------------------------------------------------ rows to samples

def measure(specs, work, template, encoder, sequence_len, rejects) -> list[dict]:
    """The samples of some data sets, measured by encoding them; what can't be used is added to `rejects`."""
    samples = []
    for spec in specs:
        for path in sources.files(spec):
            work.uses(path)
        rows = list(sources.rows(spec))
        with terminal.Progress(f"measuring {spec['path']}", len(rows)) as progress:
            for number, row in rows:
                try:
                    samples += samples_of(number, row, spec, work, template, encoder, sequence_len)
                except RowError as error:
                    rejects.append({"dataset": spec["path"], "row": number, "reason": error.reason, "fix": error.fix})
                progress.update(number + 1, kept=str(len(samples)), rejected=str(len(rejects)))
    return samples


def samples_of(number, row, spec, work, template, encoder, sequence_len) -> list[dict]:
    """The samples of one row (a template that rewrites earlier turns makes several), or a RowError."""
    messages, pictures = sources.normalise(row, spec)
    try:
        found = [media.read_medium(picture, sources.root(spec)) for picture in pictures]
    except media.MediaError as error:
        raise RowError(str(error), "replace that file, or remove the row") from None
    for medium in found:
        if medium["path"] is not None:
            work.uses(medium["path"], sha256=medium["sha256"])
    samples = []
    for conversation in template.conversations(messages):
        sample = {"sample_id": f"{Path(spec['path']).stem}-{number}" + (f".{len(samples)}" if samples else ""),
                  "row": number, "dataset": spec["path"], "messages": json.dumps(messages, ensure_ascii=False),
                  "text": conversation.text, "spans": [{"start": s, "end": e} for s, e in conversation.spans],
                  "media": found[:media_count(conversation.text, found, encoder)]}
        samples.append(sample | lengths(encoder(sample), encoder, sequence_len))
    return samples


def media_count(text: str, found: list, encoder: Encoder) -> int:
    """How many of the row's pictures this text shows: a sample that ends at an earlier turn may hold fewer."""
    token = getattr(encoder.processor, "image_token", None)
    count = text.count(token) if token else 0
    if found and count == 0:
        raise RowError(f"{len(found)} pictures, but the chat template puts no {token or 'picture'} token in its render",
                       "give a chat_template that renders pictures, or a base_model that takes them")
    return count


def lengths(encoded: dict, encoder: Encoder, sequence_len: int) -> dict:
    """The sample's token counts; a RowError if it is too long or teaches nothing. Media are never cut."""
    ids, labels = encoded["input_ids"][0], encoded["labels"][0]
    counts = {"input_tokens": len(ids), "supervised_tokens": int((labels[1:] != IGNORE_INDEX).sum()),
              "media_tokens": sum(int((ids == media_id).sum()) for media_id in encoder.never_trained)}
    if counts["input_tokens"] > sequence_len:
        raise RowError(f"{len(ids)} tokens, over sequence_len {sequence_len}",
                       "raise sequence_len, shorten the row, or use smaller pictures")
    if counts["supervised_tokens"] == 0:
        raise RowError("no token to learn: the assistant's turns are empty", "write what the assistant should answer")
    return counts


def stop_at_rejects(config, work, rejects) -> None:
    """With on_bad_row: error, stop here and keep the list; every row has been looked at by now."""
    if not rejects:
        return
    reasons = Counter(reject["reason"].split(":")[-1].strip()[:70] for reject in rejects)
    terminal.table(f"{len(rejects)} rows can't be used", ["reason", "rows"], [[r, n] for r, n in reasons.most_common(8)])
    if config.on_bad_row == "error":
        first = rejects[0]
        raise StageError(f"{first['dataset']}: row {first['row']}: {first['reason']}"
                         + (f" (and {len(rejects) - 1} more bad rows)" if len(rejects) > 1 else ""),
                         f"{first['fix']}; all are in {work.path / 'rejects.jsonl'}; or on_bad_row: skip")


def split(samples: list[dict], size: float, seed: int) -> tuple[list[dict], list[dict]]:
    """(train, held out) by a seeded choice of rows (size >= 1) or a share (< 1); rows that share a picture stay together."""
    groups: dict[str, list[dict]] = {}
    owner: dict[str, str] = {}
    for sample in samples:
        keys = [medium["sha256"] for medium in sample["media"]] or [f"{sample['dataset']}#{sample['row']}"]
        name = next((owner[key] for key in keys if key in owner), keys[0])
        for key in keys:
            if owner.get(key, name) != name:                       # this sample ties two groups together
                joined = owner[key]
                groups[name] += groups.pop(joined)
                owner.update({k: name for k, v in owner.items() if v == joined})
            owner[key] = name
        groups.setdefault(name, []).append(sample)
    wanted = size if size >= 1 else round(size * len(samples))
    names = list(groups)
    random.Random(seed).shuffle(names)
    held_out: set[str] = set()
    count = 0
    for name in names:
        if count >= wanted:
            break
        held_out.add(name)
        count += len(groups[name])
    chosen = {id(sample) for name in held_out for sample in groups[name]}
    return [s for s in samples if id(s) not in chosen], [s for s in samples if id(s) in chosen]


# ------------------------------------------------------------------------------------------------ writing and showing

def save_samples(samples: list[dict], folder: Path) -> None:
    """One Arrow folder for datasets.load_from_disk, byte for byte the same for the same samples."""
    import datasets
    from datasets import Features, List, Value
    datasets.disable_progress_bars()
    medium = {"kind": Value("string"), "path": Value("string"), "bytes": Value("binary"), "sha256": Value("string"),
              "width": Value("int32"), "height": Value("int32"), "seconds": Value("float32")}
    features = Features({
        "sample_id": Value("string"), "row": Value("int64"), "dataset": Value("string"), "messages": Value("string"),
        "text": Value("string"), "spans": List({"start": Value("int32"), "end": Value("int32")}), "media": List(medium),
        "input_tokens": Value("int32"), "supervised_tokens": Value("int32"), "media_tokens": Value("int32")})
    table = datasets.Dataset.from_list(samples, features=features)
    table._fingerprint = "samples"                              # the library's own is random; the ledger hashes this file
    table.save_to_disk(str(folder))


def summarise(config, train, held_out, rejects, template) -> dict:
    """report.json: counts and lengths, for people and machines."""
    every = train + held_out
    reasons = Counter(reject["reason"] for reject in rejects)
    return {
        "counts": {"train_samples": len(train), "held_out_samples": len(held_out), "rejected_rows": len(rejects),
                   "input_tokens": sum(s["input_tokens"] for s in every),
                   "media_tokens": sum(s["media_tokens"] for s in every),
                   "supervised_tokens": sum(s["supervised_tokens"] for s in every),
                   "longest_sample_tokens": max(s["input_tokens"] for s in every),
                   "replies_ended_with_eos_by_the_kit": template.without_end},
        "sequence_len": config.sequence_len,
        "by_dataset": dict(Counter(s["dataset"] for s in every)),
        "rejected_by_reason": dict(reasons.most_common()),
    }


def write_lines(path: Path, rows: list[dict]) -> None:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def preview_row(encoder: Encoder, sample: dict) -> dict:
    """One sample exactly as training will see it."""
    encoded = encoder(sample)
    ids = encoded["input_ids"][0].tolist()
    return {"sample_id": sample["sample_id"], "row": sample["row"], "dataset": sample["dataset"],
            "input_ids": ids, "labels": encoded["labels"][0].tolist(),
            "tokens": tokenizer_of(encoder.processor).convert_ids_to_tokens(ids),
            "images": len(sample["media"]), "media_tokens": sample["media_tokens"]}


def write_previews(folder: Path, encoder: Encoder, train: list[dict], summary: dict) -> None:
    """preview.jsonl (the first rows as tensors) and preview.html (the same to look at, with histograms)."""
    rows = [preview_row(encoder, sample) for sample in train[:PREVIEW_ROWS]]
    write_lines(folder / "preview.jsonl", rows)
    names = tokenizer_of(encoder.processor).convert_ids_to_tokens(list(encoder.never_trained))
    cards = []
    for sample, row in zip(train, rows):
        pictures = "".join(report.picture(media.open_image(m), f"picture {n + 1} of {row['sample_id']}")
                           for n, m in enumerate(sample["media"]))
        facts = [(f"row {row['row']}", row["dataset"]), ("tokens", len(row["input_ids"])),
                 ("trained", sample["supervised_tokens"]), ("media", row["media_tokens"])]
        cards.append(report.sample_card(row["sample_id"], pictures,
                                        report.token_view(row["tokens"], row["input_ids"], row["labels"], names), facts))
    counts = summary["counts"]
    page = report.page("What the model will learn", [
        ("In short", report.tiles([(counts["train_samples"], "samples to train on"),
                                   (counts["held_out_samples"], "held out"), (counts["rejected_rows"], "rows rejected"),
                                   (counts["supervised_tokens"], "trained tokens")])),
        ("Samples", "".join(cards)),
        ("Lengths", report.histogram([s["input_tokens"] for s in train], "tokens per sample")
         + report.histogram([s["supervised_tokens"] for s in train], "trained tokens per sample")),
    ], subtitle=f"The first {len(rows)} samples as training sees them. Trained tokens are marked.")
    (folder / "preview.html").write_text(page, encoding="utf-8")


def show(work, count: int) -> None:
    """The view `--show N`: print samples of a finished stage."""
    import datasets
    encoder = Encoder.load(work.path / "processor", work.config.trust_remote_code)
    show_samples(encoder, list(datasets.load_from_disk(str(work.path / "train")).select(range(count))))


def show_samples(encoder: Encoder, samples: list[dict]) -> None:
    """Print samples with their trained tokens in green; runs of one media token are folded."""
    for sample in samples:
        row, text = preview_row(encoder, sample), Text()
        tokenizer, last = tokenizer_of(encoder.processor), None
        for index, label in zip(row["input_ids"], row["labels"]):
            if index in encoder.never_trained and index == last:
                continue
            last = index
            style = "bold green" if label != IGNORE_INDEX else "dim" if index in encoder.never_trained else ""
            text.append(tokenizer.decode([index]), style)
        terminal.say(f"{row['sample_id']}: {len(row['input_ids'])} tokens, the green ones are trained", "bold")
        terminal.console.print(text)


if __name__ == "__main__":
    stage.run_script(main)
