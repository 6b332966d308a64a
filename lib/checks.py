"""checks: of single values, those that a type can't make: each returns the value to keep, or raises Wrong."""
import re
from datetime import date

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


def size(text: str) -> str:
    """A size of files, such as 5GB or 500MB."""
    if not re.fullmatch(r"\d+(\.\d+)?\s*(MB|GB)", text):
        raise Wrong("is no size of files", "for example 5GB or 500MB")
    return text


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
