"""features: what a frozen tower makes of each picture, computed once and kept in the run folder.

With `cache_vision_features`, training never decodes a picture and never runs the tower: a sample's tensors
without its pixels lie in features/rows, the outputs of the model's `get_image_features` in features/pictures,
named by a hash of the pictures, the processor and the base model. Samples with the same pictures share them.

Fork me to: keep them elsewhere, or in another type (`Store`).
"""
import functools
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file

from lib import ledger, terminal
from lib.stage import StageError

BY_LAYER = ("deepstack_features",)        # a list of layers; other lists are of pictures
PIXELS = {"pixel_values", "pixel_attention_mask"}
EXTRA_ROOM = 1.1                          # free space wanted, over the estimate

kept: dict | None = None                  # features of the batch in hand


@dataclass(frozen=True)
class Store:
    """The folder of kept features; only plain data, so that DataLoader workers can read it.

    salt: what besides its pictures a sample's features depend on, as a hash.
    """
    folder: Path
    salt: str

    @classmethod
    def of(cls, run: Path, plan: dict, processor: Path) -> "Store":
        """A run's store, for the processor that 02 saved and the base model of 03's plan."""
        files = [path.read_bytes() for path in sorted(processor.iterdir()) if path.suffix == ".json"]
        salt = hashlib.sha256(json.dumps([plan["base_model"], plan["revision"], plan["dtype"]]).encode())
        for content in files:
            salt.update(content)
        return cls(run / "features", salt.hexdigest())

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


def keep(store: Store, model, parts: list, world, autocast) -> None:
    """Compute and write what the store lacks of all samples' features and rows; ranks share the work."""
    missing: dict[Path, dict[Path, tuple]] = {}     # a picture's samples together, for one rank to compute it
    for samples in parts:
        for index in range(len(samples)):
            record = samples.records[index]
            if odd := {medium["kind"] for medium in record["media"]} - {"image"}:
                world.stop(f"cache_vision_features: {samples.ids[index]} has a medium of kind {odd.pop()}",
                           "cache_vision_features: false; only pictures' features are kept")
            row, pictures = store.row(record), store.pictures(record)
            if not (row.exists() and (pictures is None or pictures.exists())):
                missing.setdefault(pictures or row, {})[row] = samples, index
    for kind in ("rows", "pictures"):
        (store.folder / kind).mkdir(parents=True, exist_ok=True)
    world.barrier()                                 # all ranks have found the same to be missing
    mine = [pair for group in list(missing.values())[world.rank::world.world_size] for pair in group.values()]
    model.eval()
    with terminal.Progress("keeping vision features", len(mine)) as progress:
        fields, roomy = None, False
        for number, (samples, index) in enumerate(mine):
            row = samples.encoded(index)
            pictures = store.pictures(samples.records[index])
            if pictures is not None and not pictures.exists():
                fields = fields or fields_read(model, row, autocast)
                found = flat(of_row(model, row, fields, autocast))
                if not roomy:
                    check_room(store.folder, found, samples.media_tokens[index], parts)
                    roomy = True
                write(found, pictures)
            write({key: row[key] for key in row.keys() - PIXELS}, store.row(samples.records[index]))
            progress.update(number + 1)
    model.train()
    world.barrier()


def check_room(folder: Path, found: dict[str, torch.Tensor], tokens: int, parts: list) -> None:
    """Nothing; says how much the features will take, and stops where the disk lacks it."""
    per_token = sum(tensor.nbytes for tensor in found.values()) / max(1, tokens)
    wanted = per_token * sum(sum(samples.media_tokens) for samples in parts) / 2**30
    free = shutil.disk_usage(folder).free / 2**30
    terminal.say(f"vision features: at most {wanted:.2f} GiB in {folder}; {free:.1f} GiB are free")
    if wanted * EXTRA_ROOM > free:
        raise StageError(f"cache_vision_features: {folder} would take up to {wanted:.1f} GiB, and "
                         f"{free:.1f} GiB are free", "free some space, or cache_vision_features: false")


