"""The code that a stage runs, as hashes of its syntax trees: a comment or a line break is no edit."""

import ast
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path

from lib.run import ledger
from lib.run.errors import StageError
from lib.run.ledger import HOOK, name_of


def source(stem: str, knobs: Mapping) -> dict[str, str]:
    """{file: sha256} of the code that a stage runs.

    The files are its script, every file of lib that it imports, directly or through others, and those whose
    functions its knobs name. What is hashed is the syntax tree without docstrings, so comments, line breaks
    and help texts don't count.
    """
    digests, waiting = {}, [f"{stem}.py", *hook_files(knobs)]
    while waiting:
        name = waiting.pop()
        if name not in digests and (ledger.ROOT / name).is_file():
            digests[name], imported = _read_source(name, (ledger.ROOT / name).read_bytes())
            waiting += imported
    return dict(sorted(digests.items()))


def hook_files(knobs: Mapping) -> list[str]:
    """The files whose functions these knobs name, by their names in a ledger (`ledger.name_of`)."""
    texts = [text for value in knobs.values() for text in (value if isinstance(value, list) else [value])
             if isinstance(text, str)]
    return [name_of(Path(hook[1])) for hook in map(HOOK.fullmatch, texts) if hook]


@functools.lru_cache(maxsize=None)
def _read_source(name: str, text: bytes) -> tuple[str, tuple[str, ...]]:
    """The sha256 of one file's code, and the files of lib that its imports may mean."""
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise StageError(f"{name}:{error.lineno} is not Python: {error.msg}", f"edit {name}") from None
    modules = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        elif isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = Path(name).parts[: -node.level] if node.level else ()
            module = ".".join([*package, *filter(None, [node.module])])
            modules += [module, *(f"{module}.{alias.name}" for alias in node.names)]
    ours = [Path(*module.split(".")) for module in modules if module.split(".")[0] == "lib"]
    inits = [f"{folder}/__init__.py" for module in ours for folder in (module, *module.parents[:-1])]
    files = [f"{module}.py" for module in ours] + inits
    return hashlib.sha256(_text_of_tree(tree).encode()).hexdigest(), tuple(files)


def _text_of_tree(node) -> str:
    """A syntax tree as text, without empty fields: unlike `ast.dump`, the same in every Python version."""
    if isinstance(node, ast.AST):
        kept = ((name, value) for name, value in ast.iter_fields(node) if value not in (None, []))
        fields = (f"{name}={_text_of_tree(value)}" for name, value in kept)
        return f"{type(node).__name__}({','.join(fields)})"
    return f"[{','.join(map(_text_of_tree, node))}]" if isinstance(node, list) else repr(node)
