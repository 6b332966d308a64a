"""Knobs: how a field of a schema takes a recipe's value, by its declared type, its limits and its own check.

A schema is a dataclass whose fields are made by `knob(...)`. Values are converted by the field's type alone:
str, int, float, bool, dict, list[…], Literal[…], unions of them, and another schema for a nested record.
"""

import dataclasses
import difflib
import functools
import re
import types
import typing
from collections.abc import Mapping

import yaml

from lib.config import axolotl
from lib.config.checks import Wrong
from lib.config.recipe import FALSE, TRUE, is_null, number, pairs_of, plain, written
from lib.run.ledger import HOOK, STAGES


class Hook(str):
    """A value that names a user's function, which lib/training/hooks.py loads."""


REQUIRED = ...                                                   # the default of a knob that has none
WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a mapping",
         Hook: "path/to/file.py:function"}
TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map")


def knob(default, stages: str, why: str, unit="", low=None, above=None, high=None, below=None, identity=True,
         check=None) -> dataclasses.Field:
    """One field of a schema.

    `stages` are the numbers of the scripts that read it. `why` says what it is for; messages print it alone.
    `low` and `high` are allowed values, `above` and `below` are not. `check(value)` returns the value to keep
    or raises Wrong. `identity=False`: changing it doesn't make a stage out of date. The dataclass itself has
    no defaults, since every value comes out of a Reading.
    """
    limits = {"from {:,}": low, "above {:,}": above, "up to {:,}": high, "below {:,}": below}
    stems = tuple(stem for stem in STAGES if stem[:2] in stages.split())
    return dataclasses.field(metadata=dict(default=default, stages=stems, why=why, unit=unit, limits=limits,
                                           identity=identity, check=check))


@functools.cache
def knobs_of(schema: type) -> dict[str, tuple[type, Mapping]]:
    """{name: (type, metadata)} of a schema's fields, in their written order."""
    kinds = typing.get_type_hints(schema)
    return {field.name: (kinds[field.name], field.metadata) for field in dataclasses.fields(schema)}


def readers(schema: type) -> dict[str, list[str]]:
    """{stem: the knobs that this stage reads}; under "not_identity", those that put no stage out of date."""
    metas = {name: meta for name, (_, meta) in knobs_of(schema).items()}
    of_stage = {stem: [name for name, meta in metas.items() if stem in meta["stages"]] for stem in STAGES}
    return of_stage | {"not_identity": [name for name, meta in metas.items() if not meta["identity"]]}


# ---- nodes to values -------------------------------------------------------------------------------------


def convert_within(node: yaml.Node, kind: type, meta: Mapping):
    """A node's value for a knob: converted by its type, within its limits, passed by its check.

    Raises Wrong where it is not.
    """
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


def convert(node: yaml.Node, kind: type):
    """The value of a node as `kind`, one of the types of a schema; raises Wrong where it can't be."""
    members = typing.get_args(kind)
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return convert_union(node, kind, members)
    if node.tag not in TAGS:
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


def convert_union(node: yaml.Node, kind: type, members: tuple):
    """The value of a node as the first member of a union that takes it; raises Wrong where none does.

    A complaint about something inside a list or a mapping is raised before a general one.
    """
    complaint = Wrong(f"must be {in_words(kind)}", None, node)
    for member in members:
        try:
            return convert(node, member)
        except Wrong as wrong:
            complaint = wrong if wrong.node is not node or wrong.fix else complaint
    raise complaint


def scalars(node: yaml.ScalarNode, kind: type) -> list:
    """[the value of a scalar as `kind`], or [] where it has none."""
    text, lowered = node.value, node.value.lower()
    if typing.get_origin(kind) is typing.Literal:
        return [choice for choice in typing.get_args(kind)
                if (lowered in TRUE if choice is True else text == choice)]
    if kind is str:
        return [] if is_null(node) else [text]
    if kind is Hook:
        return [text] if HOOK.fullmatch(text) else []
    if kind is bool:
        return [lowered in TRUE] if lowered in TRUE + FALSE else []
    value = number(text, kind) if kind in (int, float) else None
    return [] if value is None else [value]


def convert_record(node: yaml.MappingNode, schema: type) -> dict:
    """A nested record (an entry of `datasets`) as a dict, its defaults filled in. Raises Wrong."""
    given, repeated = pairs_of(node)
    known = knobs_of(schema)
    for _, key_node in repeated:
        raise Wrong("is a key given twice", "keep one of the two", key_node)
    for key, child in given.items():
        if key in axolotl.NOT_YET_IN_DATASETS and not is_null(child):
            raise Wrong(f"is for {key}: not built yet", f"remove {key}", child)
        if key not in (*known, *axolotl.NOT_YET_IN_DATASETS):
            raise Wrong(f"is for {key}, which is no such key", nearest(key, list(known)), child)
    record = {}
    for name, (kind, meta) in known.items():
        if name in given and not is_null(given[name]):
            try:
                record[name] = convert_within(given[name], kind, meta)
            except Wrong as wrong:
                if wrong.fix:
                    raise
                fix = f"give {name} {in_words(kind, meta)} ({meta['why']})"
                raise Wrong(f"is for {name}, and {wrong.words}", fix, wrong.node) from None
        elif meta["default"] is REQUIRED:
            raise Wrong(f"has no {name}", f"add `{name}: …` ({meta['why']})", node)
        else:
            record[name] = meta["default"]
    return record


# ---- words -----------------------------------------------------------------------------------------------


def in_words(kind: type, meta: Mapping | None = None) -> str:
    """What a knob takes, in words such as "a whole number from 1" or "lora or qlora"."""
    members = [member for member in typing.get_args(kind) if member is not type(None)]
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        members = [member for member in members if member is not int or float not in members]
        words = either([in_words(member) for member in members])
    elif typing.get_origin(kind) is typing.Literal:
        words = either([written(member) for member in members])
    elif typing.get_origin(kind) is list:
        words = "a list of " + ("mappings" if dataclasses.is_dataclass(members[0]) else in_words(members[0]))
    else:
        words = WORDS.get(kind, "a mapping")
    limits = meta["limits"].items() if meta else ()
    limits = " and ".join(text.format(limit) for text, limit in limits if limit is not None)
    return f"{words} {limits}".strip()


def either(words: list[str]) -> str:
    """`a, b or c`."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def nearest(key: str, names: list[str]) -> str:
    """The fix for an unknown key: the known name that looks most like it, if one does."""
    whole = re.split(r"[.\[]", key)[0]
    if whole != key and whole in names:
        return f"give {whole} as a whole, '{whole}=[…]'"
    close = difflib.get_close_matches(key, names, n=1)
    return f"remove it, or did you mean {close[0]}?" if close else (
        "remove it; all knobs: python 01_config.py --knobs")
