"""The demo's data and the base model that is shipped for it: what they hold, and how fetching can fail.

The packages are the real ones: a test that needs one skips where it can't be fetched.
"""

import hashlib
import importlib
import json
import random
import re
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from lib.run.errors import StageError
from lib.run.stage import ROOT, STAGES
from recipes.demo import data

BASE = ROOT / "recipes" / "demo" / "base"


def fetched(name: str, fetch=data.fetch) -> dict[str, bytes]:
    """What `data.fetch` gives; the test is skipped where the package can't be had."""
    try:
        return fetch(name)
    except StageError as error:
        if "can't be fetched" not in error.what:
            raise
        pytest.skip(error.what)


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """A folder with the demo's data."""
    fetched("scikit-learn-1.9.1")
    folder = tmp_path_factory.mktemp("digits")
    data.write_digits(folder)
    return folder


def rows(folder: Path, part: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]


def answers(folder: Path, part: str) -> list[str]:
    return [row["messages"][1]["content"][0]["text"] for row in rows(folder, part)]


def pixels(folder: Path, part: str) -> set[bytes]:
    return {Image.open(folder / row["images"][0]).tobytes() for row in rows(folder, part)}


def test_the_demo_learns_a_batch_by_heart(digits, tmp_path, monkeypatch, capsys):
    """`05_train.py --check` says yes of the recipe that the README begins with."""
    for name, path in (("recipes", ROOT / "recipes"), ("data/demo", digits)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    importlib.import_module("01_config").main(["recipes/demo.yaml", "run"])
    for stem in STAGES[1:4]:
        importlib.import_module(stem).main(["run"])
    importlib.import_module("05_train").main(["run", "--check"])
    assert "labels, gradients and optimizer work together" in " ".join(capsys.readouterr().out.split())


# ---- the demo's task -------------------------------------------------------------------------------------


def test_all_digits_are_there_and_a_fifth_is_held_out(digits):
    assert (len(rows(digits, "train")), len(rows(digits, "test"))) == (1437, 360)
    assert len(list((digits / "img").iterdir())) == 1797


def test_no_held_out_picture_is_trained_on(digits):
    train, test = pixels(digits, "train"), pixels(digits, "test")
    assert not train & test
    assert len(train) + len(test) == 1797  # nor is a picture there twice


@pytest.mark.parametrize("part", ["train", "test"])
def test_every_digit_is_about_as_frequent_as_any_other(digits, part):
    counts = Counter(answers(digits, part))
    assert sorted(counts) == list("0123456789")
    assert max(counts.values()) < 2 * min(counts.values())  # so always the same answer can't score


def test_the_labels_belong_to_the_pictures(digits):
    """The nearest train picture tells the digit nearly always; with shuffled labels, one time in ten."""
    import torch
    inputs = {part: torch.stack([torch.frombuffer(bytearray(Image.open(digits / row["images"][0]).tobytes()),
                                                  dtype=torch.uint8).float() for row in rows(digits, part)])
              for part in ("train", "test")}
    nearest = torch.cdist(inputs["test"], inputs["train"]).argmin(dim=1).tolist()
    known, wanted = answers(digits, "train"), answers(digits, "test")
    assert sum(known[index] == want for index, want in zip(nearest, wanted)) > 0.95 * len(wanted)


def test_the_same_files_are_written_every_time(digits, tmp_path):
    data.write_digits(tmp_path)
    for path in (p for p in digits.rglob("*") if p.is_file()):
        assert (tmp_path / path.relative_to(digits)).read_bytes() == path.read_bytes()


# ---- what the base model has seen ------------------------------------------------------------------------

KINDS = [pytest.param(kind, id=kind.__name__) for kind in data.MIX]


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_model_is_never_shown_a_digit(kind, monkeypatch):
    opened = set()
    monkeypatch.setattr(data, "fetch", lambda name: opened.add(name) or fetched(name))
    data.fashion_mnist.cache_clear()
    rng = random.Random(1)
    drawn = [kind(rng, part) for part in ("train", "test") for _ in range(200)]
    assert opened and "scikit-learn-1.9.1" not in opened
    assert {picture.size for picture, _, _ in drawn} == {(28, 28)}
    assert not [question for _, question, _ in drawn if "digit" in question]
    assert kind is data.counted or not [answer for _, _, answer in drawn if re.search(r"\d", answer)]


# ---- the base model that is shipped ----------------------------------------------------------------------


def test_the_base_models_readme_names_its_hash_and_it_is_small():
    sha256 = hashlib.sha256((BASE / "model.safetensors").read_bytes()).hexdigest()
    assert sha256 in (BASE / "README.md").read_text(encoding="utf-8")
    assert sum(path.stat().st_size for path in BASE.iterdir()) < 5 * 10**6


def test_the_base_models_tokenizer_writes_each_digit_as_one_token():
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    assert all(len(tokenizer(f" {digit}")["input_ids"]) == 1 for digit in range(10))


# ---- fetching --------------------------------------------------------------------------------------------


def package(command=("no-such-client",), sha256="0" * 64) -> data.Package:
    return data.Package(command, "inside/", (".txt",), sha256)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DEMO_CACHE", str(tmp_path))
    data.fetch.cache_clear()
    yield tmp_path
    data.fetch.cache_clear()


def refusal(monkeypatch, pack: data.Package) -> StageError:
    monkeypatch.setitem(data.PACKAGES, "pack", pack)
    with pytest.raises(StageError) as caught:
        data.fetch("pack")
    return caught.value


def test_a_missing_client_is_named_with_the_file_that_would_do(empty_cache, monkeypatch):
    error = refusal(monkeypatch, package())
    assert error.what == "pack can't be fetched: there is no no-such-client here"
    assert error.fix == f"mend that, or save the package's file as {empty_cache / 'pack'} yourself"


def test_a_client_that_fails_is_quoted(empty_cache, monkeypatch):
    error = refusal(monkeypatch, package((sys.executable, "-c", "raise SystemExit('no route to host')")))
    assert error.what == "pack can't be fetched: no route to host"
    assert not list(empty_cache.iterdir())


def test_a_client_that_fetches_nothing_is_no_success(empty_cache, monkeypatch):
    error = refusal(monkeypatch, package((sys.executable, "-c", "")))
    assert error.what == "pack can't be fetched: it fetched nothing"


def test_other_content_than_the_pinned_one_is_refused(empty_cache, monkeypatch):
    with zipfile.ZipFile(empty_cache / "pack", "w") as archive:
        archive.writestr("inside/a.txt", "other")
    error = refusal(monkeypatch, package())
    sha256 = hashlib.sha256(b"other").hexdigest()
    told = f"what is read of it has the SHA-256 {sha256}, not {'0' * 64}"
    assert error.what == f"{empty_cache / 'pack'}: {told}"
    assert error.fix.startswith(f"rm {empty_cache / 'pack'}")


def test_a_file_that_is_no_package_is_refused(empty_cache, monkeypatch):
    (empty_cache / "pack").write_bytes(b"not found")
    assert "no wheel, tarball or Debian package" in refusal(monkeypatch, package()).what
