"""The forecast of memory is what really lives in memory, and needs neither weights nor memory of its own."""
import importlib
import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import LlamaConfig

from bench.forecast import measure
from lib.batches.sampler import Batcher
from lib.memory import fit, on_cuda
from lib.memory.forecast import WORKSPACES, HollowStep
from lib.models import plan
from lib.run import stage
from lib.run.errors import StageError
from lib.training import devices, parallel
from tests.runner import Run
from tests.test_families import find

MIB, GIB = 2**20, 2**30


def knobs_for(folder, **given):
    """The knobs of a recipe on this checkpoint."""
    given = {"base_model": "a/b", "datasets": [{"path": __file__}], "adapter": "lora"} | given
    knobs, *_ = importlib.import_module("01_config").configure(Path("forecast.yaml"), json.dumps(given))
    knobs.base_model = str(folder)
    return knobs


def text_batch(tokens, rows=1, vocabulary=1000):
    """A batch of noise, whose last quarter is trained."""
    ids = torch.randint(0, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :tokens * 3 // 4] = -100
    row = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    return Batcher(0, "cat")([dict(row) for _ in range(rows)])


def llama(folder, **sizes):
    """The folder, with a configuration and no weights in it."""
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=1000) | sizes
    config = LlamaConfig(**sizes)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return folder


# ---- right ----

@pytest.mark.parametrize("name, adapter", [("llava", "lora"), ("llava", "qlora"), ("gemma3", "lora"),
                                           ("qwen3_vl_moe", "lora")])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_it_is_what_the_same_step_on_real_tensors_holds(name, adapter, checkpointing, tmp_path_factory):
    subject = find(name, tmp_path_factory)
    knobs = knobs_for(subject.folder, adapter=adapter, bf16=True)
    planned = plan.make_plan(knobs)
    batch = subject.batch(subject.rows((1, "What is it? " * 12, "a red fox " * 12)))
    found = HollowStep(planned, knobs, cuda=False).peak(batch, checkpointing).of(1)
    _, measured = measure(planned, knobs, batch, checkpointing)
    assert found == pytest.approx(measured, rel=0.05) and found >= 0.99 * measured


def test_weights_adapter_gradients_and_optimizer_are_those_of_a_sum_by_hand(tmp_path):
    knobs = knobs_for(llama(tmp_path), lora_r=8, bf16=True)
    peak = HollowStep(plan.make_plan(knobs), knobs, cuda=False).peak(text_batch(32), True)
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3              # q, o; k, v; gate, up, down
    adapter = 8 * 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert peak.weights == {"embedding bfloat16": 2 * 1000 * 64, "head bfloat16": 2 * 1000 * 64,
                            "language bfloat16": 2 * (2 * (layer + 2 * 64) + 64)}
    assert (peak.trained, peak.gradients, peak.optimizer) == (4 * adapter, 4 * adapter, 8 * adapter)


@pytest.mark.parametrize("bits", [{"adapter": "qlora"}, {"load_in_8bit": True}])
def test_dora_on_a_quantised_base_adds_its_magnitudes(bits, tmp_path):
    plain, dora = (knobs_for(llama(tmp_path), bf16=True, **bits, **more) for more in ({}, {"peft_use_dora": True}))
    batch, planned = text_batch(32), plan.make_plan(plain)
    without, found = (HollowStep(planned, knobs, cuda=False).peak(batch, True) for knobs in (plain, dora))
    outputs = 2 * (2 * 64 + 2 * 32 + 64 + 2 * 128)                # of q, o; k, v; down; gate, up
    assert (found.weights, found.trained) == (without.weights, without.trained + 4 * outputs)
    assert found.activations > without.activations


def test_four_bits_are_half_a_byte_and_the_scales(tmp_path):
    knobs = knobs_for(llama(tmp_path), adapter="qlora", bf16=True)
    peak = HollowStep(plan.make_plan(knobs), knobs, cuda=False).peak(text_batch(32), True)
    elements = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3)
    each = 1 / 2 + 1 / 64 + 4 / 64 / 256
    assert peak.weights["language quantised"] == pytest.approx(elements * each, rel=0.01)


