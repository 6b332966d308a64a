"""resolve: the words of 01's command line, and a recipe read as a whole, all its problems said at once."""
import re
from pathlib import Path

from lib.config.reading import Reading, read_knobs
from lib.config.recipe import read_overrides, read_recipe
from lib.config.rules import RULES
from lib.run.errors import StageError


def sort_arguments(words: list[str]) -> tuple[Path, str | None, list[str]]:
    """(recipe, run folder or None where none is named, overrides) of a command line's words."""
    overrides = [word for word in words if re.match(r"[A-Za-z_][\w.\[\]]*=", word)]
    paths = [word for word in words if word not in overrides]
    if not paths:
        raise StageError("no recipe is named", "python 01_config.py recipes/demo.yaml runs/demo")
    if len(paths) > 2:
        raise StageError(f"{' '.join(paths[2:])}: neither the recipe, nor the run folder, nor key=value",
                         "write an override without spaces around its =, and quote it for the shell")
    if len(paths) == 2 and Path(paths[1]).is_file():
        raise StageError(f"{paths[1]} is a file, no run folder", f"python 01_config.py {paths[0]} runs/NAME")
    return Path(paths[0]), paths[1] if len(paths) == 2 else None, overrides


def as_override(flag: str, value: str = "VALUE", *_) -> str:
    """`lora_r=8` for the words --lora_r 8, --lora-r=8 and the like."""
    name, _, given = flag.lstrip("-").partition("=")
    return f"{name.replace('-', '_')}={given or value}"


def read_checked(schema: type, recipe_path: Path, text: str, overrides=()) -> Reading:
    """The Reading of a recipe by a schema, in which no knob contradicts another.

    Raises StageError with all problems of the recipe at once.
    """
    entries, problems = read_recipe(recipe_path, text)
    changes, more = read_overrides(overrides)
    reading = read_knobs(entries, changes, schema)
    problems += more + reading.problems
    k = schema(**reading.values)
    for rule in RULES:
        names = rule.knobs.split()
        if not reading.failed & set(names) and rule.contradict(k):
            problems.append((f"{reading.together(names)}: {rule.why}", rule.fix))
    if problems:
        *others, (what, fix) = problems                          # each in two lines, as if it were alone
        raise StageError("".join(f"{what}\n  fix: {fix}\nerror: " for what, fix in others) + what, fix)
    return reading
