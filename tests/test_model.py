"""03: what a model is, by role, is known before it is loaded; and what is loaded is that."""

import dataclasses
import json
import os
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lib import registry
from lib.batches.sampler import Batcher
from lib.models import model, plan
from lib.models.roles import Roles
from lib.registry import auto_class
from lib.run import versions
from lib.run.errors import StageError
from lib.training.loss import forward_loss
from tests import harness
from tests.harness import Bad, bad_input
from tests.runner import Run, colour_rows, text_rows

CPU = torch.device("cpu")
FAMILIES = ("llava", "qwen2_5_vl", "gemma3", "smolvlm2", "llama_text")

# What the tensors in a checkpoint's files are, by the start of their names there.
LLAVA = {"vision_tower": "vision", "multi_modal_projector": "projector",
         "language_model.model.embed": "embedding", "language_model.model.layers": "language",
         "language_model.model.norm": "language", "language_model.lm_head": "head"}
LLAMA = {"model.embed": "embedding", "model.layers": "language", "model.norm": "language", "lm_head": "head"}
ON_DISK = {
    "llava": LLAVA, "gemma3": LLAVA, "llama_text": LLAMA,
    "qwen2_5_vl": LLAMA | {"visual.patch_embed": "vision", "visual.blocks": "vision",
                           "visual.merger": "projector"},
    "smolvlm2": {"model.text_model.embed": "embedding", "model.text_model": "language", "lm_head": "head",
                 "model.vision_model": "vision", "model.connector": "projector"},
}


def knobs(base, **changes):
    """The knobs that a plan is made of."""
    given = dict(base_model=str(base), revision=None, trust_remote_code=False, model_type=None, bf16=False,
                 fp16=False, attn_implementation="sdpa", overrides_of_model_config={}, sequence_len=2048,
                 load_in_4bit=False, load_in_8bit=False, bnb_config_kwargs={}, tokens=[], special_tokens={})
    return SimpleNamespace(**given | changes)


@pytest.fixture
def planned(zoo):
    return lambda name, **changes: plan.make_plan(knobs(zoo(name), **changes))


def counted(folder, prefixes):
    """Parameters by role in a checkpoint's files, the longest prefix deciding."""
    counts = Counter()
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():
            prefix = max((prefix for prefix in prefixes if name.startswith(prefix)), key=len)
            counts[prefixes[prefix]] += torch.Size(file.get_slice(name).get_shape()).numel()
    return counts


# ---- the plan ----

@pytest.mark.parametrize("kind, expected", [
    ("llava", "AutoModelForMultimodalLM"), ("qwen2_vl", "AutoModelForMultimodalLM"),
    ("voxtral", "AutoModelForMultimodalLM"), ("llama", "AutoModelForCausalLM"),
    ("qwen3", "AutoModelForCausalLM")])
def test_a_type_with_a_tower_never_gets_the_text_only_class(kind, expected):
    assert auto_class(kind) == expected


