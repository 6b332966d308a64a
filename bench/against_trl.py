"""against_trl: our training step against TRL's SFTTrainer, in fresh processes that take turns.

    python -m bench.against_trl                                 # or: make bench
    python -m bench.against_trl --cases packed --rounds 1 --tiny

Both sides load the same checkpoint and adapter, and train the same rows in bf16 autocast. Nothing is
reported of a case whose losses or gradient norms disagree. Prints a table for each case, and writes
bench/results/CASE-MACHINE.json.
"""
import argparse
import importlib
import importlib.util
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field

from bench import machine
from bench.apart import FOLDER, process, write_result
from lib.run import stage, terminal
from lib.run.errors import StageError

WARM_UP_STEPS = 3
NORMS_AGREE = 0.01                         # as a part of TRL's, where steps are compared


@dataclass(frozen=True)
class Case:
    """What is trained on both sides, and how it is compared.

    data: what bench/prepare.py builds. ours, trl: {side: knobs of the recipe, or SFTConfig's arguments}; the
    first one of each is its default. compare: "step", or "epoch" where the steps can't be the same ones.
    agree: how far losses per token may differ, as a part of TRL's. target: ours / TRL's best, of time and
    peak memory.
    """
    name: str
    what: str
    data: dict
    ours: dict[str, dict]
    trl: dict[str, dict]
    compare: str = "step"
    epochs: int = 1
    agree: float = 1e-3
    target: dict[str, float] = field(default_factory=dict)


CHECKPOINTING = {"TRL": {"gradient_checkpointing": True},
                 "TRL, activations kept": {"gradient_checkpointing": False}}
OURS = {"ours": {}, "ours, checkpointed": {"gradient_checkpointing": True}}
PACKED = {"sample_packing": True, "sequence_len": 1024, "micro_batch_size": 1,
          "gradient_accumulation_steps": 1}
QWEN = {"family": "qwen2_vl", "sizes": "70m", "rows": 64, "mixed": False}
LLAVA = {"family": "llava", "sizes": "70m", "rows": 64, "mixed": False}
MIXED = QWEN | {"rows": 96, "mixed": True}

CASES = (
    Case("as_trl_can", "padded batches, 2 x 2, Qwen2-VL of 70M", QWEN, OURS, CHECKPOINTING,
         target={"seconds": 0.28, "peak": 0.40}),
    Case("packed", "mixed lengths, ours packed", MIXED, {"ours": PACKED}, CHECKPOINTING, "epoch", agree=5e-3,
         target={"seconds": 0.18}),
    Case("features_kept", "3 epochs, ours packed, vision features kept", MIXED | {"rows": 48},
         {"ours": PACKED | {"cache_vision_features": True}}, CHECKPOINTING, "epoch", epochs=3, agree=5e-3,
         target={"seconds": 0.14}),
    Case("wide_vocabulary", "a vocabulary of 262k", QWEN | {"sizes": "262k"}, OURS, CHECKPOINTING,
         target={"peak": 0.25}),
    Case("llava", "padded batches, 2 x 2, LLaVA-1.5 of 70M: 576 tokens a picture", LLAVA, OURS,
         CHECKPOINTING),
)


# ---- running ----

def main(argv=None) -> None:
    """Measure the cases, each side in turn, and print what agrees."""
    args = arguments(argv)
    if importlib.util.find_spec("trl") is None:
        raise StageError("this environment has no trl", "run make bench, which makes one that has")
    knobs = importlib.import_module("01_config").Recipe.__dataclass_fields__
    for case in CASES:
        if args.cases and case.name not in args.cases:
            continue
        missing = sorted({knob for own in case.ours.values() for knob in own} - set(knobs))
        if missing:
            terminal.warn(f"{case.name} is skipped: there is no knob {missing[0]}")
            continue
        results = measure(case, args)
        refuse(case, results)
        report(case, results, args)


