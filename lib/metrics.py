"""metrics: what training writes down: metrics.jsonl, timings.jsonl, and the loss curve made of them.

metrics.jsonl is exact: the same after every resume, and on every machine that computes alike. timings.jsonl
holds what is not.
"""
import json
from pathlib import Path

from lib import charts, parallel
from lib.checkpoint import sync

EXACT = ("loss", "token_accuracy", "learning_rate", "grad_norm", "supervised_tokens")


class Log:
    """Appends a line a step on rank 0. On resuming at step N, lines of later steps are cut off first."""

    def __init__(self, folder: Path, world: parallel.World, steps_per_epoch: int, first_step: int):
        self.folder, self.world, self.steps_per_epoch = folder, world, steps_per_epoch
        self.last: dict = {}
        if first_step and world.is_leader:
            for name in ("metrics.jsonl", "timings.jsonl"):
                cut_back(folder / name, first_step)

    def step(self, step: int, figures: dict) -> None:
        """Write what one optimizer step found, and how long it took."""
        epoch = round(step / self.steps_per_epoch, 4)
        self.write({"step": step, "epoch": epoch} | {key: figures[key] for key in EXACT})
        seconds = figures["seconds"]
        timing = {"step": step, "seconds": round(seconds, 4),
                  "tokens_per_second": round(figures["tokens"] * self.world.world_size / seconds, 1),
                  "data_wait": round(figures["waited"] / seconds, 4),
                  "peak_memory_gib": round(parallel.peak_memory_gib(self.world.device), 3)}
        self._append("timings.jsonl", timing)
        self.last = figures | timing

    def line(self) -> dict[str, str]:
        """The last step's figures for the progress bar."""
        return {"loss": f"{self.last['loss']:.4f}", "tokens/s": f"{self.last['tokens_per_second']:,.0f}",
                "waiting": f"{self.last['data_wait']:.0%}", "peak": f"{self.last['peak_memory_gib']:.2f} GiB"}

    def write(self, row: dict) -> None:
        """Append to metrics.jsonl."""
        self._append("metrics.jsonl", row)

    def sync(self) -> None:
        """Wait until metrics.jsonl is on disk: a checkpoint must not outlive the lines that led to it."""
        if self.world.is_leader:
            sync(self.folder / "metrics.jsonl")

    def draw(self) -> None:
        """Write loss.svg."""
        if self.world.is_leader:
            series = loss_series(self.folder / "metrics.jsonl")
            svg = charts.curve(series, "optimizer step", "loss per token", standalone=True)
            (self.folder / "loss.svg").write_text(svg, encoding="utf-8")

    def _append(self, name: str, row: dict) -> None:
        if self.world.is_leader:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def cut_back(path: Path, last_step: int) -> None:
    """Keep the whole lines up to a step."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= last_step]
    half = path.with_name(f".{path.name}.half")
    half.write_text("".join(kept), encoding="utf-8")
    half.replace(path)


def loss_series(metrics: Path) -> dict[str, list[tuple[int, float]]]:
    """{name: [(step, loss)]} of training and held-out losses."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    series = {"training": [(r["step"], r["loss"]) for r in rows if "loss" in r],
              "held out": [(r["step"], r["eval_loss"]) for r in rows if "eval_loss" in r]}
    return {name: points for name, points in series.items() if points}