def test_full_fine_tuning_holds_sixteen_bytes_for_each_parameter(tmp_path):
    knobs = knobs_for(llama(tmp_path), adapter=None, bf16=True)
    planned = plan.make_plan(knobs)
    peak = HollowStep(planned, knobs, cuda=False).peak(text_batch(32), True)
    state = peak.trained + peak.gradients + peak.optimizer
    assert state == 16 * sum(planned["parameters"].values()) and not peak.weights


@pytest.mark.parametrize("name", ["gemma3", "llava", "qwen2_5_vl", "mllama", "llama4", "mistral4"])
def test_what_a_gpus_kernels_hold_is_less_than_what_a_cpus_do(name, tmp_path_factory):
    subject = find(name, tmp_path_factory)
    knobs = knobs_for(subject.folder, bf16=True)
    planned = plan.make_plan(knobs)
    batch = subject.batch(subject.rows((1, "What is it? " * 12, "a red fox " * 12)))
    activations = [HollowStep(planned, knobs, cuda).peak(batch, False).activations for cuda in (True, False)]
    assert 0 < activations[0] - WORKSPACES < activations[1]


@pytest.mark.parametrize("size, taken", [(1, 512), (512, 512), (513, 1024), (43 * MIB, 44 * MIB), (44 * MIB, 44 * MIB),
                                         (45 * MIB - 512, 45 * MIB - 512), (45 * MIB + 512, 46 * MIB), (9 * MIB + 3, 9 * MIB + 512)])
def test_cudas_allocator_hands_out_somewhat_more(size, taken):
    assert on_cuda.taken_on_cuda(size) == taken


# ---- cheap ----

def test_a_model_of_130_billion_parameters_is_forecast_in_less_memory_than_one_of_its_layers(tmp_path):
    sizes = dict(hidden_size=16_384, intermediate_size=53_248, num_hidden_layers=40, num_attention_heads=128,
                 num_key_value_heads=8, vocab_size=32_768)
    knobs = knobs_for(llama(tmp_path, **sizes), bf16=True)
    planned = plan.make_plan(knobs)
    before_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    peak = HollowStep(planned, knobs).peak(text_batch(2048), True)
    grown_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 - before_gib
    assert sum(planned["parameters"].values()) > 128e9 and peak.of(1) > 2 * 128e9
    assert grown_gib < peak.layer / GIB


# ---- what follows ----

def test_sharding_needs_less_and_summing_gradients_over_ranks_more(tmp_path):
    knobs = knobs_for(llama(tmp_path, num_hidden_layers=16), bf16=True)
    peak = HollowStep(plan.make_plan(knobs), knobs).peak(text_batch(8), True)
    assert peak.sharded(8) < peak.sharded(4) < peak.of(4) and peak.of(1) < peak.of(4) == peak.of(8)


def test_more_rows_or_kept_activations_take_more(tmp_path):
    knobs = knobs_for(llama(tmp_path), bf16=True)
    step = HollowStep(plan.make_plan(knobs), knobs)
    peaks = {checkpointing: [step.peak(text_batch(64, rows), checkpointing).of(1) for rows in (1, 2, 4, 8)]
             for checkpointing in (True, False)}
    assert all(sizes == sorted(set(sizes)) for sizes in peaks.values())
    assert all(less < more for less, more in zip(peaks[True], peaks[False]))


def test_the_micro_batch_that_fits_is_the_largest_and_grows_with_the_room():
    def bytes_of(rows):
        return max(100 + 10 * rows, 40 + 17 * rows)               # two parts of a step, by turns the higher
    found = [fit.most_rows(bytes_of, room) for room in range(60, 2000, 7)]
    assert found == sorted(found) and found[0] == 0
    for rows, room in zip(found, range(60, 2000, 7)):
        assert rows == 0 or bytes_of(rows) <= room < bytes_of(rows + 1)
    assert fit.most_rows(bytes_of, 10**9) == fit.MOST_ROWS


