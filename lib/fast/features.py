"""features: what a vision tower makes of pictures: taken from the model, and given back in place of pixels.

Features are the outputs of the model's `get_image_features`. lib/fast/store.py keeps them in the run folder.
"""
import functools
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import torch

from lib.run.errors import StageError

BY_LAYER = ("deepstack_features",)        # fields that are lists of layers; other lists are of pictures

kept: dict | None = None                  # features of the current batch


class Captured(Exception):
    """Ends a forward once its features are captured."""


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


@torch.no_grad()
def forward(model, row: dict, autocast, make) -> None:
    """Run the model on a row, with `make(own method)` for get_image_features; end early where Captured."""
    inputs = {key: value.to(model.device) for key, value in row.items() if key != "labels"}
    with in_place_of_features(model, make), autocast(), suppress(Captured):
        model(**inputs, use_cache=False)


def fields_read(model, row: dict, autocast) -> tuple[str, ...]:
    """The names of those outputs of get_image_features that the model's forward reads."""
    read = {}

    class Watched:
        def __init__(self, output):
            self.output = output

        def __getattr__(self, name):
            read[name] = True
            return getattr(self.output, name)

    forward(model, row, autocast, lambda own: lambda *words, **options: Watched(own(*words, **options)))
    if not read:
        raise StageError("cache_vision_features: this model's forward asks no get_image_features for them",
                         "cache_vision_features: false")
    return tuple(read)


def of_row(model, row: dict, fields: tuple[str, ...], autocast) -> dict:
    """{field: tensor or list of tensors} that get_image_features gives for a row's pictures."""
    found = {}

    def captured(own):
        def capture(*words, **options):
            output = own(*words, **options)
            found.update({name: getattr(output, name) for name in fields})
            raise Captured
        return capture

    forward(model, row, autocast, captured)
    return found


# ---- in training ----

@contextmanager
def replayed(model) -> Iterator[None]:
    """Inside, the model takes the current batch's features (`of_batch`) in place of its tower's."""
    def replay(own):
        return lambda *words, **options: SimpleNamespace(**kept) if kept else own(*words, **options)

    with in_place_of_features(model, replay):
        yield


def of_batch(batch: dict) -> dict:
    """Inputs that make the model ask for the batch's features, which are noted; {} where it has none."""
    global kept
    kept = batch.get("features")
    return {"pixel_values": torch.zeros(1, device=batch["input_ids"].device)} if kept else {}


def together(rows: list[dict]) -> dict:
    """The features of several samples, joined to those of one batch."""
    return {field: joined([row[field] for row in rows], field in BY_LAYER) for field in rows[0]}


def joined(values: list, by_layer: bool):
    """Several samples' values of a field as one: tensors concatenated, lists of pictures, too.

    by_layer: the values are lists of layers, each of which is joined by itself.
    """
    if isinstance(values[0], torch.Tensor):
        return torch.cat(values)
    if by_layer:
        return [joined(layer, by_layer=False) for layer in zip(*values)]
    return [picture for pictures in values for picture in pictures]
