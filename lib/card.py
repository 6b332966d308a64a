"""card: the README.md of an export: what it is, how to load it, how good it is, what it was made from.

Fork me to: say more about the data, the licence or the intended use.
"""
from importlib.metadata import version

from lib.plan import public_name

LOADING = {
    "adapter": """\
from peft import PeftModel
from transformers import AutoProcessor, {cls}

BASE = "{base}"    # the base model: a hub id, or the folder where you have it
FOLDER = "."    # the folder of this card

model = {cls}.from_pretrained(BASE, {revision}dtype="{dtype}")
{grown}model = PeftModel.from_pretrained(model, FOLDER)
processor = AutoProcessor.from_pretrained(FOLDER)""",
    "model": """\
from transformers import AutoProcessor, {cls}

FOLDER = "."    # the folder of this card

model = {cls}.from_pretrained(FOLDER, dtype="{dtype}")
processor = AutoProcessor.from_pretrained(FOLDER)""",
}
GROWN = "model.resize_token_embeddings({rows}, mean_resizing=False)    # the adapter holds the new rows\n"


def model_card(kind: str, plan: dict, counts: dict, trained: dict, check: dict, day: str | None) -> str:
    """The card of an adapter, model or merged model, as Markdown; it tells no path of this machine.

    counts: 02's report; trained: 04's adapter.json; check: 06's check.json; day: what the chat template told
    in training, if it tells the day.
    """
    base, adapter, scores = public_name(plan), kind == "adapter", check["exact_match"]
    sees = {"vision", "audio"} & plan["parameters"].keys()
    what = "LoRA adapter for" if adapter else "model made from"
    revision = f" at revision `{plan['revision']}`" if plan["revision"] else ""
    snippet = LOADING["adapter" if adapter else "model"].format(
        base=base, cls=plan["class"], dtype=plan["dtype"],
        grown=GROWN.format(rows=plan["grown_to"]) if plan["grown_to"] else "",
        revision=f'revision="{plan["revision"]}", ' if plan["revision"] else "")
    results = "No row was held out, so none was answered."
    if check["rows"]:
        results = (f"Exact match by greedy generation on {check['rows']} held-out rows: {scores['base']:.1%} "
                   f"before, {scores['tuned']:.1%} after.")
    clock = (f" Its chat template writes today's date into a prompt; in training that was {day}."
             if day else "")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    return f"""---
base_model: {base}
library_name: {"peft" if adapter else "transformers"}
pipeline_tag: {"image-text-to-text" if sees else "text-generation"}
---

# {base}, fine-tuned

A {what} `{base}`{revision}.

## Load it

```python
{snippet}
```

## Results

{results} Logits in a fresh process differ from those in training by at most
{check["exports"][kind]["max_logit_difference"]:.2g} of {check["exports"][kind]["max_logit"]:.3g}.

## Made from

{counts["train_samples"]:,} samples; {counts["held_out_samples"]:,} were held out, and \
{counts["rejected_rows"]:,} rows rejected. Method: {trained["method"]}.{clock}

Versions: {versions}. The licence is the base model's, together with that of the data.
"""
