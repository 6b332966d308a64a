"""serving: how an export is loaded, asked and served by others' programs.

Source: vLLM's `serve --help` and its LoRA guide; `transformers serve --help`.
Fork me to: name another engine (`serving`).
"""
from lib.models.plan import public_name
from lib.pages.facts import Facts

LOADING = {
    "adapter": """\
from peft import PeftModel
from transformers import {config}AutoProcessor, {cls}

BASE = "{base}"    # the base model: a hub id, or the folder where you have it
FOLDER = "."    # the folder of this card

{changes}model = {cls}.from_pretrained(BASE, {revision}dtype="{dtype}")
{grown}model = PeftModel.from_pretrained(model, FOLDER)
processor = AutoProcessor.from_pretrained(FOLDER)""",
    "model": """\
from transformers import AutoProcessor, {cls}

FOLDER = "."    # the folder of this card

model = {cls}.from_pretrained(FOLDER, dtype="{dtype}")
processor = AutoProcessor.from_pretrained(FOLDER)""",
}
GROWN = "model.resize_token_embeddings({rows}, mean_resizing=False)    # the adapter holds the new rows\n"
ASKING = """\

content = {content}
messages = [{{"role": "user", "content": content}}]
inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True,
                                       return_dict=True, return_tensors="pt").to({where})
answer = model.generate(**inputs, max_new_tokens={tokens}, do_sample=False)
print(processor.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""
CONTENT = {"vision": '[{"type": "image", "path": "photo.jpg"}, {"type": "text", "text": "What is this?"}]',
           "audio": '[{"type": "audio", "path": "speech.wav"}, {"type": "text", "text": "What is said?"}]',
           "language": '"What follows one?"'}
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)                      # values that vLLM's --max-lora-rank takes
OWN_PROCESSOR = ("image_max_pixels", "image_min_pixels", "max_image_tokens", "processor_kwargs")


def loading(kind: str, facts: Facts) -> str:
    """Python that loads an export with plain libraries, and asks it something."""
    plan = facts.plan
    content = next(words for role, words in CONTENT.items() if role in plan["parameters"])
    at, config, changes = f'revision="{plan["revision"]}", ' if plan["revision"] else "", "", ""
    if plan["text_config"]:                              # what the base's own configuration doesn't say
        changes = f"config = AutoConfig.from_pretrained({f'BASE, {at}'.rstrip(', ')})\n" + "".join(
            f"config.get_text_config().{name} = {value!r}\n" for name, value in plan["text_config"].items())
        at, config = f"config=config, {at}", "AutoConfig, "
    code = LOADING["adapter" if kind == "adapter" else "model"].format(
        base=public_name(plan), cls=plan["class"], dtype=plan["dtype"], revision=at, config=config,
        changes=changes, grown=GROWN.format(rows=plan["grown_to"]) if plan["grown_to"] else "")
    where = "model.device" if content == CONTENT["language"] else "model.device, model.dtype"
    return f"{code}\n{ASKING.format(content=content, where=where, tokens=facts.config['max_new_tokens'])}"


def serving(kind: str, facts: Facts) -> list[tuple[str, str]]:
    """[(a sentence, its command or "")] on how an export is served."""
    size = facts.config["image_size"]
    size = " x ".join(map(str, size if isinstance(size, list) else [size, size]))
    hints = [(f"In training every picture was fitted into {size} pixels, on black: do so before you ask.",
              "")] if facts.config["image_size"] else []
    if kind != "adapter":
        return [("An OpenAI-compatible server, by vLLM where it has this architecture:", "vllm serve ."),
                ('or by transformers, with `pip install "transformers[serving]"`:', "transformers serve ."),
                *hints]
    if reasons := needs_merging(facts):
        where = "It is in `merged/`." if "merged" in facts.check["exports"] else \
            "`merge: true` in the recipe writes it."
        return [(f"Serve the merged model, not this adapter: {'; '.join(reasons)}. {where}", ""), *hints]
    plan, rank = facts.plan, next(rank for rank in RANKS if rank >= facts.method["lora_r"])
    revision = f"--revision {plan['revision']} " if plan["revision"] else ""
    return [("An OpenAI-compatible server, by vLLM where it has this architecture; it is the model `tuned`:",
             f"vllm serve {public_name(plan)} {revision}--chat-template chat_template.jinja \\\n"
             f"  --enable-lora --max-lora-rank {rank} --lora-modules tuned=."), *hints]


def needs_merging(facts: Facts) -> list[str]:
    """Reasons why an engine would serve an adapter differently from how it was trained; [] if it wouldn't."""
    config, rank, trained = facts.config, facts.method["lora_r"], facts.method["trained_parameters"].keys()
    towers = [role for role in ("vision", "audio", "projector") if role in trained]
    own = [knob for knob in OWN_PROCESSOR if config[knob]]
    reasons = {f"{' and '.join(towers)} trained, and engines put LoRA on the language model alone unless "
               "they are told otherwise": towers,
               "experts trained, which not every engine takes from an adapter": facts.method["experts"],
               "DoRA is more than the LoRA that engines know": facts.method["method"].startswith("DoRA"),
               "new tokens have rows in the adapter, which engines pass over": facts.plan["new_rows"],
               f"{' and '.join(own)} changed the processor, and an engine takes the base's": own,
               "its rotary positions are not the base's, whose configuration an engine reads":
               facts.plan["text_config"],
               f"a rank of {rank} is more than vLLM takes": rank > RANKS[-1]}
    return [words for words, holds in reasons.items() if holds]
