"""05_train: the training loop, written out.

    python 05_train.py runs/demo                                   # laptop or one GPU
    torchrun --nproc-per-node 8 05_train.py runs/demo              # many
    python 05_train.py runs/demo --check                           # does it fit, can it learn? writes nothing

Reads:  02_data (samples, processor), 03_load_model/model.json, 04_lora/adapter.
Writes: 05_train/adapter/ or model/, checkpoints/step-N/, metrics.jsonl (exact), timings.jsonl, loss.svg,
        answers.jsonl (of evaluations), trained.json (which step), golden.safetensors (what the trained
        weights answer, for 06 to compare).
Stops:  after Ctrl-C or SIGTERM with a checkpoint of the step, and exit code 130 or 143.
Source: loss on generated text only, normalised over the whole optimizer step; gradient checkpointing
        (arXiv 1604.06174).
Fork me to: change the step (`optimizer_step`), the loss (lib/training/loss.py), the schedule
        (lib/training/optim.py), the order of samples (lib/batches/order.py).
"""
import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch

from lib import fast
from lib.batches import packing
from lib.batches.order import Order, Row, in_turn
from lib.batches.sampler import Samples, loader, to_device
from lib.data.finished import encoder_of, samples_of
from lib.evaluation.evaluate import held_out_answers, held_out_loss
from lib.evaluation.golden import golden_answers, write_golden
from lib.evaluation.scores import metrics_of
from lib.fast import features, products
from lib.fast.store import keep_features
from lib.memory import fit
from lib.models import model
from lib.models.plan import read_plan
from lib.models.roles import Roles
from lib.models.saved import save_adapter
from lib.registry import family_of
from lib.run import folder, stage, terminal
from lib.run.ledger import read_json, write_json
from lib.training import checkpoint, devices, faults, hooks, metrics, optim, parallel, rehearsal, sharding
from lib.training.loss import forward_loss
from lib.training.metrics import Log
from lib.training.steps import Results, Sent, Step
from lib.training.trackers import trackers_of
from lib.training.watch import GradientWatch, waits_for


def main(argv=None):
    """Decide together, load, train from the newest checkpoint on, save."""
    parser = stage.arguments(__doc__)
    parser.add_argument("--check", action="store_true", help="take the longest step, then overfit one batch")
    parser.add_argument("--resume", action="store_true", help="go on although something changed")
    args = parser.parse_args(argv)
    with parallel.world() as world:
        path = world.agree(lambda: stage.resolve_run(args.run))
        if args.check:
            run = load(stage.view("05_train", path), world)
            with faults.explained(run), products.paths(run.dtype, world.device):
                return rehearsal.check(run, optimizer_step)
        # 1. Rank 0 decides whether to skip, run, resume or refuse; the others do the same.
        decision = world.agree(lambda: stage.decide("05_train", path, args.force, args.resume))
        work = stage.begin(decision, leader=world.is_leader)
        world.barrier()
        if work is None:
            return
        # 2. Load model, adapter and samples by the plans of the earlier stages, and the newest checkpoint.
        run = load(work, world)
        # 3. Train.
        with faults.explained(run):
            with products.paths(run.dtype, world.device) as speed, devices.tf32(
                    work.config.tf32 and work.config.bf16 is False):
                if speed > 1 and world.is_leader:
                    terminal.say(f"this CPU is slow in {run.dtype}: products are computed in float32")
                if work.config.cache_vision_features:
                    keep_features(run)
                gc.collect()
                gc.freeze()               # the garbage collector no longer looks at what stays for all steps
                with fast.paths(run.model, run.roles), features.replayed(run.model):
                    rehearsal.prove_rows_apart(run)
                    log = train(run)
            log.say_peak(run.forecast_gib)
            # 4. Save what was trained, and what a fresh process has to reproduce.
            save(run, log)


