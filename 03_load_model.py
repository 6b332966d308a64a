"""03_load_model: find out what the model is, plan how it is loaded, then really load it and run one forward.

    python 03_load_model.py runs/demo [--plan-only] [--force]

Reads:  01_config/config.json; 02_data (one sample); the base model's config and weights.
Writes: 03_load_model/model.json (class, dtype, quantisation, roles: true on every machine), load.json (seconds, GiB, first loss).
Source: the auto classes of transformers; QLoRA (arXiv 2305.14314) where the recipe quantises.
Fork me to: teach it a family (lib/registry.py:FAMILIES), or load in another way (lib/model.py:load).
"""
import json
import math
import time
from pathlib import Path

import datasets
import torch

from lib import model, parallel, stage, terminal
from lib.chat import Encoder
from lib.loss import forward_loss
from lib.sampler import Batcher, to_device


def main(argv=None):
    """Plan on meta tensors, print it by role, then load and compare."""
    parser = stage.arguments(__doc__)
    parser.add_argument("--plan-only", action="store_true", help="only print the plan; load and write nothing")
    args = parser.parse_args(argv)
    run = stage.resolve_run(args.run)
    if args.plan_only:
        return print_plan(model.make_plan(stage.view("03_load_model", run).config))

    # 1. Start the stage, unless its outputs are still true.
    work = stage.begin(stage.decide("03_load_model", run, force=args.force))
    if work is None:
        return
    # 2. Plan: class, dtype, quantisation and the role of every module, from the config alone.
    if Path(work.config.base_model).is_dir():
        work.uses(work.config.base_model)
    plan = model.make_plan(work.config)
    write_json(work.path / "model.json", plan)
    print_plan(plan)
    # 3. Load it for real, by the plan.
    device, started = parallel.pick_device(), time.monotonic()
    loaded = model.load(plan, device)
    seconds = time.monotonic() - started
    # 4. Run one sample through it: the first loss tells a broken model or template at once.
    first_loss, sample_id = first_forward(loaded, work, device)
    facts = {"device": str(device), "load_seconds": round(seconds, 2), "first_loss": first_loss, "sample_id": sample_id,
             "random_loss": math.log(loaded.get_output_embeddings().weight.shape[0]),
             "peak_memory_gib": round(parallel.peak_memory_gib(device), 3)}
    write_json(work.path / "load.json", facts)
    terminal.say(f"loaded on {device} in {seconds:.1f} s; loss of {sample_id}: {first_loss:.3f} "
                 f"(random answers would be at {facts['random_loss']:.2f}); {facts['peak_memory_gib']:.2f} GiB")
    work.finish(volatile=("load.json",))


def print_plan(plan: dict) -> None:
    """The plan as a table by role."""
    quantised = plan["quantisation"]
    names = {}
    for path, role in plan["roles"].items():
        names.setdefault(role, []).append(path)
    terminal.say(f"{plan['family']}: {plan['class']}, {plan['dtype']}, attention {plan['attn_implementation']}"
                 + (f", {len(quantised['linears'])} linear layers in {quantised['bits']} bits" if quantised else ""))
    if plan["roles_guessed"]:
        terminal.warn(f"no record for {plan['model_type']!r}: these roles are guessed from module names, check them")
    total = sum(plan["parameters"].values())
    rows = [[role, count, f"{count / total:.1%}", ", ".join(names.get(role, ["inside the language model"]))]
            for role, count in sorted(plan["parameters"].items(), key=lambda item: -item[1])]
    rows.append(["all", total, "100.0%", "head and embedding are one tensor" if plan["tied_head"] else ""])
    terminal.table("parameters by role", ["role", "parameters", "share", "modules"], rows)


def first_forward(loaded, work, device: torch.device) -> tuple[float, str]:
    """(loss per supervised token of the first training sample before any training, its sample_id)."""
    record = datasets.load_from_disk(str(work.input("02_data") / "train"))[0]
    encoder = Encoder.load(work.input("02_data") / "processor", work.config.trust_remote_code)
    batch = to_device(Batcher(encoder.pad_id, encoder.collate)([encoder(record)]), device)
    loaded.eval()
    with torch.no_grad():
        loss, _ = forward_loss(loaded, batch)
    return float(loss) / len(batch["targets"]), record["sample_id"]


def write_json(path: Path, content: dict) -> None:
    """A JSON file for people and machines."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    stage.run_script(main)
