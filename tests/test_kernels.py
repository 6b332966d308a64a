"""What a machine has: attention kernels, number types, several GPUs; what lacks is replaced with a word or refused."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from lib import fast, registry
from lib.batches import packing
from lib.models import kernels, model, plan
from lib.run.errors import StageError
from lib.training import devices, parallel
from tests.test_families import find
from tests.test_fast import assert_same
from tests.test_model import knobs
from tests.test_packing import gradients, rows_of

CPU, FLASH = torch.device("cpu"), "flash_attention_2"


@pytest.mark.parametrize("name, why", [
    ("mllama", "which tokens see which picture"), ("gemma4_e2b", "512 wide"), ("gemma3", "a picture's tokens see all of it")])
def test_flash_attention_is_refused_where_it_would_compute_something_else(zoo, name, why):
    with pytest.raises(StageError, match=why) as caught:
        plan.make_plan(knobs(zoo(name), attn_implementation=FLASH))
    assert caught.value.fix == "attn_implementation: sdpa"


def test_a_part_whose_class_lacks_the_kernel_has_sdpa_and_eager_parts_stay_eager(zoo, capsys):
    made = plan.make_plan(knobs(zoo("lfm2_vl"), attn_implementation=FLASH))
    assert made["attn_implementation"] == {"": FLASH, "text_config": FLASH, "vision_config": "sdpa"}
    assert "Siglip2VisionModel: no flash_attention_2" in capsys.readouterr().out
    made = plan.make_plan(knobs(zoo("gemma4_e2b"), attn_implementation="flex_attention"))
    assert made["attn_implementation"] == {"": "flex_attention", "text_config": "flex_attention",
                                           "vision_config": "flex_attention", "audio_config": "eager"}
    assert plan.make_plan(knobs(zoo("qwen2_vl"), attn_implementation="flex_attention"))["attn_implementation"] == "sdpa"


def test_what_this_machine_lacks_is_sdpa_with_a_word_and_computes_the_same(zoo, capsys):
    wanted = plan.make_plan(knobs(zoo("llava"), attn_implementation=FLASH))
    assert wanted["attn_implementation"] == FLASH               # in the plan, which is the same everywhere
    loaded = model.load(wanted, CPU)
    assert loaded.model.language_model.config._attn_implementation == "sdpa"
    assert "this machine lacks what is asked; sdpa gives the same" in " ".join(capsys.readouterr().out.split())
    assert kernels.here({"": "flex_attention", "audio_config": "eager"}, cuda=False) == {"": "sdpa", "audio_config": "eager"}
    assert kernels.here("flex_attention", cuda=True) == "flex_attention"


def test_packed_rows_with_masks_of_their_own_are_refused_under_flex_attention(zoo):
    net = plan.on_meta(plan.make_plan(knobs(zoo("gemma3"))))
    family = registry.family_of("gemma3")
    assert packing.needs(net, family)["masks"]
    net.set_attn_implementation("flex_attention")
    with pytest.raises(StageError, match="flex_attention"):
        packing.needs(net, family)


# ---- one model over several GPUs ----

def test_a_model_with_accelerates_hooks_has_the_same_loss_and_gradients_under_the_fast_paths(tmp_path_factory, tmp_path):
    from accelerate import dispatch_model
    subject = find("qwen2_5_vl", tmp_path_factory)
    net, _ = subject.adapter(tmp_path)
    net.eval()
    batches = [subject.batch(rows_of(subject))]
    wanted = gradients(net, batches)
    dispatch_model(net.get_base_model(), {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert hasattr(net.get_output_embeddings(), "_hf_hook")
    hooked = {name for name, module in net.named_modules() if "forward" in vars(module)}
    with fast.paths(net, subject.roles):
        assert_same(gradients(net, batches), wanted)
    assert hooked == {name for name, module in net.named_modules() if "forward" in vars(module)}


def test_a_shared_out_model_with_a_part_on_no_gpu_is_refused():
    devices.refuse_offload({"model.layers.0": 0, "model.layers.1": 1})
    with pytest.raises(StageError, match="1 parts don't fit into the GPUs, such as model.layers.1"):
        devices.refuse_offload({"model.layers.0": 0, "model.layers.1": "cpu"})


def test_one_process_for_all_gpus_and_one_for_each_exclude_each_other(tmp_path):
    for name in ("model.json", "adapter.json"):
        (tmp_path / name).write_text("{}")
    work = SimpleNamespace(config=SimpleNamespace(device_map="auto", bf16=False), input=lambda stem: tmp_path)
    with pytest.raises(StageError, match="torchrun gives each rank its own GPU"):
        importlib.import_module("05_train").load(work, parallel.World(0, 2, CPU))


def test_a_shared_out_model_keeps_no_activations_as_long_as_none_says_otherwise(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    work = SimpleNamespace(config=SimpleNamespace(device_map="auto", max_memory=None, gradient_checkpointing="auto"))
    world = parallel.World(0, 1, torch.device("cuda", 0))
    assert importlib.import_module("05_train").kept_layers(work, world, {}, shards=False) == (0.0, None)
    assert "auto: no layer keeps its activations" in capsys.readouterr().out


def test_one_device_has_all_of_a_model_whatever_device_map_says():
    assert devices.spread(SimpleNamespace(device_map="auto", max_memory={"0": "1GiB"}), CPU) is None


# ---- types ----

def test_bf16_auto_asks_for_real_support_and_true_does_not():
    cuda, no = torch.device("cuda"), lambda: False
    with pytest.raises(StageError, match="no bfloat16 of its own"):
        devices.refuse_emulated_bf16("auto", cuda, no)
    for given in (("auto", cuda, lambda: True), (True, cuda, no), (False, cuda, no), ("auto", CPU, no)):
        devices.refuse_emulated_bf16(*given)


def test_tf32_holds_inside_only():
    def now():
        return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    before = now()
    for wanted, precision in ((True, "tf32"), (False, "ieee")):
        with devices.tf32(wanted):
            assert now() == (precision, precision)
        assert now() == before
