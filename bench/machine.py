"""machine: what a step needs in FLOPs, how fast this machine multiplies, and what memory a step takes.

    python -m bench.machine RUN [OUT.json]      # of a run folder's first step: FLOPs, and this machine's rate

Needed are 2 FLOPs for each weight and row of a matrix product, twice where a gradient passes through it, once
in a frozen tower. What a program does on top (recomputation, LoRA's own products, attention) counts as time,
not as work.
"""
import ctypes
import gc
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
FROZEN = ("vision", "audio", "projector")  # where no gradient passes unless they train


# ---- FLOPs ----

@dataclass(frozen=True)
class Product:
    """A matrix product with a frozen weight: [rows, inputs] x [inputs, outputs], done `passes` times."""
    rows: int
    inputs: int
    outputs: int
    passes: int
    role: str

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.inputs * self.outputs * self.passes


def products(net, roles, batch: dict, trained_roles: set[str]) -> Counter:
    """{Product: how many} of one micro-batch: every linear layer and patch embedding that its forward meets.

    The head counts for supervised positions alone. Adapters' own products don't count.
    """
    from lib.training.loss import forward_loss
    found, head = Counter(), net.get_output_embeddings()

    def note(module, output, role):
        weight = module.weight
        passes = 1 if role in FROZEN and role not in trained_roles else 2
        rows = output.numel() // weight.shape[0]
        found[Product(rows, weight[0].numel(), weight.shape[0], passes, role)] += 1

    kinds = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    counted = [(roles.of(name), module) for name, module in net.named_modules()
               if isinstance(module, kinds) and "lora_" not in name and module is not head]
    hooks = [module.register_forward_hook(lambda module, _, output, role=role: note(module, output, role))
             for role, module in counted]
    try:
        with torch.no_grad():
            forward_loss(net, batch)
    finally:
        for hook in hooks:
            hook.remove()
    outputs, inputs = head.weight.shape
    found[Product(len(batch["targets"]), inputs, outputs, 2, "head")] += 1
    return found


def flops(found: Counter) -> int:
    """FLOPs of all products."""
    return sum(product.flops * number for product, number in found.items())


def matrix_rate(found: Counter, device: torch.device, dtype: torch.dtype, seconds: float = 5.0) -> float:
    """FLOP/s that this machine reaches on these very products, each as often as the step has it."""
    share, spent = seconds / len(found), 0.0
    for product, number in found.items():
        rows, weight = (torch.randn(*shape, device=device, dtype=dtype) for shape in
                        ((product.rows, product.inputs), (product.outputs, product.inputs)))
        once = seconds_of(lambda: F.linear(rows, weight), share, device)
        if product.passes == 2:
            slopes = F.linear(rows, weight)
            once += seconds_of(lambda: slopes @ weight, share, device)
        spent += once * number
    return flops(found) / spent


def seconds_of(work, seconds: float, device: torch.device) -> float:
    """The median time of one call, over calls for so many seconds, at least 3."""
    work()
    times, ends = [], time.monotonic() + seconds
    while len(times) < 3 or time.monotonic() < ends and len(times) < 50:
        began = now(device)
        work()
        times.append(now(device) - began)
    return statistics.median(times)


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done all it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ---- memory and time of a side ----

class Meter:
    """Seconds, loss and tokens of each step, and the peak of memory above what is there between steps.

    Memory counts from the second step on: by then the model's pages are read, the optimizer has its state,
    and what libraries import late is there, so none of it is charged to a side.
    """

    def __init__(self, device: torch.device):
        self.device, self.steps, self.base_bytes = device, [], 0

    def step(self, **figures) -> None:
        """A step is over."""
        self.steps.append(figures)
        if len(self.steps) == 1:
            self.base_bytes = settle_memory(self.device)

    def result(self) -> dict:
        """What was measured, as JSON holds it."""
        peak = peak_bytes(self.device) - self.base_bytes
        return {"steps": self.steps, "peak_bytes": peak, "base_bytes": self.base_bytes,
                "threads": torch.get_num_threads(), "torch": torch.__version__}


def settle_memory(device: torch.device) -> int:
    """Bytes in use now, after what is free went back to the system; the peak counts from here on."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: VmHWM starts again from VmRSS
    return status_bytes("VmRSS")


def peak_bytes(device: torch.device) -> int:
    """The most that was in use since `settle_memory`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else status_bytes("VmHWM")


def status_bytes(key: str) -> int:
    """A figure of this process that Linux keeps."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(re.search(rf"^{key}:\s+(\d+) kB", text, re.M)[1])


# ---- what goes beside every result ----

def described() -> dict:
    """The machine and the commit that results were measured with."""
    return {"machine": name(), "python": platform.python_version(), "commit": commit()}


def name() -> str:
    """The device's name: a GPU's own, else the processor's and its number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    found = re.findall(r"^model name\s*:\s*(.+)$", text, re.M)
    return f"{found[0]}, {len(found)} cores" if found else platform.processor() or platform.machine()


def commit() -> str:
    """The short hash of HEAD, with a + where files differ from it, or a word where there is no repository."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    changed = git("status", "--porcelain", "--untracked-files=no")
    return (git("rev-parse", "--short", "HEAD") + ("+" if changed else "")) or "unknown"


def slug(text: str) -> str:
    """A name as files have it."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def main(run_path: str, out: str | None = None) -> None:
    """Print and write the needed FLOPs of a run's first step, and the rate at which the machine multiplies them.

    The rate is of the faster of bfloat16 and float32: some CPUs have no instructions for bfloat16.
    """
    from bench.prepare import loaded
    from lib.models.roles import Roles
    from lib.batches.sampler import to_device
    train, run = loaded(Path(run_path))
    plan = json.loads((run.work.input("03_load_model") / "model.json").read_text(encoding="utf-8"))
    roles, batches, found = Roles.of_plan(plan), train.micro_batches(run), Counter()
    trained = {roles.of(name) for name in run.parameters}
    for _ in range(run.work.config.gradient_accumulation_steps):
        with run.autocast():
            found += products(run.model, roles, to_device(next(batches), run.world.device), trained)
    rates = {str(dtype)[6:]: matrix_rate(found, run.world.device, dtype)
             for dtype in (torch.bfloat16, torch.float32)}
    rate = max(rates.values())
    by_role = Counter()
    for product, number in found.items():
        by_role[product.role] += product.flops * number
    result = described() | {"flops": flops(found), "flops_by_role": by_role, "flops_per_second": rate,
                            "flops_per_second_in": rates, "threads": torch.get_num_threads()}
    print(f"a step needs {flops(found) / 1e9:.1f} GFLOP ("
          + ", ".join(f"{role} {count / 1e9:.1f}" for role, count in by_role.most_common())
          + "); on these products the machine does "
          + ", ".join(f"{each / 1e9:.0f} GFLOP/s in {dtype}" for dtype, each in rates.items()))
    if out:
        Path(out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
