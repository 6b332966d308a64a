"""What the kit prints: rich where there is a terminal, plain lines where there is none (a CI log, a pipe).

Of several ranks only the first one speaks. Errors go to stderr, everything else to stdout.
"""

import os
import time

from rich import box, progress
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

WIDEST = 60               # characters to which a column of plain lines is padded; longer cells stick out
QUIET = os.environ.get("RANK", "0") != "0"
console = Console(highlight=False, quiet=QUIET)
_stderr = Console(highlight=False, stderr=True)


def say(text: str, style: str = "") -> None:
    """Print one line as it is: no markup, no wrapping."""
    console.print(text, style=style or None, markup=False, soft_wrap=True)


def warn(text: str) -> None:
    """Print a warning, which stops nothing."""
    say(f"warning: {text}", "yellow")


def error(what: str, fix: str) -> None:
    """Print the two lines with which a stage stops."""
    _stderr.print(f"error: {what}", style="bold red", markup=False, soft_wrap=True)
    _stderr.print(f"  fix: {fix}", markup=False, soft_wrap=True)


def next_command(text: str) -> None:
    """Print the last line of a stage: the command to go on with."""
    console.print(f"next: [bold green]{escape(text)}[/]", soft_wrap=True)


def table(title: str, columns: list[str], rows: list[list]) -> None:
    """Print a table, numbers right-aligned. Without a terminal its columns are only padded."""
    cells = [[_cell(value) for value in row] for row in rows]
    right = [any(map(_is_number, column)) and not any(isinstance(value, str) for value in column)
             for column in zip(*rows)] or [False] * len(columns)
    if console.is_terminal:
        drawn = Table(title=escape(title), title_justify="left", title_style="bold",
                      box=box.SIMPLE_HEAD, show_edge=False)
        for name, to_right in zip(columns, right):
            drawn.add_column(escape(name), justify="right" if to_right else "left", overflow="fold")
        for row in cells:
            drawn.add_row(*map(escape, row))
        console.print(drawn)
        return
    say(title)
    widths = [min(WIDEST, max(map(len, column))) for column in zip(columns, *cells)]
    for row in [columns, *cells]:
        line = [cell.rjust(w) if to_right else cell.ljust(w) for cell, w, to_right in zip(row, widths, right)]
        say("  " + "  ".join(line).rstrip())


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(value) -> str:
    """A value as text: with commas at thousands, four digits of a float, "-" for None."""
    if _is_number(value):
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return "-" if value is None else str(value)


def duration(seconds: float) -> str:
    """A time in words: "3.2 s", "4 min 10 s", "2 h 5 min"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def counted(number: int, word: str) -> str:
    """A number with its noun: "1 picture", "2 pictures"."""
    return f"{number} {word}{'' if number == 1 else 's'}"


class Progress:
    """A progress bar with the time left and named figures; without a terminal, a line every `every_seconds`.

        with Progress("training", total=500, done=40) as bar:      # 40 steps were done by an earlier start
            bar.update(41, loss="1.23", wait="2%")

    Figures are texts; `**{"tokens/s": "812"}` names one freely.
    """

    def __init__(self, title: str, total: int, done: int = 0, every_seconds: float = 10.0):
        self.title, self.total, self.done, self.every_seconds = title, total, done, every_seconds
        self._first, self._figures = done, ""
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=16, table_column=Column(no_wrap=True, min_width=16)),
            progress.MofNCompleteColumn(table_column=Column(no_wrap=True)),
            progress.TextColumn("{task.fields[figures]}", table_column=Column()),  # wraps in a narrow window
            console=console,
            disable=QUIET or not console.is_terminal,
        )
        self._task = self._bar.add_task(escape(title), total=total, completed=done, figures="")

    def __enter__(self) -> "Progress":
        self._began_seconds = self._line_seconds = time.monotonic()
        self._line_at = None  # how many were done when the last line was printed
        self._bar.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._bar.stop()
        if kind is None and self._line_at != self.done:
            self._line()

    def update(self, done: int, **figures: str) -> None:
        """Show that `done` of `total` are done, with these figures."""
        self.done, seconds = done, time.monotonic() - self._began_seconds
        left = seconds / (done - self._first) * (self.total - done) if done > self._first else 0
        words = [f"{duration(left)} left"] if left else []
        self._figures = "  ".join(words + [f"{name} {text}" for name, text in figures.items()])
        self._bar.update(self._task, completed=done, figures=escape(self._figures))
        if time.monotonic() - self._line_seconds >= self.every_seconds:
            self._line()

    def _line(self) -> None:
        """Print a line of how far it is, where there is no bar."""
        if self._bar.disable:
            self._line_seconds, self._line_at = time.monotonic(), self.done
            say(f"{self.title} {self.done}/{self.total}  {self._figures}".rstrip())
