"""facts: what a model card and a report say about a run, fit for others: no folder, no host, no account."""
import json
import os
from dataclasses import dataclass
from pathlib import Path

from lib.config.paths import is_data_id
from lib.run.ledger import read_json

PRIVATE = ("output_dir", "url_hosts", "wandb_project", "wandb_entity", "wandb_name")


@dataclass(frozen=True)
class Facts:
    """What a model card and a report say about a run. given: the knobs that its recipe sets."""
    config: dict
    given: list[str]
    plan: dict
    data: dict
    method: dict
    saved: dict
    check: dict

    @classmethod
    def of(cls, work, plan: dict, check: dict) -> "Facts":
        """The facts of a run, gathered while its 06_save runs."""
        return cls(read_json(work.run / "01_config" / "config.json"),
                   read_json(work.run / "01_config" / "stages.json")["given"], plan,
                   read_json(work.input("02_data") / "report.json"),
                   read_json(work.input("04_lora") / "adapter.json"),
                   read_json(work.input("05_train") / "trained.json"), check)


def origin(kind: str, facts: Facts) -> str:
    """A sentence or two: which step's weights an export holds, and what became of a quantised base."""
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
    """Sentences on the day that the chat template writes; "" where it writes none."""
    if not facts.data["counts"]["rows_that_tell_the_day"]:
        return ""
    day = facts.config["template_date"]
    return f" Its chat template writes a date into a prompt: {day} on any day, as in training. Without the " \
           "template's first line it is today's."


def datasets(facts: Facts) -> list[tuple[str, dict]]:
    """[(a data set's hub id, or the name of its file without folders; its counts)]."""
    return [(path if is_data_id(path) and not Path(path).exists() else Path(path).name, counts)
            for path, counts in facts.data["datasets"].items()]


def recipe_of(facts: Facts, given: bool = True) -> list[tuple[str, str]]:
    """[(knob, value as JSON)] of the knobs that the recipe sets, or of all others; without private ones."""
    return [(knob, without_folders(value)) for knob, value in facts.config.items()
            if (knob in facts.given) == given and knob not in PRIVATE]


def without_folders(value) -> str:
    """A knob's value as JSON, one line for each data set, with paths cut to their last part."""
    of_sets = isinstance(value, list) and value and isinstance(value[0], dict)
    lines = [json.dumps(public(each), ensure_ascii=False) for each in (value if of_sets else [value])]
    return "".join(f"\n  - {line}" for line in lines) if of_sets else lines[0]


def public(value):
    """A value fit for others: its paths without folders, its dicts without what wasn't set."""
    if isinstance(value, dict):
        return {key: public(inner) for key, inner in value.items() if inner not in (None, {}, [])}
    if isinstance(value, list):
        return [public(inner) for inner in value]
    is_path = isinstance(value, str) and (value.startswith(("/", "~", "./", "../")) or os.path.exists(value))
    return Path(value).name if is_path else value


def licence_of(plan: dict) -> dict[str, str]:
    """What the base's own model card says about its licence; {} where it says nothing or isn't here."""
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
