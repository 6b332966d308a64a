"""02_data: turn rows of conversations, pictures, sounds and clips into samples, and show what will be learnt.

    python 02_data.py runs/demo [--force]
    python 02_data.py runs/demo --show 3     # prints three samples, what is trained in green

Reads:  01_config/config.json; the data files and their media; the base model's processor and template.
Writes: 02_data/train, eval (samples, Arrow), processor/, report.json, rejects.jsonl, preview.html and .jsonl.
Source: labels follow the chat template's own render, see lib/template.py.
Fork me to: accept another shape of row (lib/messages.py:normalise), or train other words (lib/template.py).
"""
import json
from pathlib import Path

from lib import media, preview, registry, samples, sources, stage, terminal
from lib.chat import IGNORE_INDEX, Encoder
from lib.messages import NOUNS, RowError, count, normalise
from lib.plan import load_config
from lib.processor import complete, load_processor, stop_tokens, tokenizer_of
from lib.stage import StageError
from lib.template import Template

PROCESSOR_FILES = (".json", ".jinja", ".model", ".txt", ".py")    # of a base model's folder; not the weights


def main(argv=None):
    """Measure every row once, keep what can be learnt from, list the rest with a reason, and show it."""
    parser = stage.arguments(__doc__)
    parser.add_argument("--show", type=int, metavar="N", help="only print N samples")
    args = parser.parse_args(argv)
    run = stage.resolve_run(args.run)
    if args.show is not None:
        return show(stage.view("02_data", run, own=True), args.show)

    # 1. Start the stage, unless its outputs are still true.
    work = stage.begin(stage.decide("02_data", run, force=args.force))
    if work is None:
        return
    config = work.config
    # 2. Load the processor (tokenizer, chat template, picture sizes), save it, go on with what was saved.
    template, encoder = load_template_and_encoder(work)
    # 3. Read, render and measure every row; the bad ones are listed, and none is dropped without a word.
    specs, rejects = config.datasets + (config.test_datasets or []), []
    found = [measure(spec, name, work, template, encoder, rejects)
             for spec, name in zip(specs, samples.names_of(specs))]
    train = sum(found[:len(config.datasets)], [])
    held_out = sum(found[len(config.datasets):], [])
    samples.write_lines(work.path / "rejects.jsonl", rejects)
    if rejects:
        stop_at_rejects(work, rejects, kept=len(train))
    # 4. Split off the held-out samples, if no file of their own was named.
    if config.val_set_size:
        train, held_out = samples.hold_out(train, config.val_set_size, config.seed)
    # 5. Write the samples, and pages on which a person sees what will be learnt.
    samples.save(train, work.path / "train")
    samples.save(held_out, work.path / "eval")
    counts = preview.write_report(work.path / "report.json", train, held_out, rejects)
    preview.write_previews(work.path, encoder, train, counts)
    terminal.table("02_data", ["what", "count"], [[name.replace("_", " "), n] for name, n in counts.items()])
    preview.show_own_words(train + held_out)
    preview.show(train[:1], encoder.processor)
    work.finish()


def show(work, number: int) -> None:
    """The view `--show N`: the first samples of a finished stage."""
    import datasets
    encoder = Encoder.load(work.path / "processor", work.config.trust_remote_code)
    train = datasets.load_from_disk(str(work.path / "train"))
    preview.show(list(train.select(range(min(number, len(train))))), encoder.processor)


# ---- the processor ---------------------------------------------------------------------------------------


def load_template_and_encoder(work) -> tuple[Template, Encoder]:
    """The base model's, with the recipe's options, as 02_data/processor gives them to every later stage."""
    config, base_model = work.config, Path(work.config.base_model)
    if base_model.is_dir():
        for path in sorted(base_model.iterdir()):
            if path.suffix in PROCESSOR_FILES:
                work.uses(path)
    options = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    model_config = load_config(config.base_model, **options)
    family = registry.family_of(model_config.model_type)
    registry.require_packages(family)
    options |= config.processor_kwargs
    processor = complete(load_processor(config.base_model, config.processor_type, **options), family)
    if config.chat_template in registry.template_names():
        registry.check_template_name(config.chat_template, family)
        terminal.say(f"chat_template: {config.chat_template} means the checkpoint's own")
    elif config.chat_template:
        processor.chat_template = tokenizer_of(processor).chat_template = given_template(work)
    clips = {"video_fps": config.video_fps, "video_max_frames": config.video_max_frames}
    lacks = registry.kinds_without_tower(model_config)
    Encoder.of(processor, family, lacks, **clips).save(work.path / "processor")
    encoder = Encoder.load(work.path / "processor", config.trust_remote_code)
    stops = stop_tokens(config.base_model, processor, config.revision)
    return Template(encoder.processor, stops, config.template_date), encoder


def given_template(work) -> str:
    """The recipe's chat template: the Jinja that it holds, or that of the file that it names."""
    given = work.config.chat_template
    if "{{" in given or "{%" in given:
        return given
    work.uses(given)
    return Path(given).read_text(encoding="utf-8")


# ---- rows to samples -------------------------------------------------------------------------------------