def write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A safetensors file that is whole or not there, also after a power cut."""
    aside = path.with_suffix(".partial")
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, aside)
    ledger.sync(aside)
    aside.replace(path)


# ---- the model's own features ----

class Captured(Exception):
    """Ends a forward whose features are had."""


@contextmanager
def in_place_of_features(model, make) -> Iterator[None]:
    """Inside, `make(own method)` stands in for get_image_features of the model's modules."""
    from peft import PeftModel
    modules = [module for module in model.modules()
               if hasattr(type(module), "get_image_features") and not isinstance(module, PeftModel)]
    for module in modules:
        own = module.get_image_features
        module.get_image_features = functools.wraps(own)(make(own))   # generate asks what arguments it takes
    try:
        yield
    finally:
        for module in modules:
            del module.get_image_features


def inputs_of(model, row: dict) -> dict:
    """A row as the model takes it."""
    return {key: value.to(model.device) for key, value in row.items() if key != "labels"}


@torch.no_grad()
def fields_read(model, row: dict, autocast) -> tuple[str, ...]:
    """The names of those outputs of get_image_features that the model's forward reads."""
    read = {}

    class Watched:
        def __init__(self, output):
            self.output = output

        def __getattr__(self, name):
            read[name] = True
            return getattr(self.output, name)

    def watched(own):
        return lambda *words, **options: Watched(own(*words, **options))

    with in_place_of_features(model, watched), autocast():
        model(**inputs_of(model, row), use_cache=False)
    if not read:
        raise StageError("cache_vision_features: this model's forward asks no get_image_features for them",
                         "cache_vision_features: false")
    return tuple(read)


@torch.no_grad()
def of_row(model, row: dict, fields: tuple[str, ...], autocast) -> dict:
    """{field: tensor or list of tensors} that get_image_features gives for a row's pictures."""
    found = {}

    def captured(own):
        def capture(*words, **options):
            output = own(*words, **options)
            found.update({name: getattr(output, name) for name in fields})
            raise Captured
        return capture

    with in_place_of_features(model, captured), autocast():
        try:
            model(**inputs_of(model, row), use_cache=False)
        except Captured:
            pass
    return found


# ---- in training ----

@contextmanager
def replayed(model) -> Iterator[None]:
    """Inside, the model takes the features of the batch in hand (`of_batch`) for those of its tower."""
    def replay(own):
        return lambda *words, **options: SimpleNamespace(**kept) if kept else own(*words, **options)

    with in_place_of_features(model, replay):
        yield


def of_batch(batch: dict) -> dict:
    """What the model gets beside the batch's own tensors, so that it asks for the features."""
    global kept
    kept = batch.get("features")
    if not kept:
        return {}
    return {"pixel_values": next(iter(flat(kept).values())).new_zeros(1)}


def together(rows: list[dict]) -> dict:
    """The features of several samples as those of one batch."""
    return {field: joined([row[field] for row in rows], field in BY_LAYER) for field in rows[0]}


def joined(values: list, by_layer: bool):
    """One value of a field for several: tensors end to end, lists of pictures one after the other."""
    if isinstance(values[0], torch.Tensor):
        return torch.cat(values)
    if by_layer:
        return [joined(layer, by_layer=False) for layer in zip(*values)]
    return [picture for pictures in values for picture in pictures]


def flat(value, name: str = "") -> dict[str, torch.Tensor]:
    """{"FIELD.NUMBER": tensor} of nested fields and lists, as a file holds them."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    inner = value.items() if isinstance(value, dict) else ((f"{i:04}", each) for i, each in enumerate(value))
    return {path: tensor for key, each in inner
            for path, tensor in flat(each, f"{name}.{key}" if name else key).items()}


def unflat(named: dict[str, torch.Tensor]) -> dict:
    """The opposite of `flat`."""
    tree = {}
    for name, tensor in named.items():
        *path, last = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = tensor

    def lists(node):
        if isinstance(node, torch.Tensor):
            return node
        if all(key.isdigit() for key in node):
            return [lists(node[key]) for key in sorted(node)]
        return {key: lists(inner) for key, inner in node.items()}
    return lists(tree)
