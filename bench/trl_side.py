"""trl_side: TRL's side of the bench, its SFTTrainer on the same checkpoint, adapter and batches.

    python -m bench.trl_side RUN BATCHES OUT.json '{"gradient_checkpointing": true}' [STEPS]

The only file that imports trl. The collator hands TRL the batches that this kit encoded (TRL would also
train the newline after an end of turn). All else is TRL's own: trainer, loss, checkpointing and optimizer.
"""
import json
import sys
import time
from pathlib import Path

import datasets
import torch
import transformers
import trl

from bench.machine import Meter, now
from bench.prepare import batch_files, read
from lib.training import optim

NOT_FOR_TRL = ("positions", "targets")    # made for this kit's loss; TRL has labels


class Timed(trl.SFTTrainer):
    """SFTTrainer that keeps losses and gradient norms: logging each step would cost waits for the device."""

    def training_step(self, *args, **kwargs):
        """The micro-batch's share of its step's loss."""
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.detach())
        return loss

    def _get_grad_norm(self, *args, **kwargs):
        self.norm = super()._get_grad_norm(*args, **kwargs)
        return self.norm


class Clock(transformers.TrainerCallback):
    """Tells the meter when a step is over; the time in which the collator read files is left out."""

    def __init__(self, meter: Meter, tokens: list[int]):
        self.meter, self.tokens, self.trainer = meter, tokens, None

    def on_train_begin(self, args, state, control, **_):
        """The first step begins with the first read."""
        self.trainer.losses, self.reading, self.reading_cpu = [], 0.0, 0.0
        self.began, self.began_cpu = now(self.meter.device), time.process_time()

    def on_step_end(self, args, state, control, **_):
        """A step is over; the next one begins."""
        seconds = now(self.meter.device) - self.began - self.reading
        cpu_seconds = time.process_time() - self.began_cpu - self.reading_cpu
        loss = float(sum(self.trainer.losses))
        self.meter.step(seconds=seconds, cpu_seconds=cpu_seconds, waited=self.reading, loss=loss,
                        grad_norm=float(self.trainer.norm), tokens=self.tokens[state.global_step - 1])
        self.on_train_begin(args, state, control)


def settings(knobs, steps: int, accumulate: int, options: dict, folder: Path) -> trl.SFTConfig:
    """TRL at its best: fused AdamW, bf16 autocast, no logging, saving or cutting; `options` on top."""
    return trl.SFTConfig(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=1,  # one item is a whole batch
        gradient_accumulation_steps=accumulate, learning_rate=knobs.learning_rate,
        lr_scheduler_type=knobs.lr_scheduler, warmup_steps=optim.warmup_steps(knobs, steps),
        optim="adamw_torch_fused", adam_beta1=knobs.adam_beta1, adam_beta2=knobs.adam_beta2,
        adam_epsilon=knobs.adam_epsilon, weight_decay=knobs.weight_decay, max_grad_norm=knobs.max_grad_norm,
        bf16=True, use_cpu=not torch.cuda.is_available(), max_length=None, completion_only_loss=False,
        train_sampling_strategy="sequential", remove_unused_columns=False,
        logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(), seed=knobs.seed,
        dataset_kwargs={"skip_prepare_dataset": True}, **options)


def train(net, processor, read_batch, tokens: list[int], config: trl.SFTConfig, device) -> dict:
    """What TRL's steps took.

    read_batch: number of a micro-batch -> its tensors. tokens: the supervised ones of each step.
    """
    clock = Clock(Meter(device), tokens)

    def collate(items: list[dict]) -> dict:
        began, cpu = time.perf_counter(), time.process_time()
        batch = read_batch(items[0]["number"])
        batch = {key: tensor for key, tensor in batch.items() if key not in NOT_FOR_TRL}
        clock.reading += time.perf_counter() - began
        clock.reading_cpu += time.process_time() - cpu
        return batch

    numbers = range(config.max_steps * config.gradient_accumulation_steps)
    rows = datasets.Dataset.from_dict({"number": list(numbers)})
    trainer = Timed(model=net, args=config, train_dataset=rows, data_collator=collate,
                    processing_class=processor, callbacks=[clock])
    clock.trainer = trainer
    trainer.train()
    return clock.meter.result() | {"trl": trl.__version__, "transformers": transformers.__version__}


def main(run_path: str, batches_path: str, out: str, options: str, steps: str | None = None) -> None:
    """Train with TRL on the run folder's model, adapter and batches, and write what the steps took."""
    wanted = int(steps) if steps else None
    _, result = trained(Path(run_path), Path(batches_path), json.loads(options), wanted)
    Path(out).write_text(json.dumps(result) + "\n", encoding="utf-8")


def trained(run_path: Path, batches_path: Path, options: dict, steps: int | None = None) -> tuple:
    """(the trained model, what its steps took)."""
    from lib.models import model
    from lib.models.saved import attach
    from lib.run import stage
    from lib.text.chat import Encoder
    from lib.training.devices import pick_device
    work = stage.view("05_train", run_path)
    device = pick_device()
    plan = json.loads((work.input("03_load_model") / "model.json").read_text(encoding="utf-8"))
    net = attach(model.load(plan, device), work.input("04_lora") / "adapter")
    processor = Encoder.load(work.input("02_data") / "processor").processor
    by_step = batch_files(batches_path)[:steps]
    files = [path for step in by_step for path in step]
    tokens = [sum(len(read(path)["targets"]) for path in step) for step in by_step]
    config = settings(work.config, len(by_step), work.config.gradient_accumulation_steps, options,
                      batches_path.parent / "trl")
    return net, train(net, processor, lambda number: read(files[number]), tokens, config, device)


if __name__ == "__main__":
    main(*sys.argv[1:])
