"""rows: a data set's rows as measured samples, or a RowError that says why one can't be used.

Fork me to: do something else with what is too long (`Rows.fitted`).
"""
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from lib import files, media, sources
from lib.budget import has_coordinates, largest_budget
from lib.chat import Encoder
from lib.counting import Counter
from lib.fetch import FetchError, Fetcher
from lib.locating import MediaError, url_of
from lib.messages import NOUNS, RowError, count, normalise
from lib.processor import placeholders, tokenizer_of
from lib.resolution import bounds_of
from lib.shapes import ROLES, Shape, shortened, tools_of
from lib.template import Conversation, Labels, Template

TRIES = 8                          # of cutting a text: its last tokens may be others without what followed

COUNTS = ("input_tokens", "supervised_tokens", "media_tokens", "cut_tokens", "image_bounds")


class TooLong(RowError):
    """A row that is over sequence_len."""


@dataclass(frozen=True)
class Rows:
    """What turns the rows of one data set into samples.

    uses(path, sha256): says to the stage that a file was read, be it good or bad.
    """
    spec: dict
    name: str
    config: object
    template: Template
    encoder: Encoder
    counter: Counter
    uses: object
    shape: Shape
    labels: Labels
    root: Path
    fetcher: Fetcher

    @classmethod
    def of(cls, spec: dict, name: str, work, template: Template, encoder: Encoder) -> "Rows":
        """The reader of an entry of `datasets`; what it leaves open is as for all data sets."""
        knobs = {key: getattr(work.config, key) if spec[key] is None else spec[key]
                 for key in ("train_on_inputs", "roles_to_train", "train_on_eos")}
        labels = Labels(ROLES if knobs["train_on_inputs"] else tuple(knobs["roles_to_train"]),
                        knobs["train_on_eos"])
        fetcher = Fetcher(work.run / "media", work.config.url_timeout_seconds,
                          int(work.config.url_max_mib * 2**20), work.config.url_retries,
                          tuple(work.config.url_hosts))
        return cls(spec, name, work.config, template, encoder, Counter(encoder), work.uses, Shape.of(spec),
                   labels, sources.root(spec), fetcher)

    def parsed(self, row) -> tuple[list[dict], list, list[dict]]:
        """(messages, media as the row gives them, tools) of a row."""
        return *normalise(row, self.shape), tools_of(row, self.shape)

    def measured(self, given: list[files.Row]) -> tuple[list[dict], list[dict]]:
        """(samples, rejects) of some rows. Texts without media are tokenized together, to save time."""
        parsed = [tried(self.parsed, files.parsed(row)) for _, _, row in given]
        given_media = [source for row in parsed if not isinstance(row, RowError) for source in row[1]]
        self.fetcher.fetch_all([url for url in map(url_of, given_media) if url])
        talks = [tried(self.talk, row) for row in parsed]
        texts = [each for talk in talks if not isinstance(talk, RowError) for each in talk if not each.media]
        counted = self.counter.texts([(each.text, each.spans) for each in texts])
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
        return template.conversations(messages, self.labels)

    def samples(self, row: tuple | RowError, number: int, talk: list[Conversation] | RowError,
                known: dict[int, tuple]) -> list[dict]:
        """The samples of a parsed row and its conversations, or a RowError; known: counts by `id`."""
        if isinstance(row, RowError):
            raise row
        messages, given, _ = row
        pictures = sum(part["type"] == "image" for message in messages for part in message["content"])
        if self.config.max_images is not None and pictures > self.config.max_images:
            raise RowError(f"{count(pictures, 'picture')}, over max_images {self.config.max_images}",
                           "raise max_images, or remove some with their parts")
        records, opened = self.read_media(messages, given)
        if isinstance(talk, RowError):
            raise talk
        found = []
        for conversation in talk:
            counts = known.get(id(conversation))
            conversation, sizes = self.fitted(conversation, opened[:conversation.media], counts)
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
        """(media records, decoded media), or a RowError. Their files are the stage's inputs, good or bad."""
        kinds = [part["type"] for message in messages for part in message["content"]
                 if part["type"] != "text"]
        records, opened = [], []
        for kind, source in zip(kinds, given, strict=True):
            try:
                if url := url_of(source):
                    record, medium = self.read_fetched(url, kind)
                else:
                    record, medium = media.read_medium(source, self.root, kind, self.encoder.sampling)
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
            return media.read_medium(path, Path(), kind, self.encoder.sampling)
        except FetchError as error:
            raise MediaError(shown, str(error)) from None
        except MediaError as error:
            why = f"{served}: {str(error).removeprefix(f'{error.name}: ')}"
            self.fetcher.refuse(url, why)
            raise MediaError(shown, why) from None

    def fitted(self, conversation: Conversation, opened: list, counts: tuple | None):
        """(the conversation, its counts), made to fit as excess_length_strategy says, or a RowError.

        Only text after the last medium is cut: media are whole, where the template put them. counts: those
        that are known without encoding it alone.
        """
        pictures = pictures_of(opened)
        if opened and len(pictures) == len(opened):
            counts = self.counter.row(conversation.text, conversation.spans, pictures)
        if counts and counts[0] <= self.config.sequence_len and counts[1]:
            return conversation, dict(zip(COUNTS, (*counts, 0, None)))
        encoded, cut, bounds = self.encode(conversation, opened), 0, None
        limit, smallest = self.config.sequence_len, ""
        length = encoded["input_ids"].shape[1]
        excess = too_long = length - limit
        while excess > 0 and self.config.excess_length_strategy == "truncate" and cut < TRIES:
            conversation = self.without_last(conversation, excess)
            encoded, cut = self.encode(conversation, opened), cut + 1
            excess = encoded["input_ids"].shape[1] - limit
        if excess > 0 and self.config.excess_length_strategy == "shrink_media" and pictures:
            bounds, smallest = self.shrunk(conversation, opened), ", even with the smallest pictures"
            if bounds is not None:
                encoded, excess = self.encode(conversation, opened, bounds), 0
        if excess > 0:
            raise TooLong(f"{count(length, 'token')}, over sequence_len {limit}{smallest}",
                          "raise sequence_len, shorten the row, or use smaller pictures")
        cut_tokens = 0 if bounds else max(0, too_long)
        return conversation, {**self.counts(encoded), "cut_tokens": cut_tokens, "image_bounds": bounds}

    def shrunk(self, conversation: Conversation, opened: list) -> str | None:
        """The bounds of its pictures, as large as may be, with which it fits, as JSON; None if none do."""
        processor, pixels = self.encoder.processor, self.encoder.pixels

        def fits(bounded, most: int) -> bool:
            rows = replace(self, encoder=replace(self.encoder, processor=bounded))
            return rows.encode(conversation, opened)["input_ids"].shape[1] <= self.config.sequence_len

        most = largest_budget(processor, pixels, fits)
        return None if most is None else json.dumps(bounds_of(processor, pixels, most))

    def without_last(self, conversation: Conversation, tokens: int) -> Conversation:
        """The conversation without its last tokens; TooLong where media or nothing to learn would be left."""
        text, tokenizer = conversation.text, tokenizer_of(self.encoder.processor)
        known = placeholders(self.encoder.processor).values()
        behind = max((text.rfind(token) + len(token) for token in known if token in text), default=0)
        rest = tokenizer(text[behind:], add_special_tokens=False, return_offsets_mapping=True)
        places = [start for start, _ in rest["offset_mapping"]]
        stop = behind + places[-tokens] if len(places) > tokens else behind
        spans = [(start, min(end, stop)) for start, end in conversation.spans if start < stop]
        start, end = conversation.reply
        if not spans or stop == behind:
            raise TooLong(f"cut to sequence_len {self.config.sequence_len} behind its last medium, it "
                          "teaches nothing", "raise sequence_len, or use smaller pictures")
        reply = (start, min(end, stop)) if start < stop else spans[-1]
        return replace(conversation, text=text[:stop], spans=spans, reply=reply)

    def encode(self, conversation: Conversation, opened: list, bounds: str | None = None) -> dict:
        """The tensors of a conversation; a RowError where the processor refuses its media."""
        try:
            return self.encoder.bounded(bounds).encode(conversation.text, conversation.spans, opened)
        except RowError:
            raise
        except (ValueError, RuntimeError) as error:
            sizes = ", ".join(f"{picture.width}x{picture.height}" for picture in pictures_of(opened))
            raise RowError(f"the processor refuses this row: {error} (pictures: {sizes or 'none'})",
                           "change the picture's size, or remove the row") from None

    def counts(self, encoded: dict) -> dict[str, int]:
        """The sample's token counts; a RowError if it teaches nothing."""
        counts = self.encoder.counts(*(encoded[name][0].numpy() for name in ("input_ids", "labels")))
        if not counts[1]:
            raise RowError("nothing to learn: no token is trained", "write what the assistant should answer")
        return dict(zip(COUNTS, counts))


def tried(step: Callable, given):
    """What a step makes of something, or what is wrong with it: a RowError given or raised."""
    try:
        return given if isinstance(given, RowError) else step(given)
    except RowError as error:
        return error


def pictures_of(opened: list) -> list:
    """Those of decoded media that are pictures."""
    return [medium for medium in opened if media.kind_of(medium) == "image"]
