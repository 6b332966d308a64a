"""Kept features: every family learns from them what it learns from the pixels, and the tower never runs again."""
import shutil

import pytest
import torch

from lib.batches import packing
from lib.batches.sampler import Batcher
from lib.fast import features, store
from lib.run.errors import StageError
from tests import zoo
from tests.runner import STEMS, Run, colour_rows, text_rows
from tests.test_families import SEEING, find
from tests.test_packing import REFUSED, gradients, rows_of

MIXED = [row for pair in zip(colour_rows(), text_rows()) for row in pair]


@pytest.fixture(params=SEEING)
def subject(request, tmp_path_factory):
    return find(request.param, tmp_path_factory)


class Plain:
    """An autocast that changes nothing."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


def kept_rows(net, rows):
    """The rows with features in place of their pixels, by way of a file's flat names."""
    fields = features.fields_read(net, rows[0], Plain)
    kept = []
    for row in rows:
        plain = {key: row[key] for key in row.keys() - store.PIXELS}
        if "pixel_values" in row:
            plain["features"] = store.unflat(store.flat(features.of_row(net, row, fields, Plain)))
        kept.append(plain)
    return kept


def test_losses_and_gradients_are_those_of_the_pixels(subject, tmp_path):
    net, _ = subject.adapter(tmp_path)
    net.eval()
    rows = rows_of(subject)
    if subject.name in ("mllama", "voxtral"):                          # no pictures on that way, or none at all
        with pytest.raises(StageError, match="asks no get_image_features"):
            kept_rows(net, rows)
        return
    pad_id, style = subject.encoder.pad_id, subject.encoder.collate
    wanted = gradients(net, [subject.batch(rows)])
    batches = [Batcher(pad_id, style)(kept_rows(net, rows))]
    if subject.name not in REFUSED:
        needs = packing.needs(net, subject.family)
        joined = packing.join(kept_rows(net, rows), needs["positions"], style)
        batches.append(Batcher(pad_id, style, needs["masks"])([joined]))
    tower = [module for name, module in net.named_modules() if subject.roles.of(name.removeprefix("base_model.model."))
             == "vision"]
    ran = []
    hooks = [module.register_forward_pre_hook(lambda module, given: ran.append(module)) for module in tower]
    with features.replayed(net):
        for batch in batches:
            assert "pixel_values" not in batch
            found = gradients(net, [batch])
            assert found[0] == pytest.approx(wanted[0], rel=1e-5)
            for name, gradient in wanted[1].items():
                assert (found[1][name] - gradient).norm() <= 5e-4 * gradient.norm() + 1e-7, name
    assert ran == []
    for hook in hooks:
        hook.remove()


def test_a_run_with_kept_features_has_the_losses_of_one_without(tmp_path, monkeypatch):
    metrics = []
    for number, knobs in enumerate(({}, {"cache_vision_features": True, "dataloader_num_workers": 1})):
        folder = tmp_path / str(number)
        folder.mkdir()
        run = Run(folder, monkeypatch, zoo.build("qwen3_vl", folder / "base"), MIXED, num_epochs=2, **knobs)
        metrics.append(run.upto("05_train").metrics())
    assert len(metrics[0]) == len(metrics[1]) > 4
    for plain, kept in zip(*metrics):
        assert kept == pytest.approx(plain, rel=1e-5)
    files = sorted(path.parent.name for path in (folder / "run/features").rglob("*.safetensors"))
    assert files.count("pictures") == 9 and files.count("rows") == 18
    assert not list((folder / "run/features").rglob("*.partial"))


def test_features_of_another_base_in_the_same_folder_are_not_taken(tmp_path, monkeypatch):
    losses = {}
    for name, seeds in (("first", (0,)), ("both", (0, 1)), ("second", (1,))):
        folder = tmp_path / name
        folder.mkdir()
        for seed in seeds:
            shutil.rmtree(folder / "base", ignore_errors=True)
            run = Run(folder, monkeypatch, zoo.build("llava", folder / "base", seed=seed), MIXED, max_steps=2,
                      cache_vision_features=True)
            run("01_config")
            for stem in STEMS[1:5]:
                run(stem, "--force")
        losses[name] = run.losses()
    assert losses["both"] == losses["second"] != losses["first"]


def test_features_are_not_kept_of_a_tower_that_trains(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch, zoo.build("llava", tmp_path / "base"), cache_vision_features=True,
              lora_target_roles=["language", "vision"]).upto("04_lora")
    with pytest.raises(StageError, match="vision would train"):
        run("05_train")


def test_a_full_disk_is_seen_before_the_first_picture(tmp_path):
    parts = [type("Part", (), {"media_tokens": [10**15]})()]
    with pytest.raises(StageError, match="would take up to"):
        store.check_room(tmp_path, {"pooler_output": torch.zeros(4, 8)}, 4, parts)
