"""Knobs: how a schema's field takes a recipe's value, by its declared type, its limits and its own check.

A schema is a dataclass whose fields are made by `knob(...)`. The type of a field is all the converting there is: str,
int, float, bool, dict, list[…], Literal[…], unions of them, and another schema for a nested record.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import types
import typing

import yaml

from lib import axolotl
from lib.recipe import FALSE, TRUE, Wrong, is_null, number, pairs_of, plain, source, written
from lib.stage import STAGES

REQUIRED = ...                                                   # the default of a knob that has none
WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a mapping"}
PLAIN_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map")


def knob(default, stages, why, unit="", low=None, above=None, high=None, below=None, identity=True, check=None):
    """One field of a schema. `stages` are the numbers of the scripts that read it; `low` and `high` are allowed values,
    `above` and `below` are not; `check(value)` returns the value to keep or raises Wrong; `identity=False` marks a
    knob that is no part of what a run is. The dataclass itself has no default: a value always comes from a reading."""
    limits = {"from {:g}": low, "above {:g}": above, "up to {:g}": high, "below {:g}": below}
    stages = tuple(stem for stem in STAGES if stem[:2] in stages.split())
    return dataclasses.field(metadata=dict(default=default, stages=stages, why=why, unit=unit, limits=limits,
                                           identity=identity, check=check))


def knobs_of(schema):
    """{name: (type, metadata)} of a schema's fields, in their written order."""
    kinds = typing.get_type_hints(schema)
    return {field.name: (kinds[field.name], field.metadata) for field in dataclasses.fields(schema)}


# ---- a recipe's entries ----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Reading:
    """What a recipe says: each knob's value, the entries that gave values, the keys that could not be read, problems as
    (what, fix), and notes as (key, words) on what was accepted but is not followed to the letter."""

    values: dict
    given: dict = dataclasses.field(default_factory=dict)
    failed: set = dataclasses.field(default_factory=set)
    problems: list = dataclasses.field(default_factory=list)
    notes: list = dataclasses.field(default_factory=list)

    def together(self, names):
        """`recipes/demo.yaml:4: load_in_4bit: true with adapter: null (the default)`: knobs that concern each other."""
        first, *others = [name for name in names if name in self.given]
        others = [f"{self.given[name].edit(self.values[name])} ({self.given[name].place()})" for name in others]
        others += [f"{name}: {written(self.values[name])} (the default)" for name in names if name not in self.given]
        return " with ".join([self.given[first].told(), *others])


def read_knobs(entries, overrides, schema):
    """The Reading of a recipe's entries, or of the overrides in their place. No problem hides the next one."""
    known = knobs_of(schema)
    reading = Reading({name: copy.deepcopy(meta["default"]) for name, (_, meta) in known.items()})
    overrides = [axolotl.respelled(entry) for entry in overrides]
    overridden = {entry.key for entry in overrides}
    entries = [entry for entry in map(axolotl.respelled, entries) if entry.key not in overridden]
    for entry in entries + overrides:
        try:
            if entry.key in known:
                take(entry, *known[entry.key], reading)
            elif words := axolotl.meaning(entry):
                reading.notes.append((entry.name, words))
        except KeyError:
            known_words = (*known, *axolotl.SPELLINGS, *axolotl.NOT_YET, *axolotl.NO_MEANING)
            reading.problems.append((f"{entry.told()}: no such knob", nearest(entry.key, known_words)))
        except Wrong as wrong:
            reading.failed.add(entry.key)
            fix = wrong.fix or example_of(entry, *known[entry.key])
            reading.problems.append((f"{entry.told(wrong.node)} {wrong.words}", fix))
    for name in known:
        if reading.values[name] is REQUIRED and name not in reading.failed:
            reading.failed.add(name)
            reading.problems.append((f"{name} is missing", f"add `{name}: …` ({known[name][1]['why']})"))
    return reading


def take(entry, kind, meta, reading):
    """Nothing; the reading has the value of one knob. Raises Wrong."""
    if is_null(entry.node):                                      # null means the default
        return
    if replaced := axolotl.replacement(entry):
        value, words = replaced
        reading.notes.append((entry.name, words))
    else:
        value = convert_within(entry.node, kind, meta)
    earlier = reading.given.setdefault(entry.key, entry)
    if earlier is not entry and reading.values[entry.key] != value:
        raise Wrong(f"says otherwise than {earlier.name}: {source(earlier.node)} ({earlier.place()})", "keep one of them")
    reading.values[entry.key] = value


