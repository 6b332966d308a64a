"""cost: what a training step costs against batch, length, pictures and ranks, and how that grows.

    OMP_NUM_THREADS=1 python -m bench.cost
    python -m bench.cost --sizes tiny --sweeps batch ranks

The model is the Qwen2-VL of 70M of the bench against TRL, its activations kept. Each point is 05_train's own
step in fresh processes, which torchrun starts. In a sweep all numbers but one stay. Growth is the exponent
between a point and the one before: at 1 the cost doubles where the number does. Prints a table for each
sweep, and of this size writes bench/results/cost-MACHINE.json.
"""
import argparse
import contextlib
import json
import math
import random
import shutil
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import prepare, shapes
from bench.against_trl import WARM_UP_STEPS
from bench.apart import FOLDER, process, write_result
from lib.run import stage, terminal

STEPS = WARM_UP_STEPS + 3
ANSWER = 48                                                 # characters, about as many tokens


@dataclass(frozen=True)
class Point:
    """batch: rows of a micro-batch on each rank. text: characters of a row, each about a token."""
    batch: int = 1
    text: int = 128
    images: int = 1
    ranks: int = 1


SWEEPS = {"batch": [Point(batch=batch) for batch in (1, 2, 4, 8)],
          "text": [Point(text=text, images=0) for text in (128, 256, 512, 1024, 2048)],
          "images": [Point(images=images) for images in (0, 1, 2, 4)],
          "ranks": [Point(ranks=ranks) for ranks in (1, 2)]}


def main(argv=None) -> None:
    """Measure every point of the sweeps once, print them, and write the result file."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--sizes", choices=shapes.SIZES, default="70m")
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    args = parser.parse_args(argv)
    folder = FOLDER / "cost"
    shutil.rmtree(folder, ignore_errors=True)
    shapes.build("qwen2_vl", shapes.SIZES[args.sizes], folder / "checkpoint")
    found = {}
    for sweep in args.sweeps:
        for point in SWEEPS[sweep]:
            found[point] = found.get(point) or measure(point, folder, shapes.SIZES[args.sizes].pixels)
        show(sweep, [found[point] for point in SWEEPS[sweep]])
    if args.sizes == "70m":
        write_result("cost", {"points": list(found.values())})


def measure(point: Point, folder: Path, pixels: int) -> dict[str, float]:
    """A point, with tokens of a row, and of a step on the first rank its seconds and peak above the model."""
    name = "-".join(map(str, asdict(point).values()))
    terminal.say(", ".join(f"{value} {key}" for key, value in asdict(point).items()))
    row = point.text - ANSWER, ANSWER, [(pixels, pixels)] * point.images
    rows = [row] * (STEPS * point.batch * point.ranks)
    knobs = {"datasets": [{"path": f"rows-{name}/rows.jsonl"}], "micro_batch_size": point.batch,
             "gradient_accumulation_steps": 1, "gradient_checkpointing": False, "sequence_len": 4096}
    with contextlib.chdir(folder):                          # so that the user's runs/latest stays as it is
        shapes.write(folder / f"rows-{name}", rows, random.Random(0))
        prepare.run_stages(name, knobs)
    process(folder, "torch.distributed.run", "--standalone", "--nproc-per-node", point.ranks,
            "-m", "bench.ours", name, f"{name}.json")
    result = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    report = json.loads((folder / name / "02_data" / "report.json").read_text(encoding="utf-8"))
    steps = result["steps"][WARM_UP_STEPS:]
    spent = {clock: statistics.median(step[clock] for step in steps) for clock in ("cpu_seconds", "seconds")}
    return {**asdict(point), "tokens": report["counts"]["input_tokens"] / len(rows),
            "peak_bytes": result["peak_bytes"], **spent}


def show(sweep: str, points: list[dict]) -> None:
    """Print a sweep's table."""
    axis = "tokens" if sweep == "text" else sweep           # 02 has counted them
    columns = [axis, "tokens a row", "s CPU", "s wall", "growth", "peak MiB", "growth"]
    rows = []
    for before, point in zip([None, *points], points):
        growth = [exponent(before, point, axis, cost) for cost in ("cpu_seconds", "peak_bytes")]
        rows.append([f"{point[axis]:.0f}", f"{point['tokens']:.0f}", f"{point['cpu_seconds']:.2f}",
                     f"{point['seconds']:.2f}", growth[0], f"{point['peak_bytes'] / 2**20:.0f}", growth[1]])
    terminal.table(f"cost of a step by {axis}", columns, rows)


def exponent(before: dict | None, point: dict, axis: str, cost: str) -> str:
    """The exponent of growth since the point before."""
    if not before or not before[axis]:
        return ""
    return f"{math.log(point[cost] / before[cost]) / math.log(point[axis] / before[axis]):.2f}"


if __name__ == "__main__":
    stage.run_script(main)
