"""03_load_model: find out what the model is, plan how it is loaded, then really load it and run one forward.

    python 03_load_model.py runs/demo [--force]
    python 03_load_model.py runs/demo --plan-only       # what it is, by role; loads and writes nothing
    python 03_load_model.py runs/demo --forecast --gpus 8 --gib 80   # will training fit? needs no weights

Reads:  01_config/config.json; 02_data (one sample); the base model's config and weights.
Writes: 03_load_model/model.json (class, dtype, quantisation, roles: true on every machine), load.json
        (seconds, GiB, first loss) and forecast.json (GiB that training takes on such a device).
Source: the auto classes of transformers; QLoRA (arXiv 2305.14314) where the recipe quantises.
Fork me to: teach it a family (lib/models/families.py:FAMILIES), or load in another way
        (lib/models/model.py:load).
"""
import math
import time
from pathlib import Path

import torch

from lib import quant, registry
from lib.batches.sampler import Batcher, to_device
from lib.data.finished import encoder_of, samples_of
from lib.memory import fit
from lib.models import model, origin
from lib.models.plan import make_plan
from lib.run import stage, terminal
from lib.run.errors import StageError
from lib.run.ledger import write_json
from lib.training import devices
from lib.training.loss import forward_loss


def main(argv=None):
    """Plan the model on meta tensors, print the plan by role, then load the model and compare."""
    parser = stage.arguments(__doc__)
    parser.add_argument("--plan-only", action="store_true", help="only print the plan")
    parser.add_argument("--forecast", action="store_true", help="only print the memory that training takes")
    parser.add_argument("--gpus", type=int, help="--forecast: how many GPUs (1)")
    parser.add_argument("--gib", type=float, help="--forecast: memory of each, GiB (80)")
    args = parser.parse_args(argv)
    for flag, given in (("--gpus", args.gpus), ("--gib", args.gib)):
        if given is not None and (given <= 0 or not args.forecast):
            wrong = "more than 0 is needed" if args.forecast else "only --forecast reads it"
            raise StageError(f"{flag} {given}: {wrong}", "for example --forecast --gpus 8 --gib 80")
    run = stage.resolve_run(args.run)
    if args.plan_only:
        return print_plan(make_plan(stage.every_knob(run)))
    if args.forecast:
        plan = make_plan(stage.view("03_load_model", run).config)
        print_plan(plan)
        return fit.print_fit(fit.Case.of(run, plan), args.gpus or 1, args.gib or 80)

    # 1. Start the stage, unless its outputs are still true.
    work = stage.begin(stage.decide("03_load_model", run, force=args.force))
    if work is None:
        return
    if Path(work.config.base_model).is_dir():
        work.uses(work.config.base_model)
    # 2. Plan: class, dtype, quantisation and the role of every module, from the config and empty tensors.
    if work.config.trust_remote_code:
        origin.say_code(work.config.base_model, work.config.revision)
    plan = make_plan(work.config)
    write_json(work.path / "model.json", plan)
    print_plan(plan)
    # 3. Forecast what training will take on this kind of device.
    device = devices.pick_device()
    if forecast := fit.of_run(run, plan, device.type):
        write_json(work.path / "forecast.json", forecast)
        fit.print_facts(forecast)
    # 4. Load it for real, by the plan.
    if plan["dtype"] == "bfloat16":
        devices.refuse_emulated_bf16(work.config.bf16, device)
    began = time.monotonic()
    loaded = model.load(plan, device, "inference", spread=devices.spread(work.config, device))
    seconds = time.monotonic() - began
    # 5. Run one sample through it: the first loss tells a broken model or template at once.
    loss, sample_id = first_forward(loaded, work, device)
    random_loss = math.log(loaded.get_output_embeddings().weight.shape[0])
    peak_gib = devices.peak_memory_gib(device)
    write_json(work.path / "load.json", {
        "device": str(device), "load_seconds": round(seconds, 2), "peak_memory_gib": round(peak_gib, 3),
        "sample_id": sample_id, "first_loss": loss, "random_loss": random_loss})
    terminal.say(f"loaded on {device} in {terminal.duration(seconds)}, peak memory {peak_gib:.2f} GiB; "
                 f"loss of {sample_id}: {loss:.3f} (random answers: {random_loss:.2f})")
    if getattr(loaded.config.get_text_config(), "output_router_logits", False):
        terminal.warn("output_router_logits: the router's auxiliary loss isn't added in training")
    explain_high_loss(loss, random_loss, registry.family_of(plan["model_type"]))
    work.finish(volatile=("load.json", "forecast.json"))


def print_plan(plan: dict) -> None:
    """Print the plan as a table by role."""
    terminal.say(f"{plan['family']}: {plan['class']} in {plan['dtype']}")
    for line in quant.in_words(plan):
        terminal.say(line)
    if plan["grown_to"]:
        terminal.say(f"new tokens: embedding and head grow to {plan['grown_to']:,} rows")
    if plan["roles_guessed"]:
        terminal.warn(f"no record for {plan['model_type']!r}: roles are guessed by name, check them")
    total, rows = sum(plan["parameters"].values()), []
    for role, count in sorted(plan["parameters"].items(), key=lambda item: -item[1]):
        paths = ", ".join(path for path, its_role in plan["roles"].items() if its_role == role)
        rows.append([role, count, f"{count / total:.1%}", paths or "inside the language model"])
    rows.append(["all", total, "100.0%", "head and embedding are one tensor" if plan["tied_head"] else ""])
    terminal.table("parameters by role", ["role", "parameters", "share", "modules"], rows)


def first_forward(loaded, work, device: torch.device) -> tuple[float, str]:
    """(loss per supervised token of the first training sample, before training; its sample_id)."""
    record, encoder = samples_of(work, "train")[0], encoder_of(work)
    batch = to_device(Batcher(encoder.pad_id, encoder.collate)([encoder(record)]), device)
    with torch.no_grad():
        loss, _ = forward_loss(loaded, batch)
    return float(loss) / len(batch["targets"]), record["sample_id"]


def explain_high_loss(loss: float, random_loss: float, family: registry.Family) -> None:
    """Say what the family's record tells of a high first loss, if it is above half of a random guess's."""
    if loss > random_loss / 2 and family.first_loss_note:
        terminal.say(f"a high first loss: {family.first_loss_note}")


if __name__ == "__main__":
    stage.run_script(main)
