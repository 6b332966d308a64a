"""fit: a run's memory forecast as tables: what takes memory, which micro-batch fits, what to change else.

Fork me to: advise something else (`changes`).
"""
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch

from lib.batches import packing
from lib.batches.order import in_turn
from lib.batches.sampler import Batcher, Samples
from lib.memory.forecast import HollowStep, Peak
from lib.models.plan import make_plan
from lib.registry import family_of
from lib.run import terminal
from lib.run.errors import StageError, first_line
from lib.run.ledger import read_json
from lib.run.stage import Knobs, every_knob
from lib.text.chat import Encoder

GIB = 2**30
RESERVE = 0.05                            # of a GPU, for what isn't counted: CUDA's context, gaps in memory
CAUTION = 0.7                             # of free memory, that is planned with: gaps and libraries take some
MOST_ROWS = 256                           # the largest micro-batch that is tried
SETTINGS = {"checkpointed": True, "kept": False}     # of layers' activations: whether they are checkpointed
CHANGED_BY = ("micro_batch_size", "gradient_accumulation_steps", "sample_packing", "sequence_len",
              "optimizer", "adapter", "lora_r", "lora_target_roles", "lora_target_modules",
              "lora_target_parameters", "lora_model_dir", "peft_use_dora", "train_roles",
              "unfrozen_parameters")


@dataclass(frozen=True)
class Case:
    """A run as it would be trained: its plan, all its knobs, and where 02's samples are."""
    plan: dict
    knobs: object
    data: Path

    @classmethod
    def of(cls, run: Path, plan: dict) -> "Case":
        """The Case of a run folder.

        It may read all knobs, those of 04 and 05, too, since a forecast is no part of any stage's result.
        """
        return cls(plan, every_knob(run), run / "02_data")

    def changed(self, **knobs) -> "Case":
        """This case with other knobs, planned anew."""
        knobs = Knobs(**vars(self.knobs) | knobs)
        return Case(make_plan(knobs), knobs, self.data)

    def peaks(self, cuda: bool = True) -> Callable[[int, bool], Peak]:
        """A function of (rows of a micro-batch, whether layers are checkpointed) that returns the Peak."""
        step = HollowStep(self.plan, self.knobs, cuda)
        row, batcher = longest_row(self, step.net)
        return functools.cache(lambda rows, checkpointing: step.peak(
            batcher([dict(row) for _ in range(rows)]), checkpointing))


def longest_row(case: Case, net) -> tuple[dict[str, torch.Tensor], Batcher]:
    """(02's longest training row, packed if the recipe packs, with its floats on meta; its Batcher)."""
    knobs, family = case.knobs, family_of(case.plan["model_type"])
    encoder = Encoder.load(case.data / "processor", knobs.trust_remote_code)
    packs = knobs.sample_packing and not family.packing              # where it can't, 05 says so
    samples = Samples(datasets.load_from_disk(case.data / "train"), encoder,
                      **packing.needs(net, family) if packs else {})
    rows = in_turn(samples, knobs.sequence_len if packs else None)
    row = samples[max(rows, key=lambda row: [sum(tokens[index] for index in row)
                                             for tokens in (samples.input_tokens, samples.media_tokens)])]
    row = without_empty_frames(row, encoder.collate)
    row |= {key: value.to("meta") for key, value in row.items()
            if isinstance(value, torch.Tensor) and value.is_floating_point()}
    return row, Batcher(encoder.pad_id, encoder.collate, samples.masks)


def without_empty_frames(row: dict[str, torch.Tensor], style: str) -> dict[str, torch.Tensor]:
    """The row without the all-zero frames that pad its shorter clips, which a "stack" family's model drops.

    Hollow tensors have no values by which it could.
    """
    pixels = row.get("pixel_values")
    if style != "stack" or pixels is None or pixels.dim() != 5:              # [clips, frames, C, H, W]
        return row
    real = pixels.flatten(2).any(-1)                                         # [clips, frames]
    return row | {key: row[key][real][None] for key in ("pixel_values", "pixel_attention_mask") if key in row}


# ---- what takes memory ----

def facts(case: Case, peaks: Callable[[int, bool], Peak], device: str) -> dict:
    """The content of forecast.json: GiB of a device that holds everything, with and without checkpointing."""
    knobs, found = case.knobs, {}
    for name, checkpointing in SETTINGS.items():
        peak = peaks(knobs.micro_batch_size, checkpointing)
        found[name] = {"peak_gib": gib(peak.of(1)), "activations_gib": gib(peak.activations),
                       "phases_gib": {phase: gib(size) for phase, size in peak.phases.items()}}
    state = {"weights_gib": {kind: gib(size) for kind, size in peak.weights.items()},
             "layers_gib": gib(peak.layers), "layer_gib": gib(peak.layer), "trained_gib": gib(peak.trained),
             "gradients_gib": gib(peak.gradients), "optimizer_gib": gib(peak.optimizer)}
    return asked(case.knobs, device) | state | found


def asked(knobs, device: str) -> dict:
    """What a forecast is of: a kind of device, and the knobs that change it."""
    return {"device": device, "knobs": {name: getattr(knobs, name) for name in CHANGED_BY}}


def of_run(run: Path, plan: dict, device: str) -> dict | None:
    """A run's `facts` for a kind of device; None, after a warning that says why, where there is no forecast.

    The one that 03 wrote is taken if its knobs and its kind of device are these.
    """
    try:
        case, path = Case.of(run, plan), run / "03_load_model" / "forecast.json"
        written = read_json(path) if path.exists() else {}
        if asked(case.knobs, device).items() <= written.items():
            return written
        return facts(case, case.peaks(device == "cuda"), device)
    except (StageError, RuntimeError, ValueError) as error:  # 04 or 05 says it, and its fix
        terminal.warn(f"no forecast of memory: {first_line(error)}")
        return None


