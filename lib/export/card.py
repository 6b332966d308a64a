"""card: the README.md of an export: what it is, how to load and serve it, how good it is, what it is made of.

Fork me to: say more about the data, the licence or the intended use.
"""
from importlib.metadata import version

from lib.export.serving import loading, serving
from lib.models.plan import public_name
from lib.pages.facts import Facts, clock, datasets, licence_in_words, licence_of, origin, recipe_of


def model_card(kind: str, facts: Facts) -> str:
    """The card of an adapter, model or merged model, as Markdown, without any path of this machine."""
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
