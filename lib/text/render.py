"""render: conversations as text, by the checkpoint's own chat template, with its clock stopped.

Jinja runs in transformers' sandbox, as at inference. Templates differ in what they take (typed parts or
strings), and some print today's date: transformers gives them a clock, the function `strftime_now`. Samples
have to be the same on any day, so a macro of that name is put before the template and gives the day that
config.json holds. 02 saves the template unchanged; if any row's text has the date, the template that 06
exports begins with the macro, so that plain transformers renders as training did.
"""
import copy
import functools
import json
import re
from datetime import date, timedelta

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils.chat_template_utils import _compile_jinja_template

from lib.data.messages import has_media, text_parts, texts_of
from lib.run.errors import RowError, StageError, one_line
from lib.text.processor import opening_of, tokenizer_of

MARK = "⟦mark⟧"                                         # stands in a render for a text, to find its place
QUOTED_TYPE = re.compile(r"""(['"])type\1: """)         # in a render: typed parts were printed as they are
MOST_SHAPES = 256                                       # shapes of rows whose renders are remembered
CLOCK = "strftime_now"
PLAIN = {"role", "content"}                             # the only keys of most messages
ANOTHER_DAY = timedelta(days=400)                       # changes the year, the month and both kinds of day


class Renderer:
    """A processor's chat template, with its clock stopped at `day` (an ISO date; None: it runs)."""

    def __init__(self, processor, day: str | None = None):
        if not processor.chat_template:
            raise StageError(f"base_model: its {type(processor).__name__} has no chat template",
                             "add chat_template: FILE.jinja to the recipe, or name an instruct model")
        reads_clock = day is not None and CLOCK in processor.chat_template
        self.processor, self.day = processor, date.fromisoformat(day) if reads_clock else None
        self.options: dict = {}                         # tools and arguments of a row's renders
        self.skeletons: dict[str, str] = {}             # renders of marks, by the shape of their rows
        self.tokens = dict(tokenizer_of(processor).special_tokens_map)
        self.is_usual = isinstance(processor.chat_template, str) and type(processor).apply_chat_template in (
            ProcessorMixin.apply_chat_template, PreTrainedTokenizerBase.apply_chat_template)
        self.opening = opening_of(processor)
        self.typed: dict[str, bool] = {}                # whether a role's typed parts come out as their text
        for role in ("user", "system", "assistant", "tool"):
            self.typed[role] = self._takes_parts(role)

    def with_options(self, tools: list[dict], **options) -> "Renderer":
        """This template, given these tools and arguments in each render."""
        options |= {"tools": tools} if tools else {}
        other = self if options == self.options else copy.copy(self)
        other.options = options
        return other

    def render(self, messages: list[dict], prompt: bool = False) -> str:
        """A conversation's text; prompt: add the header that asks for a reply. RowError if it is refused."""
        return self._opened([self._shaped(message) for message in messages], prompt, self.day)

    def skeleton(self, messages: list[dict]) -> tuple[str, list[str]]:
        """(the render with a numbered mark in place of each text that isn't blank, these texts).

        It is rendered once for all rows of the same shape.
        """
        texts, marked = [], []
        for message in messages:
            parts = list(message["content"])
            for place, part in enumerate(parts):
                if part["type"] == "text" and part["text"].strip():
                    parts[place] = {"type": "text", "text": f"{MARK}{len(texts)}."}
                    texts.append(part["text"])
            marked.append({**message, "content": parts})
        shape = repr((marked, self.options))
        if shape not in self.skeletons:
            if len(self.skeletons) >= MOST_SHAPES:
                self.skeletons.clear()
            self.skeletons[shape] = self.render(marked)
        return self.skeletons[shape], texts

    def tells_day(self, messages: list[dict], text: str) -> bool:
        """Whether a conversation's text has the date: rendered on another day it would differ."""
        if self.day is None:
            return False
        shaped = [self._shaped(message) for message in messages]
        return text != self._opened(shaped, day=self.day + ANOTHER_DAY)

    def _opened(self, messages: list[dict], prompt: bool = False, day: date | None = None) -> str:
        text = self._apply(messages, prompt, day)
        return text if text.startswith(self.opening) else self.opening + text

    def _apply(self, messages: list[dict], prompt: bool = False, day: date | None = None) -> str:
        options = {**self.options, "tokenize": False, "add_generation_prompt": prompt}
        template = self.processor.chat_template
        if day:
            options["chat_template"] = template = stopped_clock(day) + template
        try:
            if self.is_usual and not self.options and all(each.keys() == PLAIN for each in messages):
                # What apply_chat_template does, without its copies of messages and Jinja's of all names.
                jinja = _compile_jinja_template(template)
                names = {**jinja.environment.globals, **self.tokens, "messages": messages, "tools": None,
                         "documents": None, "add_generation_prompt": prompt}
                return "".join(jinja.root_render_func(jinja.new_context(names, shared=True)))
            return self.processor.apply_chat_template(messages, **options)
        except TemplateSyntaxError as error:
            raise StageError(f"chat_template: line {error.lineno - bool(day)}: {error.message}",
                             "mend the template") from None
        except Exception as error:  # templates raise what they like: one of the kit's three boundaries
            raise RowError(f"the chat template refuses this conversation: {one_line(error)}",
                           "change the order of roles, or name a chat_template that takes it") from None

    def _shaped(self, message: dict) -> dict:
        """The message as this template takes it: typed parts or plain text, and without `train`, 02's own."""
        if "train" in message:
            message = {key: value for key, value in message.items() if key != "train"}
        if message["content"] and (self.typed.get(message["role"], True) or has_media(message)):
            return message
        return {**message, "content": "".join(texts_of(message))}

    def _takes_parts(self, role: str) -> bool:
        """Whether a role's typed parts are rendered as their text, not as an error, nothing or a list."""
        marked = {"role": role, "content": text_parts(MARK)}
        asked = self._shaped({"role": "user", "content": text_parts("x")})
        try:
            text = self._apply({"user": [marked], "system": [marked, asked]}.get(role, [asked, marked]))
        except RowError:
            return False
        return MARK in text and not QUOTED_TYPE.search(text)


@functools.cache
def stopped_clock(day: date) -> str:
    """A line of Jinja that makes `strftime_now(format)` give this day at midnight."""
    texts = {"%-d": str(day.day), "%-m": str(day.month)}     # without a zero: strftime can't everywhere
    texts |= {f"%{code}": day.strftime(f"%{code}") for code in "aAbBcdDeFHIjmMpSuUVwWxXyY"} | {"%%": "%"}
    filters = "".join(f" | replace({code!r}, {text!r})" for code, text in texts.items())
    return f"{{% macro {CLOCK}(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n"


def stop_clock(processor, day: str) -> None:
    """Stop the clock of a processor's template at this day (ISO), in the processor and in what it saves."""
    text = stopped_clock(date.fromisoformat(day)) + processor.chat_template
    processor.chat_template = tokenizer_of(processor).chat_template = text


def stands_in(text: str, render: str) -> bool:
    """Whether a text stands in a render, as it is or as JSON writes it."""
    return text.strip() in render or any(
        json.dumps(text, ensure_ascii=plain)[1:-1] in render for plain in (True, False))


def lost(text: str) -> RowError:
    """The RowError for a row with a text that the template drops or changes."""
    return RowError(f"the chat template drops or changes this text: {text[:60]!r}",
                    "name a chat_template that renders every message as it stands")


def unclear(reason: str) -> RowError:
    """The RowError for a row whose replies can't be told from the rest of its render."""
    return RowError(reason, "name a chat_template whose replies stand as they are given")
