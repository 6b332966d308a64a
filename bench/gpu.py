"""gpu: real sizes with random weights on one GPU, ours and TRL, within ten minutes.

    python -m bench.gpu                    # or: make bench-gpu
    python -m bench.gpu --tiny             # the same code at tiny sizes, on any machine

Each case runs in a process of its own with a time limit; one that fails is reported and stops no other, and
what doesn't fit the budget is skipped by name. It needs neither the package datasets nor bitsandbytes (QLoRA
is then skipped) nor trl (ours then stands alone). Writes bench/results/gpu-DEVICE.json.

"kept" is without gradient checkpointing, the rest with it. "x4" has four times the tokens in a micro-batch, for
MFU: a step of few tokens takes as long as Python needs to ask for its kernels. Memory is the allocator's peak;
its forecast is lib/memory/forecast.py's, made of configurations alone by a process beside the cases.

MFU: the FLOPs that a step needs (4 for each weight and token on the trained path, which has no weight
gradients, and 2 in the frozen tower; recomputation is no work) over time, over the rate of bf16 products
that the same process measures.
"""
import argparse
import importlib
import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch

from bench import machine, real

BUDGET_SECONDS, CASE_SECONDS = 560, 90
KEPT = ("ours kept", "TRL kept", "ours packed kept", "ours packed kept x4")
CHECKPOINTED = ("ours", "TRL", "ours packed")
IN_FEW_BITS = ("Qwen2.5-VL-3B", "Qwen2.5-VL-7B")
STEPS, WARM_UP_STEPS = 8, 2
RATE_SECONDS = 2.0
MICRO_STEPS = 2
LENGTHS, TINY_LENGTHS = (1024, 768, 640, 256), (96, 64, 48, 24)  # tokens in a micro-batch; the last is text


# ---- all cases ----

def main(argv=None) -> None:
    """Run the cases in turn, print a line for each, and write the result file."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try it")
    parser.add_argument("--out", help="where results go, in place of bench/results")
    parser.add_argument("--seconds", type=float, default=BUDGET_SECONDS, help="the budget")
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(real.MODELS))
    parser.add_argument("--case", nargs=4, metavar=("MODEL", "ADAPTER", "SIDE", "OUT"),
                        help="one case, here, after a line of stdin")
    parser.add_argument("--forecast", metavar="OUT", help="the cases' forecasts, here")
    args = parser.parse_args(argv)
    cases = cases_of(args.models)
    if args.case:
        *case, out = args.case
        import_what_it_needs(case[-1])
        sys.stdin.readline()
        Path(out).write_text(json.dumps(measure(*case, args.tiny)) + "\n", encoding="utf-8")
        return
    if args.forecast:
        Path(args.forecast).write_text(json.dumps(forecasts(cases, args.tiny)) + "\n", encoding="utf-8")
        return
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        models = ["--models", ",".join(args.models)]
        forecasting = Apart([*models, "--forecast"], args.tiny, Path(folder) / "forecast.json")
        found = run_all(cases, args.tiny, Path(folder), lambda: args.seconds - (time.monotonic() - began))
        forecast = forecasting.result(max(10.0, args.seconds - (time.monotonic() - began)))
    for name in found.keys() & forecast.keys():
        found[name]["forecast_gib"] = forecast[name]
    for line in [*ratios(found), *(off_forecast(found) if torch.cuda.is_available() else ())]:
        print(line)
    device = machine.slug(machine.name())
    path = Path(args.out) if args.out else machine.ROOT / "bench" / "results" / f"gpu-{device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = machine.described() | {"torch": torch.__version__, "tiny": args.tiny, "cases": found,
                                     "seconds": round(time.monotonic() - began)}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def cases_of(models: list[str]) -> list[tuple[str, str, str]]:
    """(model, adapter, side) of each case, the ones that matter most first, since the budget has an end."""
    few_bits = [model for model in models if model in IN_FEW_BITS]
    return [(model, adapter, side) for adapter, own, sides in (
        ("lora", models, KEPT), ("qlora", few_bits, CHECKPOINTED), ("lora", models, CHECKPOINTED))
        for model in own for side in sides]


def run_all(cases: list, tiny: bool, folder: Path, seconds_left) -> dict[str, dict]:
    """What each case measured, or why it did not; while one runs, the next one's process imports."""
    found = {case: reason for case in cases if (reason := lacks(*case))}
    able = [case for case in cases if case not in found]
    started = (Apart(["--case", *case], tiny, folder / f"{number}.json") for number, case in enumerate(able))
    process = next(started, None)
    for case in able:
        following = next(started, None)
        found[case] = process.result(min(seconds_left(), CASE_SECONDS))
        print(" | ".join([*case, words(found[case])]), flush=True)
        process = following
    return {" | ".join(case): found[case] for case in cases}


