"""The house rules that a program can hold: words, structure, and that README and Makefile mean what they say."""
import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("0*_*.py"))
LIBRARY = sorted((ROOT / "lib").rglob("*.py"))
CODE = SCRIPTS + LIBRARY
README = ROOT / "README.md"


def read(path):
    return path.read_text(encoding="utf-8")


def holding(pattern, paths=CODE):
    """The names of the files in which a pattern stands."""
    return [path.name for path in paths if re.search(pattern, read(path), re.MULTILINE)]


def test_the_map_of_lib_names_each_of_its_folders_and_what_is_beside_them():
    text = ast.get_docstring(ast.parse(read(ROOT / "lib" / "__init__.py")))
    named = re.findall(r"^    (\w+)  +\S", text, re.M) + re.findall(r"(\w+)\.py\s\(", text)
    there = {path.stem for path in (ROOT / "lib").iterdir() if path.name not in ("__init__.py", "__pycache__")}
    assert sorted(named) == sorted(there)


def test_each_folder_of_lib_says_what_it_is_for():
    assert all(ast.get_docstring(ast.parse(read(path))) for path in LIBRARY if path.name == "__init__.py")


def test_git_ignores_no_source_file():
    ignored = subprocess.run(["git", "check-ignore", *map(str, CODE)], cwd=ROOT, capture_output=True, text=True)
    assert ignored.stdout == ""


def test_lines_end_at_110_columns():
    assert not holding(r"^.{111}")


def test_no_file_of_lib_imports_a_numbered_script():
    assert not holding(r"import_module\(.0\d_|from 0\d_", LIBRARY)


def test_a_family_is_only_asked_for_in_the_registry():
    assert set(holding(r"model_type *(==|in) ")) <= {"registry.py"}


def test_nothing_is_pickled():
    assert not holding(r"^\s*import pickle|torch\.load\(|torch\.save\(")


def test_exceptions_are_swallowed_only_at_the_three_boundaries():
    broad = [path.name for path in CODE for _ in re.findall(r"except Exception|except:", read(path))]
    assert broad == ["media.py", "render.py", "hooks.py"]


def test_every_public_function_has_a_docstring():
    bare = [f"{path.name}: {node.name}" for path in CODE for node in ast.parse(read(path)).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))
            and not node.name.startswith("_") and not ast.get_docstring(node)]
    assert not bare


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_scripts_help_says_how_to_run_what_it_reads_writes_and_where_to_fork(path):
    doc = ast.get_docstring(ast.parse(read(path)))
    assert doc.startswith(f"{path.stem}: ")
    assert f"python {path.name}" in doc
    assert all(word in doc for word in ("Reads:", "Writes:", "Source:", "Fork me to:"))


def commands(text):
    """The shell commands in a README's plain code blocks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M)
    return [line.strip() for block in blocks for line in block.splitlines() if re.match(r"(make|python3?|torchrun) ", line)]


def test_every_script_and_recipe_that_the_readme_names_exists():
    text = read(README)
    named = set(re.findall(r"(?<![\w/.])((?:recipes|lib|tests)/[\w/]+\.\w+|0\d_\w+\.py)", text))
    missing = [name for name in named if not (ROOT / name).exists()]
    assert named and not missing


def test_every_function_that_the_readme_says_to_edit_exists():
    text = read(README)
    places = re.findall(r"`([\w/]+\.py):([\w.]+)`", text)
    assert places
    for path, name in places:
        assert re.search(rf"(def|class) {name.rsplit('.', 1)[-1]}\b|^{name} = ", read(ROOT / path), re.M), name


def texts_of(path):
    """Every text that a file's code holds, with … for what an f-string fills in."""
    for node in ast.walk(ast.parse(read(path))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)


def test_every_message_that_the_readme_explains_is_one_that_the_code_prints():
    table = read(README).partition("## When it stops")[2].partition("\n## ")[0]
    fragments = [each for row in re.findall(r"^\| (`.*?) \|", table, re.M) for each in re.findall(r"`([^`]+)`", row)]
    said = "\n".join(text for path in CODE for text in texts_of(path)).replace("missing_keys", "missing keys")
    assert len(fragments) > 20
    assert not [each for each in fragments if each not in said]


def test_every_make_target_that_the_readme_names_exists():
    targets = re.findall(r"^([\w-]+):", read(ROOT / "Makefile"), re.M)
    named = set(re.findall(r"`?make ([\w-]+)", read(README)))
    assert named and named <= set(targets)


def test_readme_and_makefile_run_the_same_stages_in_order():
    stages = [path.name for path in SCRIPTS]
    for text in ("\n".join(commands(read(README))),
                 read(ROOT / "Makefile")):
        found = list(dict.fromkeys(re.findall(r"0\d_\w+\.py", text)))
        assert found == stages


def test_ci_runs_what_the_readme_says():
    assert "make test" in read(ROOT / ".ci" / "run")


def test_requirements_are_pinned():
    lines = [line for line in read(ROOT / "requirements.txt").splitlines() if line and line[0] != "#"]
    assert lines and all(re.fullmatch(r"[\w.\-\[\]]+==[\w.]+", line) for line in lines)


def test_the_table_of_families_is_what_registry_zoo_recipes_and_suite_make_it(zoo):
    pytest.importorskip("mistral_common", reason="Voxtral's checkpoint can't be built without it")
    from tests.family_table import table
    assert table(zoo) in read(README), "python -m tests.family_table --write"
