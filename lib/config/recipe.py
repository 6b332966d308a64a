"""A recipe's text as entries that know their line: flat YAML, read into nodes and no further.

PyYAML only composes the text; what a scalar means is decided by the knob that reads it (knobs.py). So `1e-4`
is a number where the knob takes one, a revision `12345e7` stays text, and `no` is false only where the knob
takes a boolean.
"""

import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from lib.config.checks import Wrong
from lib.config.paths import similar
from lib.run.errors import StageError

TRUE, FALSE = ("true", "yes", "on"), ("false", "no", "off")
SHOWN_CHARACTERS = 60
TEXT_TAG = "tag:yaml.org,2002:str"


@dataclass(frozen=True)
class Entry:
    """One `key: value` as somebody gave it.

    `name` is the key as written, `key` the knob that it sets; `path` is the recipe, or None for an override.
    """

    key: str
    name: str
    node: yaml.Node
    path: str | None

    def shown(self, node: yaml.Node | None = None) -> str:
        """How a message on the entry, or on a node inside it, begins, as `recipes/demo.yaml:4: lora_r: 0`."""
        if self.path is None:
            return f"on the command line: {self.name}={source(self.node)}"
        node = node or self.node
        return f"{self.path}:{line_of(node)}: {self.name}: {source(node)}"

    def place(self) -> str:
        """Where the entry stands: `line 4`, or `the command line`."""
        return "the command line" if self.path is None else f"line {line_of(self.node)}"

    def edit(self, value) -> str:
        """The entry as one would write it with another value."""
        return f"{self.name}{'=' if self.path is None else ': '}{written(value)}"


# ---- text to entries -------------------------------------------------------------------------------------


def read_text(path: Path) -> tuple[str, str]:
    """(text, sha256) of a recipe, by one reading of the file."""
    try:
        content = path.read_bytes()
        return content.decode("utf-8-sig"), hashlib.sha256(content).hexdigest()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        what = f"{path}:{line}: byte {error.start} is not utf-8"
        raise StageError(what, "save the recipe as utf-8") from None
    except FileNotFoundError:
        raise StageError(f"{path}: no such recipe", similar(path, "ls recipes/")) from None
    except OSError as error:
        what = f"{path}: not readable as a recipe: {error.strerror}"
        raise StageError(what, "name a YAML file") from None


def read_recipe(path: Path, text: str) -> tuple[list[Entry], list[tuple[str, str]]]:
    """(entries of a recipe's text, problems as (what, fix)); StageError where nothing can be read."""
    root = compose(path, text)
    if root is None:
        raise StageError(f"{path}: the recipe is empty", "write `key: value` lines, as in recipes/demo.yaml")
    if not isinstance(root, yaml.MappingNode):
        raise StageError(f"{path}:{line_of(root)}: {source(root)} is no `key: value` line",
                         "write one `key: value` a line, with a space after the colon")
    first, repeated = pairs_of(root)
    problems = [(f"{path}:{line_of(node)}: {key} is given a second time, after line {line_of(first[key])}",
                 "keep one of the two lines") for key, node in repeated]
    return [Entry(key, key, node, str(path)) for key, node in first.items()], problems


def read_overrides(overrides: list[str]) -> tuple[list[Entry], list[tuple[str, str]]]:
    """(entries of `key=value` arguments, problems as (what, fix)).

    A value is taken as it stands unless it begins like a list, a mapping (`{{` begins Jinja) or a quotation:
    so a regex needs no quotes but the shell's.
    """
    entries, problems = {}, []
    for override in overrides:
        key, _, text = override.partition("=")
        node = yaml.ScalarNode(TEXT_TAG, text)
        if re.match(r"""[\['"]|\{(?![{%])""", text):
            try:
                node = compose("", text)
            except StageError as error:
                what = error.what.split("not YAML: ")[-1]
                problems.append((f"on the command line: {override} is not YAML: {what}",
                                 f"close its brackets and quotes, and quote it all: '{key}=[a, b]'"))
                continue
        if key in entries:
            problems.append((f"on the command line: {key} is given a second time: {override}",
                             "keep one of the two"))
        entries[key] = Entry(key, key, node, None)
    return list(entries.values()), problems


def compose(path: Path | str, text: str) -> yaml.Node | None:
    """The root node of a YAML text; None if the text is empty. StageError where it isn't YAML."""
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
        what = f"{path}:{line}: a control character, code {error.character}"
        raise StageError(what, "remove it") from None
    except RecursionError:
        what = f"{path}: not YAML: brackets within brackets without end"
        raise StageError(what, "close the brackets") from None


# ---- nodes -----------------------------------------------------------------------------------------------


def pairs_of(mapping: yaml.MappingNode) -> tuple[dict[str, yaml.Node], list[tuple[str, yaml.Node]]]:
    """({key: value node} of a mapping, [(key, key node)] of the keys that repeat an earlier one)."""
    first, repeated = {}, []
    for key_node, node in mapping.value:
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else source(key_node)
        if key in first:
            repeated.append((key, key_node))
        first.setdefault(key, node)
    return first, repeated


def line_of(node: yaml.Node) -> int:
    """The line a node begins on, counted from 1."""
    return node.start_mark.line + 1


def source(node: yaml.Node) -> str:
    """The text of a node as it was written, on one line and cut to a readable length."""
    text = node.value                                            # an override's plain text stands in no file
    if node.start_mark is not None:
        text = node.start_mark.buffer[node.start_mark.pointer:node.end_mark.pointer]
    text = " ".join(text.split()) or "null"
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"


def is_null(node: yaml.Node) -> bool:
    """Whether a node is null: it is for `key:`, `key: ~` and `key: null`, but not for a quoted 'null'."""
    nulls = ("", "~", "null", "Null", "NULL")
    return isinstance(node, yaml.ScalarNode) and not node.style and node.value in nulls


def number(text: str, kind: type) -> int | float | None:
    """A text as an int or a float; None where it isn't one, or isn't finite."""
    try:
        return kind(text) if math.isfinite(float(text)) else None
    except ValueError:
        return None


def plain(node: yaml.Node, above: tuple = ()):
    """The value of a node that no schema describes, by YAML 1.2's core rules; Wrong where it has none."""
    if any(node is ancestor for ancestor in above):
        raise Wrong("refers to itself", "write the value out", node)
    if isinstance(node, yaml.SequenceNode):
        return [plain(child, (*above, node)) for child in node.value]
    if isinstance(node, yaml.MappingNode):
        given, repeated = pairs_of(node)
        for _, key_node in repeated:
            raise Wrong("is a key given twice", "keep one of the two", key_node)
        return {key: plain(child, (*above, node)) for key, child in given.items()}
    if node.style or is_null(node):                              # what is quoted is text
        return node.value if node.style else None
    if node.value in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return node.value.lower() == "true"
    values = (number(node.value, int), number(node.value, float), node.value)
    return next(value for value in values if value is not None)


def written(value) -> str:
    """A value as text, as one writes it in a recipe."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (dict, list)):
        return yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True,
                              sort_keys=False).strip()
    return str(value)
