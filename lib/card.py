"""card: the README.md of an export: what it is, how to load and serve it, how good it is, what it is made of.

Fork me to: say more about the data, the licence or the intended use.
"""
import json
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from lib.checks import is_data_id
from lib.ledger import read_json
from lib.plan import public_name

LOADING = {
    "adapter": """\
from peft import PeftModel
from transformers import AutoProcessor, {cls}

BASE = "{base}"    # the base model: a hub id, or the folder where you have it
FOLDER = "."    # the folder of this card

model = {cls}.from_pretrained(BASE, {revision}dtype="{dtype}")
model = PeftModel.from_pretrained(model, FOLDER)
processor = AutoProcessor.from_pretrained(FOLDER)""",
    "model": """\
from transformers import AutoProcessor, {cls}

FOLDER = "."    # the folder of this card

model = {cls}.from_pretrained(FOLDER, dtype="{dtype}")
processor = AutoProcessor.from_pretrained(FOLDER)""",
}
ASKING = """\

content = {content}
messages = [{{"role": "user", "content": content}}]
inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True,
                                       return_dict=True, return_tensors="pt").to(model.device)
answer = model.generate(**inputs, max_new_tokens={tokens}, do_sample=False)
print(processor.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""
CONTENT = {"vision": '[{"type": "image", "path": "photo.jpg"}, {"type": "text", "text": "What is this?"}]',
           "audio": '[{"type": "audio", "path": "speech.wav"}, {"type": "text", "text": "What is said?"}]',
           "language": '"What follows one?"'}
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)                      # that vLLM's --max-lora-rank may be
PRIVATE = ("output_dir", "url_hosts", "wandb_project", "wandb_entity", "wandb_name")
OWN_PROCESSOR = ("image_max_pixels", "image_min_pixels", "processor_kwargs")


@dataclass(frozen=True)
class Facts:
    """What card and report tell of a run; `given` are the knobs that its recipe sets."""
    config: dict
    given: list[str]
    plan: dict
    data: dict
    method: dict
    saved: dict
    check: dict

    @classmethod
    def of(cls, work, plan: dict, check: dict) -> "Facts":
        """Those of a run whose 06 is at work."""
        return cls(read_json(work.run / "01_config" / "config.json"),
                   read_json(work.run / "01_config" / "stages.json")["given"], plan,
                   read_json(work.input("02_data") / "report.json"),
                   read_json(work.input("04_lora") / "adapter.json"),
                   read_json(work.input("05_train") / "trained.json"), check)


def model_card(kind: str, facts: Facts) -> str:
    """The card of an adapter, model or merged model, as Markdown; it tells no path of this machine."""
    plan, check, counts = facts.plan, facts.check, facts.data["counts"]
    base, adapter, scores = public_name(plan), kind == "adapter", check["exact_match"]
    sees = {"vision", "audio"} & plan["parameters"].keys()
    about = {"base_model": base, "base_model_relation": "adapter" if adapter else "finetune",
             **licence_of(plan), "library_name": "peft" if adapter else "transformers",
             "pipeline_tag": "image-text-to-text" if sees else "text-generation"}
    header = "".join(f"{name}: {value}\n" for name, value in about.items())
    revision = f" at revision `{plan['revision']}`" if plan["revision"] else ""
    results = "No row was held out, so none was answered."
    if check["rows"]:
        results = (f"Exact match by greedy generation on {check['rows']} held-out rows: {scores['base']:.1%} "
                   f"before, {scores['tuned']:.1%} after.")
    serve = "\n\n".join(f"{words}\n\n```\n{command}\n```" if command else words
                        for words, command in serving(kind, facts))
    data = "".join(f"| {name} | {each['train_samples']:,} | {each['held_out_samples']:,} | "
                   f"{each['rejected_rows']:,} |\n" for name, each in datasets(facts))
    recipe = "\n".join(f"{knob}: {value}" for knob, value in recipe_of(facts))
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    return f"""---
{header}---

# {base}, fine-tuned

A {"LoRA adapter for" if adapter else "model made from"} `{base}`{revision}. {origin(kind, facts)}

## Load it

```python
{loading(kind, facts)}
```

## Serve it

{serve}

## Results

{results} Logits in a fresh process differ from those in training by at most
{check["exports"][kind]["max_logit_difference"]:.2g} of {check["exports"][kind]["max_logit"]:.3g}.

## Made from

{counts["train_samples"]:,} samples; {counts["held_out_samples"]:,} were held out, and \
{counts["rejected_rows"]:,} rows rejected. Method: {facts.method["method"]}.{clock(facts)}

| data set | samples | held out | rejected |
|---|---|---|---|
{data}
```yaml
{recipe}
```

