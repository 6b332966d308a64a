"""02_data: turn rows of conversations, pictures, sounds and clips into samples, and show what will be learnt.

    python 02_data.py runs/demo [--force]
    python 02_data.py runs/demo --show 3     # prints three samples, what is trained in green

Reads:  01_config/config.json; the data files and their media; the base model's processor and template.
Writes: 02_data/train, eval (samples, Arrow), processor/, report.json, rejects.jsonl, preview.html and .jsonl.
Source: labels follow the chat template's own render, see lib/text/template.py.
Fork me to: take another shape of row (lib/data/shapes.py), train other words (lib/text/template.py), or do
        something else with rows that are too long (lib/data/rows.py).
"""
import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow

from lib import registry
from lib.config.paths import OWN_TEMPLATE
from lib.data import samples, sources, summary
from lib.data.measuring import measured
from lib.data.rows import Rows
from lib.media.budget import set_token_budget
from lib.media.resolution import refuse_unbounded, set_budget
from lib.models import origin
from lib.models.plan import load_config
from lib.pages import preview
from lib.run import stage, terminal
from lib.run.errors import StageError
from lib.run.ledger import read_json
from lib.text.chat import Encoder
from lib.text.processor import complete, load_processor, stop_tokens, tokenizer_of
from lib.text.template import Template
from lib.text.vocabulary import add_tokens

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
    templates, encoder = load_templates_and_encoder(work)
    # 3. Read, render and measure every row; the bad ones are listed, and none is dropped without a word.
    specs = config.datasets + (config.test_datasets or [])
    names, rejects = samples.names_of(specs), summary.Rejects(work.path / "rejects.jsonl")
    readers = [Rows.of(spec, name, work, templates[template_of(spec, config)], encoder)
               for spec, name in zip(specs, names)]
    tables = [samples.mapped(measure(reader, work, rejects), work.path / f"{reader.name}.arrow")
              for reader in readers]
    table, ends = pyarrow.concat_tables(tables), np.cumsum([len(each) for each in tables])
    train, held_out = np.split(np.arange(len(table)), [ends[len(config.datasets) - 1]])
    stop_at_rejects(work, rejects, kept=len(train))
    # 4. Split off the held-out samples, if no file of their own was named.
    if config.val_set_size:
        train, held_out = samples.hold_out(table, config.val_set_size, config.seed)
    # 5. Give each data set its share of an epoch.
    parts = np.split(train, np.searchsorted(train, ends[:len(config.datasets) - 1]))
    train = samples.weighted(parts, names, specs, config.seed)
    if both := samples.trained_too(table, train, held_out):
        terminal.warn(f"{both} of {terminal.counted(len(held_out), 'held-out sample')} have the text and "
                      "media of training samples: what is measured on them says nothing of other rows")
    # 6. Write the samples, and pages on which a person sees what will be learnt.
    shown, shown_held_out = (samples.save(table, places, work.path / name)
                             for places, name in ((train, "train"), (held_out, "eval")))
    report = summary.write_report(work.path / "report.json", table, train, held_out, rejects)
    preview.write_previews(work.path, encoder, shown, shown_held_out, report, config)
    summary.say(report)
    summary.say_tokens_per_picture(table, np.concatenate([train, held_out]), resized=any(
        (config.image_size, config.image_max_pixels, config.image_min_pixels, config.max_image_tokens)))
    preview.show(shown.take(1), encoder.processor)
    work.finish(volatile=("preview.html",))


def show(work, number: int) -> None:
    """Print the first samples of a finished stage: the view `--show N`."""
    import datasets
    encoder = Encoder.load(work.path / "processor", work.config.trust_remote_code)
    train = datasets.load_from_disk(str(work.path / "train"))
    summary.say(read_json(work.path / "report.json"))
    preview.show_extremes(train)
    preview.show(train.take(min(number, len(train))), encoder.processor)


# ---- the processor ---------------------------------------------------------------------------------------


