"""The README's table of families, made of the registry, the zoo's checkpoints, the recipes and the suite.

    python -m tests.family_table            # prints it
    python -m tests.family_table --write    # puts it into the README
"""
import functools
import importlib
import inspect
import re
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open

from lib.models.plan import load_config
from lib.registry import FAMILIES, Family, family_of, kinds_without_tower, model_class
from lib.run.stage import ROOT
from lib.text.processor import KINDS, complete, load_processor, placeholders
from tests import zoo

HEADER = ("family", "model type", "class", "media", "packs", "expert LoRA", "recipes", "checks", "also needs", "note")
SUITE = ("tests.test_families", "tests.test_six_scripts")          # which checks every family
README = ROOT / "README.md"


def table(checkpoint: Callable[[str], Path]) -> str:
    """A Markdown table with a line for each record; `checkpoint` gives the folder of a variant of the zoo."""
    members = defaultdict(list)
    for name in zoo.NAMES:
        members[family_of(load_config(str(checkpoint(name)), None, False).model_type).name].append(name)
    checks, recipes = checks_by_variant(), recipes_by_variant()
    rows = [HEADER, ["---"] * len(HEADER)]
    for family in FAMILIES:
        names = members[family.name]
        folders = [checkpoint(name) for name in names]
        kinds = set().union(*(media(folder, family) for folder in folders))
        rows.append([
            family.name,
            ", ".join(f"`{kind}`" for kind in family.model_types),
            ", ".join(f"`{class_of(folder)}`" for folder in unique(folders, type_of)),
            ", ".join(kind for kind in KINDS if kind in kinds),
            f"no: {family.packing}" if family.packing else "yes",
            (f"no: {family.expert_lora}" if family.expert_lora else "yes") if any(map(has_experts, folders)) else "",
            ", ".join(f"[{stem}](recipes/{stem}.yaml)" for name in names for stem in recipes[name]),
            " + ".join(str(checks[name]) for name in names),
            ", ".join(pip.partition("==")[0] for pip in family.packages.values()),
            family.note])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# ---- a checkpoint ----

def type_of(folder: Path) -> str:
    """The model type of a checkpoint."""
    return load_config(str(folder), None, False).model_type


def class_of(folder: Path) -> str:
    """The name of the class that loads a checkpoint."""
    return model_class(load_config(str(folder), None, False)).__name__


def media(folder: Path, family: Family) -> set[str]:
    """The kinds of media that a checkpoint's processor prepares and its model takes."""
    processor = complete(load_processor(folder), family)
    lacks = kinds_without_tower(load_config(str(folder), None, False))
    return placeholders(processor).keys() - set(lacks)


def has_experts(folder: Path) -> bool:
    """Whether a checkpoint's weights hold experts."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return any(".experts." in name for name in file.keys())


def unique(items: list, key: Callable) -> list:
    """The first item of each key."""
    return list({key(item): item for item in reversed(items)}.values())[::-1]


# ---- the tests and the recipes ----

def recipes_by_variant() -> dict[str, list[str]]:
    """Variant of the zoo -> the recipes that train on it, but for those for a use."""
    from tests.test_recipes import VARIANTS
    found = defaultdict(list)
    for stem, name in VARIANTS.items():
        if not stem.startswith("use_"):
            found[name].append(stem)
    return found


def checks_by_variant() -> Counter:
    """Variant of the zoo -> how many tests of the suite run on it, by their parameters."""
    counts = Counter()
    for module in map(importlib.import_module, SUITE):
        for name, test in vars(module).items():
            if name.startswith("test_"):
                counts.update(set(zoo.NAMES) & set(parameters(test, module)))
    return counts


def parameters(test: Callable, module) -> list:
    """What a test is run with: the values of its parametrize marks, and the params of its module's fixtures."""
    values = [value for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize" for value in mark.args[1]]
    for argument in inspect.signature(test).parameters:
        marker = getattr(vars(module).get(argument), "_fixture_function_marker", None)
        values += (marker.params or ()) if marker else ()
    return [value for value in values if isinstance(value, str)]


def written(text: str, new: str) -> str:
    """The README's text with its table of families replaced."""
    return re.sub(r"^\| family \|.*?(?=\n\n)", lambda _: new, text, flags=re.S | re.M)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as root:
        made = table(functools.cache(lambda name: zoo.build(name, Path(root) / name)))
    if "--write" in sys.argv:
        README.write_text(written(README.read_text(encoding="utf-8"), made), encoding="utf-8")
    print(made)