def test_a_recipe_may_name_the_class(planned):
    for named in ("AutoModelForImageTextToText", "LlavaForConditionalGeneration"):
        assert planned("llava", model_type=named)["class"] == "LlavaForConditionalGeneration"


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_by_role_are_those_of_the_checkpoints_files(planned, zoo, name):
    assert planned(name)["parameters"] == counted(zoo(name), ON_DISK[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_without_its_record_a_family_gets_the_same_roles_as_a_guess(planned, name, monkeypatch):
    known = planned(name)
    monkeypatch.setattr(registry, "FAMILIES", ())
    guessed = planned(name)
    assert guessed["roles_guessed"] and guessed["parameters"] == known["parameters"]
    for parameter, _ in plan.on_meta(known).named_parameters():
        assert Roles.of_plan(guessed).of(parameter) == Roles.of_plan(known).of(parameter), parameter


def test_a_plan_is_the_same_every_time_and_from_any_kernel(planned):
    assert json.dumps(planned("llava")) == json.dumps(planned("llava"))
    eager = planned("llava", attn_implementation="eager")
    assert eager.pop("attn_implementation") == "eager"
    assert eager.items() <= planned("llava").items()


def test_a_plan_allocates_nothing(planned):
    assert {p.device.type for p in plan.on_meta(planned("qwen2_5_vl")).parameters()} == {"meta"}


@pytest.mark.parametrize("bf16, dtype", [("auto", "bfloat16"), (True, "bfloat16"), (False, "float32")])
def test_the_type_of_the_weights_is_the_recipes_and_not_the_machines(planned, bf16, dtype):
    made = planned("llava", bf16=bf16)
    assert made["dtype"] == dtype
    assert model.load(made, CPU).dtype == getattr(torch, dtype)


def test_a_head_that_is_the_embedding_counts_once(planned, zoo):
    assert planned("gemma3")["tied_head"] and "head" not in planned("gemma3")["parameters"]
    assert not planned("llava")["tied_head"]


def test_the_layers_of_a_tower_that_no_forward_reaches_are_known(planned, zoo, tmp_path, monkeypatch):
    made = planned("llava")                                        # reads the last layer but one, of two
    assert made["idle"] == ["model.vision_tower.encoder.layers.1", "model.vision_tower.post_layernorm"]
    run = Run(tmp_path, monkeypatch, zoo("llava"), adapter=None).upto("05_train")
    trained = load_file(run.path / "05_train/model/model.safetensors")
    for name, tensor in load_file(zoo("llava") / "model.safetensors").items():
        idle = name.startswith(("vision_tower.encoder.layers.1.", "vision_tower.post_layernorm"))
        assert torch.equal(trained[name], tensor) == idle, name


def test_a_model_without_the_wanted_kernel_gets_eager_and_says_so(planned, monkeypatch, capsys):
    known = planned("gemma4_e2b")
    assert known["attn_implementation"]["audio_config"] == "eager"
    monkeypatch.setattr(registry, "FAMILIES", ())
    assert planned("gemma4_e2b")["attn_implementation"] == "eager"
    assert "has no sdpa attention" in capsys.readouterr().out


# ---- loading ----

@pytest.mark.parametrize("name", FAMILIES)
def test_a_loaded_model_is_frozen_and_has_the_files_weights(planned, zoo, name):
    loaded = model.load(planned(name), CPU)
    assert loaded.training and not any(p.requires_grad for p in loaded.parameters())
    with safe_open(zoo(name) / "model.safetensors", "pt") as file:
        on_disk = sum(float(file.get_tensor(key).double().sum()) for key in file.keys())
    assert sum(float(p.double().sum()) for p in loaded.parameters()) == pytest.approx(on_disk, rel=1e-9)
    assert not model.load(planned(name), CPU, mode="inference").training


def test_03_says_how_it_loaded_and_what_a_first_answer_costs(tmp_path, monkeypatch, zoo):
    run = Run(tmp_path, monkeypatch, zoo("llava")).upto("03_load_model")
    facts = run.json("03_load_model/load.json")
    assert facts["device"] == "cpu" and facts["load_seconds"] > 0 and facts["peak_memory_gib"] > 0
    assert 0.5 < facts["first_loss"] / facts["random_loss"] < 2 and facts["sample_id"].startswith("rows-")
    assert "load.json" not in run.json("03_load_model/stage.json")["wrote"]


def test_plan_only_needs_no_more_than_01(tmp_path, monkeypatch, zoo, capsys):
    run = Run(tmp_path, monkeypatch, zoo("llava")).upto("01_config")
    run("03_load_model", "--plan-only")
    assert "vision" in capsys.readouterr().out and not (run.path / "03_load_model").exists()


def test_plan_only_shows_roles_and_writes_nothing(tmp_path, monkeypatch, zoo, capsys):
    run = Run(tmp_path, monkeypatch, zoo("llava")).upto("02_data")
    before = harness.contents(tmp_path)
    run("03_load_model", "--plan-only")
    assert harness.contents(tmp_path) == before
    said = capsys.readouterr().out
    assert "model.multi_modal_projector" in said and "LlavaForConditionalGeneration" in said


def test_a_change_of_the_weights_file_runs_03_again(tmp_path, monkeypatch, zoo, capsys):
    base = shutil.copytree(zoo("llava"), tmp_path / "base")
    run = Run(tmp_path, monkeypatch, base).upto("03_load_model")
    capsys.readouterr()
    run("03_load_model")
    assert "up to date" in capsys.readouterr().out
    edit(base, lambda tensors: tensors["language_model.lm_head.weight"].mul_(2))
    run("03_load_model")
    assert "model.safetensors changed" in capsys.readouterr().out


# ---- gradient checkpointing ----

def a_step(net, batch):
    """(loss, {name: gradient}) of one forward and backward."""
    net.zero_grad(set_to_none=True)
    total, _ = forward_loss(net, batch)
    total.backward()
    return float(total.detach()), {k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None}


class Checkpointed:
    """A family's model with some roles in training, a batch, and how its attention is counted."""

    def __init__(self, name, roles, folder, monkeypatch, zoo):
        from datasets import load_from_disk

        from lib.text.chat import Encoder
        run = Run(folder, monkeypatch, zoo(name), val_set_size=0).upto("03_load_model")
        made = run.json("03_load_model/model.json")
        self.roles, self.net = Roles.of_plan(made), model.load(made, CPU)
        model.train_roles(self.net, self.roles, roles)
        encoder = Encoder.load(run.path / "02_data/processor")
        rows = [encoder(record) for record in load_from_disk(run.path / "02_data/train").select(range(2))]
        self.batch = Batcher(encoder.pad_id, encoder.collate)(rows)
        self.plain = a_step(self.net, self.batch)
        model.checkpoint_trained_layers(self.net, self.roles, set(roles))

    def step_with_counts(self):
        """(the step's loss and gradients, forwards by attention module)."""
        runs, hooks = Counter(), []
        for name, module in self.net.named_modules():
            if type(module).__name__.endswith("Attention"):  # hooks on a layer stay outside its checkpoint
                def begun(module, given, name=name):  # a forward that is run again may stop before its end
                    runs[name] += 1
                hooks.append(module.register_forward_pre_hook(begun))
        found = a_step(self.net, self.batch)
        for hook in hooks:
            hook.remove()
        return found, runs


@pytest.mark.parametrize("roles", [["vision"], ["projector"]])
def test_gradients_pass_a_frozen_language_model_by_its_checkpoints(roles, tmp_path, monkeypatch, zoo):
    subject = Checkpointed("qwen2_5_vl", roles, tmp_path, monkeypatch, zoo)
    (loss, gradients), runs = subject.step_with_counts()
    assert loss == pytest.approx(subject.plain[0], rel=1e-6)
    assert [runs[layer] for layer in sorted(runs) if subject.roles.of(layer) == "language"] == [2, 1]
    assert all(runs[layer] == 2 for layer in runs if subject.roles.of(layer) in roles)
    assert {subject.roles.of(name) for name in gradients} == set(roles)
    assert all(torch.allclose(gradients[k], g, rtol=1e-4, atol=1e-6) for k, g in subject.plain[1].items())


# ---- bad input ----

def edit(folder, change):
    """Rewrite a checkpoint's weights."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder, **changes):
    """Rewrite keys of a checkpoint's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def shard(folder, missing):
    """Two shards with an index, of which one may be missing."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[:20], "model-2.safetensors": names[20:]}
    for file, part in parts.items():
        if file != missing:
            save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


HEAD = "language_model.lm_head.weight"
DAMAGED = "the checkpoint is damaged or of another class"
AGAIN = "download or copy that file again"
MEND = "mend its config.json, or name another model; an unknown type may need a newer transformers"
DAMAGE = {
    "a weight file cut short": (lambda f: os.truncate(f / "model.safetensors", 5000),
                                "base_model: base/model.safetensors is not whole: …", AGAIN),
    "an empty weight file": (lambda f: os.truncate(f / "model.safetensors", 0),
                             "base_model: base/model.safetensors is not whole: …", AGAIN),
    "a missing shard": (lambda f: shard(f, "model-2.safetensors"),
                        "base_model: base/model-2.safetensors is missing; model.safetensors.index.json …",
                        AGAIN),
    "no weights at all": (lambda f: (f / "model.safetensors").unlink(), "base_model: base: …",
                          "see that the folder or model id holds all of its .safetensors files"),
    "a missing tensor": (lambda f: edit(f, lambda t: t.pop(HEAD)),
                         "base_model: base: 1 missing keys, such as lm_head.weight", DAMAGED),
    "a tensor of another shape": (lambda f: edit(f, lambda t: t.update({HEAD: t[HEAD][:9].clone()})),
                                  "base_model: base: 1 mismatched keys, such as …lm_head.weight…", DAMAGED),
    "a tensor that nobody reads": (lambda f: edit(f, lambda t: t.update({"odd.weight": torch.zeros(3)})),
                                   "base_model: base: 1 unexpected keys, such as odd.weight",
                                   "LlavaForConditionalGeneration may be the wrong class; if it can do …"),
    "a shard cut short": (lambda f: (shard(f, ""), os.truncate(f / "model-1.safetensors", 5000)),
                          "base_model: base/model-1.safetensors is not whole: …", AGAIN),
    "a type that nobody knows": (lambda f: configure(f, model_type="lava"),
                                 "base_model: base: no usable config (…lava…)", MEND),
    "sizes that don't fit": (lambda f: configure(f, text_config={"hidden_size": 63}),
                             "base_model: base: no usable config (…)", MEND),
    "weights quantised by AWQ": (lambda f: configure(f, quantization_config={"quant_method": "awq", "bits": 4}),
                                 "base_model: its weights are quantised by awq, which isn't trained here",
                                 "name the unquantised checkpoint; adapter: qlora makes 4 bits of it"),
    "weights quantised in an unnamed way": (
        lambda f: configure(f, quantization_config={"bits": 4}),
        "base_model: its weights are quantised by an unnamed method, which isn't trained here",
        "name the unquantised checkpoint; adapter: qlora makes 4 bits of it"),
    "an encoder-decoder": (lambda f: (f / "config.json").write_text('{"model_type": "t5"}'),
                           "base_model: t5 is an encoder-decoder",
                           "choose another base_model: this kit trains models that continue a text"),
    "a configuration that is no JSON": (lambda f: (f / "config.json").write_text('{"model_type": '),
                                        "base_model: base: no usable config (…)", MEND),
    "a configuration without a type": (lambda f: (f / "config.json").write_text("{}"),
                                       "base_model: base: no usable config (…)", MEND),
    "a model that writes nothing": (lambda f: configure(f, model_type="clip"),
                                    "base_model: transformers has no generative model for type 'clip'",
                                    "choose an image-text-to-text, audio-text-to-text or causal …"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_ends_in_two_lines_that_name_it(damage, tmp_path, monkeypatch, zoo):
    ruin, what, fix = DAMAGE[damage]
    shutil.copytree(zoo("llava"), tmp_path / "base")
    Run(tmp_path, monkeypatch, "base").upto("02_data")
    ruin(tmp_path / "base")
    monkeypatch.setattr("lib.run.decision.check_upstream", lambda run, stem: [])  # 02 would notice the config first
    harness.check(Bad(damage, ["run"], what, fix), "03_load_model", tmp_path,
                  may_write=["run/03_load_model.partial/*"])


def test_whole_shards_load(tmp_path, planned, zoo):
    base = shutil.copytree(zoo("llava"), tmp_path / "base")
    shard(base, missing=None)
    loaded = model.load(plan.make_plan(knobs(base)), CPU).state_dict()
    whole = model.load(planned("llava"), CPU).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in whole.items())


def test_a_record_may_know_of_tensors_that_nobody_reads(tmp_path, zoo, monkeypatch):
    base = shutil.copytree(zoo("llava"), tmp_path / "base")
    edit(base, lambda tensors: tensors.update({"odd.weight": torch.zeros(3)}))
    known = tuple(dataclasses.replace(family, unread=(r"odd\..*",)) for family in registry.FAMILIES)
    monkeypatch.setattr(registry, "FAMILIES", known)
    assert model.load(plan.make_plan(knobs(base)), CPU)


WRONG = (
    Bad("a class that isn't there", ["model_type=NoSuchModel"],
        "model_type: transformers … has no class 'NoSuchModel'",
        "leave model_type out (it is found by itself), or name a transformers class"),
    Bad("a class for other checkpoints", ["model_type=AutoModelForSpeechSeq2Seq"],
        "model_type: AutoModelForSpeechSeq2Seq has no model for a 'llava' checkpoint",
        "leave model_type out: it is found by itself"),
    Bad("few bits for a part that isn't there", ["adapter=qlora", "bf16=true", "quantize_roles=[audio]"],
        "quantize_roles: no linear layer in audio", "quantize_roles: [language]"),
)


@bad_input(WRONG)
def test_a_class_or_part_that_it_lacks_ends_in_two_lines(case, tmp_path, monkeypatch, zoo):
    Run(tmp_path, monkeypatch, zoo("llava")).upto("02_data", *case.argv)
    harness.check(Bad(case.name, ["run"], case.what, case.fix), "03_load_model", tmp_path,
                  may_write=["run/03_load_model.partial/*"])


def test_a_family_whose_package_is_missing_says_how_to_install_it(planned, monkeypatch):
    family = registry.family_of("smolvlm")
    monkeypatch.setitem(family.packages, "no_such_package", "no-such-package")
    with pytest.raises(StageError) as caught:
        planned("smolvlm2")
    assert caught.value.fix == "pip install no-such-package"


def test_a_text_only_model_goes_through_03(tmp_path, monkeypatch, zoo):
    run = Run(tmp_path, monkeypatch, zoo("llama_text"), text_rows()).upto("03_load_model")
    assert set(run.json("03_load_model/model.json")["parameters"]) <= {"language", "embedding", "head"}


def test_rows_with_pictures_for_a_text_only_model_are_refused_before_03(tmp_path, monkeypatch, zoo):
    run = Run(tmp_path, monkeypatch, zoo("llama_text"), colour_rows())
    with pytest.raises(StageError, match="takes none"):
        run.upto("03_load_model")


# ---- the libraries ----

def test_these_libraries_are_new_enough():
    assert versions.refuse_old() is None


@pytest.mark.parametrize("name, oldest, what", [
    ("torch", "99.1", "torch … is too old: the kit needs 99.1 or newer"),
    ("no-such-package", "1.0", "the Python package no-such-package is not installed")])
def test_a_library_that_is_old_or_missing_is_named(name, oldest, what, monkeypatch):
    monkeypatch.setattr(versions, "MINIMUM", {name: oldest})
    with pytest.raises(StageError) as caught:
        versions.refuse_old()
    harness.assert_two_lines(caught.value.what, caught.value.fix, Bad(name, [], what, versions.FIX))


def test_versions_are_compared_as_numbers():
    assert versions.parts("2.14.1+cu130") == (2, 14, 1) > versions.parts("2.9")
