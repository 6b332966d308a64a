"""Crash states: what a power cut may leave of a folder at any moment of a program that writes to it.

    with Recorder(root) as recorder:
        recorder.mark("begun")                       # how far the program is, for what a check may demand
        ...                                          # anything that writes below root
    for state in recorder.states(random.Random(0)):
        state.build(root)                            # and then: does the next start recover?

The model of a disk: a file's content is safe once the file was synced; before, all, half or nothing of the new
content is there, or zeros. A name (made, renamed, removed) is safe once its folder was synced; before, any of
the changes of names may be there without the others, in any order. One rename is whole or not at all.
"""
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CALLS = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "fsync")
Names = dict[tuple[int, str], int]                   # {(number of the folder, name): number}
CUTS = {"none": lambda new: b"", "half": lambda new: new[:len(new) // 2], "all": lambda new: new,
        "zeros": lambda new: bytes(len(new))}


@dataclass(frozen=True)
class State:
    """A tree that a crash may leave: {path: content, or None for a folder}, and the last mark before it."""
    tree: tuple[tuple[str, bytes | None], ...]
    mark: str

    def build(self, root: Path) -> None:
        """The folder is in this state, and holds nothing else; what is so already isn't written again."""
        wanted = {root / name: content for name, content in self.tree}
        for path in sorted(root.rglob("*"), reverse=True):         # a folder comes after what is in it
            if path not in wanted or path.is_dir() != (wanted[path] is None):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path, content in wanted.items():                       # sorted: a folder comes before its files
            if content is None:
                path.mkdir(exist_ok=True)
            elif not path.exists() or path.read_bytes() != content:
                path.write_bytes(content)


class Recorder:
    """Records what happens to names and contents below a folder, by looking at it around each call of os."""

    def __init__(self, root: Path):
        self.root, self.events = root, []
        self.numbers, self.last, self.files = {}, 0, set()         # {inode: our number, never used twice}; those of files

    def __enter__(self) -> "Recorder":
        self.first = self.names, self.data = self._look()
        self._real = {call: getattr(os, call) for call in CALLS}
        for call, real in self._real.items():
            setattr(os, call, self._recorded(call, real))
        return self

    def __exit__(self, *_) -> None:
        for call, real in self._real.items():
            setattr(os, call, real)
        self._compare()

    def mark(self, words: str) -> None:
        """From here on a check may demand more."""
        self._compare()
        self.events.append(("mark", words))

    def _recorded(self, call: str, real):
        def recorded(*given, **named):
            self._compare()
            result = real(*given, **named)
            self._compare()
            if call == "fsync" and (number := self.numbers.get(os.fstat(given[0]).st_ino)) is not None:
                self.events.append(("sync", number))
            return result
        return recorded

    def _look(self) -> tuple[Names, dict[int, bytes]]:
        """All names below the folder, and the content of every file."""
        names, data, waiting, seen = {}, {}, [(self.root, self._number(self.root.stat().st_ino))], set()
        while waiting:
            where, folder = waiting.pop()
            seen.add(folder)
            for entry in os.scandir(where):
                number = names[folder, entry.name] = self._number(entry.inode())
                seen.add(number)
                if entry.is_dir():
                    waiting.append((entry.path, number))
                else:
                    self.files.add(number)
                    data[number] = Path(entry.path).read_bytes()
        self.numbers = {inode: number for inode, number in self.numbers.items() if number in seen}
        return names, data

    def _number(self, inode: int) -> int:
        """The number of what has this inode now: a file system soon gives it to another file."""
        if inode not in self.numbers:
            self.last += 1
            self.numbers[inode] = self.last
        return self.numbers[inode]

    def _compare(self) -> None:
        """What has changed since the last look becomes events."""
        names, data = self._look()
        gone = {number: key for key, number in self.names.items() if names.get(key) != number}
        for key, number in names.items():
            if self.names.get(key) != number:
                self.events.append(("name", gone.pop(number, None), key, number))  # made, or renamed
        self.events += [("name", key, None, number) for number, key in gone.items() if key not in names]
        self.events += [("data", number, data[number]) for number in data if data[number] != self.data.get(number)]
        self.names, self.data = names, data

    def states(self, chance: random.Random) -> Iterator[State]:
        """Every state once, for every number of events that had happened."""
        names, data = dict(self.first[0]), dict(self.first[1])     # what is safe
        pending, unsafe, mark, seen = [], {}, "", set()
        for event in [("mark", ""), *self.events]:
            match event:
                case "mark", mark:
                    pass
                case "data", number, content:
                    unsafe[number] = content
                case "name", *_:
                    pending.append(event)
                case "sync", number:
                    if number in unsafe:
                        data[number] = unsafe.pop(number)
                    for change in [c for c in pending if number in touched(c)]:
                        pending.remove(change)
                        self._apply(change, names)
            for chosen in choices(pending, chance):
                now = dict(names)
                for change in chosen:
                    self._apply(change, now)
                for contents in cuts(data, unsafe, chance):
                    state = State(self._tree(now, contents), mark)
                    if state not in seen:
                        seen.add(state)
                        yield state

    def _apply(self, change: tuple, names: Names) -> None:
        """The change has happened to the names, unless another one has to come before it."""
        _, before, after, number = change
        if names.get(after, number) not in self.files | {number}:
            return                                                 # a folder is never renamed over another one
        if before and names.get(before) == number:
            del names[before]
        if after:
            names[after] = number

    def _tree(self, names: Names, data: dict[int, bytes]) -> tuple:
        """The names that can be reached, with their contents."""
        inside: dict[int, list] = {}
        for (folder, name), number in names.items():
            inside.setdefault(folder, []).append((name, number))
        found, waiting = {}, [("", 1)]                             # the root was seen first
        while waiting:
            above, folder = waiting.pop()
            for name, number in inside.get(folder, ()):
                path = f"{above}{name}"
                found[path] = data.get(number, b"") if number in self.files else None
                if number not in self.files:
                    waiting.append((f"{path}/", number))
        return tuple(sorted(found.items()))


def touched(change: tuple) -> set[int]:
    """The numbers of the folders whose sync makes a change of names safe."""
    return {key[0] for key in change[1:3] if key}


def choices(pending: list, chance: random.Random) -> Iterator[list]:
    """Which of the changes a disk may have kept: the first ones, all but one, one alone, and some at random."""
    for number in range(len(pending) + 1):
        yield pending[:number]
    for number in range(len(pending)):
        yield pending[:number] + pending[number + 1:]
        yield [pending[number]]
    for _ in range(6 * len(pending)):
        yield [change for change in pending if chance.random() < 0.5]


def cuts(data: dict, unsafe: dict, chance: random.Random) -> Iterator[dict]:
    """What files may hold whose content was not synced: the same of all, and some at random."""
    kinds = list(CUTS)
    every = [dict.fromkeys(unsafe, kind) for kind in kinds]
    every += [{number: chance.choice(kinds) for number in unsafe} for _ in range(4)]
    for choice in every if unsafe else [{}]:
        yield data | {number: after(data.get(number, b""), unsafe[number], kind) for number, kind in choice.items()}


def after(safe: bytes, new: bytes, kind: str) -> bytes:
    """What a file holds; what was safe stays where the new content only goes on from it."""
    kept = len(safe) if new.startswith(safe) else 0
    return safe if kind == "none" else new[:kept] + CUTS[kind](new[kept:])
