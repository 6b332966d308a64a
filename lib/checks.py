"""Checks of single values that a type can't make: each returns the value to keep, or raises Wrong.

Paths stay as written; relative ones start from the current folder, as in every later stage.
"""

import difflib
import os
import re
from datetime import date
from pathlib import Path

from lib import registry
from lib.ledger import HOOK
from lib.shapes import EXTRAS, ROLES

BNB_ARGUMENTS = {
    "bnb_4bit_quant_type": ("nf4", "fp4"), "bnb_4bit_use_double_quant": (True, False),
    "bnb_4bit_compute_dtype": ("bfloat16", "float16", "float32"),
    "bnb_4bit_quant_storage": ("bfloat16", "uint8", "float16", "float32"), "llm_int8_threshold": float}
OVERRIDES = {"rope_theta": (int, float), "rope_scaling": (dict,), "max_position_embeddings": (int,)}
MESSAGE_PROPERTIES = ("role", "content", *EXTRAS)
RENDERING = {"messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt",
             "tokenize", "continue_final_message", "return_dict", "return_tensors"}
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "additional_special_tokens")
DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".csv", ".txt")
BUILDERS = ("json", "parquet", "arrow", "csv", "imagefolder", "audiofolder", "videofolder")     # of datasets
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


def name_regexes(given: list[str]) -> list[str]:
    """Regexes on parameters' names; Axolotl's ranges of rows are refused."""
    for text in filled(given):
        if re.search(r"\[\d*:\d*\]$", text):
            raise Wrong(f"asks for some rows of a tensor ({text}): not built yet", "name whole tensors")
        regex(text)
    return given


def name_ends(names: str | list[str]) -> list[str]:
    """The ends of parameters' names; one of them may stand without a list."""
    return filled([names] if isinstance(names, str) else names)


def hook(given: str | list[str]) -> str | list[str]:
    """A choice, a hook whose file is there and holds the function's name, or a list of such."""
    for text in given if isinstance(given, list) else [given]:
        if not (found := HOOK.fullmatch(text)):
            continue
        path, name = Path(found[1]), found[2]
        if not os.path.isfile(path):
            raise Wrong("is in no file here", similar(path) or f"a relative path starts from {Path.cwd()}")
        code = path.read_text(encoding="utf-8", errors="replace")
        if not re.search(rf"\b{name}\b", code):
            close = difflib.get_close_matches(name, re.findall(r"^def (\w+)", code, re.MULTILINE), n=1)
            raise Wrong(f"names {name}, which isn't in that file",
                        f"did you mean {path}:{close[0]}?" if close else f"write `def {name}(…):` there")
    return given


def metrics(given: list[str]) -> list[str]:
    """Metrics of answers that can be told apart by their names."""
    names = [text.rpartition(":")[2] for text in given]
    if again := {name for name in names if names.count(name) > 1}:
        raise Wrong(f"has two metrics named {again.pop()}", "rename the function")
    return hook(given)


def size(text: str) -> str:
    """A size of files."""
    bytes_of(text)
    return text


def bytes_of(text: str) -> int:
    """A size such as 5GB or 500MB as a number of bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(MB|GB)", text)
    if not found:
        raise Wrong("is no size of files", "for example 5GB or 500MB")
    return int(float(found[1]) * {"MB": 10**6, "GB": 10**9}[found[2]])


def bnb_arguments(given: dict) -> dict:
    """Arguments of bitsandbytes' configuration that say how to quantise; what is quantised, roles say."""
    for key, value in given.items():
        allowed = BNB_ARGUMENTS.get(key, ())
        if not allowed:
            fix = f"quantize_roles says what is quantised; this may hold {', '.join(BNB_ARGUMENTS)}"
            raise Wrong(f"holds {key}, which is no such argument or not for recipes", fix)
        if not (isinstance(value, float) if allowed is float else value in allowed):
            words = "a number such as 6.0" if allowed is float else " or ".join(map(str, allowed)).lower()
            raise Wrong(f"holds {key}: {value}", f"write {words}")
    return given


def model_overrides(given: dict) -> dict:
    """What of the model's configuration a recipe may change: its rotary positions and their number."""
    for name, value in given.items():
        if name not in OVERRIDES:
            raise Wrong(f"holds {name}, which its weights were made with",
                        f"it may hold {', '.join(OVERRIDES)}")
        if type(value) not in OVERRIDES[name] or \
                name == "rope_scaling" and not {"rope_type", "type"} & {*value}:
            raise Wrong(f"holds {name}: {value}", "for example {rope_theta: 1000000}, or {rope_scaling: "
                        "{rope_type: linear, factor: 2.0}}")
    return given


