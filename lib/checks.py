"""Checks of single values that their type can't make: each returns the value to keep, or raises Wrong.

Paths stay as written; relative ones start from the current folder, as in every later stage.
"""

import difflib
import json
import re
from pathlib import Path

from lib.recipe import Wrong

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def filled(values):
    """A list with something in it."""
    if not values:
        raise Wrong("is empty", "name at least one, or remove the key")
    return values


def regex(target):
    """A regex that compiles, or a list of names with something in it."""
    try:
        return filled(target) if isinstance(target, list) else re.compile(target).pattern
    except re.error as error:
        raise Wrong(f"is no regex: {error}", "mend it; in a recipe, a regex stands in single quotes") from None


def model_path(text):
    """A hub id, or a folder that holds a model."""
    path = Path(text)
    if (path / "config.json").is_file():
        return text
    if (path / "adapter_config.json").is_file():
        base = json.loads((path / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
        raise Wrong("is an adapter, not a model", f"name the model it was trained on: {base}")
    if path.is_dir():
        inside = sorted(path.glob("*/config.json")) + sorted(path.glob("*/*/config.json"))
        raise Wrong("is a folder without config.json",
                    f"did you mean {inside[0].parent}?" if inside else "name the folder that holds config.json")
    if path.exists():
        raise Wrong("is a file", f"name the model's folder: {path.parent}")
    if HUB_ID.fullmatch(text):
        return text
    if address := re.match(rf"https?://[^/]+/({HUB_ID.pattern})", text):
        raise Wrong("is an address", f"write the hub id: {address[1]}")
    raise Wrong("is no folder here, and no hub id", similar(path) or "a hub id has exactly one slash: owner/name")


def data_path(text):
    """A file or folder that is there."""
    path = Path(text)
    if text and path.exists():
        return text
    if HUB_ID.fullmatch(text) and not path.suffix and not path.parent.is_dir():
        raise Wrong("is no file or folder here, and data sets of the hub are not built yet",
                    f"save it once, datasets.load_dataset('{text}').save_to_disk('FOLDER'), and name the folder")
    raise Wrong("is no file or folder here", similar(path) or f"correct the path; it starts from {Path.cwd()}")


def chat_template(text):
    """The path of a .jinja file, or Jinja text; None for the checkpoint's own template."""
    if text == "tokenizer_default":
        return None
    path = Path(text)
    if "{{" in text or "{%" in text or (path.suffix in (".jinja", ".jinja2", ".j2") and path.is_file()):
        return text
    if path.suffix in (".jinja", ".jinja2", ".j2"):
        raise Wrong("is no file here", similar(path) or f"correct the path; it starts from {Path.cwd()}")
    raise Wrong("is a template's bare name: not built yet",
                "write tokenizer_default for the checkpoint's own, or the path of a .jinja file")


def similar(path):
    """The mending edit for a path that isn't there: the name next to it that looks most like it. None without one."""
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder {folder}"
    close = difflib.get_close_matches(path.name, [entry.name for entry in folder.iterdir()], n=1)
    return f"did you mean {folder / close[0]}?" if close else None
