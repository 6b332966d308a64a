"""shapes: rows of all usual shapes as lists of messages in OpenAI's: role, content, and what else they have.

Fork me to: take rows of another shape (`conversation_of`).
"""
import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, fields

from lib.run.errors import RowError

ROLES = ("system", "user", "assistant", "tool")
CALLED = {"human": "user", "gpt": "assistant", "model": "assistant", "observation": "tool",
          "function_response": "tool", **{role: role for role in ROLES}}
EXTRAS = ("tool_calls", "tool_call_id", "name", "reasoning_content")      # of a message, for the template
CONVERSATIONS = ("messages", "conversations", "conversation")
PAIRS = (("prompt", "completion"), ("question", "answer"))                # columns of one exchange
NOTHING = (None, [], {}, "")              # values of keys that a row only has since other rows have them


@dataclass(frozen=True)
class Shape:
    """Where the rows of a data set keep what, by its entry in the recipe; None and {}: the usual places."""

    field_messages: str | None = None
    field_tools: str = "tools"
    message_property_mappings: dict = field(default_factory=dict)
    field_thinking: str | None = None
    message_field_role: str | None = None
    message_field_content: str | None = None
    message_field_training: str = "train"
    roles: dict = field(default_factory=dict)
    system_prompt: str | None = None
    drop_system_message: bool = False

    @classmethod
    def of(cls, spec: dict) -> "Shape":
        """The shape of an entry of `datasets`."""
        return cls(**{each.name: spec[each.name] for each in fields(cls)})

    @functools.cached_property
    def places(self) -> dict[str, list[str]]:
        """{property: the keys under which a message may have it}: the recipe's, or else the usual ones."""
        older = {"role": self.message_field_role, "content": self.message_field_content,
                 "reasoning_content": self.field_thinking}
        usual = {"role": ["role", "from"], "content": ["content", "value"]}
        given = {name: self.message_property_mappings.get(name) or older.get(name)
                 for name in ("role", "content", *EXTRAS)}
        return {name: [key] if key else usual.get(name, [name]) for name, key in given.items()}

    @functools.cached_property
    def keys(self) -> tuple[set[str], set[str]]:
        """(a message's keys that can only hold its role or content, those that can hold other properties)."""
        more = {key for name in EXTRAS for key in self.places[name]} | {self.message_field_training}
        return {*self.places["role"], *self.places["content"]} - more, more

    def role(self, word) -> str | None:
        """The role that a row's word means, or None; the recipe's words go before the usual ones."""
        return self._called.get(word) if isinstance(word, str) else None

    @functools.cached_property
    def _called(self) -> dict[str, str]:
        return CALLED | {word: role for role, words in self.roles.items() for word in listed(words)}


def conversation_of(row: dict, shape: Shape) -> list:
    """The messages of a row, whichever way it writes them, before each of them is checked."""
    if shape.field_messages:
        found = row.get(shape.field_messages)
    else:
        found = next((row[key] for key in CONVERSATIONS if row.get(key)), None)
    messages = from_json(found)
    if isinstance(messages, list) and messages:
        skipped = shape.drop_system_message and is_system(messages[0], shape)
        return [*system_of(row, shape, messages), *messages[skipped:]]
    if isinstance(found, str) and found:
        raise RowError(f"the conversation is the text {shortened(found)!r}, which is no JSON of messages",
                       'write it as json.dumps does: [{"role": …, "content": …}]')
    for asked, answered in PAIRS:
        if not shape.field_messages and not found and row.get(asked) and answered in row:
            pair = exchange(row, asked, answered, shape.message_field_training)
            return [*system_of(row, shape, pair), *pair]
    keys = shortened(", ".join(map(str, row))) or "nothing"
    wanted = repr(shape.field_messages or "messages")
    raise RowError(f"no list of messages under {wanted}; the row has {keys}",
                   "write the conversation there, or name its key with field_messages")


