"""metrics: what training writes down: metrics.jsonl, timings.jsonl, and the loss curve made of them.

metrics.jsonl is exact: it is the same after a resume, and on every machine that computes alike. timings.jsonl
holds what isn't: seconds, rates and memory.
"""
import itertools
import json
import math
from collections.abc import Iterable
from pathlib import Path

from lib.batches.order import sample_of
from lib.collator import padded_length
from lib.pages import charts
from lib.run import ledger, terminal
from lib.training import devices, parallel
from lib.training.trackers import Tracker, numbers

EXACT = ("loss", "token_accuracy", "learning_rate", "grad_norm", "supervised_tokens",
         "loss_scale", "overflows")                                # the last two in float16 only
EXACT_BY_ROLE = ("learning_rate_", "grad_norm_")


def sizes(samples, rows: list[tuple[int, ...]], shares: list) -> dict[str, int]:
    """{supervised_tokens, tokens, room, images} of a step, over all ranks; room is tokens with padding."""
    def tokens(row: tuple[int, ...]) -> int:
        return sum(samples.input_tokens[sample_of(index)] for index in row)
    every, packed = [index for row in rows for index in row], samples.positions is not None
    batches = [[*map(tokens, batch)] for share in shares for batch in share]
    room = sum(len(lengths) * padded_length(lengths, packed) for lengths in batches)
    return {"supervised_tokens": sum(samples.supervised_tokens[index] for index in every),
            "tokens": sum(map(tokens, rows)),
            "room": room,
            "images": sum(samples.media[index].count("image") for index in every)}


