"""load: the memory that loading takes, over the size of what is loaded; how long an adapter for 70B takes.

    python -m bench.load [--gib 1] [--shards 4]

The base is bench/merge.py's random Llama in bfloat16. Each case is a process of its own, whose private memory
(RssAnon of /proc/self/status) is read every few milliseconds. Pages of the checkpoint's files that are only
read are the system's cache, which it takes back when it needs room: they don't count.
"""
import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

from bench.apart import last_line, process
from bench.machine import status_bytes
from bench.merge import LORA, MODEL, prepare
from lib.run import stage

CASES = {  # name: the recipe's knobs for loading
    "bf16": {},
    "nf4": {"load_in_4bit": True, "quantize_roles": ["language"], "bnb_config_kwargs": {}},
    "int8": {"load_in_8bit": True, "quantize_roles": ["language"], "bnb_config_kwargs": {}},
}
WIDE = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128_256}                 # Llama-3's of 70B


class Memory:
    """Private bytes: those when it began, and above them those kept and the most there were."""

    def __enter__(self):
        self.first = self.peak = status_bytes("RssAnon")
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.ended.wait(0.005):
            self.peak = max(self.peak, status_bytes("RssAnon"))

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()
        self.kept = status_bytes("RssAnon") - self.first
        self.most = max(self.peak - self.first, self.kept)


def measure(case: str, folder: Path) -> dict:
    """{seconds, peak_bytes, kept_bytes, forward_bytes} of a load; the last with all of the model in use."""
    import torch

    from lib.models.model import load
    from lib.models.plan import make_plan
    plan = make_plan(SimpleNamespace(base_model=str(folder / "base"), **MODEL | CASES[case], **LORA))
    warm_up(plan)
    began = time.monotonic()
    with Memory() as memory:
        model = load(plan, torch.device("cpu"), mode="inference")
    seconds = time.monotonic() - began
    with torch.no_grad():
        model(torch.zeros(1, 8, dtype=torch.long))
    return {"seconds": seconds, "peak_bytes": memory.most, "kept_bytes": memory.kept,
            "forward_bytes": status_bytes("RssAnon") - memory.first}


def warm_up(plan: dict) -> None:
    """Import what a first load would import, so that it isn't measured."""
    import torch

    from lib import quant
    if plan["quantisation"]:
        import bitsandbytes.functional  # noqa: F401
        quant.configuration(plan)
    torch.nn.Linear(4, 4)(torch.zeros(1, 4))


def adapt_wide(folder: Path) -> dict:
    """{parameters, seconds, peak_bytes} of an adapter for a base of 70B, made and saved as 04 does."""
    from transformers import LlamaConfig

    from lib.models import model
    from lib.models.plan import make_plan
    from lib.models.saved import save_adapter
    LlamaConfig(architectures=["LlamaForCausalLM"], **WIDE).save_pretrained(folder / "wide")
    given = MODEL | LORA | {"peft_init_lora_weights": True, "base_model": str(folder / "wide")}
    knobs = SimpleNamespace(**given)
    plan = make_plan(knobs)
    began = time.monotonic()
    with Memory() as memory:
        adapter, _ = model.new_adapter(plan, knobs)
        save_adapter(adapter, folder / "wide-adapter")
    return {"parameters": sum(plan["parameters"].values()), "seconds": time.monotonic() - began,
            "peak_bytes": memory.most}


def main() -> None:
    """Print a line for each case."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--gib", type=float, default=1)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        case, folder = args.case
        return print(json.dumps(adapt_wide(Path(folder)) if case == "wide" else measure(case, Path(folder))))
    with tempfile.TemporaryDirectory() as made:
        total, folder = prepare(Path(made), args.gib, args.shards), Path(made)
        shard = max(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
        print(f"checkpoint {total / 2**30:.2f} GiB in bfloat16, largest file {shard / 2**30:.2f} GiB")
        for case in (*CASES, "wide"):
            found = last_line(process(stage.ROOT, "bench.load", "--case", case, made))
            print(in_words(case, found, total, shard))


def in_words(case: str, found: dict, total: int, shard: int) -> str:
    """A line on what `measure` or `adapt_wide` found."""
    gib = {name: size / 2**30 for name, size in found.items() if name.endswith("_bytes")}
    if case == "wide":
        return (f"04's adapter for {found['parameters'] / 1e9:.1f}B parameters: {found['seconds']:.1f} s, "
                f"peak {gib['peak_bytes']:.2f} GiB")
    above = max(0, found["peak_bytes"] - found["forward_bytes"]) / shard
    return (f"{case:4}: {found['seconds']:5.1f} s, peak {gib['peak_bytes']:.2f} GiB, "
            f"{found['peak_bytes'] / total:.2f} of the checkpoint; kept {gib['kept_bytes']:.2f}, "
            f"after a forward {gib['forward_bytes']:.2f}; the peak is {above:.2f} files above that")


if __name__ == "__main__":
    stage.run_script(main)
