"""compare: runs side by side: what differs between their recipes, and what came of it.

Fork me to: compare another figure (`figures`).
"""
import json
import math
import statistics
from pathlib import Path

from lib.run import ledger, terminal
from lib.run.errors import StageError
from lib.run.program import command
from lib.training.metrics import loss_series, read_lines

NOTHING = "-"
BARS, COLUMNS = "▁▂▃▄▅▆▇█", 12
OF_THE_FOLDER = ("output_dir",)                              # differs in every run, and tells nothing


def compare(runs: list[Path]) -> None:
    """Print the table of two or more trained runs: the view `06_save.py RUN RUN … --compare`."""
    if len(runs) < 2:
        raise StageError(f"--compare: only {runs[0]} is named", "name two runs or more")
    for run in runs:
        if not ledger.finished(run / "05_train"):
            raise StageError(f"{run / '05_train'} is not there: 05_train has not finished",
                             f"run first: {command('05_train', run)}")
    names = [str(run) for run in runs]
    knobs = [ledger.read_json(run / "01_config" / "config.json") for run in runs]
    apart = [[knob, *(json.dumps(each[knob]) if knob in each else NOTHING for each in knobs)]
             for knob in dict.fromkeys(knob for each in knobs for knob in each)
             if knob not in OF_THE_FOLDER and any(each.get(knob) != knobs[0].get(knob) for each in knobs)]
    if apart:
        terminal.table("what differs between the recipes", ["knob", *names], apart)
    else:
        terminal.say("the recipes don't differ")
    found = [figures(run) for run in runs]
    lines = [[name, *(each[name] for each in found)] for name in found[0]]
    terminal.table("what came of it", ["figure", *names], lines)


def figures(run: Path) -> dict[str, str]:
    """{figure: its value in words} of one trained run; those that 06 finds are "-" until it has finished."""
    losses = loss_series(run / "05_train" / "metrics.jsonl")
    timings = read_lines(run / "05_train" / "timings.jsonl")
    counts = ledger.read_json(run / "02_data" / "report.json")["counts"]
    seconds = sum(line["seconds"] for line in timings)
    tokens = sum(line["tokens_per_second"] * line["seconds"] for line in timings)
    peak = max((line["peak_memory_gib"] for line in timings), default=0)
    check = run / "06_save" / "check.json" if ledger.finished(run / "06_save") else None
    scores = ledger.read_json(check)["exact_match"] if check else {"base": None, "tuned": None}
    held_out = losses.get("held out", [])
    return {"training samples": f"{counts['train_samples']:,}",
            "tokens per picture": f"{counts['tokens_per_picture']:,}",
            "longest sample": f"{counts['longest_sample_tokens']:,} tokens",
            "steps": str(len(losses["training"])),
            "training loss": drawn(losses["training"]),
            "held-out loss": drawn(held_out),
            "best held-out loss": f"{min(held_out, key=lambda p: p[1])[1]:.4f}" if held_out else NOTHING,
            "exact match before": NOTHING if scores["base"] is None else f"{scores['base']:.1%}",
            "exact match after": NOTHING if scores["tuned"] is None else f"{scores['tuned']:.1%}",
            "time in steps": terminal.duration(seconds) if timings else NOTHING,
            "tokens per second": f"{tokens / seconds:,.0f}" if timings else NOTHING,
            "peak memory": f"{peak:.2f} GiB" if timings else NOTHING}


def drawn(points: list[tuple[int, float]]) -> str:
    """A curve in one line: its first value, bars between its lowest and highest value, its last value."""
    values = [value for _, value in points if math.isfinite(value)]
    if not values:
        return NOTHING
    size = math.ceil(len(values) / COLUMNS)
    means = [statistics.fmean(values[n:n + size]) for n in range(0, len(values), size)]
    low, high = min(means), max(means)
    bars = "".join(BARS[round((mean - low) / ((high - low) or 1) * (len(BARS) - 1))] for mean in means)
    return f"{values[0]:.3f} {bars} {values[-1]:.4f}"
