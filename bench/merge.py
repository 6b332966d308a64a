"""merge: how fast an adapter is merged into a base on disk, beside a plain copy of the same files.

    python -m bench.merge [--gib 3] [--shards 4]      # prints GiB/s of both, their ratio, and the peak memory

The base is a random Llama in bfloat16, the adapter LoRA on every linear layer of it. Copy and merge run in
processes of their own, in turn, on files that the system holds in its cache, and end when all is synced to the disk:
a disk's rate drifts within a minute, so each merge is compared with the copy before it.
"""
import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch

from bench.apart import last_line, process
from bench.machine import peak_bytes, settle_memory
from lib.run import stage

HIDDEN = 2560
CPU = torch.device("cpu")
LORA = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "lora_target_modules": None, "seed": 0,
        "lora_target_roles": ["language"], "lora_target_parameters": None, "lora_model_dir": None, "peft_use_dora": False,
        "peft_use_rslora": False, "peft_init_lora_weights": True}
MODEL = {"revision": None, "trust_remote_code": False, "model_type": None, "bf16": True, "fp16": False,
         "quantize_roles": [], "load_in_8bit": False, "load_in_4bit": False, "bnb_config_kwargs": None,
         "adapter": "lora", "attn_implementation": "sdpa", "overrides_of_model_config": {}, "sequence_len": 2048,
         "tokens": [], "special_tokens": {}}


def prepare(folder: Path, gib: float, shards: int) -> int:
    """The bytes of the weights of a random base in `folder`/base, beside plan.json and an adapter for it."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from lib.models import model
    from lib.models.plan import make_plan
    from lib.models.saved import save_adapter
    from lib.models.shards import INDEX, Place, cut, write_index
    layer_bytes = 2 * HIDDEN * HIDDEN * (4 + 3 * 4)
    config = LlamaConfig(hidden_size=HIDDEN, intermediate_size=4 * HIDDEN, num_attention_heads=20,
                         num_hidden_layers=round(gib * 2**30 / layer_bytes), vocab_size=4096,
                         architectures=["LlamaForCausalLM"])
    base = folder / "base"
    config.save_pretrained(base)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    places = {name: Place(base, 0, 2 * shape.numel(), "BF16", list(shape)) for name, shape in shapes.items()}
    total = sum(place.bytes for place in places.values())
    files = cut(places, total // shards + layer_bytes // 4)
    for name, held in files.items():
        tensors = {each: torch.randn(shapes[each]).bfloat16() / 50 for each in held}
        save_file(tensors, base / name, metadata={"format": "pt"})
    write_index(base / INDEX, files)
    knobs = SimpleNamespace(base_model=str(base), **MODEL, **LORA)
    plan = make_plan(knobs)
    adapted, _ = model.new_adapter(plan, knobs)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:              # which begins at zero, so that a merge would change nothing
            torch.nn.init.normal_(parameter, std=0.01)
    save_adapter(adapted, folder / "adapter")
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    return total


def measure(what: str, folder: Path) -> dict:
    """{seconds, peak_bytes} of a copy or a merge of the prepared base; imports don't count."""
    from lib.export import merge
    from lib.models import shards
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    tensors = {name: place for path in shards.weight_files(plan) for name, place in shards.places(path).items()}
    merge.Sums(plan | {"dtype": "float32"}, folder / "adapter", tensors)           # imports what a first one needs
    before, began, out = settle_memory(CPU), time.monotonic(), folder / what
    if what == "copy":
        out.mkdir()
        for path in (folder / "base").iterdir():
            shutil.copyfile(path, out / path.name)
    else:
        merge.write_merged(plan, folder / "adapter", out)
    for path in out.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return {"seconds": time.monotonic() - began, "peak_bytes": peak_bytes(CPU) - before}


def in_a_process(what: str, folder: Path) -> dict:
    """What `measure` returns, in a process of its own."""
    shutil.rmtree(folder / what, ignore_errors=True)
    return last_line(process(stage.ROOT, "bench.merge", "--measure", what, folder))


def main() -> None:
    """Print the bench, or, in a process of its own, one measurement as JSON."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--gib", type=float, default=3)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--measure", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure[0], Path(args.measure[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        total = prepare(Path(folder), args.gib, args.shards)
        largest = max(path.stat().st_size for path in Path(folder, "base").iterdir())
        print(f"{total / 2**30:.2f} GiB, the largest of {args.shards} files {largest / 2**30:.2f} GiB")
        pairs = [{what: in_a_process(what, Path(folder)) for what in ("copy", "merge")} for _ in range(args.times)]
    for what in ("copy", "merge"):
        seconds = [pair[what]["seconds"] for pair in pairs]
        peak = max(pair[what]["peak_bytes"] for pair in pairs)
        print(f"{what}: {total / 2**30 / median(seconds):.2f} GiB/s, median of {args.times} "
              f"(in {min(seconds):.2f} to {max(seconds):.2f} s); peak memory {peak / 2**20:.0f} MiB")
    ratios = [pair["copy"]["seconds"] / pair["merge"]["seconds"] for pair in pairs]
    print(f"merge / copy, each pair: {', '.join(f'{each:.2f}' for each in ratios)}; median {median(ratios):.2f}")


if __name__ == "__main__":
    stage.run_script(main)
