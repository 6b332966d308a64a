"""05_train: the training loop, written out.

    python 05_train.py runs/demo                                   # laptop or one GPU
    torchrun --nproc-per-node 8 05_train.py runs/demo              # many
    python 05_train.py runs/demo --check                           # does it fit, can it learn? writes nothing

Reads:  02_data (samples, processor), 03_load_model/model.json, 04_lora/adapter.
Writes: 05_train/adapter/ or model/, checkpoints/step-N/, metrics.jsonl (exact), timings.jsonl, golden.safetensors, loss.svg.
Source: loss on generated text only, normalised over the whole optimizer step; gradient checkpointing (arXiv 1604.06174).
Fork me to: change the step (`optimizer_step`), the loss (lib/loss.py), the schedule (lib/optim.py), the order (lib/sampler.py).
"""
import contextlib
import json
import math
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import datasets
import torch

from lib import checkpoint, model, optim, parallel, stage, terminal
from lib.chat import Encoder
from lib.evaluate import held_out_loss
from lib.golden import write_golden
from lib.loss import forward_loss
from lib.metrics import Log
from lib.registry import Roles
from lib.sampler import Order, Samples, loader, to_device
from lib.stage import StageError


def main(argv=None):
    """Decide together, load, resume if there is something to resume, train, save."""
    parser = stage.arguments(__doc__)
    parser.add_argument("--check", action="store_true", help="one step on the longest batch, then overfit one batch")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint although something changed")
    args = parser.parse_args(argv)
    world = parallel.start()
    try:
        run = Path(world.agree(lambda: str(stage.resolve_run(args.run))))
        if args.check:
            return check(Run.load(stage.view("05_train", run), world))
        # 1. Rank 0 decides whether to skip, run, resume or refuse; the others do the same.
        decision = world.agree(lambda: stage.decide("05_train", run, args.force, args.resume).to_json())
        work = stage.begin(stage.Decision.from_json(decision), leader=world.is_leader)
        world.barrier()
        if work is not None:
            # 2. Load model, adapter and samples by the plans of the earlier stages.
            training = Run.load(work, world)
            # 3. Train, from the newest checkpoint if there is one.
            train(training)
            # 4. Save what was trained, and what a fresh process has to reproduce.
            save(training)
    finally:
        parallel.stop()


@dataclass
class Run:
    """Everything that the loop needs, loaded once."""
    work: stage.Work
    world: parallel.World
    model: torch.nn.Module
    parameters: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    samples: Samples
    held_out: Samples
    order: Order
    total_steps: int
    autocast: partial
    had_gradient: set[str] = field(default_factory=set)

    @classmethod
    def load(cls, work: stage.Work, world: parallel.World) -> "Run":
        """The run as the earlier stages planned it, on this rank's device."""
        config, data = work.config, work.input("02_data")
        plan = json.loads((work.input("03_load_model") / "model.json").read_text(encoding="utf-8"))
        roles = Roles.of_plan(plan)
        net = model.load(plan, world.device)
        if config.adapter is None:
            model.train_roles(net, roles, config.train_roles)
        else:
            net = model.attach(net, work.input("04_lora") / "adapter")
        parameters = model.trained_parameters(net)
        planned = json.loads((work.input("04_lora") / "adapter.json").read_text(encoding="utf-8"))
        compare_with_plan(parameters, planned)
        if config.gradient_checkpointing:
            trained_roles = {roles.of(model.base_name(name)) for name in parameters}
            model.checkpoint_trained_layers(net, roles, trained_roles)
        encoder = Encoder.load(data / "processor", config.trust_remote_code)
        samples = Samples(datasets.load_from_disk(str(data / "train")), encoder)
        held_out = Samples(datasets.load_from_disk(str(data / "eval")), encoder)
        global_batch_size = config.micro_batch_size * config.gradient_accumulation_steps * world.world_size
        order = Order(len(samples), global_batch_size, config.seed)
        kind = torch.bfloat16 if plan["dtype"] == "bfloat16" else None
        autocast = partial(torch.autocast, world.device.type, kind) if kind else contextlib.nullcontext
        return cls(work, world, net, parameters, optim.make_optimizer(list(parameters.values()), config), samples,
                   held_out, order, order.total_steps(config.num_epochs, config.max_steps), autocast)


def compare_with_plan(parameters: dict, planned: dict) -> None:
    """StageError where what trains here is not what 04 planned."""
    here, there = sum(p.numel() for p in parameters.values()), sum(planned["trained_parameters"].values())
    if here != there:
        raise StageError(f"05 would train {here:,} parameters; 04_lora/adapter.json planned {there:,}",
                         "run 04_lora.py again")


