"""tokens: a sample's tokens as HTML: each with its id, trained ones marked, runs of media tokens folded."""
import re
from html import escape
from itertools import groupby

from lib.collator import IGNORE_INDEX
from lib.pages.page import cell
from lib.text.spans import BYTE_OF

KEY = ('<p class="note">The model learns to write the tokens on '
             '<span class="tokens"><mark><span>green</span></mark></span>, underlined. '
             'The others it reads, and they give no loss. Point at a token to see its id; '
             '<span class="tokens"><i>↵</i></span> is a newline, '
             '<span class="tokens"><i>·</i></span> a space that is easily missed.</p>')
SIGNS = {" ": "<i>·</i>", "\n": "<i>↵</i>\n", "\r": "<i>␍</i>", "\t": "<i>⇥</i>"}


def view(tokens, input_ids, labels, media_tokens=()):
    """HTML of every token, its id as title; trained ones in <mark>; a run of one media token is counted."""
    byte_level = any(sign in token for token in tokens for sign in "ĠĊ") and all(t[:1] != "▁" for t in tokens)
    rows = [(label != IGNORE_INDEX, token if token in media_tokens else n, token, token_id)
            for n, (token, token_id, label) in enumerate(zip(tokens, input_ids, labels, strict=True))]
    html = []
    for trained, run in groupby(rows, key=lambda row: row[0]):
        spans = "".join(_token_span(list(same), media_tokens, byte_level)
                        for _, same in groupby(run, key=lambda row: row[1]))
        html.append(f"<mark>{spans}</mark>" if trained else spans)
    return f'<div class="tokens">{"".join(html)}</div>'


def _token_span(same, media_tokens, byte_level):
    _, _, token, token_id = same[0]
    if token in media_tokens:
        times = f" ×{len(same)}" if len(same) > 1 else ""
        return f'<span class="media" title="id {token_id}">{escape(token)}{times}</span>'
    return f'<span title="id {token_id}">{_readable(token, byte_level)}</span>'


def _readable(token, byte_level):
    """The escaped text of one token, with signs for what would be invisible."""
    if not byte_level:
        token = token.replace("▁", " ")
        token = "\n" if token == "<0x0A>" else token
    elif all(character in BYTE_OF for character in token):  # added tokens are stored as plain text
        token = bytes(BYTE_OF[character] for character in token).decode("utf-8", "backslashreplace")

    def sign(match):
        character = match[0]
        plain = escape(character) if character.isprintable() else f"<i>U+{ord(character):04X}</i>"
        return SIGNS.get(character, plain)
    # A space between words speaks for itself; a doubled, trailing or lonely one does not.
    return re.sub(r"(?<= ) | (?=\s|$)|[^ ]", sign, token)


def card(title, media_html, token_html, facts, anchor=""):
    """HTML of one sample: its facts ([(label, value)]), media and tokens; anchor: an id for links to it."""
    facts = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(cell(value))}</dd></div>"
                    for label, value in facts)
    media = f'<div class="pictures">{media_html}</div>' if media_html else ""
    place = f' id="{escape(anchor)}"' if anchor else ""
    return (f'<article class="sample"{place}><h3>{escape(title)}</h3><dl class="facts">{facts}</dl>'
            f"{media}{token_html}</article>")
