"""collate: which share of a training step encoding and collating take.

    python -m bench.collate FOLDER [--steps 8]      # FOLDER gets a checkpoint, rows and a run folder

Encoding (decoding pictures, the processor, labels) and collating run beside training, in DataLoader workers: one
worker keeps up where their share is below 100%. Here they are timed alone, in this process, on the rows of the
same steps. The model is the Qwen2-VL of 70M of the bench against TRL, with a picture of 336 pixels squared a row.
"""
import argparse
import contextlib
import json
import time
from pathlib import Path
from statistics import median

from bench import prepare, shapes
from bench.ours import take
from lib import fast
from lib.fast import products
from lib.batches.sampler import Batcher

WARM_UP = 2


def main(argv: list[str] | None = None) -> None:
    """Print the median seconds of a step's encoding, collating and training, and their shares of the last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--sizes", default="70m", choices=shapes.SIZES)
    args = parser.parse_args(argv)
    rows = 4 * (args.steps + WARM_UP)
    data = {"family": "qwen2_vl", "sizes": args.sizes, "rows": rows, "mixed": False}
    prepare.prepare(args.folder.resolve(), data, {})
    with contextlib.chdir(args.folder):   # where the paths of the run's recipe start
        train, run = prepare.loaded(Path("padded"))
        encoding, collating = zip(*(prepared(run, step) for step in range(args.steps + WARM_UP)))
        with products.paths(run.dtype, run.world.device), fast.paths(run.model, run.roles):
            meter = take(train, run, args.steps + WARM_UP, train.micro_batches(run))
    seconds = {"encoding": encoding, "collating": collating, "training": [step["seconds"] for step in meter.steps]}
    found = {name: median(each[WARM_UP:]) for name, each in seconds.items()}
    for name, each in found.items():
        print(f"{name:10} {1000 * each:9.2f} ms a step  {each / found['training']:7.2%} of training")
    print(json.dumps(found))


def prepared(run, step: int) -> tuple[float, float]:
    """(seconds of encoding, of collating) the rows of a step."""
    encoder, encoding, collating = run.samples.encoder, 0.0, 0.0
    batcher = Batcher(encoder.pad_id, encoder.collate, run.samples.masks)
    for rows in run.samples.dealt(run.order.of_step(step), run.work.config.micro_batch_size, 1)[0]:
        began = time.perf_counter()
        encoded = [run.samples[row] for row in rows]
        middle = time.perf_counter()
        batcher(encoded)
        encoding, collating = encoding + middle - began, collating + time.perf_counter() - middle
    return encoding, collating


if __name__ == "__main__":
    main()