def lacks(model: str, adapter: str, side: str) -> dict | None:
    """Why a case can't run here, or None."""
    needed = ["trl", "datasets"] if "TRL" in side else []
    needed += ["bitsandbytes"] if adapter == "qlora" else []
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    return {"skipped": f"{missing[0]} is not installed"} if missing else None


class Apart:
    """This script in a process of its own, which imports at once and works when its result is asked for."""

    def __init__(self, words: list[str], tiny: bool, out: Path):
        self.out = out
        command = [sys.executable, "-m", "bench.gpu", *words, str(out), *(["--tiny"] if tiny else [])]
        self.process = subprocess.Popen(command, cwd=machine.ROOT, stdin=subprocess.PIPE, text=True,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def result(self, seconds: float) -> dict:
        """What it wrote within so many seconds from now, or why it did not."""
        if seconds < 10:
            self.process.kill()
            return {"skipped": "the budget is used up"}
        try:
            _, complaints = self.process.communicate("now\n", timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return {"failed": f"not done after {seconds:.0f} s"}
        if self.process.returncode:
            lines = [line for line in complaints.splitlines() if line.strip()]
            return {"failed": " / ".join(lines[-2:]) or f"exit code {self.process.returncode}"}
        return json.loads(self.out.read_text(encoding="utf-8"))


def words(outcome: dict) -> str:
    """A case's result in a line."""
    if "seconds" not in outcome:
        return " ".join(f"{kind}: {why}" for kind, why in outcome.items())
    return (f"{outcome['seconds'] * 1000:.0f} ms a step, {outcome['tokens_per_second']:,.0f} tokens/s, peak "
            f"{outcome['base_gib']:.1f} + {outcome['peak_gib']:.1f} GiB, MFU {outcome['mfu']:.0%}")


def ratios(found: dict[str, dict]) -> list[str]:
    """Ours as parts of TRL's, where both ran and their losses agree to 1%."""
    lines = []
    for name, ours in found.items():
        model, adapter, side = name.split(" | ")
        theirs = found.get(" | ".join([model, adapter, side.replace("ours", "TRL").replace(" packed", "")]))
        if side.startswith("TRL") or "seconds" not in ours or "seconds" not in (theirs or ()):
            continue
        off = max(abs(a / b - 1) for a, b in zip(ours["losses"], theirs["losses"]))
        time_part, peak_part = (ours[key] / theirs[key] for key in ("seconds", "peak_gib"))
        lines.append(f"{name} / TRL: " + (f"time {time_part:.2f}, peak {peak_part:.2f}" if off <= 0.01
                                          else f"no ratio, since losses differ by {off:.1%}"))
    return lines


def off_forecast(found: dict[str, dict]) -> list[str]:
    """How far each measured peak is from its forecast."""
    both = {name: (case["forecast_gib"], case["base_gib"] + case["peak_gib"]) for name, case in found.items()
            if "seconds" in case and "forecast_gib" in case}
    return [f"{name}: forecast {forecast:.2f} GiB, measured {measured:.2f}: {forecast / measured - 1:+.1%}"
            for name, (forecast, measured) in both.items()]


def forecasts(cases: list[tuple[str, str, str]], tiny: bool) -> dict[str, float]:
    """Case of ours -> GiB at the peak of a step, counted without weights."""
    from lib.memory.forecast import HollowStep
    found = {}
    for case in cases:
        model, adapter, side = case
        if "ours" in side and not lacks(*case):
            with planned(model, adapter, side, tiny) as (plan, knobs):
                step = HollowStep(plan, knobs)
                batch = Made(model, step.net, tiny, side).batches[0]
                try:
                    found[" | ".join(case)] = step.peak(batch, "kept" not in side).of(1) / 2**30
                except ValueError as error:         # tiles of a row without a picture, which only values tell
                    print(" | ".join(case), "has no forecast:", error, file=sys.stderr)
    return found


# ---- one case ----

def import_what_it_needs(side: str) -> None:
    """Import what takes seconds to import."""
    stand_in_for_datasets()
    for name in ("transformers", "peft", "lib.models.model", "05_train", *(["trl"] if "TRL" in side else [])):
        importlib.import_module(name)


def stand_in_for_datasets() -> None:
    """Let 05_train be imported without the package datasets, which it would only need to read 02's samples."""
    if importlib.util.find_spec("datasets") is None:
        sys.modules["datasets"] = types.ModuleType("datasets")


def measure(name: str, adapter: str, side: str, tiny: bool) -> dict:
    """What the steps of one side took, in this process."""
    stand_in_for_datasets()
    from lib.training.devices import pick_device
    from lib.training.parallel import World
    world = World(0, 1, pick_device())
    with planned(name, adapter, side, tiny) as (plan, knobs):
        net, roles = build(plan, knobs, world.device)
    made = Made(name, net, tiny, side)
    result = (with_trl if "TRL" in side else with_ours)(net, roles, made, knobs, world)
    return figures(result, net, roles, made, world.device)


@contextmanager
def planned(name: str, adapter: str, side: str, tiny: bool) -> Iterator[tuple[dict, object]]:
    """(plan, knobs) of a case, as long as its configuration is on disk."""
    from lib.models.plan import make_plan
    packed = "packed" in side
    given = {"base_model": f"random/{name}", "datasets": [{"path": __file__}], "adapter": adapter,
             "micro_batch_size": 1 if packed else len(LENGTHS), "gradient_accumulation_steps": MICRO_STEPS,
             "sample_packing": packed, "gradient_checkpointing": "kept" not in side, "lora_r": 16,
             "lr_scheduler": "constant", "warmup_steps": 0, "learning_rate": 1e-5}
    knobs, *_ = importlib.import_module("01_config").configure(Path("gpu.yaml"), json.dumps(given))
    with tempfile.TemporaryDirectory() as folder:
        real.configuration(name, tiny).save_pretrained(folder)
        knobs.base_model = folder
        yield make_plan(knobs), knobs


def build(plan: dict, knobs, device: torch.device):
    """(PEFT model with random weights in bf16 or nf4, its roles)."""
    from lib import quant, registry
    from lib.models import adapter
    from lib.models.plan import planned_config, quiet
    from lib.models.roles import Roles
    roles, config = Roles.of_plan(plan), planned_config(plan)
    torch.manual_seed(0)
    with torch.device(device), quiet():
        net = registry.model_class(config, None)._from_config(config, dtype=torch.bfloat16,
                                                              attn_implementation="sdpa")
    net.requires_grad_(False)
    if knobs.load_in_4bit:
        for linear in quant.quantised_linears(net, roles):
            net.set_submodule(linear, in_4_bits(net.get_submodule(linear), device))
        net.is_loaded_in_4bit = True      # by which TRL knows
        quant.keep_gradients(net)
    peft_model, _ = adapter.put_on(net, plan, knobs)
    return peft_model.train(), roles


def in_4_bits(linear: torch.nn.Linear, device: torch.device):
    """The layer as QLoRA has it: nf4, its scales quantised again, computing in bf16."""
    import bitsandbytes
    new = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None,
                                     compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True,
                                     quant_storage=torch.bfloat16, device="meta")
    new.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4",
                                            compress_statistics=True, module=new,
                                            quant_storage=torch.bfloat16)
    new.bias = linear.bias
    return new.to(device)                 # which quantises