def limits(given: dict) -> dict:
    """{number of a GPU: the most of the model that it gets, such as 20GiB}."""
    for name, most in given.items():
        if not name.isdigit() or not re.fullmatch(r"\d+(GiB|GB|MiB|MB)", str(most)):
            raise Wrong(f"holds {name}: {most}", "for example {0: 20GiB, 1: 24GiB}")
    return given


def model_path(text: str) -> str:
    """A hub id, or a folder that holds a model."""
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
                similar(path) or "a hub id has exactly one slash: owner/name")


def adapter_path(text: str) -> str:
    """A folder that holds an adapter, as peft saves it."""
    path = Path(text)
    if missing := [name for name in ("adapter_config.json", "adapter_model.safetensors")
                   if not os.path.isfile(path / name)]:
        raise Wrong(f"is no folder with {missing[0]}", None if os.path.isdir(path) else similar(path)
                    or "hf download OWNER/NAME --local-dir FOLDER fetches one from the hub")
    return text


def data_path(text: str) -> str:
    """A file or folder that is there, a hub id, or a kind of file whose data_files say where it is."""
    path = Path(text)
    if text and os.path.exists(path) or text in BUILDERS or is_data_id(text):
        return text
    raise Wrong("is no file or folder here, and no hub id",
                similar(path) or f"a relative path starts from {Path.cwd()}")


def is_data_id(text: str) -> bool:
    """Whether a path that isn't there is a hub's id for a data set, and no missing file."""
    path = Path(text)
    is_id = HUB_ID.fullmatch(text) is not None
    return is_id and path.suffix not in DATA_SUFFIXES and not os.path.isdir(path.parent)


def side(given: int | list[int]) -> int | list[int]:
    """A side of a square, or [width, height]; in pixels."""
    sides = given if isinstance(given, list) else [given, given]
    if len(sides) != 2 or not all(1 <= each <= 16_384 for each in sides):
        raise Wrong("is no size of a picture", "for example 512, or [640, 480] for width and height")
    return given


def role_words(given: dict) -> dict:
    """{role: the word or words that mean it}."""
    for role, words in given.items():
        if role not in ROLES:
            raise Wrong(f"holds {role}, which is no role", f"its keys are {', '.join(ROLES)}")
        if not all(isinstance(word, str) for word in (words if isinstance(words, list) else [words])):
            raise Wrong(f"holds {role}: {words}", f"for example {role}: [human, person]")
    return given


def properties(given: dict) -> dict:
    """{property of a message: the key under which the rows have it}."""
    for name, key in given.items():
        if name not in MESSAGE_PROPERTIES or not isinstance(key, str):
            raise Wrong(f"holds {name}: {key}, which is no property of a message with its key",
                        f"the properties are {', '.join(MESSAGE_PROPERTIES)}")
    return given


def special_tokens(given: dict) -> dict:
    """{bos_token and so on: the token}, and more of them as a list; what is null says nothing."""
    given = {name: token for name, token in given.items() if token is not None}
    for name, token in given.items():
        if name not in SPECIAL_TOKENS:
            raise Wrong(f"holds {name}, which is no special token",
                        f"its keys are {', '.join(SPECIAL_TOKENS)}")
        kind, example = (list, ["<a>", "<b>"]) if name == SPECIAL_TOKENS[-1] else (str, "<a>")
        if not isinstance(token, kind):
            raise Wrong(f"holds {name}: {token}", f"for example {name}: {example}")
        words(token if kind is list else [token])
    return given


def words(given: list[str]) -> list[str]:
    """Texts that can be tokens."""
    for text in given:
        if not isinstance(text, str) or text != text.strip() or not text:
            raise Wrong(f"holds {text!r}, which can't be a token", "write texts without blanks around them")
    return given


def template_arguments(given: dict) -> dict:
    """Arguments of a chat template that are a recipe's to give."""
    if taken := sorted(given.keys() & RENDERING):
        raise Wrong(f"holds {taken[0]}, which 02_data gives itself", f"remove {taken[0]}")
    return given


def day(text: str) -> str:
    """A day of the calendar, as in 2026-07-14."""
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise Wrong("is no day", "write year, month and day: 2026-07-14") from None


def chat_template(text: str) -> str | None:
    """The path of a .jinja file, Jinja text, or a family's name; None for the checkpoint's own template.

    Whether the checkpoint is of that family, 02 sees, which has its config.
    """
    if text == "tokenizer_default" or text.startswith("tokenizer_default_fallback_"):
        return None
    if text in registry.template_names():
        return text
    if "{{" in text or "{%" in text:
        return text
    path = Path(text)
    if path.suffix not in (".jinja", ".jinja2", ".j2"):
        close = difflib.get_close_matches(text, registry.template_names(), n=1)
        raise Wrong("is a template that the kit doesn't hold", f"did you mean {close[0]}?" if close else
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