# ---- the script ----

def test_05_checkpoints_as_many_layers_as_03s_forecast_says_it_must(tmp_path, monkeypatch, zoo, capsys):
    run = Run(tmp_path, monkeypatch, zoo("llava")).upto("04_lora")
    forecast = run.json("03_load_model/forecast.json")
    assert forecast["device"] == "cpu"
    assert forecast["checkpointed"]["peak_gib"] < forecast["kept"]["peak_gib"]
    assert "forecast.json" not in run.json("03_load_model/stage.json")["wrote"]
    work, world = stage.view("05_train", run.path), parallel.World(0, 1, torch.device("cpu"))
    train, plan = importlib.import_module("05_train"), run.json("03_load_model/model.json")
    for setting, share in (("kept", 1.0), ("checkpointed", 0.0)):
        peak = forecast[setting]["peak_gib"]
        monkeypatch.setattr(devices, "free_memory_gib", lambda device: peak / fit.CAUTION)
        assert train.kept_layers(work, world, plan, shards=False) == pytest.approx((share, peak))
        assert f"auto: {share:.0%} of the layers" in capsys.readouterr().out
    run("01_config", "gradient_checkpointing=true")
    run("05_train")
    assert f"; forecast {forecast['checkpointed']['peak_gib']:.2f} GiB without them" in capsys.readouterr().out


def test_activations_stay_layer_by_layer_as_room_grows_and_the_last_ones_first(zoo):
    found = {"checkpointed": {"peak_gib": 2.0}, "kept": {"peak_gib": 4.0}, "layers_gib": 1.0, "layer_gib": 0.1}
    assert [fit.kept(found, room) for room in (1, 2, 3, 4, 9)] == [
        (0, 2), (0, 2), (0.5, 3), (1, 4), (1, 4)]
    share, peak = fit.kept(found, 2.0, shards=4)                  # 0.75 less of frozen layers, 0.2 more in use
    assert (round(share, 3), round(peak, 3)) == (0.275, 2.0)


def test_the_view_needs_no_weights_writes_nothing_and_says_what_to_change(tmp_path, monkeypatch, zoo, capsys):
    base = Path(shutil.copytree(zoo("llava"), tmp_path / "base"))
    run = Run(tmp_path, monkeypatch, base, gradient_checkpointing=False, bf16=True).upto("02_data")
    (base / "model.safetensors").unlink()
    run("03_load_model", "--forecast", "--gpus", "8", "--gib", "0.0005")
    said = capsys.readouterr().out
    assert not (run.path / "03_load_model").exists() and "none fits" in said
    for knob in ("micro_batch_size: 1", "gradient_checkpointing: true", "adapter: qlora, with checkpointing"):
        assert f"  {knob}: " in said
    for words, what in ((("--gpus", "2"), "--gpus 2: only --forecast reads it"),
                        (("--forecast", "--gib", "-1"), "--gib -1.0: more than 0 is needed")):
        with pytest.raises(StageError, match=what):
            run("03_load_model", *words)


@pytest.mark.parametrize("packs", [False, True])
def test_a_row_with_clips_of_several_lengths_has_a_forecast(packs, zoo, tmp_path, monkeypatch):
    content = [{"type": "video"}, {"type": "video"}, {"type": "text", "text": "Which is longer?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "the second"}]
    rows = [{"messages": messages, "images": [], "videos": [["red.png"] * 2, ["red.png"] * frames]}
            for frames in (3, 4)]
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    run = Run(tmp_path, monkeypatch, zoo("smolvlm2"), rows, sample_packing=packs, val_set_size=0)
    run.upto("03_load_model")
    assert run.json("03_load_model/forecast.json")["kept"]["peak_gib"] > 0