def kept(found: dict, room_gib: float, shards: int | None = None) -> tuple[float, float]:
    """(share, 0 to 1, of the layers whose activations fit in memory, GiB at the peak), by a forecast.

    Each layer whose activations are kept is taken to need the same memory. shards: ranks over which frozen
    layers are sharded; None: each rank holds them.
    """
    saved = found["layers_gib"] * (1 - 1 / shards) - 2 * found["layer_gib"] if shards else 0.0
    least, most = (found[setting]["peak_gib"] - saved for setting in SETTINGS)
    share = min(1.0, max(0.0, (room_gib - least) / max(most - least, 1e-9)))
    return share, least + share * (most - least)


def gib(size: int) -> float:
    """Bytes as GiB, rounded for a file."""
    return round(size / GIB, 4)


def print_facts(found: dict) -> None:
    """Print the table of forecast.json."""
    both = [found[name] for name in SETTINGS]
    rows = [[f"weights: {kind}", size, size] for kind, size in found["weights_gib"].items()]
    rows += [[name, *[found[f"{name}_gib"]] * 2] for name in ("trained", "gradients", "optimizer")]
    rows.append(["activations, at most", *(setting["activations_gib"] for setting in both)])
    rows.append(["peak, not quite their sum", *(setting["peak_gib"] for setting in both)])
    rows += [[f"  peak in {phase}", *(setting["phases_gib"][phase] for setting in both)]
             for phase in both[0]["phases_gib"]]
    given = ", ".join(f"{name} {value}" for name, value in found["knobs"].items() if value)
    terminal.table(f"forecast: GiB on one {found['device'].upper()}, at the longest row ({given})",
                   ["", "checkpointed", "not checkpointed"], rows)


# ---- what fits ----

def most_rows(bytes_of: Callable[[int], int], room: int, most: int = MOST_ROWS) -> int:
    """The most rows, up to `most`, whose bytes are within room; 0 if a single row's aren't.

    Bytes grow with rows nearly along a straight line, which gives the next number to try. The search begins
    with few rows, since ids are real tensors: for many rows they alone take gigabytes.
    """
    if bytes_of(1) > room:
        return 0
    fits, fails, other = 1, most + 1, 2
    while fails - fits > 1:
        line = fits + (room - bytes_of(fits)) * (other - fits) // (bytes_of(other) - bytes_of(fits))
        rows = min(max(line, fits + 1), fails - 1)
        if bytes_of(rows) <= room:
            fits, other = rows, fits
        else:
            fails = other = rows
    return fits


def print_fit(case: Case, gpus: int, room_gib: float) -> None:
    """Print the largest micro-batch that fits each way of using the GPUs, and what to change if none does."""
    knobs, peaks, room = case.knobs, case.peaks(), int(room_gib * GIB * (1 - RESERVE))
    print_facts(facts(case, peaks, "cuda"))
    ways = {"one GPU": lambda peak: peak.of(1)}
    if gpus > 1:
        ways[f"each of {gpus}, which holds all"] = lambda peak: peak.of(gpus)
        if knobs.adapter:
            ways[f"each of {gpus}, base sharded (fsdp_version: 2)"] = lambda peak: peak.sharded(gpus)
    rows = []
    for way, bytes_of in ways.items():
        at = functools.cache(lambda n: bytes_of(peaks(n, knobs.gradient_checkpointing)))
        rows.append([way, gib(at(knobs.micro_batch_size)), most_rows(at, room) or "none fits"])
    terminal.table(f"what fits into {room_gib:g} GiB, with {RESERVE:.0%} left free for what isn't counted",
                   ["on", f"GiB at micro_batch_size {knobs.micro_batch_size}", "largest that fits"], rows)
    if peaks(knobs.micro_batch_size, knobs.gradient_checkpointing).of(gpus) > room:
        for line in changes(case, peaks, gpus, room):
            terminal.say(line)


def changes(case: Case, peaks: Callable[[int, bool], Peak], gpus: int, room: int) -> list[str]:
    """Lines on the knobs that lower the peak most, each with the peak that it would lead to."""
    knobs, lines = case.knobs, ["it doesn't fit; what helps:"]

    def line(words: str, peak: Peak) -> str:
        fits = "fits" if peak.of(gpus) <= room else "doesn't fit, either"
        return f"  {words}: {peak.of(gpus) / GIB:.2f} GiB, {fits}"
    if knobs.micro_batch_size > 1:
        lines.append(line("micro_batch_size: 1", peaks(1, knobs.gradient_checkpointing)))
    if not knobs.gradient_checkpointing:
        lines.append(line("gradient_checkpointing: true", peaks(1, True)))
    if not case.plan["quantisation"] and not case.plan["stored_as"]:
        few_bits = case.changed(adapter="qlora", load_in_4bit=True)
        lines.append(line("adapter: qlora, with checkpointing", few_bits.peaks()(1, True)))
    least = peaks(1, True)
    left = room - (least.of(gpus) - least.activations)
    share = left / least.activations
    if 0 < share < 1:
        lines.append(f"  shorter rows: with about {share:.0%} of the longest one's tokens it fits "
                     "(sequence_len, or smaller pictures: image_max_pixels)")
    return lines
