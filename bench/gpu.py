"""gpu: real sizes with random weights on one GPU, ours and TRL, within ten minutes. Not yet measured.

    python -m bench.gpu                    # or: make bench-gpu
    python -m bench.gpu --tiny             # the same code at tiny sizes, on any machine

Each case runs in a process of its own with a time limit; one that fails is reported and stops no other, and
what doesn't fit the budget is skipped by name. It needs neither the package datasets nor bitsandbytes (QLoRA
is then skipped) nor trl (ours then stands alone). Writes bench/results/gpu-DEVICE.json.

MFU: the FLOPs that a step needs (4 for each weight and token on the trained path, which has no weight
gradients, and 2 in the frozen tower; recomputation is no work) over time, over the rate of bf16 products
that the same process measures.
"""
import argparse
import importlib
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from types import SimpleNamespace

import torch

from bench import machine, real

BUDGET_SECONDS, CASE_SECONDS = 540, 150
SIDES, ADAPTERS = ("ours", "TRL", "ours, packed"), ("lora", "qlora")
STEPS, WARM_UP_STEPS = 12, 3
MICRO_STEPS = 2
LENGTHS, TINY_LENGTHS = (1024, 768, 640, 256), (96, 64, 48, 24)  # tokens in a micro-batch; the last is text


# ---- all cases ----

def main(argv=None) -> None:
    """Run the cases in turn, print a line for each, and write the result file."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try it")
    parser.add_argument("--out", help="where results go, in place of bench/results")
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(real.MODELS))
    parser.add_argument("--case", nargs=4, metavar=("MODEL", "ADAPTER", "SIDE", "OUT"), help="one case, here")
    args = parser.parse_args(argv)
    if args.case:
        *case, out = args.case
        Path(out).write_text(json.dumps(measure(*case, args.tiny)) + "\n", encoding="utf-8")
        return
    began, found = time.monotonic(), {}
    for case in ((model, adapter, side) for adapter in ADAPTERS for model in args.models for side in SIDES):
        left = BUDGET_SECONDS - (time.monotonic() - began)
        outcome = lacks(*case) or run_apart(case, args.tiny, min(left, CASE_SECONDS))
        found[" | ".join(case)] = outcome
        print(" | ".join([*case, words(outcome)]), flush=True)
    for line in ratios(found):
        print(line)
    device = machine.slug(machine.name())
    path = Path(args.out) if args.out else machine.ROOT / "bench" / "results" / f"gpu-{device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = machine.described() | {"torch": torch.__version__, "tiny": args.tiny, "cases": found,
                                     "seconds": round(time.monotonic() - began)}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def lacks(model: str, adapter: str, side: str) -> dict | None:
    """Why a case can't run here, or None."""
    needed = {"TRL": ("trl", "datasets")}.get(side, ()) + (("bitsandbytes",) if adapter == "qlora" else ())
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    return {"skipped": f"{missing[0]} is not installed"} if missing else None