Versions: {versions}. {licence_in_words(plan)}
"""


def loading(kind: str, facts: Facts) -> str:
    """Python that loads an export with plain libraries, and asks it something."""
    plan = facts.plan
    content = next(words for role, words in CONTENT.items() if role in plan["parameters"])
    code = LOADING["adapter" if kind == "adapter" else "model"].format(
        base=public_name(plan), cls=plan["class"], dtype=plan["dtype"],
        revision=f'revision="{plan["revision"]}", ' if plan["revision"] else "")
    return f"{code}\n{ASKING.format(content=content, tokens=facts.config['max_new_tokens'])}"


def serving(kind: str, facts: Facts) -> list[tuple[str, str]]:
    """[(a sentence, the command that it is about or "")]: how the export is served."""
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
    plan, rank = facts.plan, next(rank for rank in RANKS if rank >= facts.config["lora_r"])
    revision = f"--revision {plan['revision']} " if plan["revision"] else ""
    return [("An OpenAI-compatible server, by vLLM where it has this architecture; it is the model `tuned`:",
             f"vllm serve {public_name(plan)} {revision}--chat-template chat_template.jinja \\\n"
             f"  --enable-lora --max-lora-rank {rank} --lora-modules tuned=."), *hints]


def needs_merging(facts: Facts) -> list[str]:
    """Why an engine would serve this adapter otherwise than it was trained; [] where it wouldn't."""
    config, trained = facts.config, facts.method["trained_parameters"].keys()
    towers = [role for role in ("vision", "audio", "projector") if role in trained]
    own = [knob for knob in OWN_PROCESSOR if config[knob]]
    reasons = {f"{' and '.join(towers)} trained, and engines put LoRA on the language model alone unless "
               "they are told otherwise": towers,
               "experts trained, which not every engine takes from an adapter": facts.method["experts"],
               "DoRA is more than the LoRA that engines know": config["peft_use_dora"],
               f"{' and '.join(own)} changed the processor, and an engine takes the base's": own,
               f"a rank of {config['lora_r']} is more than vLLM takes": config["lora_r"] > RANKS[-1]}
    return [words for words, holds in reasons.items() if holds]


# ---- what it was made of ----

def origin(kind: str, facts: Facts) -> str:
    """Which step's weights these are, and what became of the base's types."""
    saved, plan = facts.saved, facts.plan
    words = f"These are the weights of step {saved['step']:,} of {saved['planned_steps']:,}"
    if saved["step"] < saved["trained_steps"]:
        metric = facts.config["metric_for_best_model"]
        words += f", whose {metric} was the best ({saved['best'][metric]:.4g})"
    elif saved["trained_steps"] < saved["planned_steps"]:
        words += ", where training stopped early"
    if plan["quantisation"]:
        words += f". In training the base had {plan['quantisation']['bits']} bits"
        words += "; here its original weights are merged" if kind == "merged" else ""
    if plan["stored_as"] == "fp8" and kind == "merged":
        words += f". The base's 8-bit floats were merged into {plan['dtype']}"
    return f"{words}."


def clock(facts: Facts) -> str:
    """A sentence where the chat template tells the day."""
    if not facts.data["counts"]["rows_that_tell_the_day"]:
        return ""
    return f" Its chat template writes today's date into a prompt; in training that was " \
           f"{facts.config['template_date']}."


def datasets(facts: Facts) -> list[tuple[str, dict]]:
    """[(a data set's hub id, or its file's name alone; its counts)]."""
    return [(path if is_data_id(path) and not Path(path).exists() else Path(path).name, counts)
            for path, counts in facts.data["datasets"].items()]


def recipe_of(facts: Facts, given: bool = True) -> list[tuple[str, str]]:
    """[(knob, value as JSON)] that the recipe sets, or of all others; without what is nobody's business."""
    return [(knob, without_folders(value)) for knob, value in facts.config.items()
            if (knob in facts.given) == given and knob not in PRIVATE]


def without_folders(value) -> str:
    """A knob's value as JSON, a line for each data set; of paths of this machine only the last part."""
    of_sets = isinstance(value, list) and value and isinstance(value[0], dict)
    lines = [json.dumps(public(each), ensure_ascii=False) for each in (value if of_sets else [value])]
    return "".join(f"\n  - {line}" for line in lines) if of_sets else lines[0]


def public(value):
    """A value whose paths tell no folder, and whose dicts have only what was set."""
    if isinstance(value, dict):
        return {key: public(inner) for key, inner in value.items() if inner not in (None, {}, [])}
    if isinstance(value, list):
        return [public(inner) for inner in value]
    is_path = isinstance(value, str) and (value.startswith(("/", "~", "./", "../")) or os.path.exists(value))
    return Path(value).name if is_path else value


def licence_of(plan: dict) -> dict[str, str]:
    """What the base's own card says about its licence; {} where it says nothing, or there is none here."""
    from huggingface_hub import hf_hub_download, metadata_load
    try:
        folder = Path(plan["base_model"])
        path = folder / "README.md" if folder.is_dir() else hf_hub_download(
            plan["base_model"], "README.md", revision=plan["revision"], local_files_only=True)
        said = metadata_load(path) or {}
    except (OSError, ValueError):                                # no card, none in the cache, or a broken one
        said = {}
    return {name: said[name] for name in ("license", "license_name", "license_link") if name in said}


def licence_in_words(plan: dict) -> str:
    """A sentence on the licence."""
    said = licence_of(plan)
    name = said.get("license_name", said.get("license"))
    own = name or "which its card doesn't name"
    return f"The licence is that of the base model ({own}) together with that of the data."