class Made:
    """Samples made up for a model, with what 05_train's step asks of 02's; every step trains all of them."""

    def __init__(self, name: str, net, tiny: bool, side: str):
        from lib import registry
        from lib.batches import packing
        from lib.batches.sampler import Batcher
        torch.manual_seed(0)
        chance = torch.Generator().manual_seed(0)
        lengths = (TINY_LENGTHS if tiny else LENGTHS) * (4 if "x4" in side else 1)
        packed = "packed" in side
        family = registry.family_of(net.config.model_type)
        samples = [real.sample(name, net.config, tokens, int(tokens > lengths[-1]), chance)
                   for _ in range(MICRO_STEPS) for tokens in lengths]
        self.ids = [str(number) for number in range(len(samples))]
        self.input_tokens = [sample["input_ids"].shape[1] for sample in samples]
        self.supervised_tokens = [int((sample["labels"][:, 1:] != -100).sum()) for sample in samples]
        self.media = [("image",) if "pixel_values" in sample else () for sample in samples]
        plain = Batcher(0, family.collate)
        self.alone = [plain([sample]) for sample in samples]
        size, batcher, self.positions = len(lengths), plain, None
        groups = [tuple(range(start, start + size)) for start in range(0, len(samples), size)]
        self.rows = groups if packed else [(index,) for index in range(len(samples))]
        if packed:
            needs = packing.needs(net.get_base_model(), family)
            batcher, self.positions = Batcher(0, family.collate, needs["masks"]), needs["positions"]
            rows = [[packing.join([samples[index] for index in row], self.positions, family.collate)]
                    for row in groups]
        else:
            rows = [[samples[index] for index in row] for row in groups]
        self.batches = [pinned(batcher(row)) for row in rows]

    def dealt(self, rows, micro_batch_size: int, world_size: int) -> list:
        """Each rank's rows of a step, in micro-batches."""
        from lib.batches.order import dealt
        return dealt(rows, micro_batch_size, world_size)


