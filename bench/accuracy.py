"""accuracy: how soon our training is as accurate as TRL's is in the end, on the demo's task.

    OMP_NUM_THREADS=1 python -m bench.accuracy              # three seeds
    python -m bench.accuracy --seeds 0 eval_answer_rows=36 num_epochs=1
    python -m bench.accuracy --seeds 3,4,5 --sides plain,packed                 # whether they end alike

By the demo's recipe with half of its epochs, TRL and this kit in three ways train the digits, each in a fresh
process, TRL on the batches of our plain way. Accuracy is the demo's own: greedy answers to held-out pictures
that equal the reference. Ours answers after each epoch of the second half; TRL's adapter in our model, in the
end. Answering is no part of any time. Prints a table, and, with all sides and no other knobs, writes
bench/results/accuracy-MACHINE.json. Started again, it goes on: no result that runs/bench/accuracy holds is
measured again.
"""
import argparse
import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean

import torch

from bench import machine, ours, prepare
from bench.apart import FOLDER, process, write_result
from lib.evaluation.evaluate import held_out_answers
from lib.evaluation.scores import exact_match
from lib.run import stage, terminal

DEMO = stage.ROOT / "recipes" / "demo"
KNOBS = {"base_model": DEMO / "base", "num_epochs": 4, "eval_answer_rows": 360, "evals_per_epoch": 0,
         "saves_per_epoch": 0}
SIDES = {"TRL": {}, "plain": {},
         "packed": {"sample_packing": "true", "micro_batch_size": 1, "sequence_len": 8 * 63},  # 8 samples
         "features kept": {"cache_vision_features": "true"}}
CLOCKS = {"cpu_seconds": "CPU", "seconds": "wall"}


def main(argv=None) -> None:
    """Train each seed on each side, print when which was as accurate as TRL, and write the result file."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--seeds", type=lambda text: text.split(","), default=["0", "1", "2"])
    parser.add_argument("--sides", type=lambda text: text.split(","), default=[*SIDES], help=", ".join(SIDES))
    parser.add_argument("--one", nargs=3, metavar=("SIDE", "RUN", "OUT"), help="one training, here")
    parser.add_argument("knobs", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    if args.one:
        return one(*args.one)
    folder = FOLDER / machine.slug(" ".join(["accuracy", *args.knobs]))
    subprocess.run([sys.executable, DEMO / "data.py", "digits", folder / "data" / "demo"], check=True)
    found = {side: [] for side in args.sides}
    with contextlib.chdir(folder):                          # so that the user's runs/latest stays as it is
        for seed in args.seeds:
            for side, runs in found.items():
                runs.append(evaluations(side, seed, args.knobs))
    report(found, args)


def evaluations(side: str, seed: str, knobs: list[str]) -> list[dict]:
    """{step, accuracy, seconds so far} of a training in a process of its own, or of an earlier one."""
    run = Path(f"{machine.slug(side)}-{seed}")
    out = run.with_suffix(".json")
    if not out.exists():
        terminal.say(f"seed {seed}: {side}")
        knobs = KNOBS | SIDES[side] | {"seed": seed} | dict(word.split("=") for word in knobs)
        prepare.run_recipe(DEMO.with_suffix(".yaml"), run.name, knobs)
        if side == "TRL":
            shutil.rmtree("batches", ignore_errors=True)
            prepare.write_batches(run, Path("batches"))
        process(Path.cwd(), "bench.accuracy", "--one", side, run, out)
    return json.loads(out.read_text(encoding="utf-8"))


def one(side: str, run_path: str, out: str) -> None:
    """Train one side, and write its evaluations."""
    found = trl(Path(run_path)) if side == "TRL" else kit(Path(run_path))
    Path(out).write_text(json.dumps(found) + "\n", encoding="utf-8")


def kit(run_path: Path) -> list[dict]:
    """Ours: an evaluation after each epoch of the second half."""
    accuracies = {}

    def after(run, step: int) -> None:
        if step % run.order.steps_per_epoch == 0 and 2 * step >= run.total_steps:
            accuracies[step] = accuracy(run)

    result = ours.trained(run_path, after=after)
    return [evaluation(result, step, found) for step, found in accuracies.items()]


def trl(run_path: Path) -> list[dict]:
    """TRL's: one evaluation of its adapter, in our model. It keeps activations, its fastest way here."""
    from bench import trl_side
    net, result = trl_side.trained(run_path, Path("batches"), {"gradient_checkpointing": False})
    _, run = prepare.loaded(run_path)
    trained = dict(net.named_parameters())
    with torch.no_grad():
        for name, parameter in run.parameters.items():
            parameter.copy_(trained[name])
    return [evaluation(result, len(result["steps"]), accuracy(run))]


def accuracy(run) -> float:
    """The share of held-out questions that the model answers right."""
    rows = held_out_answers(run)
    return exact_match(*([row[side] for row in rows] for side in ("answer", "reference")))


def evaluation(result: dict, step: int, accuracy: float) -> dict:
    """The accuracy after so many steps, and what they took, with what came before them."""
    spent = {clock: result.get(f"before_{clock}", 0.0) + sum(each[clock] for each in result["steps"][:step])
             for clock in CLOCKS}
    return {"step": step, "accuracy": accuracy, **spent}


def report(found: dict[str, list[list[dict]]], args) -> None:
    """Print and write the table: accuracies in the end, and ours' times as parts of TRL's, if it ran."""
    ends = {side: [each[-1] for each in runs] for side, runs in found.items()}
    rows = []
    for side, runs in found.items():
        rows.append([side, " ".join(f"{end['accuracy']:.1%}" for end in ends[side]),
                     f"{mean(end['accuracy'] for end in ends[side]):.1%}",
                     f"{mean(end['cpu_seconds'] for end in ends[side]):.0f}"]
                    + [" ".join(part(first(run, trl), trl, clock) for run, trl in zip(runs, ends["TRL"]))
                       for clock in CLOCKS if "TRL" in ends])
    columns = ["side", "accuracy of each seed", "mean", "CPU seconds in all",
               *(f"{name} time to TRL's accuracy / TRL's" for name in CLOCKS.values() if "TRL" in ends)]
    seeds = ", ".join(args.seeds)
    terminal.table(f"held-out accuracy in the end, and how soon it is TRL's; seeds {seeds}", columns, rows)
    if not args.knobs and ends.keys() == SIDES.keys():
        write_result("accuracy", {"seeds": args.seeds, "evaluations": found})


def first(run: list[dict], trl: dict) -> dict | None:
    """The first evaluation that is as accurate as TRL's."""
    return next((each for each in run if each["accuracy"] >= trl["accuracy"]), None)


def part(reached: dict | None, trl: dict, clock: str) -> str:
    """The time until then, as a part of TRL's."""
    return "never" if reached is None else f"{reached[clock] / trl[clock]:.2f}"


if __name__ == "__main__":
    stage.run_script(main)
