"""prepare: run folders made by scripts 01 to 04, as a user would, and the batches of one as files.

    python -m bench.prepare FOLDER '{"family": "qwen2_vl", "sizes": "70m", "rows": 48, "mixed": false}' \\
        '{"ours": {}, "kept": {"gradient_checkpointing": false}}'

The second JSON names run folders and the knobs in which each recipe differs from KNOBS. FOLDER gets
checkpoint/, rows/, a run folder for each name, and one named padded, of plain rows, whose micro-batches
go to batches/, a file each in the order of training: they are what the other side trains on.
"""
import contextlib
import importlib
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bench import shapes

KNOBS = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_roles": ["language"], "bf16": True,
         "micro_batch_size": 2, "gradient_accumulation_steps": 2, "num_epochs": 1, "learning_rate": 2e-5,
         "lr_scheduler": "constant", "warmup_steps": 0, "evals_per_epoch": 0, "saves_per_epoch": 0}


def prepare(folder: Path, data: dict, runs: dict[str, dict], epochs: int = 1) -> None:
    """Write the whole folder, in place of what was there: checkpoint, rows, runs and batches."""
    if folder.exists():
        shutil.rmtree(folder)
    sizes = shapes.SIZES[data["sizes"]]
    shapes.build(data["family"], sizes, folder / "checkpoint")
    shapes.write_rows(folder / "rows", data["rows"], sizes.pixels, data["mixed"])
    with contextlib.chdir(folder):        # so that the user's runs/latest stays as it is
        for name, knobs in {"padded": {}, **runs}.items():
            run_stages(name, {"num_epochs": epochs, **knobs})
        write_batches(Path("padded"), Path("batches"))


def run_stages(name: str, knobs: dict) -> None:
    """Write NAME.yaml here, of KNOBS and these knobs, and run its first four stages on the run folder NAME."""
    given = KNOBS | {"base_model": "checkpoint", "datasets": [{"path": "rows/rows.jsonl"}]} | knobs
    lines = (f"{knob}: {json.dumps(value)}\n" for knob, value in given.items())
    recipe = Path(f"{name}.yaml")
    recipe.write_text("".join(lines), encoding="utf-8")
    run_recipe(recipe, name, {})


def run_recipe(recipe: Path, name: str, overrides: dict) -> None:
    """Run the first four scripts on the run folder NAME."""
    words = [f"{knob}={value}" for knob, value in overrides.items()]
    importlib.import_module("01_config").main([str(recipe), name, *words])
    for stem in ("02_data", "03_load_model", "04_lora"):
        importlib.import_module(stem).main([name])


def loaded(run: Path, world=None):
    """05_train, as a module, and the run that its own `load` makes of a run folder; world: one rank."""
    from lib.run import stage
    from lib.training.devices import pick_device
    from lib.training.parallel import World
    train = importlib.import_module("05_train")
    return train, train.load(stage.view("05_train", run), world or World(0, 1, pick_device()))


def write_batches(run_path: Path, folder: Path) -> None:
    """Write the micro-batches that 05_train would make, as STEP-MICRO_STEP.safetensors."""
    train, run = loaded(run_path)
    folder.mkdir(exist_ok=True)
    batches = train.micro_batches(run)
    for step in range(run.total_steps):
        (share,) = run.samples.dealt(run.order.of_step(step), run.work.config.micro_batch_size, 1)
        for number in range(len(share)):
            save_file(shortest(next(batches)), folder / f"{step:04}-{number:02}.safetensors")


def shortest(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch [B, T] as long as its longest row: what this kit pads beyond that is its own affair."""
    from lib.collator import is_per_token
    from lib.collator import supervised_positions
    tokens = int(batch["attention_mask"].sum(-1).max())
    cut = {name: tensor[:, :tokens].contiguous() for name, tensor in batch.items() if is_per_token(name)}
    positions, targets = supervised_positions(cut["labels"])
    return batch | cut | {"positions": positions, "targets": targets}


def batch_files(folder: Path) -> list[list[Path]]:
    """The files of each step."""
    steps: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        steps.setdefault(path.name.split("-")[0], []).append(path)
    return list(steps.values())


def read(path: Path) -> dict[str, torch.Tensor]:
    """One batch, in memory of its own."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


if __name__ == "__main__":
    given = [json.loads(words) for words in sys.argv[2:]]
    prepare(Path(sys.argv[1]).resolve(), *given)