def load_templates_and_encoder(work) -> tuple[dict[str, Template], Encoder]:
    """({chat template that the recipe names: Template}, the base model's Encoder with the recipe's options).

    The encoder is saved in 02_data/processor, with the first data set's template, and loaded from there, as
    every later stage loads it.
    """
    config, base_model = work.config, Path(work.config.base_model)
    if base_model.is_dir():
        for path in sorted(base_model.iterdir()):
            if path.suffix in PROCESSOR_FILES:
                work.uses(path)
    options = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    if config.trust_remote_code:
        origin.say_code(config.base_model, config.revision)
    model_config = load_config(config.base_model, **options)
    family = registry.family_of(model_config.model_type)
    registry.refuse_missing_packages(family)
    options |= config.processor_kwargs
    processor = complete(load_processor(config.base_model, config.processor_type, **options), family)
    if new := add_tokens(processor, config):
        terminal.say(f"{terminal.counted(len(new), 'new token')}, from id {new[0]} on")
    own, specs = processor.chat_template, config.datasets + (config.test_datasets or [])
    named = {template_of(spec, config) for spec in specs}
    texts = {given: jinja_of(given, own, family, work) for given in named}
    first = template_of(config.datasets[0], config)
    if first != OWN_TEMPLATE:
        processor.chat_template = tokenizer_of(processor).chat_template = texts[first]
    if len(texts) > 1:
        terminal.say(f"{len(texts)} chat templates: what is saved, asked and served has the first data set's")
    set_budget(processor, family, config.image_min_pixels, config.image_max_pixels)
    set_token_budget(processor, family, config.max_image_tokens)
    if config.excess_length_strategy == "shrink_media":
        refuse_unbounded(processor, family, "excess_length_strategy")
    width, height = config.image_size if isinstance(config.image_size, list) else 2 * [config.image_size]
    sampling = {"video_fps": config.video_fps, "video_max_frames": config.video_max_frames,
                "image_width": width, "image_height": height,
                "image_resize_algorithm": config.image_resize_algorithm}
    lacks = registry.kinds_without_tower(model_config)
    Encoder.of(processor, family, lacks, **sampling).save(work.path / "processor")
    encoder = Encoder.load(work.path / "processor", config.trust_remote_code)
    stops = stop_tokens(config.base_model, processor, config.revision)
    templates = {}
    for given, text in texts.items():
        other = copy.copy(encoder.processor)
        other.chat_template = text
        templates[given] = Template(other, stops, config.template_date)
    return templates, encoder


def template_of(spec: dict, config) -> str:
    """The chat template that an entry of `datasets` names: its own, or the recipe's for all."""
    return spec["chat_template"] or config.chat_template or OWN_TEMPLATE


def jinja_of(given: str, own: str, family: registry.Family, work) -> str:
    """The Jinja of a chat template that is given as Jinja, as a file, or by a family's name.

    A name means the checkpoint's `own`, if it is of that family; StageError if it isn't.
    """
    if given == OWN_TEMPLATE:
        return own
    if given in registry.template_names():
        registry.refuse_foreign_template(given, family)
        terminal.say(f"chat_template: {given} means the checkpoint's own")
        return own
    if "{{" in given or "{%" in given:
        return given
    work.uses(given)
    return Path(given).read_text(encoding="utf-8")


# ---- rows to samples -------------------------------------------------------------------------------------


def measure(reader: Rows, work, rejects: summary.Rejects) -> Iterator[pyarrow.RecordBatch]:
    """Yield the measured samples of a data set in batches; rows that can't be used are added to `rejects`."""
    path, kept, too_long = reader.spec["path"], 0, 0
    for file in sources.files_of(reader.spec):
        work.uses(file)
    rows = sources.shard(sources.rows(reader.spec), reader.spec, work.config.seed)
    if not len(rows):
        raise StageError(f"datasets: {path}: holds no row", "name a file with rows, or remove it")
    with terminal.Progress(f"measuring {path}", len(rows)) as progress:
        for part in measured(reader, rows, work.config.dataset_processes):
            for file, sha256 in part.files:
                work.uses(file, sha256)
            kept += len(part.samples)
            too_long += sum(reject["too_long"] for reject in part.rejects)
            rejects.add(part.rejects)
            progress.update(progress.done + part.rows, kept=str(kept), rejected=str(rejects.number.total()))
            yield part.samples
    summary.warn_of_length(path, too_long, len(rows))


def stop_at_rejects(work, rejects: summary.Rejects, kept: int) -> None:
    """Print which rows can't be used; raise StageError where the recipe says so, or no sample is left."""
    rejects.file.close()
    if rejects.kinds:
        title = f"{terminal.counted(rejects.number.total(), 'row')} can't be used"
        terminal.table(title, ["rows", "such as", "fix"],
                       [list(kind.values()) for kind in rejects.listed()[:8]])
    stops = {True: work.config.excess_length_strategy == "error", False: work.config.on_bad_row == "error"}
    bad = [too_long for too_long in rejects.first if stops[too_long] or not kept]
    if bad:
        first, others = rejects.first[bad[0]], sum(rejects.number[too_long] for too_long in bad) - 1
        more = f" (and {terminal.counted(others, 'more bad row')})" if others else ""
        listed = f"; all are in {work.path / 'rejects.jsonl'}" if others else ""
        knob = "excess_length_strategy=drop" if first["too_long"] else "on_bad_row=skip"
        without = f"; or go without: {knob}" if kept else ""
        raise StageError(f"{first['where']}: {first['reason']}{more}", f"{first['fix']}{listed}{without}")


if __name__ == "__main__":
    stage.run_script(main)