# ------------------------------------------------------------------------------------------------ the loop

def train(run: Run) -> None:
    """Optimizer steps from the newest checkpoint to the end, with evaluation and checkpoints on the way."""
    config, per_epoch = run.work.config, run.order.steps_per_epoch
    first = resume(run)
    log = Log(run.work.path, run.world, per_epoch, first)
    batches = micro_batches(run, first)
    with terminal.Progress("training", run.total_steps, done=first) as progress:
        if first == 0:
            evaluate(run, log, step=0)
        for step in range(first, run.total_steps):
            figures = optimizer_step(run, step, batches)
            log.step(step + 1, figures)
            if (step + 1) % config.logging_steps == 0:
                progress.update(step + 1, **log.line())
            if due(step + 1, per_epoch, config.evals_per_epoch, run.total_steps):
                evaluate(run, log, step + 1)
            if due(step + 1, per_epoch, config.saves_per_epoch, run.total_steps, config.save_steps):
                save_checkpoint(run, step + 1)
    log.draw()


def resume(run: Run) -> int:
    """The step to go on from: 0, or that of the newest checkpoint, whose weights and moments are put in place."""
    newest = stage.newest_checkpoint(run.work.path) if run.work.resuming else None
    if newest is None:
        return 0
    state = checkpoint.load(newest, run.parameters, run.optimizer)
    if state["global_batch_size"] != run.order.global_batch_size:
        raise StageError(f"{newest} was trained with {state['global_batch_size']} samples a step, now it would be "
                         f"{run.order.global_batch_size}",
                         "change gradient_accumulation_steps so that micro batch x accumulation x ranks is the same")
    return state["step"]


