"""paths: checks that what a recipe names exists: a model, an adapter, data, a template, a user's function.

Each check returns the value to keep or raises Wrong. Paths stay as written; relative ones start from the
current folder, as in every later stage.
"""
import difflib
import os
import re
from pathlib import Path

from lib import registry
from lib.config.checks import Wrong
from lib.run.ledger import HOOK

DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".csv", ".tsv", ".txt")
BUILDERS = ("json", "parquet", "arrow", "csv", "imagefolder", "audiofolder", "videofolder")     # of datasets
OWN_TEMPLATE = "tokenizer_default"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def hook(given: str | list[str]) -> str | list[str]:
    """The value: a choice, a hook whose file exists and holds the function's name, or a list of these."""
    for text in given if isinstance(given, list) else [given]:
        if not (found := HOOK.fullmatch(text)):
            continue
        path, name = Path(found[1]), found[2]
        if not os.path.isfile(path):
            raise Wrong("is in no file here", similar(path))
        code = path.read_text(encoding="utf-8", errors="replace")
        if not re.search(rf"\b{name}\b", code):
            close = difflib.get_close_matches(name, re.findall(r"^def (\w+)", code, re.MULTILINE), n=1)
            raise Wrong(f"names {name}, which isn't in that file",
                        f"did you mean {path}:{close[0]}?" if close else f"write `def {name}(…):` there")
    return given


def metrics(given: list[str]) -> list[str]:
    """The metrics of answers, which must differ in their names; hooks are checked."""
    names = [text.rpartition(":")[2] for text in given]
    if again := {name for name in names if names.count(name) > 1}:
        raise Wrong(f"has two metrics named {again.pop()}", "rename the function")
    return hook(given)


def model_path(text: str) -> str:
    """The base model: a hub id, or a folder that holds a config.json."""
    path = Path(text)
    if os.path.isfile(path / "config.json"):
        return text
    if os.path.isfile(path / "adapter_config.json"):
        raise Wrong("is an adapter, not a model", "name the base model, which its adapter_config.json tells; "
                    "lora_model_dir is for the adapter")
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
                similar(path, "a hub id has exactly one slash: owner/name"))


def adapter_path(text: str) -> str:
    """The path of a folder that must hold an adapter, as peft saves it."""
    path = Path(text)
    if missing := [name for name in ("adapter_config.json", "adapter_model.safetensors")
                   if not os.path.isfile(path / name)]:
        inside = [place for place in (path / "06_save/adapter", path / "adapter") if os.path.isdir(place)]
        raise Wrong(f"is no folder with {missing[0]}", f"did you mean {inside[0]}?" if inside else
                    "name the folder that peft saved an adapter in" if os.path.isdir(path) else
                    similar(path, "hf download OWNER/NAME --local-dir FOLDER fetches one from the hub"))
    return text


def data_path(text: str) -> str:
    """A data set's path: an existing file or folder, a hub id, or a kind of file whose data_files name it."""
    path = Path(text)
    if text and os.path.exists(path) or text in BUILDERS or is_data_id(text):
        return text
    raise Wrong("is no file or folder here, and no hub id", similar(path))


def is_data_id(text: str) -> bool:
    """Whether a path that doesn't exist is a data set's id on the hub, not a missing file."""
    path = Path(text)
    is_id = HUB_ID.fullmatch(text) is not None
    return is_id and path.suffix not in DATA_SUFFIXES and not os.path.isdir(path.parent)


def chat_template(text: str) -> str:
    """The chat template: the path of a .jinja file, Jinja text, a family's name, or OWN_TEMPLATE.

    OWN_TEMPLATE means the checkpoint's own. Whether a family's name fits the checkpoint, 02 checks.
    """
    if text == "tokenizer_default" or text.startswith("tokenizer_default_fallback_"):
        return OWN_TEMPLATE
    if text in registry.template_names() or "{{" in text or "{%" in text:
        return text
    path = Path(text)
    if path.suffix not in (".jinja", ".jinja2", ".j2"):
        close = difflib.get_close_matches(text, registry.template_names(), n=1)
        raise Wrong("is a template that the kit doesn't hold", f"did you mean {close[0]}?" if close else
                    "write tokenizer_default for the checkpoint's own, or the path of a .jinja file")
    if not os.path.isfile(path):
        raise Wrong("is no file here", similar(path))
    return text


def similar(path: Path, otherwise: str = "") -> str:
    """The fix for a path that doesn't exist: the name beside it that looks most like it, or `otherwise`."""
    folder = path.parent
    if not os.path.isdir(folder):
        return f"there is no folder {folder}"
    names = os.listdir(folder) if os.access(folder, os.R_OK) else []
    close = difflib.get_close_matches(path.name, names, n=1)
    otherwise = otherwise or f"a relative path starts from {Path.cwd()}"
    return f"did you mean {folder / close[0]}?" if close else otherwise
