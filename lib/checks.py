"""Checks of single values that a type can't make: each returns the value to keep, or raises Wrong.

Paths stay as written; relative ones start from the current folder, as in every later stage.
"""

import difflib
import os
import re
from pathlib import Path

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class Wrong(ValueError):
    """A value that its knob can't take: why, the edit that mends it (None: an example will do), its node."""

    def __init__(self, words: str, fix: str | None = None, node=None):
        super().__init__(words)
        self.words, self.fix, self.node = words, fix, node


def filled(values: list) -> list:
    """A list with something in it."""
    if not values:
        raise Wrong("is empty", "name at least one, or remove the key")
    return values


def regex(target: str | list[str]) -> str | list[str]:
    """A regex that compiles, or a list of names with something in it."""
    try:
        return filled(target) if isinstance(target, list) else re.compile(target).pattern
    except re.error as error:
        raise Wrong(f"is no regex: {error}", "mend it; a recipe holds a regex in single quotes") from None


def model_path(text: str) -> str:
    """A hub id, or a folder that holds a model."""
    path = Path(text)
    if os.path.isfile(path / "config.json"):
        return text
    if os.path.isfile(path / "adapter_config.json"):
        raise Wrong("is an adapter, not a model", "name the base model, which its adapter_config.json tells")
    if os.path.isdir(path):
        inside = sorted(path.glob("*/config.json")) + sorted(path.glob("*/*/config.json"))
        fix = f"did you mean {inside[0].parent}?" if inside else "name the folder that holds config.json"
        raise Wrong("is a folder without config.json", fix)
    if os.path.exists(path):
        raise Wrong("is a file", f"name the model's folder: {path.parent}")
    if HUB_ID.fullmatch(text):
        return text
    if address := re.match(rf"https?://[^/]+/({HUB_ID.pattern})", text):
        raise Wrong("is an address", f"write the hub id: {address[1]}")
    raise Wrong("is no folder here, and no hub id",
                similar(path) or "a hub id has exactly one slash: owner/name")


def data_path(text: str) -> str:
    """A file or folder that is there."""
    path = Path(text)
    if text and os.path.exists(path):
        return text
    if HUB_ID.fullmatch(text) and not path.suffix and not os.path.isdir(path.parent):
        raise Wrong("is no file or folder here, and data sets of the hub are not built yet",
                    f"save it once, datasets.load_dataset('{text}').save_to_disk('FOLDER'), and name FOLDER")
    raise Wrong("is no file or folder here", similar(path) or f"a relative path starts from {Path.cwd()}")


def chat_template(text: str) -> str | None:
    """The path of a .jinja file, or Jinja text; None for the checkpoint's own template."""
    if text == "tokenizer_default":
        return None
    if "{{" in text or "{%" in text:
        return text
    path = Path(text)
    if path.suffix not in (".jinja", ".jinja2", ".j2"):
        raise Wrong("is a template's bare name: not built yet",
                    "write tokenizer_default for the checkpoint's own, or the path of a .jinja file")
    if not os.path.isfile(path):
        raise Wrong("is no file here", similar(path) or f"a relative path starts from {Path.cwd()}")
    return text


def similar(path: Path) -> str | None:
    """The mending edit for a path that isn't there: the name beside it that looks most like it, or None."""
    folder = path.parent
    if not os.path.isdir(folder):
        return f"there is no folder {folder}"
    names = os.listdir(folder) if os.access(folder, os.R_OK) else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {folder / close[0]}?" if close else None