def exchange(row: dict, asked: str, answered: str, train: str) -> list:
    """The messages of a prompt and its completion, each a text or messages; the prompt isn't trained."""
    question, answer = row[asked], row[answered]
    if isinstance(question, str) and isinstance(answer, str):
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if isinstance(question, str):
        question = [{"role": "user", "content": question}]
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    for name, value in ((asked, question), (answered, answer)):
        if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
            raise RowError(f"{name!r} is {name_of(value)}, neither a text nor a list of messages",
                           f"write {asked} and {answered} as texts or as lists of messages")
    return [*({train: False, **message} for message in question), *answer]


def system_of(row: dict, shape: Shape, messages: list) -> list:
    """[the system message] that the row's column or the recipe adds; [] where there is none to add."""
    own = row["system"] if isinstance(row.get("system"), str) and not shape.drop_system_message else ""
    text = own or shape.system_prompt
    return [] if not text or is_system(messages[0], shape) and not shape.drop_system_message else \
        [{shape.places["role"][0]: "system", shape.places["content"][0]: text}]


def is_system(message, shape: Shape) -> bool:
    """Whether a message is a system message."""
    return isinstance(message, dict) and shape.role(first_of(message, shape.places["role"])) == "system"


def tools_of(row: dict, shape: Shape = Shape()) -> list[dict]:
    """The tools that a row offers, which it gives as a list or as the JSON text of one."""
    tools = from_json(row.get(shape.field_tools) or [])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and name_in(tool) for tool in tools):
        raise RowError(f"{shape.field_tools!r} is no list of tools, each with a name",
                       'write [{"type": "function", "function": {"name": …, "parameters": …}}]')
    return tools


def calls_of(given, number: int) -> list[dict]:
    """A message's tool calls, with their arguments as objects: a template would quote a JSON text.

    number: the message's, for errors.
    """
    calls = from_json(given)
    if not isinstance(calls, list) or not all(isinstance(call, dict) and name_in(call) for call in calls):
        raise RowError(f"message {number} has tool_calls that are no list of calls, each with a name",
                       'write [{"type": "function", "function": {"name": …, "arguments": {…}}}]')
    return [{**call, "function": plain_call(call["function"])} if isinstance(call.get("function"), dict)
            else plain_call(call) for call in calls]


def plain_call(call: dict) -> dict:
    """A call with its arguments as an object, if they are given as the JSON text of one."""
    arguments = from_json(call.get("arguments"))
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def first_of(message: dict, keys: Iterable[str]):
    """The value under the first of these keys that has one; None where none has."""
    return next((message[key] for key in keys if message.get(key) is not None), None)


def name_in(call: dict) -> str | None:
    """The name of a tool or call; None where it has none."""
    name = inside(call).get("name")
    return name if isinstance(name, str) and name else None


def inside(call: dict) -> dict:
    """A tool or call itself, which many rows keep under "function"."""
    return call["function"] if isinstance(call.get("function"), dict) else call


def calls_in(messages: list[dict]) -> list[str]:
    """Every name, key and text of the messages' tool calls."""
    calls = [inside(call) for message in messages for call in message.get("tool_calls", ())]
    return [text for call in calls for text in [call["name"], *strings_in(call.get("arguments"), keys=True)]]


def strings_in(value, keys: bool = False) -> list[str]:
    """Every text in a JSON value; with `keys`, the keys of its objects, too."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = list(value) if keys and isinstance(value, dict) else []
    return own + [text for each in inner for text in strings_in(each, keys)]


def from_json(value):
    """The value of a JSON text; None where the text isn't JSON."""
    try:
        read = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value
    return read if isinstance(read, list | dict) else value


def listed(value) -> list:
    """The value as a list: itself, or a list of it alone."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def name_of(value) -> str:
    """The type of a JSON value in words, such as "a list"."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def shortened(text: str) -> str:
    """At most 80 characters of a text, in one line."""
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:79]}…"