def measure(spec: dict, name: str, work, template: Template, encoder: Encoder, rejects: list) -> list[dict]:
    """The samples of a data set, measured by encoding them; what can't be used is added to `rejects`."""
    path, found = spec["path"], []
    if not Path(path).exists():
        raise StageError(f"datasets: {path}: no such file or folder",
                         "correct the path (a relative one starts from the current folder)")
    work.uses(path)
    rows = list(sources.rows(spec))
    if not rows:
        raise StageError(f"datasets: {path}: holds no row", "name a file with rows, or remove it")
    with terminal.Progress(f"measuring {path}", len(rows)) as progress:
        for number, where, row in rows:
            try:
                found += samples_of(row, number, f"{name}-{number}", spec, work, template, encoder)
            except RowError as error:
                rejects.append({"dataset": path, "row": number, "where": where, "reason": error.reason,
                                "fix": error.fix})
            progress.update(number + 1, kept=str(len(found)), rejected=str(len(rejects)))
    return found


def samples_of(row, number: int, name: str, spec: dict, work, template: Template, encoder: Encoder) -> list:
    """The samples of one row (a template that rewrites earlier turns makes several), or a RowError."""
    if isinstance(row, RowError):
        raise row
    messages, sources_of_media = normalise(row, spec["field_messages"])
    records, opened = read_media(messages, sources_of_media, sources.root(spec), work, encoder.sampling)
    found = []
    for conversation in template.conversations(messages):
        encoded = encode(conversation, opened[:conversation.media], encoder)
        found.append({"sample_id": f"{name}.{len(found)}" if found else name, "row": number,
                      "dataset": spec["path"], "messages": json.dumps(messages, ensure_ascii=False),
                      "text": conversation.text,
                      "spans": [{"start": start, "end": end} for start, end in conversation.spans],
                      "media": records[:conversation.media], "ends_added": conversation.ends_added,
                      "put_in": conversation.put_in, "tells_day": conversation.tells_day,
                      **lengths(encoded, encoder, work.config.sequence_len)})
    return found


def read_media(messages: list[dict], given: list, root: Path, work, sampling) -> tuple[list[dict], list]:
    """(media records, decoded media), or a RowError. Their files are inputs of this stage, good or bad."""
    kinds = [part["type"] for message in messages for part in message["content"] if part["type"] != "text"]
    records, opened = [], []
    for kind, source in zip(kinds, given, strict=True):
        try:
            record, medium = media.read_medium(source, root, kind, sampling)
        except media.MediaError as error:
            if isinstance(error.name, Path) and error.name.is_file():
                work.uses(error.name)
            raise RowError(str(error), f"replace that {NOUNS[kind]}, or remove the row") from None
        for path in media.files_of(record):
            work.uses(path, sha256=record["sha256"] if record["bytes"] is None else None)
        records.append(record)
        opened.append(medium)
    return records, opened


def encode(conversation, opened: list, encoder: Encoder) -> dict:
    """The tensors of a conversation; a RowError where the processor refuses its media."""
    try:
        return encoder.encode(conversation.text, conversation.spans, opened)
    except RowError:
        raise
    except ValueError as error:
        pictures = [medium for medium in opened if media.kind_of(medium) == "image"]
        sizes = ", ".join(f"{picture.width}x{picture.height}" for picture in pictures)
        raise RowError(f"the processor refuses this row: {error} (pictures: {sizes or 'none'})",
                       "change the picture's size, or remove the row") from None


def lengths(encoded: dict, encoder: Encoder, sequence_len: int) -> dict[str, int]:
    """The sample's token counts; a RowError if it is too long or teaches nothing. Media are never cut."""
    ids, labels = encoded["input_ids"][0], encoded["labels"][0]                  # [T]
    if len(ids) > sequence_len:
        raise RowError(f"{count(len(ids), 'token')}, over sequence_len {sequence_len}",
                       "raise sequence_len, shorten the row, or use smaller pictures")
    supervised_tokens = int((labels[1:] != IGNORE_INDEX).sum())                  # no token predicts the first
    if supervised_tokens == 0:
        raise RowError("nothing to learn: no token is trained", "write what the assistant should answer")
    return {"input_tokens": len(ids), "supervised_tokens": supervised_tokens,
            "media_tokens": sum(int((ids == media_id).sum()) for media_id in encoder.never_trained)}


def stop_at_rejects(work, rejects: list[dict], kept: int) -> None:
    """Show what can't be used; with on_bad_row: error, or nothing left, stop. All rows were looked at."""
    kinds = [[kind["rows"], kind["such_as"], kind["fix"]] for kind in preview.kinds_of(rejects)[:8]]
    terminal.table(f"{count(len(rejects), 'row')} can't be used", ["rows", "such as", "fix"], kinds)
    if work.config.on_bad_row == "error" or not kept:
        first, others = rejects[0], len(rejects) - 1
        more = f" (and {count(others, 'more bad row')})" if others else ""
        listed = f"; all are in {work.path / 'rejects.jsonl'}" if others else ""
        without = "; or go without: on_bad_row=skip" if kept else ""
        raise StageError(f"{first['where']}: {first['reason']}{more}", f"{first['fix']}{listed}{without}")


if __name__ == "__main__":
    stage.run_script(main)