def arguments(argv):
    """What the command line asks for."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--cases", type=lambda text: text.split(","), help="names, with commas")
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes of each side")
    parser.add_argument("--steps", type=int, default=9, help="steps of a process, where steps are compared")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try it; writes no result file")
    return parser.parse_args(argv)


def measure(case: Case, args) -> dict[str, list[dict]]:
    """{side: what each of its processes measured}, and under "machine" the FLOPs and the rate."""
    folder = FOLDER / case.name
    data = case.data | ({"sizes": "tiny", "rows": 24} if args.tiny else {})
    runs = {machine.slug(side): knobs for side, knobs in case.ours.items()}
    process(stage.ROOT, "bench.prepare", folder, json.dumps(data), json.dumps(runs), case.epochs)
    steps = [str(args.steps)] if case.compare == "step" else []
    results: dict[str, list[dict]] = {side: [] for side in (*case.ours, *case.trl)}
    for number in range(args.rounds):
        for side, found in results.items():
            terminal.say(f"{case.name}: {side}, round {number + 1} of {args.rounds}")
            out = folder / f"{machine.slug(side)}-{number}.json"
            if side in case.ours:
                process(folder, "bench.ours", machine.slug(side), out, *steps)
            else:
                options = json.dumps(case.trl[side])
                process(folder, "bench.trl_side", "padded", "batches", out, options, *steps)
            found.append(json.loads(out.read_text(encoding="utf-8")))
    out = folder / "machine.json"
    process(folder, "bench.machine", machine.slug(next(iter(case.ours))), out)
    return results | {"machine": [json.loads(out.read_text(encoding="utf-8"))]}


# ---- comparing ----

def refuse(case: Case, results: dict[str, list[dict]]) -> None:
    """Raise StageError where the sides did not train the same: then no time or memory means anything."""
    reference = results[next(iter(case.trl))][0]["steps"]
    for side in (*case.ours, *case.trl):
        for run in results[side]:
            for where, off, limit in differences(case, run["steps"], reference):
                if not off <= limit:      # so that NaN is refused, too
                    raise StageError(f"{case.name}: {where} of {side} is off by {off:.2g}, over {limit:g}",
                                     "find out why: nothing is reported of this case")


def differences(case: Case, steps: list[dict], reference: list[dict]) -> Iterator[tuple[str, float, float]]:
    """(what, how far it is off, how far it may be) of all that has to agree with the reference."""
    if case.compare == "epoch":
        ours, theirs = epochs(steps, case.epochs), epochs(reference, case.epochs)
        for number, (a, b) in enumerate(zip(ours, theirs, strict=True), 1):
            yield f"the loss of epoch {number}", abs(a / b - 1), case.agree
        return
    yield "the number of steps", abs(len(steps) - len(reference)), 0
    for number, (a, b) in enumerate(zip(steps, reference), 1):
        yield f"the loss of step {number}", abs(a["loss"] / b["loss"] - 1), case.agree
        yield f"the gradient norm of step {number}", abs(a["grad_norm"] / b["grad_norm"] - 1), NORMS_AGREE


def epochs(steps: list[dict], number: int) -> list[float]:
    """The loss per token of each epoch."""
    size = len(steps) // number
    parts = [steps[start:start + size] for start in range(0, size * number, size)]
    return [sum(s["loss"] * s["tokens"] for s in part) / sum(s["tokens"] for s in part) for part in parts]


def summary(case: Case, runs: list[dict]) -> dict[str, float]:
    """Seconds (of a step, or of all epochs), supervised tokens a second, peak bytes above the model."""
    if case.compare == "step":
        steps = [step for run in runs for step in run["steps"][WARM_UP_STEPS:]]
        seconds = statistics.median(step["seconds"] for step in steps)
        tokens = statistics.mean(step["tokens"] for step in steps)
    else:
        seconds = statistics.median(sum(step["seconds"] for step in run["steps"])
                                    + run.get("before_seconds", 0.0) for run in runs)
        tokens = sum(step["tokens"] for step in runs[0]["steps"])
    return {"seconds": seconds, "tokens_per_second": tokens / seconds,
            "peak": statistics.median(run["peak_bytes"] for run in runs)}


def report(case: Case, results: dict[str, list[dict]], args) -> None:
    """Print the case's table, ours as parts of TRL at its best in that column, and write the result file."""
    found = {side: summary(case, results[side]) for side in (*case.ours, *case.trl)}
    best = {key: min(found[side][key] for side in case.trl) for key in ("seconds", "peak")}
    rows = []
    for side, figures in found.items():
        time_part, peak_part = (figures[key] / best[key] for key in ("seconds", "peak"))
        rows.append([side, f"{figures['seconds']:.2f}", f"{figures['tokens_per_second']:.0f}",
                     f"{figures['peak'] / 2**20:.0f}", f"{time_part:.2f}", f"{peak_part:.2f}"])
    unit = "s a step" if case.compare == "step" else "s in all"
    columns = ["side", unit, "supervised tokens/s", "peak MiB", "time / TRL's best", "peak / TRL's best"]
    terminal.table(f"{case.name}: {case.what}", columns, rows)
    facts = results["machine"][0]
    default = found[next(iter(case.ours))]
    if case.compare == "step":
        share = facts["flops"] / default["seconds"] / facts["flops_per_second"]
        terminal.say(f"{facts['flops'] / 1e9:.0f} GFLOP a step; this machine multiplies at "
                     f"{facts['flops_per_second'] / 1e9:.0f} GFLOP/s with {facts['threads']} thread(s); "
                     f"our step reaches {share:.0%} of that")
    ratios = {key: default[key] / best[key] for key in case.target}
    for key, ratio in ratios.items():
        terminal.say(f"{key}: {ratio:.2f} of TRL's at its best (target {case.target[key]:.2f})")
    if not args.tiny:
        write_result(case.name, {"case": case.name, "what": case.what, "rounds": args.rounds,
                                 "summary": found, "ratios": ratios, "target": case.target, "runs": results})


if __name__ == "__main__":
    stage.run_script(main)
