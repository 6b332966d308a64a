"""What is printed, with a terminal and without one."""

import io
import re
import time

import pytest
from rich.console import Console

from lib.run import terminal

ROWS = [["language", 224, 1234567890, True, 0.912345], ["vision [x]", 24, None, False, 0.001]]
COLUMNS = ["role", "modules", "parameters", "trains", "share"]


@pytest.fixture
def screen(monkeypatch):
    """A terminal of 80 columns that can be read."""
    console = Console(file=io.StringIO(), force_terminal=True, width=80, highlight=False)
    monkeypatch.setattr(terminal, "console", console)
    return console.file


def test_without_a_terminal_a_table_is_plain_lines_with_numbers_to_the_right(capsys):
    terminal.table("parameters [by role]", COLUMNS, ROWS)
    assert capsys.readouterr().out == (
        "parameters [by role]\n"
        "  role        modules     parameters  trains   share\n"
        "  language        224  1,234,567,890  True    0.9123\n"
        "  vision [x]       24              -  False    0.001\n"
    )


def test_a_table_without_rows_shows_its_columns(capsys, screen):
    terminal.table("rejects", ["reason", "rows"], [])
    assert "reason" in screen.getvalue()


def test_on_a_terminal_a_table_says_the_same(screen):
    terminal.table("parameters [by role]", COLUMNS, ROWS)
    for text in ("parameters [by role]", "vision [x]", "1,234,567,890", "0.9123"):
        assert text in screen.getvalue()


def test_a_long_line_is_neither_wrapped_nor_read_as_markup(capsys):
    terminal.warn("[B, T] " + "x" * 200)
    assert capsys.readouterr().out == "warning: [B, T] " + "x" * 200 + "\n"


def test_without_a_terminal_progress_is_a_plain_line_now_and_then_and_one_at_the_end(capsys):
    with terminal.Progress("training", total=12, done=10, every_seconds=3600) as bar:
        bar.update(11, loss="1.23", **{"peak memory": "2 GiB"})
        assert capsys.readouterr().out == ""
        bar.update(12, **{"tokens/s": "812"})
    assert capsys.readouterr().out == "training 12/12  tokens/s 812\n"


def test_a_plain_line_names_the_time_left_and_the_figures(capsys):
    with terminal.Progress("training", total=12, done=10, every_seconds=0) as bar:
        time.sleep(0.01)
        bar.update(11, loss="1.23", **{"peak memory": "2 GiB"})
    line = r"training 11/12  0\.\d s left  loss 1\.23  peak memory 2 GiB\n"
    assert re.fullmatch(line, capsys.readouterr().out)


def test_on_a_terminal_progress_is_a_bar_that_a_narrow_window_does_not_cut(screen):
    with terminal.Progress("training", total=12) as bar:
        bar.update(11, loss="1.23", wait="2%", **{"peak memory": "12.3 GiB", "tokens/s": "812,345"})
    shown = screen.getvalue()
    for text in ("━━━━", "11/12", "loss 1.23", "812,345"):
        assert text in shown


def test_an_error_goes_to_stderr_in_two_lines(capsys):
    terminal.error("recipes/demo.yaml:3: lora_r: 'x' is no integer", "write a whole number")
    errors = "error: recipes/demo.yaml:3: lora_r: 'x' is no integer\n  fix: write a whole number\n"
    assert capsys.readouterr() == ("", errors)


def test_durations_are_words():
    words = {3.21: "3.2 s", 59.99: "1 min 0 s", 72: "1 min 12 s", 3599.9: "1 h 0 min", 7500: "2 h 5 min"}
    assert {seconds: terminal.duration(seconds) for seconds in words} == words