@dataclass
class Run:
    """Everything that the training loop needs, loaded once."""
    work: stage.Work
    world: parallel.World
    model: torch.nn.Module
    roles: Roles
    parameters: dict[str, torch.nn.Parameter]                      # what trains
    role_of: dict[str, str]                                        # {name of a parameter: its role}
    watch: GradientWatch
    optimizer: torch.optim.Optimizer
    dtype: torch.dtype                                             # of matrix products
    samples: Samples
    held_out: Samples
    order: Order
    first_step: int
    total_steps: int
    loss: Callable = forward_loss                                  # or one with a user's token losses
    scaler: optim.Scaler = field(default_factory=lambda: optim.Scaler("float32", torch.device("cpu")))
    forecast_gib: float | None = None                              # forecast of the peak, if there is one
    skipped: int = 0                                               # steps whose loss was not finite
    now: tuple[int, list[Row]] = (0, ())                           # step and micro-batch now, for messages
    read_at: float = 0.0                                           # when a step's figures were last read

    def autocast(self) -> torch.autocast:
        """The context of each forward, where `dtype` has 16 bits."""
        return torch.autocast(self.world.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def shares(self, rows: list[Row]) -> list[list[list[Row]]]:
        """Each rank's micro-batches of a step's rows."""
        return self.samples.dealt(rows, self.work.config.micro_batch_size, self.world.world_size)


def load(work: stage.Work, world: parallel.World) -> Run:
    """The Run as the earlier stages planned it, on this rank's device, resumed from its newest checkpoint."""
    config = work.config
    if config.device_map and world.world_size > 1:
        world.stop(f"device_map: {config.device_map} shares one process's model out, and torchrun gives each "
                   "rank its own GPU", "python 05_train.py, without torchrun; or remove device_map")
    world.agree(lambda: hooks.refuse_missing(config))
    plan = read_plan(work)
    # The model, and what of it trains.
    shards = config.fsdp_version is not None and world.world_size > 1
    net, roles, forecast_gib = load_model(work, world, plan, shards)
    parameters = model.trained_parameters(net)
    role_of = {name: roles.of(name) for name in parameters}
    # The samples.
    encoder = encoder_of(work)
    packed = packing.needs(net, family_of(plan["model_type"])) if config.sample_packing else {}
    samples, held_out = (Samples(samples_of(work, part), encoder, **packed, even=shards)
                         for part in ("train", "eval"))
    watch = GradientWatch(waits_for(net, roles, role_of), set().union(*samples.media))
    # The optimizer, the checkpoint to go on from, and the order of the samples, which it fixes.
    optimizer = optim.make_optimizer(parameters, role_of, config)
    state = resume(work, world, parameters, optimizer)
    scaler = optim.Scaler(plan["dtype"], world.device, state["scaler"])
    room = config.sequence_len if config.sample_packing else None
    order = Order(samples.input_tokens, state["global_batch_size"], config.seed, room, config.group_by_length,
                  samples.kinds)
    total_steps = order.total_steps(config.num_epochs, config.max_steps)
    if state["step"] > total_steps:
        knob = "num_epochs" if config.max_steps is None else "max_steps"
        steps = terminal.counted(total_steps, "step")
        world.stop(f"{work.checkpoint} is past the {steps} that {knob} now asks for",
                   f"raise {knob} to go on from it, or start over with --force")
    return Run(work=work, world=world, model=net, roles=roles, parameters=parameters, role_of=role_of,
               watch=watch, optimizer=optimizer, dtype=getattr(torch, plan["dtype"]), samples=samples,
               held_out=held_out, order=order, first_step=state["step"], total_steps=total_steps,
               loss=hooks.loss_of(config), scaler=scaler, forecast_gib=forecast_gib)


def load_model(work: stage.Work, world: parallel.World, plan: dict,
               shards: bool) -> tuple[torch.nn.Module, Roles, float | None]:
    """(the model, with what trains as 04 planned it; its roles; the forecast of the peak in GiB or None).

    shards: whether the frozen base is sharded over ranks.
    """
    config, roles = work.config, Roles.of_plan(plan)
    if plan["dtype"] == "bfloat16":
        devices.refuse_emulated_bf16(config.bf16, world.device)
    kept_share, forecast_gib = kept_layers(work, world, plan, shards)
    at = torch.device("cpu") if shards and not plan["quantisation"] else world.device
    adapter_path = work.input("04_lora") / "adapter" if config.adapter else None
    net = model.load(plan, at, "train", adapter_path, devices.spread(config, at))
    if world.device.type == "cpu":
        devices.keep_freed_memory()
    if config.adapter is None:
        model.train_roles(net, roles, config.train_roles, config.unfrozen_parameters)
    parameters = model.trained_parameters(net)
    planned = read_json(work.input("04_lora") / "adapter.json")["trained_parameters"]
    model.refuse_unplanned(parameters, roles, planned)
    if config.gradient_checkpointing:
        model.checkpoint_trained_layers(net, roles, set(map(roles.of, parameters)), kept_share,
                                        offload=config.gradient_checkpointing == "offload")
    if shards:
        sharding.shard(net, roles, world)
    return net, roles, forecast_gib


def resume(work: stage.Work, world: parallel.World, parameters: dict[str, torch.nn.Parameter],
           optimizer: torch.optim.Optimizer) -> dict:
    """The loop's state, of the newest checkpoint, whose weights and moments are loaded, or of a start."""
    per_rank = work.config.micro_batch_size * work.config.gradient_accumulation_steps
    if not work.checkpoint:
        return {"step": 0, "global_batch_size": per_rank * world.world_size, "scaler": None}
    state = checkpoint.read_state(work.checkpoint)         # the step's rows hold on any number of ranks
    if per_rank != state["per_rank"]:
        world.stop(f"micro_batch_size x gradient_accumulation_steps is {per_rank}; the checkpoint was "
                   f"made with {state['per_rank']}", "change them back, or start over with --force")
    checkpoint.load(work.checkpoint, parameters, optimizer)
    for group, numbers in zip(optimizer.param_groups, state["groups"]):
        group.update(numbers)
    return state


def kept_layers(work: stage.Work, world: parallel.World, plan: dict,
                shards: bool) -> tuple[float, float | None]:
    """(share of the layers that keep their activations for the backward, GiB at the peak; None: no forecast).

    They are chosen by the forecast of memory, and the same on every rank, since a sharded model's
    checkpointed layers are gathered once more. There is no forecast for a model spread over GPUs by
    device_map, nor for activations in host memory.
    """
    wanted, shared_out = work.config.gradient_checkpointing, devices.spread(work.config, world.device)
    if wanted == "auto" and shared_out:
        terminal.say("gradient_checkpointing: auto: no layer keeps its activations, since no forecast knows "
                     "what room there is on GPUs that share a model (device_map)")
    if wanted == "offload" or shared_out:
        return 0.0, None

    def decide() -> tuple[float, float | None]:
        free = devices.free_memory_gib(world.device) * fit.CAUTION
        if (forecast := fit.of_run(work.run, plan, world.device.type)) is None:
            return 0.0, None
        room = {True: 0.0, False: math.inf}.get(wanted, free)
        share, peak = fit.kept(forecast, room, world.world_size if shards else None)
        if wanted == "auto":
            terminal.say(f"gradient_checkpointing: auto: {share:.0%} of the layers keep their activations "
                         f"(forecast {peak:.2f} GiB, room for {free:.2f} GiB)")
        return share, peak
    return world.agree(decide)


# ---- the loop ----

def train(run: Run) -> Log:
    """The log of all optimizer steps, taken from the first one to do, with evaluations and checkpoints."""
    config, per_epoch, total = run.work.config, run.order.steps_per_epoch, run.total_steps
    evaluates = partial(due, per_epoch, config.evals_per_epoch, config.eval_steps)
    keeps = partial(due, per_epoch, config.saves_per_epoch, config.save_steps)
    tell = trackers_of(config, run.work.run) if run.world.is_leader else []
    log = Log(run.work.path, run.world, per_epoch, run.first_step, tell)
    run.skipped = sum("skipped" in row for row in log.notable)
    batches, held_out = micro_batches(run), held_out_batches(run)
    progress = terminal.Progress("training", total, done=run.first_step)
    saves = checkpoint.Writer(run.work.path, config.save_total_limit)
    results = Results(run, log, progress)                         # of steps that a GPU may still be computing
    with stage.asked_to_stop() as asked, progress, saves:         # noted also while a checkpoint is written
        if run.first_step == 0:
            evaluate(run, held_out, log, step=0)
        for step in range(run.first_step, total):
            if log.patience_is_over(config):
                best = f"step {log.best(config)['step']} has the best {config.metric_for_best_model}"
                ago = terminal.counted(config.early_stopping_patience, "evaluation")
                terminal.say(f"early stopping: {best}, {ago} ago")
                break
            rate = optim.learning_rate(config, step, total)
            results.add(optimizer_step(run, step, run.order.of_step(step), batches, rate))
            done = step + 1
            if evaluates(done, total):
                results.read_all()
                evaluate(run, held_out, log, done)
            saves.look()
            stop = results.agreed(asked.signal)
            end = done if log.patience_is_over(config) else total
            if keeps(done, end) or stop or done in to_keep(run, log):
                results.read_all()
                save_checkpoint(run, saves, log, done)
            if stop:
                saves.wait()
                run.world.barrier()
                raise KeyboardInterrupt(stop)
        results.read_all()
    log.draw()
    return log


def optimizer_step(run: Run, step: int, rows: list[Row], batches: Iterator[dict], rate: float) -> Step:
    """One optimizer step, taken: forward and backward of each micro-batch, a sum over ranks, one update.

    The loss is the sum of token losses divided by the supervised tokens of the whole step, over all
    micro-batches and ranks. Their number is known before the first forward: so how samples are cut into
    micro-batches and ranks changes nothing. Where a loss or the gradient isn't finite, there is no update.
    """
    config, world, samples = run.work.config, run.world, run.samples
    began, waited = time.monotonic(), 0.0
    shares = run.shares(rows)
    sizes = metrics.sizes(samples, rows, shares)
    losses = torch.zeros(len(shares), max(map(len, shares)), 2, device=world.device)  # [rank, batch, figure]
    torch.manual_seed((config.seed * 1_000_003 + step) * 4096 + world.rank)   # dropout repeats when resumed
    for number, micro_batch in enumerate(shares[world.rank]):
        run.now, asked = (step, micro_batch), time.monotonic()
        batch = next(batches)
        waited += time.monotonic() - asked
        with run.autocast():
            loss, right = run.loss(run.model, to_device(batch, world.device))
        if loss.requires_grad:                # without media, nothing leads to a tower that trains alone
            run.scaler.scale(loss / sizes["supervised_tokens"]).backward()
        losses[world.rank, number] = torch.stack([loss.detach(), right])
    world.sum(losses)
    world.sum_gradients(run.parameters.values(), run.watch.some_lack)
    run.scaler.unscale_(run.optimizer)
    norms = optim.clip_gradients(run.parameters, run.role_of, config.max_grad_norm)
    finite = losses.isfinite().all() & norms["grad_norm"].isfinite().to(world.device)
    if run.watch.waiting and finite:      # asking a GPU waits for it: only in the first two steps or so
        kinds = {kind for row in rows for index in row for kind in samples.media[index]}
        run.watch.look(run.parameters, world, kinds)
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group["share"]
    scale = run.scaler.scale(torch.ones((), device=world.device))
    optim.update(run.optimizer, finite)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    return Step(step, shares, sizes, optim.rates(config, rate), Sent(scale), Sent(losses),
                {name: Sent(norm) for name, norm in norms.items()}, began, waited)


def micro_batches(run: Run) -> Iterator[dict]:
    """An iterator over this rank's micro-batches, of all steps from the first one to do."""
    steps = map(run.order.of_step, range(run.first_step, run.total_steps))
    mine = (batch for rows in steps for batch in run.shares(rows)[run.world.rank])
    return iter(loader(run.samples, mine, run.work.config.dataloader_num_workers, run.world.device,
                       longest_batch(run)))


def longest_batch(run: Run) -> int:
    """The most tokens that a micro-batch may have."""
    return run.work.config.micro_batch_size * max(run.order.room or 0, max(run.samples.input_tokens))


def held_out_batches(run: Run) -> Callable[[], Iterable[tuple[str, dict]]]:
    """A function that iterates over this rank's share of the held-out samples, as (data set, batch)."""
    config, world, mine = run.work.config, run.world, []
    for name, chosen in run.held_out.by_dataset().items():
        rows = in_turn(run.held_out, run.order.room, chosen)
        shares = run.held_out.dealt(rows, config.micro_batch_size, world.world_size)
        mine += [(name, batch) for batch in shares[world.rank]]
    batches = loader(run.held_out, [batch for _, batch in mine], config.dataloader_num_workers, world.device,
                     longest_batch(run))
    return lambda: zip((name for name, _ in mine), batches)


def due(steps_per_epoch: int, per_epoch: int, every: int | None, step: int, total: int) -> bool:
    """Whether something that happens `per_epoch` times an epoch, or every `every` steps, is due after `step`.
    """
    if every is not None:
        return step == total or step % every == 0
    passed, before = (number * per_epoch // steps_per_epoch for number in (step, step - 1))
    return per_epoch > 0 and (step == total or passed > before)


def evaluate(run: Run, batches: Callable[[], Iterable[tuple[str, dict]]], log: Log, step: int) -> None:
    """Write the held-out samples' losses, answers and scores into the log, if any samples are held out."""
    config = run.work.config
    if not len(run.held_out) or not (config.evals_per_epoch or config.eval_steps):
        return
    began, answers = time.monotonic(), []
    figures = held_out_loss(run, batches())
    seconds = {"losses": time.monotonic() - began}
    if config.eval_answer_rows:
        answers = held_out_answers(run)
        seconds["answers"] = time.monotonic() - began - seconds["losses"]
        texts = [[row[side] for row in answers] for side in ("answer", "reference")]
        figures |= run.world.agree(lambda: {
            f"eval_{name}": metric(*texts) for name, metric in metrics_of(config.eval_metrics).items()})
    if config.metric_for_best_model not in figures:
        run.world.stop(f"metric_for_best_model: {config.metric_for_best_model} is no evaluation's figure",
                       f"in 01_config.py: metric_for_best_model={' or '.join(figures)}")
    log.evaluation(step, figures, answers, seconds)


# ---- saving ----

def save_checkpoint(run: Run, saves: checkpoint.Writer, log: Log, step: int) -> None:
    """Let rank 0 begin to write checkpoints/step-N; the other ranks do nothing."""
    if run.world.is_leader:
        config = run.work.config
        per_rank = config.micro_batch_size * config.gradient_accumulation_steps  # at the first start, too
        state = {"global_batch_size": run.order.global_batch_size, "per_rank": per_rank,
                 "scaler": run.scaler.state_dict(), "groups": optim.numbers_in_groups(run.optimizer, config)}
        saves.save(step, run.parameters, run.optimizer, state, also_keep=to_keep(run, log))


def to_keep(run: Run, log: Log) -> set[int]:
    """{the step of the best evaluation so far}, if its weights are to be the result, else nothing."""
    best = log.best(run.work.config) if run.work.config.load_best_model_at_end else None
    return {best["step"]} if best else set()


def save(run: Run, log: Log) -> None:
    """Write adapter/ or model/ of the last or the best step, trained.json and golden.safetensors.

    trained.json says which step it is; golden.safetensors, what the saved weights answer in a plain forward.
    """
    net, config, path = run.model.eval(), run.work.config, run.work.path
    origin = {"step": log.steps, "trained_steps": log.steps, "planned_steps": run.total_steps}
    run.world.barrier()                   # rank 0 may still be writing the checkpoint
    for step in to_keep(run, log) - {log.steps}:
        best, origin["step"] = path / "checkpoints" / f"step-{step}", step
        if words := folder.damage(best):
            run.world.stop(f"{best}, the best one, is damaged: {words}", "to save the last step's weights: "
                           "01_config.py with load_best_model_at_end=false, then 05_train.py --resume")
        checkpoint.load_weights(best, run.parameters)
    rows = run.held_out if len(run.held_out) else run.samples
    answers = golden_answers(model.as_stored(net), rows, config.golden_rows)   # on every rank: a part of it
    run.world.barrier()                   # some rank may still be reading the checkpoint that is moved here
    if run.world.is_leader:
        if config.adapter is None:
            weights = model.save_full(net, path / "model")
        else:
            weights = save_adapter(net, path / "adapter")
        write_json(path / "trained.json", origin | {"best": log.best(config)})
        write_golden(answers, weights, rows.ids[:config.golden_rows], path / "golden.safetensors")
        run.work.finish(volatile=("checkpoints", "timings.jsonl"))
    run.world.barrier()


if __name__ == "__main__":
    stage.run_script(main)
