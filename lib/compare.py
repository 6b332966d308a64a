"""compare: runs side by side: what differs between their recipes, and what came of it.

Fork me to: compare another figure (`figures`).
"""
import json
from pathlib import Path

from lib import ledger, terminal
from lib.metrics import loss_series
from lib.program import command
from lib.stage import StageError

NOTHING = "-"
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
    """{figure: its value in words} of one trained run; what 06 finds out only where it has finished."""
    losses = loss_series(run / "05_train" / "metrics.jsonl")
    text = (run / "05_train" / "timings.jsonl").read_text(encoding="utf-8")
    timings = [json.loads(line) for line in text.splitlines()]
    seconds = sum(line["seconds"] for line in timings)
    tokens = sum(line["tokens_per_second"] * line["seconds"] for line in timings)
    check = run / "06_save" / "check.json" if ledger.finished(run / "06_save") else None
    scores = ledger.read_json(check)["exact_match"] if check else {"base": None, "tuned": None}
    return {"steps": str(len(losses["training"])),
            "last training loss": f"{losses['training'][-1][1]:.4f}",
            "last held-out loss": f"{losses['held out'][-1][1]:.4f}" if "held out" in losses else NOTHING,
            "exact match before": NOTHING if scores["base"] is None else f"{scores['base']:.1%}",
            "exact match after": NOTHING if scores["tuned"] is None else f"{scores['tuned']:.1%}",
            "time in steps": terminal.duration(seconds),
            "tokens per second": f"{tokens / seconds:,.0f}",
            "peak memory": f"{max(line['peak_memory_gib'] for line in timings):.2f} GiB"}
