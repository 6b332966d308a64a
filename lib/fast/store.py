"""store: what a frozen tower makes of each picture, computed once and kept in the run folder.

With `cache_vision_features`, training never decodes a picture and never runs the tower: a sample's tensors
without its pixels are in features/rows, the features of its pictures in features/pictures, in files named by
a hash of the pictures, the processor and the base model. Samples with the same pictures share a file.

Fork me to: keep them elsewhere, or in another dtype (`Store`).
"""
import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from lib.fast import features
from lib.run import ledger, terminal
from lib.run.errors import StageError

PIXELS = {"pixel_values", "pixel_attention_mask"}
EXTRA_ROOM = 1.1                          # free space required, as a multiple of the estimate


@dataclass(frozen=True)
class Store:
    """The folder of kept features; plain data, so that it can be sent to DataLoader workers.

    salt: a hash of all that features depend on besides the pictures.
    """
    folder: Path
    salt: str

    @classmethod
    def of(cls, work) -> "Store":
        """The Store of a run, for the processor that 02 saved and the base model of 03's plan."""
        planned = work.input("03_load_model")
        plan, files = (ledger.read_json(planned / name) for name in ("model.json", "stage.json"))
        base = [plan[fact] for fact in ("base_model", "revision", "class", "dtype", "quantisation")]
        base += [stamped.get("sha256") for stamped in files["reads"]["outside"].values()]
        salt = hashlib.sha256(json.dumps([*base, transformers.__version__]).encode())
        for path in sorted((work.input("02_data") / "processor").glob("*.json")):
            salt.update(path.read_bytes())
        return cls(work.run / "features", salt.hexdigest())

    def pictures(self, record: dict) -> Path | None:
        """The file of a sample's features; None for a sample without pictures."""
        hashes = [medium["sha256"] for medium in record["media"] if medium["kind"] == "image"]
        return self._file("pictures", [hashes, record["image_bounds"]]) if hashes else None

    def row(self, record: dict) -> Path:
        """The file of a sample's other tensors."""
        media = [medium["sha256"] for medium in record["media"]]
        return self._file("rows", [record["text"], record["spans"], media, record["image_bounds"]])

    def read(self, record: dict) -> dict:
        """A sample's tensors, with its "features" in place of its pixels."""
        row, pictures = load_file(self.row(record)), self.pictures(record)
        return row if pictures is None else row | {"features": unflat(load_file(pictures))}

    def _file(self, kind: str, key) -> Path:
        name = hashlib.sha256(json.dumps([self.salt, key]).encode()).hexdigest()[:32]
        return self.folder / kind / f"{name}.safetensors"


def keep_features(run) -> None:
    """Make the run's samples bring kept vision features in place of pixels.

    Features that the store lacks are computed and written first; ranks share the work.
    """
    world, net, parts = run.world, run.model, (run.samples, run.held_out)
    if moving := {*run.role_of.values()} & {"vision", "projector"}:
        world.stop(f"cache_vision_features: {' and '.join(sorted(moving))} would train, so that the "
                   "features change", "cache_vision_features: false, or train other roles only")
    store, fields = Store.of(run.work), None
    lacking = what_lacks(store, parts, world)
    mine = [pair for group in lacking[world.rank::world.world_size] for pair in group]
    net.eval()
    with terminal.Progress("keeping vision features", len(mine)) as progress:
        for number, (samples, index) in enumerate(mine):
            record, row = samples.records[index], samples.encoded(index)
            pictures = store.pictures(record)
            if pictures is not None and not pictures.exists():
                if fields is None:
                    fields = features.fields_read(net, row, run.autocast)
                    found = flat(features.of_row(net, row, fields, run.autocast))
                    check_room(store.folder, found, samples.media_tokens[index], parts)
                write(flat(features.of_row(net, row, fields, run.autocast)), pictures)
            write({key: row[key] for key in row.keys() - PIXELS}, store.row(record))
            progress.update(number + 1)
    net.train()
    world.barrier()
    run.samples.store = run.held_out.store = store


def what_lacks(store: Store, parts: Iterable, world) -> list[list[tuple]]:
    """[[(samples, index)]] of the samples for which the store lacks a file; the same on every rank.

    Samples with the same pictures are one group, for one rank to compute.
    """
    lacking: dict[Path, dict[Path, tuple]] = {}
    for samples in parts:
        for index, record in enumerate(samples.records):
            if odd := {medium["kind"] for medium in record["media"]} - {"image"}:
                world.stop(f"cache_vision_features: {samples.ids[index]} has a medium of kind {odd.pop()}",
                           "cache_vision_features: false; only pictures' features are kept")
            row, pictures = store.row(record), store.pictures(record)
            if not (row.exists() and (pictures is None or pictures.exists())):
                lacking.setdefault(pictures or row, {})[row] = samples, index
    for kind in ("rows", "pictures"):
        (store.folder / kind).mkdir(parents=True, exist_ok=True)
    world.barrier()
    return [list(group.values()) for group in lacking.values()]


def check_room(folder: Path, found: dict[str, torch.Tensor], tokens: int, parts: tuple) -> None:
    """Say how much room the features will take at most; raise StageError where the disk lacks it."""
    per_token = sum(tensor.nbytes for tensor in found.values()) / max(1, tokens)
    wanted = per_token * sum(sum(samples.media_tokens) for samples in parts) / 2**30
    free = shutil.disk_usage(folder).free / 2**30
    terminal.say(f"vision features: at most {wanted:.2f} GiB in {folder}; {free:.1f} GiB are free")
    if wanted * EXTRA_ROOM > free:
        raise StageError(f"cache_vision_features: {folder} would take up to {wanted:.1f} GiB, and "
                         f"{free:.1f} GiB are free", "free some space, or cache_vision_features: false")


def write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file, which is whole or not there, even after a power cut."""
    aside = path.with_suffix(".partial")
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, aside)
    ledger.sync(aside)
    aside.replace(path)


def flat(value, name: str = "") -> dict[str, torch.Tensor]:
    """{"FIELD.NUMBER": tensor} of nested dicts and lists, as a file holds them."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    inner = value.items() if isinstance(value, dict) else ((f"{i:04}", each) for i, each in enumerate(value))
    return {path: tensor for key, each in inner
            for path, tensor in flat(each, f"{name}.{key}" if name else key).items()}


def unflat(named: dict[str, torch.Tensor]) -> dict | list:
    """The nested dicts and lists of which `flat` made these named tensors."""
    inner: dict[str, dict] = {}
    for name, tensor in named.items():
        key, _, rest = name.partition(".")
        inner.setdefault(key, {})[rest] = tensor
    found = {key: each[""] if "" in each else unflat(each) for key, each in inner.items()}
    return [found[key] for key in sorted(found)] if all(key.isdigit() for key in found) else found
