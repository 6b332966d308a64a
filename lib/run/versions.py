"""versions: the oldest versions of libraries that the kit runs with, checked in this one place."""
from importlib.metadata import PackageNotFoundError, version

from lib.run.errors import StageError

MINIMUM = {"torch": "2.11", "transformers": "5.17", "peft": "0.18",
           "datasets": "3.0", "pillow": "11.0", "rich": "13.0"}
FIX = "pip install -r requirements.txt"


def refuse_old() -> None:
    """Raise StageError for the first library that is missing or too old."""
    for name, oldest in MINIMUM.items():
        refuse_older(name, oldest, "the kit")


def refuse_older(name: str, oldest: str, who: str) -> None:
    """Raise StageError where a library is missing, or older than `who` needs."""
    try:
        found = version(name)
    except PackageNotFoundError:
        raise StageError(f"the Python package {name} is not installed", FIX) from None
    if parts(found) < parts(oldest):
        raise StageError(f"{name} {found} is too old: {who} needs {oldest} or newer", FIX)


def parts(text: str) -> tuple[int, ...]:
    """A version's numbers, such as (2, 14, 1) of "2.14.1+cu130"."""
    return tuple(int(part) for part in text.split("+")[0].split(".") if part.isdigit())
