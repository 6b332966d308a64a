"""Quantised bases: which layers of which family, that gradients live, what the checkpoint already is, and the way to 06."""

import json
import math
import shutil
from collections import Counter

import bitsandbytes
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lib import quant
from lib.export import merge
from lib.models import model
from lib.models.plan import make_plan
from lib.models.saved import attach
from lib.run.errors import StageError
from lib.training.loss import forward_loss
from tests import zoo
from tests.runner import Run
from tests.test_families import LLAMA, LORA, NAMES, difference, find, inputs, step
from tests.test_save import prove_here

CPU = torch.device("cpu")
BITS = {4: {"load_in_4bit": True}, 8: {"load_in_8bit": True}}
KINDS = {4: bitsandbytes.nn.Linear4bit, 8: bitsandbytes.nn.Linear8bitLt}
TURN = (1, "What is it?", "a red fox")

# The language model's linear layers that are quantised although LoRA leaves them alone, and the other way round.
MORE = {
    "glm4v_moe": {"gate_proj": 2, "up_proj": 2, "down_proj": 2},     # a dense layer, a shared expert
    "gemma4_e2b": {"per_layer_model_projection": 1},
    "gemma3n": {"per_layer_model_projection": 1, "0": 2},            # projections between its two streams
    "mistral4": {"kv_b_proj": -2},
}
LANGUAGE = ("model.language_model.layers.", "language_model.model.layers.", "model.text_model.layers.", "model.layers.",
            "model.language_model.per_layer_model_projection", "model.language_model.altup_")
OUTSIDE = ("lm_head", "router", "gate", "shared_expert_gate", "modality_router", "altup")


@pytest.fixture(params=NAMES)
def subject(request, tmp_path_factory):
    return find(request.param, tmp_path_factory)


def planned(subject, bits, **changes):
    return make_plan(subject.knobs(bf16=True, **BITS[bits], **changes))


def quantised(net, bits):
    """Names of the quantised layers, found by their class."""
    return [name for name, module in net.named_modules() if isinstance(module, KINDS[bits])]


# ------------------------------------------------------------------------------------------------ which layers

def test_in_4_bits_are_exactly_the_language_models_linear_layers(subject):
    names = quantised(model.load(planned(subject, 4), CPU), 4)
    expected = Counter(LORA.get(subject.name, LLAMA))
    expected.update(MORE.get(subject.name, {}))
    assert Counter(name.rsplit(".", 1)[-1] for name in names) == +expected
    assert all(name.startswith(LANGUAGE) and not set(OUTSIDE) & set(name.split(".")) for name in names)


def test_8_bits_are_for_the_same_layers_as_4(subject):
    in_4, in_8 = (planned(subject, bits)["quantisation"] for bits in BITS)
    assert in_4["linears"] == in_8["linears"]
    assert in_4["options"]["llm_int8_skip_modules"] == in_8["options"]["llm_int8_skip_modules"]
    assert any(name.endswith("lm_head") for name in in_8["options"]["llm_int8_skip_modules"])


@pytest.mark.parametrize("name, towers", [("llava", {"vision": 12}), ("llama4", {"vision": 12}),
                                          ("gemma4_e2b", {"vision": 15, "audio": 24})])
@pytest.mark.parametrize("bits", BITS)
def test_towers_are_quantised_where_the_recipe_says_so(name, towers, bits, tmp_path_factory):
    subject = find(name, tmp_path_factory)
    rows = subject.rows(TURN)
    plain = planned(subject, bits)
    wide = planned(subject, bits, quantize_roles=["language", *towers])
    net = model.load(wide, CPU, mode="inference")
    more = set(quantised(net, bits)) - set(plain["quantisation"]["linears"])
    assert Counter(next(kind for kind in ("vision", "audio") if kind in name) for name in more) == towers
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, whole = (float(forward_loss(each, subject.batch(rows))[0]) for each in (net, subject.base))
    assert found == pytest.approx(whole, rel=0.1)