class Log:
    """Appends a line for each step, on rank 0. On resuming at step N, lines of later steps are cut off first.

    notable: the lines so far on which later steps depend, evaluations and skipped steps; every rank has them.
    """

    def __init__(self, folder: Path, world: parallel.World, steps_per_epoch: int, first_step: int,
                 trackers: Iterable[Tracker] = ()):
        self.folder, self.world, self.steps_per_epoch = folder, world, steps_per_epoch
        self.trackers = trackers
        self.last, self.steps = {}, first_step                     # the last step's figures; steps done
        self.notable: list[dict] = []
        if first_step:
            lines = lines_up_to(folder / "metrics.jsonl", first_step)
            self.notable = [row for row in map(json.loads, lines) if "loss" not in row]
            if not lines or json.loads(lines[-1])["step"] != first_step:
                world.stop(f"{folder / 'metrics.jsonl'} has no line of step {first_step}, to go on from",
                           "put the file back, or start over with --force")
            for name in ("metrics.jsonl", "timings.jsonl", "answers.jsonl") if world.is_leader else ():
                if (folder / name).exists():
                    cut_back(folder / name, first_step)

    def step(self, step: int, figures: dict) -> None:
        """Write what one optimizer step found, and how long it took."""
        epoch = round(step / self.steps_per_epoch, 4)
        exact = ("skipped",) if figures["skipped"] else (
            key for key in figures if key in EXACT or key.startswith(EXACT_BY_ROLE))
        self.write({"step": step, "epoch": epoch} | {key: figures[key] for key in exact})
        seconds = figures["seconds"]
        rates = {f"{what}_per_second": round(figures[what] / seconds, 1)
                 for what in ("tokens", "supervised_tokens", "images")}
        timing = {"step": step, "seconds": round(seconds, 4), **rates,
                  "data_wait": round(figures["waited"] / seconds, 4),
                  "padding": round(1 - figures["tokens"] / figures["room"], 4),
                  "peak_memory_gib": round(devices.peak_memory_gib(self.world.device), 3)}
        self._append("timings.jsonl", timing)
        self.last, self.steps = figures | timing, step

    def line(self) -> dict[str, str]:
        """The last step's figures for the progress bar."""
        return {"loss": f"{self.last['loss']:.4f}", "tokens/s": f"{self.last['tokens_per_second']:,.0f}",
                "waiting": f"{self.last['data_wait']:.0%}", "peak": f"{self.last['peak_memory_gib']:.2f} GiB"}

    def write(self, row: dict) -> None:
        """Append a line to metrics.jsonl."""
        self._append("metrics.jsonl", row)
        if "loss" not in row:
            self.notable.append(row)

    def evaluation(self, step: int, figures: dict, answers: list[dict], seconds: dict[str, float]) -> None:
        """Write an evaluation's figures and answers, which no tracker gets; say the figures and the time."""
        self.write({"step": step, **figures})
        if answers and self.world.is_leader:
            with (self.folder / "answers.jsonl").open("a", encoding="utf-8") as file:
                file.write(ledger.in_lines({"step": step, **row} for row in answers))
            ledger.sync(self.folder / "answers.jsonl")             # a checkpoint must not outlive its lines
        words = ", ".join(f"{name} {figure:.4f}" for name, figure in figures.items())
        took = ", ".join(f"{terminal.duration(value)} for {what}" for what, value in seconds.items())
        terminal.say(f"step {step}: {words} ({took})")

    def best(self, knobs) -> dict | None:
        """The first evaluation with the best metric so far, without the one before training; None: none."""
        metric, sign = knobs.metric_for_best_model, 1 if knobs.greater_is_better else -1
        judged = [row for row in self.notable if row["step"] and math.isfinite(row.get(metric, math.nan))]
        return max(judged, key=lambda row: sign * row[metric], default=None)

    def patience_is_over(self, knobs) -> bool:
        """Whether the last `early_stopping_patience` evaluations were no better than an earlier one."""
        best = self.best(knobs)
        since = sum(knobs.metric_for_best_model in row and row["step"] > best["step"]
                    for row in self.notable) if best else 0
        return knobs.early_stopping_patience is not None and since >= knobs.early_stopping_patience

    def draw(self) -> None:
        """Write loss.svg."""
        if self.world.is_leader:
            series = loss_series(self.folder / "metrics.jsonl")
            svg = charts.curve(series, "optimizer step", "loss per token", standalone=True)
            (self.folder / "loss.svg").write_text(svg, encoding="utf-8")

    def say_peak(self, forecast_gib: float | None) -> None:
        """Say how much memory was used at the peak, and how much was forecast."""
        used = f"peak memory {devices.peak_memory_gib(self.world.device):.2f} GiB"
        forecast = "" if forecast_gib is None else f"; forecast {forecast_gib:.2f} GiB"
        if self.world.device.type != "cuda":
            used += " of this process, with its libraries"
            forecast += forecast and " without them"
        terminal.say(used + forecast)

    def _append(self, name: str, row: dict) -> None:
        if self.world.is_leader:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            for tracker in self.trackers:
                tracker(row["step"], numbers(row))


def lines_up_to(path: Path, last_step: int) -> list[bytes]:
    """The lines of a file up to a step: those before the first later or broken one, as a kill may leave."""
    def counts(line: bytes) -> bool:
        try:
            return line.endswith(b"\n") and json.loads(line)["step"] <= last_step
        except ValueError:
            return False
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return list(itertools.takewhile(counts, lines))


def cut_back(path: Path, last_step: int) -> None:
    """Cut a file back to the lines up to a step, by one rename: it is never half cut."""
    ledger.write_whole(path, b"".join(lines_up_to(path, last_step)).decode())


def read_lines(path: Path) -> list[dict]:
    """The objects of a JSONL file; [] where there is none, since volatile files may be gone."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def loss_series(metrics: Path) -> dict[str, list[tuple[int, float]]]:
    """{name: [(step, loss)]} of training and held-out losses."""
    rows = read_lines(metrics)
    series = {"training": [(r["step"], r["loss"]) for r in rows if "loss" in r],
              "held out": [(r["step"], r["eval_loss"]) for r in rows if "eval_loss" in r]}
    return {name: points for name, points in series.items() if points}