def nearest(key, names):
    """The mending edit for an unknown key: the known name that looks most like it, if one does."""
    close = difflib.get_close_matches(key, list(names), n=1)
    return f"did you mean {close[0]}?" if close else "remove it; `python 01_config.py --knobs` lists all there are"


# ---- nodes to values -------------------------------------------------------------------------------------------------


def convert_within(node, kind, meta):
    """The value of a node as its knob takes it: converted, within the limits, passed by the knob's check."""
    value = convert(node, kind)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        low, above, high, below = meta["limits"].values()
        if not ((low is None or value >= low) and (above is None or value > above)
                and (high is None or value <= high) and (below is None or value < below)):
            raise Wrong(f"must be {in_words(kind, meta)}", None, node)
    try:
        return value if meta["check"] is None else meta["check"](value)
    except Wrong as wrong:
        raise Wrong(wrong.words, wrong.fix, node) from None


def convert(node, kind):
    """The value of a node as `kind`, a type of a schema. Raises Wrong."""
    members = typing.get_args(kind)
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return convert_union(node, kind, members)
    if node.tag not in PLAIN_TAGS:
        raise Wrong(f"has the tag {node.tag}", "remove the tag: a knob knows its type", node)
    if isinstance(node, yaml.SequenceNode) and typing.get_origin(kind) is list:
        return [convert(child, members[0]) for child in node.value]
    if isinstance(node, yaml.MappingNode) and dataclasses.is_dataclass(kind):
        return convert_record(node, kind)
    if isinstance(node, yaml.MappingNode) and kind is dict:
        return plain(node)
    if isinstance(node, yaml.ScalarNode):
        for value in scalars(node, kind):
            return value
    raise Wrong(f"must be {in_words(kind)}", None, node)


def convert_union(node, kind, members):
    """The value as the first type of a union that takes it; what is wrong inside a list or mapping is said first."""
    complaint = Wrong(f"must be {in_words(kind)}", None, node)
    for member in members:
        try:
            return convert(node, member)
        except Wrong as wrong:
            complaint = wrong if wrong.node is not node or wrong.fix else complaint
    raise complaint


def scalars(node, kind):
    """[the value] of a scalar as `kind`; [] where it can't be one."""
    text, lowered = node.value, node.value.lower()
    if typing.get_origin(kind) is typing.Literal:
        return [choice for choice in typing.get_args(kind)
                if (lowered in TRUE if choice is True else text == choice)]
    if kind is str:
        return [] if is_null(node) else [text]
    if kind is bool:
        return [lowered in TRUE] if lowered in TRUE + FALSE else []
    value = number(text, kind) if kind in (int, float) else None
    return [] if value is None else [value]


def convert_record(node, schema):
    """The mapping of a nested schema, such as one entry of `datasets`, with its defaults filled in. Raises Wrong."""
    given, repeated = pairs_of(node)
    known = knobs_of(schema)
    for key_node in repeated:
        raise Wrong("is a key given twice", "keep one of the two", key_node)
    for key, child in given.items():
        if key not in known and not is_null(child):
            if key in axolotl.NOT_YET_IN_DATASETS:
                raise Wrong(f"is for {key}: not built yet", f"remove {key}", child)
            raise Wrong(f"is for {key}, which is no such key", nearest(key, known), child)
    record = {}
    for name, (kind, meta) in known.items():
        if name in given and not is_null(given[name]):
            record[name] = convert_within(given[name], kind, meta)
        elif meta["default"] is REQUIRED:
            raise Wrong(f"has no {name}", f"add `{name}: …` ({meta['why']})", node)
        else:
            record[name] = meta["default"]
    return record


# ---- words -----------------------------------------------------------------------------------------------------------


def in_words(kind, meta=None):
    """What a knob asks for, as in "a whole number from 1" or "lora or qlora"."""
    members = [member for member in typing.get_args(kind) if member is not type(None)]
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        words = " or ".join(in_words(member) for member in members)
    elif typing.get_origin(kind) is typing.Literal:
        words = " or ".join(written(member) for member in members)
    elif typing.get_origin(kind) is list:
        words = "a list of " + ("mappings" if dataclasses.is_dataclass(members[0]) else in_words(members[0]))
    else:
        words = WORDS.get(kind, "a mapping")
    limits = [text.format(limit) for text, limit in meta["limits"].items() if limit is not None] if meta else []
    return " ".join([words, " and ".join(limits)]).strip()


def example_of(entry, kind, meta):
    """A mending edit for a knob: its default where it has one, else what it asks for."""
    if meta["default"] is REQUIRED or meta["default"] is None:
        return f"give {in_words(kind, meta)} ({meta['why']})"
    return f"for example {entry.edit(meta['default'])} ({meta['why']})"
