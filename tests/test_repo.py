"""The house rules that a program can hold: words, structure, and that README and Makefile mean what they say."""
import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("0*_*.py"))
LIBRARY = sorted((ROOT / "lib").glob("*.py"))
CODE = SCRIPTS + LIBRARY


def sources(paths):
    return [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in paths]


def test_git_ignores_no_source_file():
    ignored = subprocess.run(["git", "check-ignore", *map(str, CODE)], cwd=ROOT, capture_output=True, text=True)
    assert ignored.stdout == ""


@pytest.mark.parametrize("path", sources(CODE))
def test_lines_end_at_110_columns(path):
    long = [n for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if len(line) > 110]
    assert not long


@pytest.mark.parametrize("path", sources(LIBRARY))
def test_no_file_of_lib_imports_a_numbered_script(path):
    assert not re.search(r"import_module\(.0\d_|from 0\d_", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", sources(CODE))
def test_a_family_is_only_asked_for_in_the_registry(path):
    if path.name == "registry.py":
        return
    assert not re.search(r"model_type *(==|in) ", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", sources(CODE))
def test_nothing_is_pickled(path):
    assert not re.search(r"^\s*import pickle|torch\.load\(|torch\.save\(", path.read_text(encoding="utf-8"), re.M)


@pytest.mark.parametrize("path", sources(CODE))
def test_exceptions_are_swallowed_only_at_the_three_boundaries(path):
    text = path.read_text(encoding="utf-8")
    broad = len(re.findall(r"except Exception|except:", text))
    assert broad == {"hooks.py": 1, "media.py": 1, "render.py": 1}.get(path.name, 0)


@pytest.mark.parametrize("path", sources(CODE))
def test_every_public_function_has_a_docstring(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bare = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
            and not node.name.startswith("_") and not ast.get_docstring(node)]
    assert not bare


@pytest.mark.parametrize("path", sources(SCRIPTS))
def test_a_scripts_help_says_how_to_run_what_it_reads_writes_and_where_to_fork(path):
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert doc.startswith(f"{path.stem}: ")
    assert f"python {path.name}" in doc
    assert all(word in doc for word in ("Reads:", "Writes:", "Source:", "Fork me to:"))


def commands(text):
    """The shell commands in a README's plain code blocks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M)
    return [line.strip() for block in blocks for line in block.splitlines() if re.match(r"(make|python3?|torchrun) ", line)]


def test_every_script_and_recipe_that_the_readme_names_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w/.])((?:recipes|lib|tests)/[\w/]+\.\w+|0\d_\w+\.py)", text))
    missing = [name for name in named if not (ROOT / name).exists()]
    assert named and not missing


def test_every_function_that_the_readme_says_to_edit_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    places = re.findall(r"`([\w/]+\.py):([\w.]+)`", text)
    assert places
    for path, name in places:
        assert re.search(rf"(def|class) {name.rsplit('.', 1)[-1]}\b|^{name} = ", (ROOT / path).read_text(encoding="utf-8"), re.M), name


def test_every_make_target_that_the_readme_names_exists():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    named = set(re.findall(r"`?make ([\w-]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert named and named <= set(targets)


def test_readme_and_makefile_run_the_same_stages_in_order():
    stages = [path.name for path in SCRIPTS]
    for text in ("\n".join(commands((ROOT / "README.md").read_text(encoding="utf-8"))),
                 (ROOT / "Makefile").read_text(encoding="utf-8")):
        found = list(dict.fromkeys(re.findall(r"0\d_\w+\.py", text)))
        assert found == stages


def test_ci_runs_what_the_readme_says():
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_requirements_are_pinned():
    lines = [line for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    assert lines and all(re.fullmatch(r"[\w.\-\[\]]+==[\w.]+", line) for line in lines)


def test_the_table_of_families_is_what_registry_zoo_recipes_and_suite_make_it(zoo):
    pytest.importorskip("mistral_common", reason="Voxtral's checkpoint can't be built without it")
    from tests.family_table import table
    assert table(zoo) in (ROOT / "README.md").read_text(encoding="utf-8"), "python -m tests.family_table --write"
