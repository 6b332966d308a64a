"""prefix: a prompt and its reply given to the processor apart, as PaliGemma's takes them.

Such a model's prompt is a prefix, all of whose tokens see one another; a reply's tokens see what is before
them. So the processor has to know where the reply begins, and writes more into the prompt than media: the
first token behind the pictures, and a newline at its end.
"""
from lib.text.processor import placeholders, tokenizer_of


def process(processor, text: str, seam: int | None, **options) -> dict:
    """The processor's tensors of a text, and all that it wrote into it.

    seam: the character at which the reply begins; None: the text is a prompt alone. Offsets of tokens are
    those in the text with what was written.
    """
    prompt, reply = text[:seam], "" if seam is None else text[seam:]
    apart = {"text_pair": [reply]} if reply else {}
    batch = dict(processor(text=[prompt], **apart, **options))
    batch.pop("labels", None)
    (media,), token = batch["text_replacement_offsets"], placeholders(processor)["image"]
    behind = prompt.rfind(token) + len(token)
    written = [*((tuple(each["span"]), each["replacement"]) for each in media),
               ((behind, behind), tokenizer_of(processor).bos_token), ((len(prompt), len(prompt)), "\n")]
    replaced = placed(written)
    of_reply = batch["token_type_ids"][..., None]                                # [1, T, 1], 1 in the reply
    offsets = batch["offset_mapping"] + of_reply * replaced[-1]["new_span"][1]
    return batch | {"offset_mapping": offsets, "text_replacement_offsets": [replaced]}


def placed(written: list[tuple[tuple[int, int], str]]) -> list[dict]:
    """{span, new_span, replacement} of each (span in the text, what was written there), in their order."""
    found, shift = [], 0
    for (start, end), replacement in written:
        new_span = start + shift, start + shift + len(replacement)
        found.append({"span": (start, end), "new_span": new_span, "replacement": replacement})
        shift += len(replacement) - (end - start)
    return found
