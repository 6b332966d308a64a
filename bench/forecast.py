"""forecast: 03's forecast against what really lives in memory, on real CPU tensors, family by family.

    python -m bench.forecast                        # six families, three kinds of base weights
    python -m bench.forecast --families llava

The same counter (lib/memory/hollow.py) counts one training step twice: on hollow tensors, from the configuration
alone, and on the loaded model. So an allocator's gaps are in neither. Sizes are between the zoo's and real
ones: 256 wide, 4 layers, 512 tokens; the families' classes and processors are their own.
"""
import argparse
import gc
import importlib
import json
import statistics
import tempfile
from pathlib import Path

import torch

FAMILIES = ("llava", "qwen2_5_vl", "gemma3", "mistral3", "qwen3_vl_moe", "internvl")
CASES = ("lora", "qlora", "int8")
TOKENS = 512
SIZES = dict(hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=16,
             num_key_value_heads=8, vocab_size=8192)        # heads stay 16 wide, as in the zoo


def main(argv=None) -> None:
    """Print a line for each case, then the errors' median and extremes."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--families", type=lambda text: text.split(","), default=FAMILIES)
    args = parser.parse_args(argv)
    errors = []
    print("family adapter checkpointing tokens weights_mib forecast_mib measured_mib error")
    for name in args.families:
        for adapter in CASES:
            with tempfile.TemporaryDirectory() as folder:
                for row in compared(name, adapter, Path(folder)):
                    errors.append(row.pop("error"))
                    print(name, adapter, *row.values(), f"{errors[-1]:+.2%}", flush=True)
    sizes = [abs(error) for error in errors]
    print(f"{len(errors)} cases: median error {statistics.median(sizes):.2%}, worst {max(sizes):.2%}, "
          f"lowest {min(errors):+.2%}")


def compared(name: str, adapter: str, folder: Path) -> list[dict]:
    """A family's forecast and measurement, with and without checkpointing."""
    from lib.memory.forecast import HollowStep
    planned, knobs, batch = case(name, adapter, folder)
    found = []
    for checkpointing in (True, False):
        forecast = HollowStep(planned, knobs, cuda=False).peak(batch, checkpointing)
        weights, measured = measure(planned, knobs, batch, checkpointing)
        found.append({"checkpointing": checkpointing, "tokens": batch["input_ids"].numel(),
                      "weights": f"{weights / 2**20:.2f}", "forecast": f"{forecast.of(1) / 2**20:.2f}",
                      "measured": f"{measured / 2**20:.2f}", "error": forecast.of(1) / measured - 1})
    return found


def case(name: str, adapter: str, folder: Path) -> tuple[dict, object, dict]:
    """(plan, knobs, batch of one row of TOKENS) of a family's checkpoint, written into the folder."""
    from lib.models import plan
    from lib.batches.sampler import Batcher
    from tests.test_families import Subject
    write(name, folder)
    given = {"base_model": "a/b", "datasets": [{"path": __file__}], "lora_r": 16,
             "adapter": "qlora" if adapter == "qlora" else "lora", "load_in_8bit": adapter == "int8"}
    knobs, *_ = importlib.import_module("01_config").configure(Path("forecast.yaml"), json.dumps(given))
    knobs.base_model = str(folder)
    subject = Subject(name, folder)
    rows = subject.rows((1, "What is it? " * 12, "a red fox " * 12))
    rows = [longer(row) for row in rows]
    return plan.make_plan(knobs), knobs, Batcher(0, subject.family.collate)(rows)


def longer(row: dict) -> dict:
    """The row with its last token repeated until there are TOKENS."""
    from lib.collator import is_per_token
    more = TOKENS - row["input_ids"].shape[1]
    return {key: torch.cat([value, value[..., -1:].expand(*value.shape[:-1], more)], -1)
            if is_per_token(key) and more > 0 else value for key, value in row.items()}


def write(name: str, folder: Path) -> None:
    """A checkpoint of the zoo's family with a larger language model."""
    from tests import zoo
    from tests.zoo import checkpoint
    kind = next(module for module, names in zoo.VARIANTS.items() if name in names)
    parts = getattr(importlib.import_module(f"tests.zoo.{kind}"), name)()
    text, seen = parts.config.get_text_config(), getattr(parts.config, "vision_config", None)
    for key, value in SIZES.items():
        setattr(text, key, value)
    if getattr(text, "layer_types", None):
        text.layer_types = (text.layer_types * SIZES["num_hidden_layers"])[-SIZES["num_hidden_layers"]:]
    if hasattr(seen, "out_hidden_size"):
        seen.out_hidden_size = SIZES["hidden_size"]
    checkpoint.write(parts, folder, seed=0, dtype="bfloat16")


def measure(planned: dict, knobs, batch: dict, checkpointing: bool) -> tuple[int, int]:
    """(bytes of the loaded model, most bytes in its second training step)."""
    from lib import fast
    from lib.memory import hollow
    from lib.models import adapter, model
    from lib.training.loss import forward_loss
    from lib.training.optim import make_optimizer
    from lib.models.roles import Roles
    gc.collect()
    roles = Roles.of_plan(planned)
    net, _ = adapter.put_on(model.load(planned, torch.device("cpu")), planned, knobs)
    trained = model.trained_parameters(net.train())
    role_of = {name: roles.of(name) for name in trained}
    if checkpointing:
        model.checkpoint_trained_layers(net, roles, set(role_of.values()))
    optimizer, count = make_optimizer(trained, role_of, knobs), hollow.Count()
    with fast.paths(net, roles):
        for step in range(2):
            counted = count if step else hollow.Count()
            if step:
                count.add([*state_of(net), optimizer.state_dict(), batch])
                weights = count.live_bytes
            with counted:
                with torch.autocast("cpu", torch.bfloat16):
                    loss, _ = forward_loss(net, batch)
                loss.backward()
                del loss, _
                optimizer.step()
            optimizer.zero_grad()
    return weights, count.peak_bytes


def state_of(net) -> list[torch.Tensor]:
    """The tensors of a model, with the scales of quantised weights."""
    tensors = [*net.parameters(), *net.buffers()]
    for tensor in net.parameters():
        for state in (getattr(tensor, "quant_state", None), getattr(tensor, "SCB", None)):
            if state is not None:
                tensors += [state] if isinstance(state, torch.Tensor) else [
                    state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    for module in net.modules():
        state = getattr(module, "state", None)
        held = vars(state).values() if hasattr(state, "SCB") else ()
        tensors += [value for value in held if isinstance(value, torch.Tensor)]
    return tensors


if __name__ == "__main__":
    main()
