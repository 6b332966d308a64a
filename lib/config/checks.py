"""checks: what a knob's type can't say of its value. Each check returns the value to keep, or raises Wrong.
"""
import re
from datetime import date

from lib.data.shapes import EXTRAS, ROLES

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
    """A value that its knob can't take: words, why; fix, the edit that mends it; node, where it stands.

    Without a fix, the message gives an example.
    """

    def __init__(self, words: str, fix: str | None = None, node=None):
        super().__init__(words)
        self.words, self.fix, self.node = words, fix, node


def filled(values: list) -> list:
    """The list, which must not be empty."""
    if not values:
        raise Wrong("is empty", "name at least one, or remove the key")
    return values


def regex(target: str | list[str]) -> str | list[str]:
    """The regex, which must compile, or the list of names, which must not be empty."""
    try:
        return filled(target) if isinstance(target, list) else re.compile(target).pattern
    except re.error as error:
        raise Wrong(f"is no regex: {error}", "mend it; a recipe holds a regex in single quotes") from None


def name_regexes(given: list[str]) -> list[str]:
    """The regexes on parameters' names, which must compile; Axolotl's ranges of rows are refused."""
    for text in filled(given):
        if re.search(r"\[\d*:\d*\]$", text):
            raise Wrong(f"asks for some rows of a tensor ({text}): not built yet", "name whole tensors")
        regex(text)
    return given


def name_ends(names: str | list[str]) -> list[str]:
    """The ends of parameters' names as a list; a single one may be given as text."""
    return filled([names] if isinstance(names, str) else names)


def size(text: str) -> str:
    """The size of a file, which must read like 5GB or 500MB."""
    if not re.fullmatch(r"\d+(\.\d+)?\s*(MB|GB)", text):
        raise Wrong("is no size of files", "for example 5GB or 500MB")
    return text


def bnb_arguments(given: dict) -> dict:
    """The arguments of bitsandbytes' configuration, only those that say how, not what, to quantise."""
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
    """The changes to the model's configuration, only of its rotary positions and their number."""
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
    """{number of a GPU: the most memory that the model may take there, such as 20GiB}."""
    for name, most in given.items():
        if not name.isdigit() or not re.fullmatch(r"\d+(GiB|GB|MiB|MB)", str(most)):
            raise Wrong(f"holds {name}: {most}", "for example {0: 20GiB, 1: 24GiB}")
    return given


def side(given: int | list[int]) -> int | list[int]:
    """The side of a square, or [width, height], in pixels."""
    sides = given if isinstance(given, list) else [given, given]
    if len(sides) != 2 or not all(1 <= each <= 16_384 for each in sides):
        raise Wrong("is no size of a picture", "for example 512, or [640, 480] for width and height")
    return given


def role_words(given: dict) -> dict:
    """{role: the word or words by which rows name it}."""
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
    """{bos_token and so on: the token}, additional_special_tokens being a list; null values are left out."""
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
    """The texts, each of which must be able to be a token: not empty, no blanks around it."""
    for text in given:
        if not isinstance(text, str) or text != text.strip() or not text:
            raise Wrong(f"holds {text!r}, which can't be a token", "write texts without blanks around them")
    return given


def template_arguments(given: dict) -> dict:
    """The arguments for a chat template, none of which may be one that 02_data gives itself."""
    if taken := sorted(given.keys() & RENDERING):
        raise Wrong(f"holds {taken[0]}, which 02_data gives itself", f"remove {taken[0]}")
    return given


def day(text: str) -> str:
    """The day as YYYY-MM-DD, which must be one of the calendar."""
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise Wrong("is no day", "write year, month and day: 2026-07-14") from None
