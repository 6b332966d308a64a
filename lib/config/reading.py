"""Reading: a recipe's entries read by a schema, so that every knob has a value and every problem is known.

One problem doesn't hide the next: an entry that can't be read is noted, and the others are still read.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

from lib.config import axolotl
from lib.config.checks import Wrong
from lib.config.knobs import REQUIRED, convert_within, in_words, knobs_of, nearest
from lib.config.recipe import Entry, is_null, source, written


@dataclass
class Reading:
    """What a recipe says.

    values: {knob: value}. given: {knob: the entry that gave its value}. failed: knobs that couldn't be read.
    problems: [(what, fix)]. notes: [(key, words)] on what isn't followed to the letter.
    """

    values: dict
    given: dict[str, Entry] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    problems: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)

    def take(self, entry: Entry, kind: type, meta: Mapping) -> None:
        """Give the knob the entry's value, or raise Wrong. A null entry leaves the default."""
        if is_null(entry.node):                                  # null means the default
            return
        if replaced := axolotl.replacement(entry):
            value, words = replaced
            self.notes.append((entry.name, words))
        else:
            value = convert_within(entry.node, kind, meta)
        earlier = self.given.setdefault(entry.key, entry)
        if earlier is not entry and self.values[entry.key] != value:
            raise Wrong(f"says otherwise than {earlier.name}: {source(earlier.node)} ({earlier.place()})",
                        "keep one of them")
        self.values[entry.key] = value

    def together(self, names: list[str]) -> str:
        """Knobs in a message, as `r.yaml:4: load_in_4bit: true with adapter: null (the default)`."""
        first, *others = [name for name in names if name in self.given]
        others = [f"{name}: {source(self.given[name].node)} ({self.given[name].place()})" for name in others]
        defaults = [name for name in names if name not in self.given]
        others += [f"{name}: {written(self.values[name])} (the default)" for name in defaults]
        return " with ".join([self.given[first].shown(), *others])


def read_knobs(entries: list[Entry], overrides: list[Entry], schema: type) -> Reading:
    """The Reading of a recipe's entries, with overrides in place of the entries that they override."""
    known = knobs_of(schema)
    reading = Reading({name: copy.deepcopy(meta["default"]) for name, (_, meta) in known.items()})
    overrides = [axolotl.respelled(entry) for entry in overrides]
    overridden = {entry.key for entry in overrides}
    entries = [entry for entry in map(axolotl.respelled, entries) if entry.key not in overridden]
    for entry in entries + overrides:
        try:
            if entry.key in known:
                reading.take(entry, *known[entry.key])
            elif words := axolotl.meaning(entry):
                reading.notes.append((entry.name, words))
        except KeyError:
            if is_null(entry.node):
                reading.notes.append((entry.name, "no such knob; it is empty, so nothing is lost"))
                continue
            fix = nearest(entry.key, [*known, *axolotl.KEYS])
            reading.problems.append((f"{entry.shown()}: no such knob", fix))
        except Wrong as wrong:
            reading.failed.add(entry.key)
            fix = wrong.fix or example_of(entry, *known[entry.key])
            reading.problems.append((f"{entry.shown(wrong.node)} {wrong.words}", fix))
    for name in known:
        if reading.values[name] is REQUIRED and name not in reading.failed:
            reading.failed.add(name)
            reading.problems.append((f"{name} is missing", f"add `{name}: …` ({known[name][1]['why']})"))
    return reading


def example_of(entry: Entry, kind: type, meta: Mapping) -> str:
    """The fix for a knob's wrong value: an edit to its default if it has one, else what it takes."""
    if meta["default"] is REQUIRED or meta["default"] is None:
        return f"give {in_words(kind, meta)} ({meta['why']})"
    return f"for example {entry.edit(meta['default'])} ({meta['why']})"