def pinned(batch: dict) -> dict:
    """The batch as a loader for CUDA hands it over, so that its copy doesn't hold up the step."""
    if not torch.cuda.is_available():
        return batch
    return {key: value.pin_memory() if isinstance(value, torch.Tensor) else value
            for key, value in batch.items()}


def with_ours(net, roles, made: Made, knobs, world) -> dict:
    """05_train's own optimizer_step, so many times."""
    from bench.ours import take
    from lib import fast
    from lib.models import model
    from lib.training import optim
    from lib.training.watch import GradientWatch
    train = importlib.import_module("05_train")
    parameters = model.trained_parameters(net)
    role_of = {name: roles.of(name) for name in parameters}
    if knobs.gradient_checkpointing:
        model.checkpoint_trained_layers(net, roles, set(role_of.values()))
    every_step = SimpleNamespace(of_step=lambda step: made.rows)
    run = train.Run(
        work=SimpleNamespace(config=knobs), world=world, model=net, roles=roles, parameters=parameters,
        role_of=role_of,
        watch=GradientWatch(role_of, {"image"}),
        optimizer=optim.make_optimizer(parameters, role_of, knobs),
        dtype=torch.bfloat16, samples=made, held_out=made, order=every_step, first_step=0, total_steps=STEPS)
    with fast.paths(net, roles):
        return take(train, run, STEPS, itertools.cycle(made.batches)).result()


def with_trl(net, roles, made: Made, knobs, world) -> dict:
    """TRL's SFTTrainer on the same batches. It wants a tokenizer, and never uses it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from bench import trl_side
    words = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")
    with tempfile.TemporaryDirectory() as folder:
        config = trl_side.settings(knobs, STEPS, MICRO_STEPS,
                                   {"gradient_checkpointing": knobs.gradient_checkpointing}, Path(folder))
        return trl_side.train(net, tokenizer, lambda number: made.batches[number % MICRO_STEPS],
                              [sum(made.supervised_tokens)] * STEPS, config, world.device)


def figures(result: dict, net, roles, made: Made, device: torch.device) -> dict:
    """Time, memory and MFU of what a meter measured. Padding is no work: it counts by samples alone."""
    from collections import Counter

    from lib.batches.sampler import to_device
    needed, done = Counter(), Counter()
    with torch.autocast(device.type, torch.bfloat16):
        for batches, found in ((made.alone, needed), (made.batches, done)):
            for batch in batches:
                found += machine.products(net, roles, to_device(batch, device), {"language"})
    rate = machine.matrix_rate(done, device, torch.bfloat16, RATE_SECONDS)
    seconds = statistics.median(step["seconds"] for step in result["steps"][WARM_UP_STEPS:])
    return {"seconds": seconds, "tokens_per_second": sum(made.input_tokens) / seconds,
            "base_gib": result["base_bytes"] / 2**30, "peak_gib": result["peak_bytes"] / 2**30,
            "mfu": machine.flops(needed) / seconds / rate, "flops": machine.flops(needed),
            "flops_per_second": rate, "losses": [step["loss"] for step in result["steps"]]}


if __name__ == "__main__":
    main()
