"""rows: a data set's rows turned into measured samples, or into rejects that say why they can't be used."""
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lib.data import files, sources
from lib.data.counting import TokenCounter
from lib.data.length import Length, TooLong
from lib.data.messages import normalise, texts_of
from lib.data.parts import NOUNS
from lib.data.shapes import ROLES, Shape, shortened, tools_of
from lib.media import media
from lib.media.fetch import FetchError, Fetcher
from lib.media.locating import MediaError, url_of
from lib.run.errors import RowError
from lib.run.terminal import counted
from lib.text.chat import Encoder
from lib.text.template import Conversation, Labels, Template

# <box>, <|box_start|>, <point x=…, <loc0123>, bbox, and brackets around two or four numbers.
COORDINATES = re.compile(r"<\|?(box|point|loc)|\bbbox|[(\[]\s*\d+(\.\d+)?(\s*,\s*\d+(\.\d+)?){1,3}\s*[)\]]",
                         re.IGNORECASE)


@dataclass(frozen=True)
class Rows:
    """Turns the rows of one data set into samples.

    uses(path, sha256): tells the stage that a file was read, be it good or bad.
    """
    spec: dict
    name: str
    config: object
    template: Template
    encoder: Encoder
    length: Length
    uses: object
    shape: Shape
    labels: Labels
    root: Path
    fetcher: Fetcher

    @classmethod
    def of(cls, spec: dict, name: str, work, template: Template, encoder: Encoder) -> "Rows":
        """The Rows of an entry of `datasets`; label knobs that it doesn't set are those of the recipe."""
        knobs = {key: getattr(work.config, key) if spec[key] is None else spec[key]
                 for key in ("train_on_inputs", "roles_to_train", "train_on_eos")}
        labels = Labels(ROLES if knobs["train_on_inputs"] else tuple(knobs["roles_to_train"]),
                        knobs["train_on_eos"])
        fetcher = Fetcher(work.run / "media", work.config.url_timeout_seconds,
                          int(work.config.url_max_mib * 2**20), work.config.url_retries,
                          tuple(work.config.url_hosts))
        length = Length(work.config, encoder, TokenCounter(encoder))
        return cls(spec, name, work.config, template, encoder, length, work.uses, Shape.of(spec), labels,
                   sources.root(spec), fetcher)

    def parsed(self, row) -> tuple[list[dict], list, list[dict]]:
        """(messages, media as the row gives them, tools) of a row."""
        return *normalise(row, self.shape), tools_of(row, self.shape)

    def measured(self, given: list[files.Row]) -> tuple[list[dict], list[dict]]:
        """(samples, rejects) of some rows; texts without media are tokenized together, to save time."""
        parsed = [tried(self.parsed, files.parsed(row)) for _, _, row in given]
        given_media = [source for row in parsed if not isinstance(row, RowError) for source in row[1]]
        self.fetcher.fetch_all([url for url in map(url_of, given_media) if url])
        talks = [tried(self.talk, row) for row in parsed]
        texts = [each for talk in talks if not isinstance(talk, RowError) for each in talk if not each.media]
        counted = self.length.counter.texts([(each.text, each.spans) for each in texts])
        known = {id(each): counts for each, counts in zip(texts, counted)}
        samples, rejects = [], []
        for (number, where, _), row, talk in zip(given, parsed, talks):
            try:
                samples += self.samples(row, number, talk, known)
            except RowError as error:
                rejects.append({"dataset": self.spec["path"], "row": number, "where": where,
                                "reason": error.reason, "fix": error.fix,
                                "too_long": isinstance(error, TooLong)})
        return samples, rejects

    def talk(self, row: tuple) -> list[Conversation]:
        """The conversations of a parsed row (several if the template rewrites earlier turns)."""
        messages, _, tools = row
        template = self.template.with_options(tools, **self.config.chat_template_kwargs)
        talks = template.conversations(messages, self.labels)
        if self.encoder.prefix and any(talk.spans[0][0] < talk.reply[0] for talk in talks):
            raise RowError("a prompt can't be trained, since base_model sees all of it at once",
                           "train_on_inputs: false, roles_to_train: [assistant]; no train: true elsewhere")
        return talks

    def samples(self, row: tuple | RowError, number: int, talk: list[Conversation] | RowError,
                known: dict[int, tuple]) -> list[dict]:
        """The samples of a parsed row and its conversations; RowError where it can't be used.

        known: {id of a conversation: its counts}, of those without media.
        """
        if isinstance(row, RowError):
            raise row
        messages, given, _ = row
        pictures = sum(part["type"] == "image" for message in messages for part in message["content"])
        if self.config.max_images is not None and pictures > self.config.max_images:
            raise RowError(f"{counted(pictures, 'picture')}, over max_images {self.config.max_images}",
                           "raise max_images, or remove some with their parts")
        records, opened = self.read_media(messages, given)
        if isinstance(talk, RowError):
            raise talk
        found = []
        for conversation in talk:
            counts = known.get(id(conversation))
            conversation, sizes = self.length.fitted(conversation, opened[:conversation.media], counts)
            found.append({"sample_id": f"{self.name}-{number}" + (f".{len(found)}" if found else ""),
                          "row": number, "dataset": self.spec["path"],
                          "messages": json.dumps(messages, ensure_ascii=False),
                          "text": conversation.text,
                          "spans": [{"start": start, "end": end} for start, end in conversation.spans],
                          "reply": dict(zip(("start", "end"), conversation.reply)),
                          "media": records[:conversation.media], "ends_added": conversation.ends_added,
                          "put_in": conversation.put_in, "tells_day": conversation.tells_day,
                          "pictures": conversation.media if pictures == len(given) else 0,
                          "coordinates": pictures > 0 and has_coordinates(messages), **sizes})
        return found

    def read_media(self, messages: list[dict], given: list) -> tuple[list[dict], list]:
        """(media records, decoded media) of a row, or RowError; files, good or bad, become stage inputs."""
        kinds = [part["type"] for message in messages for part in message["content"]
                 if part["type"] != "text"]
        records, opened = [], []
        for kind, source in zip(kinds, given, strict=True):
            try:
                if url := url_of(source):
                    record, medium = self.read_fetched(url, kind)
                else:
                    record, medium = media.read_medium(source, self.root, kind, self.encoder.decoding)
            except MediaError as error:
                if isinstance(error.name, Path) and error.name.is_file():
                    self.uses(error.name)
                raise RowError(str(error), f"replace that {NOUNS[kind]}, or remove the row") from None
            for path in media.files_of(record):
                self.uses(path, sha256=record["sha256"] if record["bytes"] is None else None)
            records.append(record)
            opened.append(medium)
        return records, opened

    def read_fetched(self, url: str, kind: str) -> tuple[dict, object]:
        """(media record, decoded medium) of a url, or a MediaError with how it was served."""
        served, shown = "", shortened(url)
        try:
            path, served = self.fetcher.path_of(url)
            return media.read_medium(path, Path(), kind, self.encoder.decoding)
        except FetchError as error:
            raise MediaError(shown, str(error)) from None
        except MediaError as error:
            why = f"{served}: {str(error).removeprefix(f'{error.name}: ')}"
            self.fetcher.refuse(url, why)
            raise MediaError(shown, why) from None


def tried(step: Callable, given):
    """The result of a step; the RowError where it raises one, or is given one in place of a value."""
    try:
        return given if isinstance(given, RowError) else step(given)
    except RowError as error:
        return error


def has_coordinates(messages: list[dict]) -> bool:
    """Whether a row's texts hold boxes or points."""
    return any(COORDINATES.search(text) for message in messages for text in texts_of(message))
