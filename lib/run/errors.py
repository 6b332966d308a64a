"""errors: mistakes that a user can mend: what is wrong and where, and the edit or command for it.

A function called refuse_… returns nothing, and raises one of these where its name applies.
"""


class StageError(Exception):
    """A user's mistake in two lines: what (the value, and where it came from); fix (the edit or command)."""

    def __init__(self, what: str, fix: str | None = None):
        if fix is None:
            # torch hands on what a DataLoader worker raised as one text, which ends with our two lines.
            what, _, fix = what.rstrip().rpartition("StageError: ")[2].partition("\n")
        super().__init__(what, fix)
        self.what, self.fix = what, fix

    def __str__(self) -> str:
        return f"{self.what}\n{self.fix}"


class RowError(ValueError):
    """A row that can't be used: RowError(reason, fix), both one line."""

    def __init__(self, reason: str, fix: str):
        super().__init__(reason)
        # JSON can hold halves of surrogate pairs, which no file or terminal takes.
        self.reason, self.fix = (text.encode("utf-8", "backslashreplace").decode() for text in (reason, fix))

    def __reduce__(self):
        return type(self), (self.reason, self.fix)               # from one process to another


# ---- what libraries raise ----

def first_line(error: Exception) -> str:
    """The first line of a library's error message, or the error's type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()


def one_line(error: BaseException) -> str:
    """What a library says went wrong, in one line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