def optimizer_step(run: Run, step: int, batches) -> dict:
    """One optimizer step: every micro-batch forward and backward, gradients summed over ranks, one update.

    The loss is the sum of token losses over the supervised tokens of the whole step, all micro-batches and ranks, known
    before the first forward. So how the samples are cut into micro-batches and ranks changes nothing.
    """
    config, world = run.work.config, run.world
    step_tokens = sum(run.samples.records[index]["supervised_tokens"] for index in run.order.of_step(step))
    torch.manual_seed((config.seed * 1_000_003 + step) * 4096 + world.rank)  # dropout, so that resuming repeats it
    sums = torch.zeros(2, device=world.device)                                # loss, correct tokens
    tokens, waited, began = 0, 0.0, time.monotonic()
    for _ in run.order.micro_batches(step, config.micro_batch_size, world.rank, world.world_size):
        asked = time.monotonic()
        batch = next(batches)
        waited += time.monotonic() - asked
        tokens += int(batch["attention_mask"].numel())
        batch = to_device(batch, world.device)
        with run.autocast():
            loss, correct = forward_loss(run.model, batch)
        (loss / step_tokens).backward()
        sums += torch.stack([loss.detach(), correct.to(loss.dtype)])
    world.sum_gradients(run.parameters.values())
    if step <= 1:
        require_gradients(run, step)
    rate = optim.learning_rate(config, step, run.total_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    norm = torch.nn.utils.clip_grad_norm_(run.parameters.values(), config.max_grad_norm)
    loss, correct = (world.sum(sums) / step_tokens).tolist()
    if not math.isfinite(loss) or not math.isfinite(float(norm)):
        raise StageError(f"step {step + 1}: loss {loss}, gradient norm {float(norm)}, on the samples {step_samples(run, step)}",
                         "look at these rows; else lower learning_rate, or set bf16: false")
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return {"loss": loss, "token_accuracy": correct, "learning_rate": rate, "grad_norm": float(norm),
            "supervised_tokens": step_tokens, "seconds": time.monotonic() - began, "waited": waited, "tokens": tokens}


def require_gradients(run: Run, step: int) -> None:
    """Stop the run if by its second step a trainable tensor has had no gradient other than zero.

    LoRA's A matrices get theirs only once B has moved, so the first step alone can't tell.
    """
    for name, parameter in run.parameters.items():
        if parameter.grad is not None and bool(parameter.grad.any()):
            run.had_gradient.add(name)
    without = [name for name in run.parameters if name not in run.had_gradient]
    if without and step == 1:
        raise StageError(f"{len(without)} of {len(run.parameters)} trainable tensors got no gradient, such as {without[0]}",
                         "a role trains whose medium the data lacks: change lora_target_roles or train_roles")


def step_samples(run: Run, step: int) -> str:
    """The sample ids of a step, for messages."""
    return ", ".join(run.samples.records[index]["sample_id"] for index in run.order.of_step(step)[:8])


def micro_batches(run: Run, first: int):
    """An iterator over this rank's micro-batches of every step from `first` on."""
    config, world = run.work.config, run.world
    batches = [batch for step in range(first, run.total_steps)
               for batch in run.order.micro_batches(step, config.micro_batch_size, world.rank, world.world_size)]
    return iter(loader(run.samples, batches, config.dataloader_num_workers, world.device))


def due(step: int, steps_per_epoch: int, per_epoch: int, total: int, every: int | None = None) -> bool:
    """Whether something that happens `per_epoch` times an epoch, or `every` so many steps, happens after this step."""
    if per_epoch == 0 and every is None:
        return False
    if step == total:
        return True
    if every is not None:
        return step % every == 0
    return (step * per_epoch) // steps_per_epoch > ((step - 1) * per_epoch) // steps_per_epoch


def evaluate(run: Run, log: "Log", step: int) -> None:
    """Loss on the held-out samples, written to metrics.jsonl; nothing where there are none."""
    if len(run.held_out) and run.work.config.evals_per_epoch:
        found = held_out_loss(run.model, run.held_out, run.world, run.work.config.micro_batch_size, run.autocast)
        log.write({"step": step, **found})


# ------------------------------------------------------------------------------------------------ saving

def save_checkpoint(run: Run, step: int) -> None:
    """checkpoints/step-N, by rank 0; the others wait, so that no rank runs ahead into a failing disk."""
    if run.world.is_leader:
        folder = run.work.path / "checkpoints"
        checkpoint.save(folder, step, run.parameters, run.optimizer, {"global_batch_size": run.order.global_batch_size})
        checkpoint.prune(folder, run.work.config.save_total_limit)
    run.world.barrier()


def save(run: Run) -> None:
    """adapter/ or model/, then golden.safetensors: what the saved weights answer in a plain inference forward."""
    if run.world.is_leader:
        net, config = run.model.eval(), run.work.config
        if config.adapter is None:
            model.save_full(net, run.work.path / "model")
        else:
            model.save_adapter(net, run.work.path / "adapter")
        rows = run.held_out if len(run.held_out) else run.samples
        write_golden(net, rows, config.golden_rows, run.work.path / "golden.safetensors")
        run.work.finish(volatile=("checkpoints", "timings.jsonl"))
    run.world.barrier()


# ------------------------------------------------------------------------------------------------ the check

def check(run: Run) -> None:
    """One step on the longest samples, its memory and the hours of the run; then 30 steps on one batch."""
    config, records = run.work.config, run.samples.records
    longest = sorted(range(len(records)), key=lambda i: -records[i]["input_tokens"])[:run.order.global_batch_size]
    began = time.monotonic()
    losses = [overfit_step(run, longest)]
    seconds = time.monotonic() - began
    hours = seconds * run.total_steps / 3600
    terminal.say(f"longest step: {sum(records[i]['input_tokens'] for i in longest):,} tokens in {seconds:.2f} s, "
                 f"peak {parallel.peak_memory_gib(run.world.device):.2f} GiB; "
                 f"{run.total_steps} steps take at most {hours:.2f} h")
    few = longest[:config.micro_batch_size]
    for group in run.optimizer.param_groups:
        group["lr"] = max(config.learning_rate, 2e-3 if config.adapter else 1e-4)  # learn by heart, whatever the recipe
    losses = [overfit_step(run, few) for _ in range(30)]
    terminal.say(f"30 steps on one batch: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    if losses[-1] >= 0.1:
        raise StageError(f"the model doesn't overfit one batch: loss {losses[-1]:.3f} after 30 steps, not under 0.1",
                         "look at 02_data/preview.html (are the right tokens trained?); else raise lora_r or learning_rate")
    terminal.say("the model can learn this batch by heart: labels, gradients and optimizer work together", "green")


def overfit_step(run: Run, indices: list[int]) -> float:
    """Loss per token of these samples, after which one optimizer step is taken on them."""
    size = run.work.config.micro_batch_size
    batches = [indices[i:i + size] for i in range(0, len(indices), size)]
    tokens, total = sum(run.samples.records[i]["supervised_tokens"] for i in indices), 0.0
    for batch in loader(run.samples, batches, 0, run.world.device):
        with run.autocast():
            loss, _ = forward_loss(run.model, to_device(batch, run.world.device))
        (loss / tokens).backward()
        total += float(loss.detach()) / tokens
    torch.nn.utils.clip_grad_norm_(run.parameters.values(), run.work.config.max_grad_norm)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return total


if __name__ == "__main__":
    stage.run_script(main)
