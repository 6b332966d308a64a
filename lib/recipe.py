"""A recipe's text as entries that know their line: flat YAML, read into nodes and no further.

PyYAML only composes the text here; what a scalar means is decided by the knob that reads it (lib/knobs.py). So `1e-4`
is a number for a number, a revision `12345e7` stays text, and `no` is a boolean only where a boolean is declared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import yaml

from lib.stage import StageError

TRUE, FALSE = ("true", "yes", "on"), ("false", "no", "off")
SHOWN_CHARACTERS = 60
TEXT = "tag:yaml.org,2002:str"


class Wrong(ValueError):
    """A value that its knob can't take: in words, the edit that mends it (None: an example will do), and its node."""

    def __init__(self, words, fix=None, node=None):
        super().__init__(words)
        self.words, self.fix, self.node = words, fix, node


@dataclass(frozen=True)
class Entry:
    """One `key: value` as somebody gave it. `name` is the key as written, `key` the knob it sets; `path` is the recipe
    that holds it, None for an override."""

    key: str
    name: str
    node: yaml.Node
    path: str | None

    def told(self, node=None):
        """`recipes/demo.yaml:4: lora_r: 0`: how a message about the entry, or about a node inside it, begins."""
        if self.path is None:
            return f"on the command line: {self.name}={source(self.node)}"
        node = node or self.node
        return f"{self.path}:{line_of(node)}: {self.name}: {source(node)}"

    def place(self):
        """`line 4`, or `the command line`."""
        return "the command line" if self.path is None else f"line {line_of(self.node)}"

    def edit(self, value):
        """The entry written anew with another value."""
        return f"{self.name}{'=' if self.path is None else ': '}{written(value)}"


# ---- text to entries -------------------------------------------------------------------------------------------------


def read_recipe(path, text):
    """([Entry], problems) of a recipe's text. Raises StageError where nothing can be read at all."""
    root = compose(path, text)
    if root is None:
        raise StageError(f"{path}: the recipe is empty", "write `key: value` lines, as in recipes/demo.yaml")
    if not isinstance(root, yaml.MappingNode):
        raise StageError(f"{path}:{line_of(root)}: {source(root)} is no `key: value` line",
                         "write one `key: value` a line, with a space after the colon")
    first, repeated = pairs_of(root)
    problems = [(f"{path}:{line_of(key)}: {key.value} is given a second time, after line {line_of(first[key.value])}",
                 "keep one of the two lines") for key in repeated]
    return [Entry(key, key, node, str(path)) for key, node in first.items()], problems


def read_overrides(overrides):
    """([Entry], problems) of `key=value` arguments. A value is taken as it stands unless it opens a list, a mapping
    or a quotation: a regex needs no quotes beyond the shell's."""
    entries, problems = {}, []
    for override in overrides:
        key, _, text = override.partition("=")
        node = yaml.ScalarNode(TEXT, text)
        if text.startswith(("[", "{", "'", '"')):
            try:
                node = yaml.compose(text, Loader=yaml.BaseLoader)
            except yaml.YAMLError as error:
                problems.append((f"on the command line: {override} is not YAML: {getattr(error, 'problem', error)}",
                                 f"close brackets and quotes, and quote the whole for the shell: '{key}=[a, b]'"))
                continue
        if key in entries:
            problems.append((f"on the command line: {key} is given a second time: {override}", "keep one of the two"))
        entries[key] = Entry(key, key, node, None)
    return list(entries.values()), problems


def compose(path, text):
    """The root node of a recipe's text; None if nothing is in it."""
    try:
        return yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        line = (error.problem_mark or error.context_mark).line + 1
        fix = "check the quotes, brackets, colons and indentation there"
        if r"'\t'" in str(error.problem):
            fix = "replace the tab by spaces"
        elif "escape" in str(error.problem):
            fix = "put a regex into single quotes, where a backslash is a backslash"
        raise StageError(f"{path}:{line}: not YAML: {error.problem}", fix) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise StageError(f"{path}:{line}: a control character, code {error.character}", "remove it") from None


# ---- nodes -----------------------------------------------------------------------------------------------------------


def pairs_of(mapping):
    """({key: node}, [key nodes that repeat an earlier one]) of a mapping node."""
    first, repeated = {}, []
    for key_node, node in mapping.value:
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else source(key_node)
        if key in first:
            repeated.append(key_node)
        first.setdefault(key, node)
    return first, repeated


def line_of(node):
    """The line a node begins on, counted from 1."""
    return node.start_mark.line + 1


def source(node):
    """The text a node was written as: on one line, cut to a readable length."""
    if node.start_mark is None:                                  # the plain text of an override
        return node.value
    text = node.start_mark.buffer[node.start_mark.pointer:node.end_mark.pointer]
    text = " ".join(text.split()) or "null"
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"


def is_null(node):
    """True for `key:`, `key: ~` and `key: null`, not for a quoted 'null'."""
    return isinstance(node, yaml.ScalarNode) and not node.style and node.value in ("", "~", "null", "Null", "NULL")


def number(text, kind):
    """The text as an int or a float; None where it is none, or not a finite one."""
    try:
        return kind(text) if math.isfinite(float(text)) else None
    except (ValueError, OverflowError):
        return None


def plain(node, above=()):
    """The value of a node that no schema describes, by the core rules of YAML 1.2. Raises Wrong."""
    if any(node is ancestor for ancestor in above):
        raise Wrong("refers to itself", "write the value out", node)
    if isinstance(node, yaml.SequenceNode):
        return [plain(child, (*above, node)) for child in node.value]
    if isinstance(node, yaml.MappingNode):
        given, repeated = pairs_of(node)
        for key_node in repeated:
            raise Wrong("is a key given twice", "keep one of the two", key_node)
        return {key: plain(child, (*above, node)) for key, child in given.items()}
    if node.style or is_null(node):                              # what is quoted is text
        return node.value if node.style else None
    if node.value in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return node.value.lower() == "true"
    values = [number(node.value, int), number(node.value, float), node.value]
    return next(value for value in values if value is not None)


def written(value):
    """A value as one writes it in a recipe."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (dict, list)):
        return yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True,
                              sort_keys=False).strip()
    return str(value)