def run_apart(case: tuple[str, str, str], tiny: bool, seconds: float) -> dict:
    """What a case measured in a process of its own, or why it did not."""
    if seconds < 20:
        return {"skipped": f"the budget of {BUDGET_SECONDS} s is used up"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "case.json"
        sizes = ["--tiny"] if tiny else []
        command = [sys.executable, "-m", "bench.gpu", *sizes, "--case", *case, str(out)]
        try:
            done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {seconds:.0f} s"}
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            return {"failed": " / ".join(lines[-2:]) or f"exit code {done.returncode}"}
        return json.loads(out.read_text(encoding="utf-8"))


def words(outcome: dict) -> str:
    """A case's result in a line."""
    if "seconds" not in outcome:
        return " ".join(f"{kind}: {why}" for kind, why in outcome.items())
    return (f"{outcome['seconds'] * 1000:.0f} ms a step, {outcome['tokens_per_second']:,.0f} tokens/s, peak "
            f"{outcome['base_gib']:.1f} + {outcome['peak_gib']:.1f} GiB, MFU {outcome['mfu']:.0%}")


def ratios(found: dict[str, dict]) -> list[str]:
    """Ours as parts of TRL's, where both ran and their losses agree to 1%."""
    lines = []
    for case, theirs in found.items():
        model, adapter, side = case.split(" | ")
        if side != "TRL" or "seconds" not in theirs:
            continue
        for other in ("ours", "ours, packed"):
            ours = found[f"{model} | {adapter} | {other}"]
            if "seconds" not in ours:
                continue
            off = max(abs(a / b - 1) for a, b in zip(ours["losses"], theirs["losses"]))
            per_token = theirs["tokens_per_second"] / ours["tokens_per_second"]
            lines.append(f"{model} | {adapter} | {other} / TRL: " + (
                f"time {per_token:.2f}, peak {ours['peak_gib'] / theirs['peak_gib']:.2f}" if off <= 0.01
                else f"no ratio, since losses differ by {off:.1%}"))
    return lines


# ---- one case ----

def measure(name: str, adapter: str, side: str, tiny: bool) -> dict:
    """What the steps of one side took, in this process."""
    if importlib.util.find_spec("datasets") is None:
        sys.modules["datasets"] = types.ModuleType("datasets")  # 05_train would read 02's samples with it
    from lib.parallel import World, pick_device
    world, lengths = World(0, 1, pick_device()), TINY_LENGTHS if tiny else LENGTHS
    packed = side == "ours, packed"
    given = {"base_model": f"random/{name}", "datasets": [{"path": __file__}], "adapter": adapter,
             "micro_batch_size": 1 if packed else len(lengths), "gradient_accumulation_steps": MICRO_STEPS,
             "sample_packing": packed, "lora_r": 16, "lr_scheduler": "constant", "warmup_steps": 0,
             "learning_rate": 1e-5}
    knobs, *_ = importlib.import_module("01_config").configure(Path("gpu.yaml"), json.dumps(given))
    net, roles = build(real.configuration(name, tiny), knobs, world.device)
    made = Made(name, net, lengths, packed)
    result = (with_trl if side == "TRL" else with_ours)(net, roles, made, knobs, world)
    return figures(result, net, roles, made, world.device)


def build(config, knobs, device: torch.device):
    """(PEFT model with random weights in bf16 or nf4, its roles)."""
    from lib import adapter, quant, registry
    from lib.plan import quiet
    from lib.roles import roles_of
    torch.manual_seed(0)
    with torch.device(device), quiet():
        net = registry.model_class(config, None)._from_config(config, dtype=torch.bfloat16,
                                                              attn_implementation="sdpa")
    net.requires_grad_(False)
    roles = roles_of(net, registry.family_of(config.model_type))
    if knobs.load_in_4bit:
        for linear in quant.quantised_linears(net, roles):
            net.set_submodule(linear, in_4_bits(net.get_submodule(linear), device))
        net.is_loaded_in_4bit = True      # by which TRL knows
        quant.keep_gradients(net)
    plan = {"base_model": knobs.base_model, "revision": None, "roles": roles.paths, "idle": roles.idle,
            "roles_guessed": False, "new_rows": []}
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

    def __init__(self, name: str, net, lengths: tuple[int, ...], packed: bool):
        from lib import packing, registry
        from lib.sampler import Batcher
        torch.manual_seed(0)
        chance = torch.Generator().manual_seed(0)
        family = registry.family_of(net.config.model_type)
        samples = [real.sample(name, net.config, tokens, int(tokens > lengths[-1]), chance)
                   for _ in range(MICRO_STEPS) for tokens in lengths]
        self.ids = [str(number) for number in range(len(samples))]
        self.input_tokens = [sample["input_ids"].shape[1] for sample in samples]
        self.supervised_tokens = [int((sample["labels"][:, 1:] != -100).sum()) for sample in samples]
        self.media = [("image",) * ("pixel_values" in sample) for sample in samples]
        plain = Batcher(0, family.collate)
        self.alone = [plain([sample]) for sample in samples]
        size, batcher = len(lengths), plain
        groups = [tuple(range(start, start + size)) for start in range(0, len(samples), size)]
        self.rows = groups if packed else [(index,) for index in range(len(samples))]
        if packed:
            needs = packing.needs(net.get_base_model(), family)
            batcher = Batcher(0, family.collate, needs["masks"])
            rows = [[packing.join([samples[index] for index in row], needs["positions"], family.collate)]
                    for row in groups]
        else:
            rows = [[samples[index] for index in row] for row in groups]
        self.batches = [pinned(batcher(row)) for row in rows]

    def dealt(self, rows, micro_batch_size: int, rank: int, world_size: int) -> list:
        """A step's rows in micro-batches."""
        from lib.sampler import dealt
        return dealt(rows, micro_batch_size, rank, world_size)


def pinned(batch: dict) -> dict:
    """The batch as a loader for CUDA hands it over, so that its copy doesn't hold up the step."""
    if not torch.cuda.is_available():
        return batch
    return {key: value.pin_memory() if isinstance(value, torch.Tensor) else value
            for key, value in batch.items()}


def with_ours(net, roles, made: Made, knobs, world) -> dict:
    """05_train's own optimizer_step, so many times."""
    from functools import partial
    from itertools import cycle

    from bench.ours import take
    from lib import fast, model, optim
    train = importlib.import_module("05_train")
    parameters = model.trained_parameters(net)
    role_of = {name: roles.of(model.base_name(name)) for name in parameters}
    model.checkpoint_trained_layers(net, roles, set(role_of.values()))
    every_step = SimpleNamespace(of_step=lambda step: made.rows)
    run = train.Run(
        work=SimpleNamespace(config=knobs), world=world, model=net, roles=roles, parameters=parameters,
        role_of=role_of,
        watch=optim.GradientWatch(role_of, {"image"}),
        optimizer=optim.make_optimizer(parameters, role_of, knobs),
        autocast=partial(torch.autocast, world.device.type, torch.bfloat16), samples=made, held_out=made,
        order=every_step, first_step=0, total_steps=STEPS)
    with fast.paths(net, roles):
        return take(train, run, STEPS, cycle(made.batches)).result()


def with_trl(net, roles, made: Made, knobs, world) -> dict:
    """TRL's SFTTrainer on the same batches. It wants a tokenizer, and never uses it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from bench import trl_side
    words = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")
    with tempfile.TemporaryDirectory() as folder:
        config = trl_side.settings(knobs, STEPS, MICRO_STEPS, {"gradient_checkpointing": True}, Path(folder))
        return trl_side.train(net, tokenizer, lambda number: made.batches[number % MICRO_STEPS],
                              [sum(made.supervised_tokens)] * STEPS, config, world.device)


def figures(result: dict, net, roles, made: Made, device: torch.device) -> dict:
    """Time, memory and MFU of what a meter measured. Padding is no work: it counts by samples alone."""
    from collections import Counter

    from lib.sampler import to_device
    needed, done = Counter(), Counter()
    with torch.autocast(device.type, torch.bfloat16):
        for batches, found in ((made.alone, needed), (made.batches, done)):
            for batch in batches:
                found += machine.products(net, roles, to_device(batch, device), {"language"})
    rate = machine.matrix_rate(done, device, torch.bfloat16)
    seconds = statistics.median(step["seconds"] for step in result["steps"][WARM_UP_STEPS:])
    return {"seconds": seconds, "tokens_per_second": sum(made.input_tokens) / seconds,
            "base_gib": result["base_bytes"] / 2**30, "peak_gib": result["peak_bytes"] / 2**30,
            "mfu": machine.flops(needed) / seconds / rate, "flops": machine.flops(needed),
            "flops_per_second": rate, "losses": [step["loss"] for step in result["steps"]]}


if __name__ == "__main__":
    main()
