"""listing: tables of knobs: those that a recipe sets, by the stage that reads them, or all that there are."""
from dataclasses import asdict

from lib.config.knobs import REQUIRED, in_words, knobs_of
from lib.config.recipe import Entry, written
from lib.config.rules import WARNINGS
from lib.run import terminal
from lib.run.ledger import STAGES


def show(k, given: dict[str, Entry], notes: list, dataset: type) -> None:
    """Print what a settled Recipe's knobs are, by stage, then what is odd about it.

    dataset: the schema of the entries of `datasets`.
    """
    known, values = knobs_of(type(k)), asdict(k)
    for stem in (*STAGES[1:], STAGES[0]):
        rows = []
        for name, (_, meta) in known.items():
            if name in given and meta["stages"][0] == stem:      # listed once, where it is read first
                later = " ".join(other[:2] for other in meta["stages"][1:])
                value = written(without_defaults(values[name], dataset))
                rows.append([name, value, given[name].place(), later])
        if rows:
            terminal.table(stem, ["knob", "value", "given by", "also read by"], rows)
    terminal.say(f"{len(known) - len(given)} more knobs are as by default: python 01_config.py --knobs")
    for name, why in notes:
        terminal.say(f"{name}: {why}")
    idle = [name for name in given if name.startswith(("lora_", "peft_")) and not k.adapter]
    if idle:
        terminal.warn(f"{', '.join(idle)}: without effect, since adapter is empty (full fine-tuning)")
    for seldom_works, why in WARNINGS:
        if seldom_works(k):
            terminal.warn(why.format(**values))


def without_defaults(value, dataset: type):
    """A knob's value as a recipe may write it: entries of `datasets` without what they leave open."""
    default = {name: meta["default"] for name, (_, meta) in knobs_of(dataset).items()}
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        return value
    return [{name: each for name, each in entry.items() if each != default.get(name, ...)} for entry in value]


def show_knobs(schema: type) -> None:
    """Print every knob with its default, what it takes, who reads it and why."""
    rows = []
    for name, (kind, meta) in knobs_of(schema).items():
        default = "required" if meta["default"] is REQUIRED else written(meta["default"])
        numbers = " ".join(stem[:2] for stem in meta["stages"])
        rows.append([name, default, in_words(kind, meta), meta["unit"], numbers, meta["why"]])
    terminal.table("knobs", ["knob", "default", "takes", "unit", "read by", "why"], rows)