def test_layers_that_are_quantised_otherwise_than_planned_stop_the_load(tmp_path_factory):
    plan = planned(find("llava", tmp_path_factory), 4)
    plan["quantisation"]["options"]["llm_int8_skip_modules"].remove("lm_head")  # an own list drops the default one
    with pytest.raises(StageError, match="1 layers are not as planned, such as lm_head"):
        model.load(plan, CPU)


@pytest.mark.parametrize("given, kind, nested", [
    ({}, "nf4", True), ({"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}, "fp4", False)])
def test_the_recipe_chooses_the_kind_of_4_bits(given, kind, nested, tmp_path_factory):
    subject = find("llama_text", tmp_path_factory)
    net = model.load(planned(subject, 4, bnb_config_kwargs=given), CPU)
    states = [module.weight.quant_state for module in net.modules() if isinstance(module, KINDS[4])]
    assert {(state.quant_type, state.nested) for state in states} == {(kind, nested)}


# ------------------------------------------------------------------------------------------------ gradients

STRUCTURES = [(4, name) for name in ("llava", "mllama", "gemma3n", "gemma4_moe", "qwen3_5_moe", "mistral4", "lfm2_vl")]
STRUCTURES += [(8, name) for name in ("llava", "mistral4", "mllama")]


@pytest.mark.parametrize("bits, name", STRUCTURES)
def test_every_lora_tensor_has_the_same_gradient_after_an_evaluation(bits, name, tmp_path_factory, tmp_path):
    subject = find(name, tmp_path_factory)
    net = with_adapter(subject, planned(subject, bits), tmp_path)
    before, after = gradients_around_an_evaluation(subject, net)
    assert set(before) == set(after) == set(model.trained_parameters(net))
    assert all(bool(gradient.any()) and bool(gradient.isfinite().all()) for gradient in after.values())
    assert all(difference(after[name], before[name]) < 1e-2 for name in before)


@pytest.mark.skipif(not bitsandbytes.nn.modules.has_avx512bf16(), reason="only these CPUs repack the weights")
def test_without_the_defence_an_evaluation_would_change_the_gradients(monkeypatch, tmp_path_factory, tmp_path):
    monkeypatch.setattr(quant, "keep_gradients", lambda net: None)
    subject = find("llava", tmp_path_factory)
    before, after = gradients_around_an_evaluation(subject, with_adapter(subject, planned(subject, 4), tmp_path))
    changed = [name for name in before if difference(after[name], before[name]) > 0.1]
    assert len(changed) > len(before) / 2, [difference(after[n], before[n]) for n in before]


def with_adapter(subject, plan, tmp_path):
    """The plan's model with an adapter whose B matrices are not zero."""
    _, folder = subject.adapter(tmp_path)
    return attach(model.load(plan, CPU), folder)


def gradients_around_an_evaluation(subject, net):
    """(gradients of a training step, those of the same step after an evaluation)."""
    pictures = int(subject.name != "gemma3n")      # whose tower of convolutions takes a second
    rows, found = subject.rows((pictures, *TURN[1:])), []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss, gradients = step(subject, net.train(), rows)
            assert math.isfinite(loss)
            found.append(gradients)
            with torch.no_grad():
                net.eval()(**inputs(subject.batch(rows)), use_cache=False)
    return found


# ------------------------------------------------------------------------------------- checkpoints of few bits

def stored(subject, folder, bits):
    """The subject's checkpoint as bitsandbytes' users publish it, tower and projector quantised, too."""
    options = transformers.BitsAndBytesConfig(**BITS[bits])
    cls = getattr(transformers, subject.plan["class"])
    shutil.copytree(subject.folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    net = cls.from_pretrained(subject.folder, quantization_config=options, device_map={"": "cpu"}, dtype=torch.bfloat16)
    net.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bits", BITS)
def test_a_checkpoint_of_bitsandbytes_is_trained_on_as_it_is(bits, tmp_path_factory, tmp_path):
    subject = find("llava", tmp_path_factory)
    folder = stored(subject, tmp_path / "stored", bits)
    plan = make_plan(subject.knobs(base_model=str(folder), bf16=True))
    assert plan["stored_as"] == "bitsandbytes" and plan["quantisation"]["bits"] == bits
    assert quant.in_words(plan) == [f"28 linear layers in {bits} bits: language 14, projector 2, vision 12"]
    net = with_adapter(subject, plan, tmp_path)
    assert len(quantised(net, bits)) == 28
    _, after = gradients_around_an_evaluation(subject, net)
    assert all(bool(gradient.any()) for gradient in after.values())
    with pytest.raises(StageError, match="merge: the weights of .* are stored quantised"):
        merge.write_merged(plan, tmp_path / "adapter", tmp_path / "merged")


def test_settings_that_such_a_checkpoint_has_already_are_refused(tmp_path_factory, tmp_path):
    subject = find("llava", tmp_path_factory)
    folder = stored(subject, tmp_path / "stored", 4)
    for changes in ({"load_in_8bit": True}, {"load_in_4bit": True, "quantize_roles": ["vision"]},
                    {"bnb_config_kwargs": {"bnb_4bit_quant_type": "fp4"}}):
        with pytest.raises(StageError, match="its weights are 4 bits already, by settings of their own"):
            make_plan(subject.knobs(base_model=str(folder), bf16=True, **changes))


def in_floats_of_8_bits(folder, name="llava", part="language_model.model.layers"):
    """A checkpoint whose language model's matrices are 8-bit floats with a scale, as some are published."""
    zoo.build(name, folder, dtype="bfloat16")
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in list(tensors.items()):
        if part in name and tensor.ndim >= 2:
            tensor = tensor.float()
            scale = tensor.abs().max() / torch.finfo(torch.float8_e4m3fn).max
            tensors[name] = (tensor / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale.reshape([1] * tensor.ndim)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tell(folder, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
                  "modules_to_not_convert": ["lm_head", "model.vision_tower", "model.multi_modal_projector"]})
    return folder


def tell(folder, quantisation):
    """Write a quantisation into a checkpoint's config.json."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = quantisation
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def test_floats_of_8_bits_are_read_as_the_plans_dtype(tmp_path_factory, tmp_path):
    subject = find("llava", tmp_path_factory)
    folder = in_floats_of_8_bits(tmp_path / "fp8")
    plan = make_plan(subject.knobs(base_model=str(folder), bf16=True))
    net = model.load(plan, CPU)
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    ours, whole = net.get_parameter(name), subject.base.get_parameter(name)
    assert 0 < difference(ours.float(), whole) < 2**-4                 # e4m3 has 3 bits behind the point
    assert quant.in_words(plan) == ["stored in 8-bit floats, read as bfloat16"]
    with pytest.raises(StageError, match="its weights are 8-bit floats, of which no load makes 4 bits"):
        make_plan(subject.knobs(base_model=str(folder), load_in_4bit=True, bf16=True))
    with pytest.raises(StageError, match="bf16: false: .* what it holds whole is bfloat16"):
        make_plan(subject.knobs(base_model=str(folder)))


def test_experts_in_floats_of_8_bits_are_rescaled_one_by_one(tmp_path_factory, tmp_path):
    subject, folder = find("qwen3_5_moe", tmp_path_factory), tmp_path / "fp8"
    in_floats_of_8_bits(folder, "qwen3_5_moe", part=".experts.")
    net = model.load(make_plan(subject.knobs(base_model=str(folder), bf16=True)), CPU)
    for name, ours in net.named_parameters():
        assert difference(ours.float(), subject.base.get_parameter(name)) < 2**-4, name


def test_experts_in_floats_of_8_bits_that_are_one_tensor_are_refused(tmp_path_factory, tmp_path):
    subject, folder = find("qwen3_vl_moe", tmp_path_factory), tmp_path / "fp8"
    in_floats_of_8_bits(folder, "qwen3_vl_moe", part=".experts.")
    with pytest.raises(StageError, match="passes over 4 scales of 8-bit floats, such as .*_scale_inv"):
        model.load(make_plan(subject.knobs(base_model=str(folder), bf16=True)), CPU)


def in_gptqs_integers(folder, name, bits, layout="gptq", group=32):
    """A checkpoint packed as GPTQ's users publish it, bit by bit, and {layer: the weight that its integers mean}.

    The inputs of a group don't lie side by side, as where they were quantised in the order of their activations.
    """
    zoo.build(name, folder, dtype="bfloat16")
    tensors, meant, most = load_file(folder / "model.safetensors"), {}, 2**bits - 1
    for key in [key for key in tensors if "layers." in key and key.endswith("_proj.weight") and "vision" not in key]:
        weight, layer = tensors.pop(key).double().numpy().T, key.removesuffix(".weight")              # [in, out]
        groups = np.random.default_rng(len(meant)).permutation(np.arange(len(weight)) // group)
        low, high = (np.stack([f(weight[groups == g], axis=0) for g in range(groups.max() + 1)]) for f in (np.min, np.max))
        scales = np.float16((np.maximum(high, 0) - np.minimum(low, 0)) / most + 1e-6)
        zeros = np.clip(np.round(-np.minimum(low, 0) / scales), 0, most).astype(int)
        integers = np.clip(np.round(weight / scales[groups]) + zeros[groups], 0, most).astype(int)
        meant[layer] = torch.tensor(((integers - zeros[groups]) * np.float64(scales)[groups]).T)
        tensors |= {f"{layer}.qweight": words(integers.T, bits).T.contiguous(), f"{layer}.scales": torch.tensor(scales),
                    f"{layer}.qzeros": words(zeros - (layout == "gptq") & most, bits),
                    f"{layer}.g_idx": torch.tensor(groups, dtype=torch.int32)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tell(folder, {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": True, "sym": False,
                  "checkpoint_format": layout})
    return folder, meant


def words(integers, bits):
    """Rows of integers as rows of 32-bit words, the first integer in the lowest bits."""
    texts = [["".join(f"{n:0{bits}b}" for n in row[at:at + 32 // bits][::-1]) for at in range(0, len(row), 32 // bits)]
             for row in integers.tolist()]
    return torch.tensor([[int(text, 2) - 2**32 * (text[0] == "1") for text in row] for row in texts], dtype=torch.int32)


@pytest.mark.parametrize("bits, layout", [(4, "gptq"), (8, "gptq_v2"), (2, "gptq")])
def test_gptqs_integers_are_read_as_the_weights_that_they_mean(bits, layout, tmp_path_factory, tmp_path):
    subject = find("llava", tmp_path_factory)
    folder, meant = in_gptqs_integers(tmp_path / "base", "llava", bits, layout)
    plan = make_plan(subject.knobs(base_model=str(folder), bf16=True))
    net = model.load(plan, CPU, mode="reference")
    assert quant.in_words(plan) == ["stored by GPTQ, read as bfloat16"] and len(meant) == 14
    for layer, weight in meant.items():
        ours = net.get_parameter(layer.replace("language_model.model", "model.language_model") + ".weight")
        assert ours.dtype == torch.bfloat16 and torch.equal(ours, weight.float().to(torch.bfloat16)), layer
    assert net.generation_config.eos_token_id == subject.base.generation_config.eos_token_id


def test_a_checkpoint_of_gptq_is_trained_on_merged_and_proved(tmp_path, monkeypatch):
    base, _ = in_gptqs_integers(tmp_path / "base", "llava", 4)
    run = Run(tmp_path, monkeypatch, base, bf16=True, adapter="qlora", merge=True, max_steps=2, answer_rows=0).upto("05_train")
    assert len(run.json("03_load_model/model.json")["quantisation"]["linears"]) == 14      # straight to nf4
    prove_here(run, monkeypatch)
    assert set(run.json("06_save/check.json")["exports"]) == {"adapter", "merged"}
    assert "quantization_config" not in run.json("06_save/merged/config.json")


def test_a_packed_layer_without_its_scales_is_named(tmp_path_factory, tmp_path):
    subject = find("llava", tmp_path_factory)
    folder, meant = in_gptqs_integers(tmp_path / "base", "llava", 4)
    tensors, layer = load_file(folder / "model.safetensors"), sorted(meant)[0]
    del tensors[f"{layer}.scales"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StageError, match=f"there is no {layer}.scales"):
        model.load(make_plan(subject.knobs(base_model=str(folder), bf16=True)), CPU)


@pytest.mark.parametrize("changes, words", [({"bits": 3}, "GPTQ in 3 bits, laid out as gptq"),
                                            ({"checkpoint_format": "marlin"}, "GPTQ in 4 bits, laid out as marlin")])
def test_a_layout_of_gptq_that_isnt_read_is_named(changes, words, tmp_path_factory, tmp_path):
    subject = find("llava", tmp_path_factory)
    shutil.copytree(subject.folder, tmp_path / "base")
    tell(tmp_path / "base", {"quant_method": "gptq", "bits": 4} | changes)
    with pytest.raises(StageError, match=words):
        make_plan(subject.knobs(base_model=str(tmp_path / "base"), bf16=True))


@pytest.mark.parametrize("method", ["awq", "compressed-tensors", "mxfp4"])
def test_other_ways_to_quantise_are_refused_by_name(method, tmp_path_factory, tmp_path):
    subject = find("llava", tmp_path_factory)
    shutil.copytree(subject.folder, tmp_path / "base")
    tell(tmp_path / "base", {"quant_method": method, "bits": 4})
    with pytest.raises(StageError, match=f"quantised by {method}, which isn't trained here") as refusal:
        make_plan(subject.knobs(base_model=str(tmp_path / "base")))
    assert refusal.value.fix == "name the unquantised checkpoint; adapter: qlora makes 4 bits of it"


# ------------------------------------------------------------------------------------------------ all the way

def test_a_quantised_mixture_trains_its_experts_and_is_merged_whole(tmp_path, monkeypatch, zoo, capsys):
    roles = ["language", "experts"]
    run = Run(tmp_path, monkeypatch, zoo("qwen3_vl_moe"), bf16=True, adapter="qlora", lora_target_roles=roles,
              merge=True, max_steps=2, answer_rows=0).upto("06_save")
    said = capsys.readouterr().out
    assert "8 linear layers in 4 bits: language 8" in said
    assert "GiB of experts stay in bfloat16" in said and "8 experts train" in said
    assert run.json("04_lora/adapter.json")["modules"] == {"experts": 4, "language": 8}
    assert set(run.json("06_save/check.json")["exports"]) == {"adapter", "merged"}


def test_a_checkpoint_in_floats_of_8_bits_goes_through_all_scripts(tmp_path, monkeypatch):
    base = in_floats_of_8_bits(tmp_path / "fp8")
    run = Run(tmp_path, monkeypatch, base, bf16=True, merge=True, max_steps=2, answer_rows=0,
              tokens=["colour"]).upto("06_save")
    assert set(run.json("06_save/check.json")["exports"]) == {"adapter", "merged"}
    assert "quantization_config" not in run.json("06_save/merged/config.json")


def test_dora_on_8_bits_is_refused_on_a_cpu(tmp_path, monkeypatch, zoo):
    run = Run(tmp_path, monkeypatch, zoo("llava"), load_in_8bit=True, peft_use_dora=True).upto("04_lora")
    with pytest.raises(StageError, match="peft_use_dora: on a CPU"):
        run("05_train")


def test_weights_of_few_bits_are_no_base_for_full_fine_tuning(tmp_path, monkeypatch, tmp_path_factory):
    base = stored(find("llava", tmp_path_factory), tmp_path / "stored", 4)
    run = Run(tmp_path, monkeypatch, base, bf16=True, adapter=None).upto("03_load_model")
    with pytest.raises(StageError, match="full fine-tuning can't train the 4-bit weights"):
        run("04_lora")
