"""04: LoRA is on exactly the layers asked for, is reproducible, and plain peft reads it."""

import json
import os
import re
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from lib.models import adapter, model
from lib.models.roles import Roles
from lib.models.saved import attach
from lib.run.errors import StageError
from tests import harness
from tests.harness import Bad, bad_input
from tests.runner import Run, text_rows
from tests.test_families import find

CPU = torch.device("cpu")
FAMILIES = ("llava", "qwen2_5_vl", "gemma3", "smolvlm2", "llama_text")
DECODER = dict.fromkeys(FAMILIES[:3], "model.language_model")
DECODER |= {"smolvlm2": "model.text_model", "llama_text": "model"}
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEARS = (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture
def make(tmp_path, monkeypatch, zoo):
    """A function: family and knobs -> the run, whose 04_lora is finished."""
    def make(name="llava", upto="04_lora", **knobs):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        rows = text_rows() if name.endswith("_text") else None
        return Run(folder, monkeypatch, zoo(name), rows, **knobs).upto(upto)
    return make


def tensors(run):
    """The tensors of 04's adapter."""
    return load_file(run.path / "04_lora/adapter/adapter_model.safetensors")


def hits(run):
    """Names of the layers that 04's adapter has tensors for."""
    found = re.findall(r"base_model\.model\.(\S+)\.lora_A\.weight", "\n".join(tensors(run)))
    return sorted(found)


def plain(run, name, zoo):
    """The base, as transformers loads it for anybody."""
    import transformers
    cls = getattr(transformers, run.json("03_load_model/model.json")["class"])
    return cls.from_pretrained(zoo(name), dtype=torch.float32).eval()


# ---- which layers ----

@pytest.mark.parametrize("name", FAMILIES)
def test_by_default_lora_and_its_regex_are_on_every_linear_layer_of_the_decoder_alone(name, make, zoo):
    run = make(name)
    expected = sorted(f"{DECODER[name]}.layers.{layer}.{linear}" for layer in (0, 1) for linear in LINEARS)
    assert hits(run) == expected
    facts = run.json("04_lora/adapter.json")
    assert facts["modules"] == {"language": 14}
    assert facts["trained_parameters"] == {"language": sum(t.numel() for t in tensors(run).values())}
    regex = json.loads((run.path / "04_lora/adapter/adapter_config.json").read_text())["target_modules"]
    assert sorted(n for n, _ in plain(run, name, zoo).named_modules() if re.fullmatch(regex, n)) == expected
    assert len(regex) < 200


@pytest.mark.parametrize("asked, expected", [
    (r".*language_model.*\.q_proj", {"language": 2}),
    (r"model\.language_model\.layers\.1\..*", {"language": 7}),
    (r".*\.(q_proj|fc1)", {"language": 2, "vision": 2}),
    (["q_proj", "v_proj"], {"language": 4, "vision": 2}),
    (["linear_1"], {"projector": 1}),
])
def test_a_regex_or_a_list_of_last_names_chooses_the_layers(asked, expected, make):
    run = make(lora_target_modules=asked)
    assert run.json("04_lora/adapter.json")["modules"] == expected
    if asked == r"model\.language_model\.layers\.1\..*":
        assert hits(run) == sorted(f"model.language_model.layers.1.{linear}" for linear in LINEARS)


@pytest.mark.parametrize("roles, expected", [
    (["vision"], {"vision": 6}), (["projector"], {"projector": 2}), (["head"], {"head": 1}),
    (["language", "vision", "projector", "head"], {"language": 14, "vision": 6, "projector": 2, "head": 1})])
def test_roles_choose_the_layers(roles, expected, make):
    assert make(lora_target_roles=roles).json("04_lora/adapter.json")["modules"] == expected


def test_layers_that_no_forward_reaches_are_left_out_with_a_count(make, capsys):
    run = make(lora_target_modules=["q_proj"])  # of two vision layers, LLaVA reads the first
    in_tower = [name for name in hits(run) if "vision" in name]
    assert in_tower == ["model.vision_tower.encoder.layers.0.self_attn.q_proj"]
    assert "left out: 1 layers that no forward reaches" in capsys.readouterr().out


def test_a_regex_that_hits_the_tower_alone_gets_a_warning_with_the_count(make, capsys):
    make(lora_target_modules=r".*vision.*\.fc1")
    assert "the adapter is on vision (1) alone: the language model stays as it is" in capsys.readouterr().out
    make()
    assert "warning" not in capsys.readouterr().out.replace("warning: max_steps", "")


def test_a_role_without_linear_layers_among_others_gets_a_warning(make, capsys):
    run = make("gemma3", lora_target_roles=["language", "projector"])  # its projector is a bare parameter
    assert run.json("04_lora/adapter.json")["modules"] == {"language": 14}
    assert "lora_target_roles: no linear layer in projector" in capsys.readouterr().out


def test_a_regex_that_cant_be_short_is_still_exact():
    among = [f"tower.layers.{n}.{leaf}" for n in range(3) for leaf in ("q", "k")]
    assert adapter.as_regex(among, among) == r"tower\.layers\.\d+\.(q|k)"
    some = [name for name in among if ".2." not in name]
    regex = adapter.as_regex(some, among)
    assert [name for name in among if re.fullmatch(regex, name)] == some


NOTHING = (
    Bad("a regex that matches nothing", ["lora_target_modules=.*nothing"],
        "lora_target_modules: '.*nothing' matches no layer of LlavaForConditionalGeneration",
        "leave it out, or write names like model.language_model.layers.0.self_attn.q_proj"),
    Bad("a regex that matches norms alone", ["lora_target_modules=.*layernorm"],
        "lora_target_modules: '.*layernorm' matches no layer of …", "leave it out, or write names like …"),
    Bad("a list that matches nothing", ["lora_target_modules=[wq, wk]"],
        "lora_target_modules: ['wq', 'wk'] matches no layer of …", "leave it out, or write names like …"),
    Bad("a role without linear layers", ["lora_target_roles=[audio]"],
        "lora_target_roles: no linear layer in audio",
        "choose among embedding, head, language, projector, vision"),
    Bad("experts by name where there are none", ["lora_target_parameters=experts.down_proj"],
        "lora_target_parameters: LLaVA-1.5 and Pixtral: this checkpoint has no experts in 3-D parameters",
        "leave it out"),
    Bad("experts by role where there are none", ["lora_target_roles=[language, experts]"],
        "lora_target_roles: LLaVA-1.5 and Pixtral: this checkpoint has no experts in 3-D parameters",
        "leave experts out"),
    Bad("full fine-tuning of a role that isn't there", ["adapter=", "train_roles=[audio, router]"],
        "train_roles: LlavaForConditionalGeneration has no audio, router",
        "choose among vision, projector, embedding, language, head"),
)


@bad_input(NOTHING)
def test_nothing_to_train_is_refused_in_two_lines(case, tmp_path, monkeypatch, zoo):
    Run(tmp_path, monkeypatch, zoo("llava")).upto("03_load_model", *case.argv)
    harness.check(Bad(case.name, ["run"], case.what, case.fix), "04_lora", tmp_path,
                  may_write=["run/04_lora.partial/*"])


def test_layers_that_peft_would_swap_for_others_are_refused(make):
    assert make("glm4v_moe", lora_target_modules=["q_proj"]).json("04_lora/adapter.json")["modules"]
    with pytest.raises(StageError, match="peft adapts other layers than asked"):
        make("glm4v_moe", lora_target_modules=["gate_proj", "up_proj", "down_proj"])
    with pytest.raises(StageError, match="peft refuses: Cannot convert .* gate_proj without also targeting up_proj"):
        make("glm4v_moe", lora_target_modules=["gate_proj"])


# ---- what the adapter is ----

def test_plain_peft_reads_the_new_adapter_and_it_changes_nothing_yet(make, zoo):
    run = make()
    base = plain(run, "llava", zoo)
    ids = torch.arange(5, 15)[None]                                # [1, T]
    with torch.no_grad():
        before = base(input_ids=ids).logits
        after = PeftModel.from_pretrained(base, run.path / "04_lora/adapter")(input_ids=ids).logits
    assert torch.equal(before, after)


def test_a_seed_gives_the_same_bytes_and_another_seed_others(make):
    one, two, other = (make(seed=seed).path / "04_lora/adapter" for seed in (1, 1, 2))
    weights, config = "adapter_model.safetensors", "adapter_config.json"
    assert (one / config).read_bytes() == (two / config).read_bytes() == (other / config).read_bytes()
    assert (one / weights).read_bytes() == (two / weights).read_bytes() != (other / weights).read_bytes()


def test_what_is_made_without_the_weights_is_what_peft_makes_with_them(make, zoo):
    from peft import LoraConfig, get_peft_model
    run = make(seed=7)
    config = LoraConfig(r=4, lora_alpha=32, target_modules=run.json("04_lora/adapter.json")["targets"])
    ours, theirs = tensors(run), get_peft_model(plain(run, "llava", zoo), config).state_dict()
    theirs = {name.replace(".default", ""): tensor for name, tensor in theirs.items() if "lora_" in name}
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape and tensor.dtype == torch.float32
        assert bool(tensor.any()) == ("lora_A" in name)
        assert tensor.std() == pytest.approx(float(theirs[name].std()), rel=0.3)


def test_gaussian_initialisation_has_its_own_spread(make):
    made = tensors(make(peft_init_lora_weights="gaussian"))
    spread = [float(tensor.std()) for name, tensor in made.items() if "lora_A" in name]
    assert sum(spread) / len(spread) == pytest.approx(1 / 4, rel=0.1)  # peft's deviation is 1 / r


def test_doras_magnitudes_are_the_norms_of_the_bases_weights(make, zoo):
    run = make(peft_use_dora=True)
    base = plain(run, "llava", zoo).state_dict()
    magnitudes = {name: tensor for name, tensor in tensors(run).items() if "magnitude" in name}
    assert len(magnitudes) == 14
    for name, tensor in magnitudes.items():
        weight = base[name.removeprefix("base_model.model.").replace("lora_magnitude_vector", "weight")]
        assert torch.allclose(tensor, weight.norm(dim=1), rtol=1e-5)


@pytest.mark.parametrize("knobs, method", [
    ({}, "LoRA"), ({"peft_use_rslora": True}, "rsLoRA"), ({"peft_use_dora": True}, "DoRA")])
def test_each_method_trains_and_says_its_name(knobs, method, make):
    run = make(upto="05_train", max_steps=3, **knobs)
    assert run.json("04_lora/adapter.json")["method"] == f"{method} r=4 alpha=32"
    before, after = tensors(run), load_file(run.path / "05_train/adapter/adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_an_adapter_tells_no_path(make, tmp_path):
    text = (make().path / "04_lora/adapter/adapter_config.json").read_text(encoding="utf-8")
    assert json.loads(text)["base_model_name_or_path"] == "llava"
    assert str(tmp_path.parent) not in text


def test_a_missing_adapter_tensor_is_an_error_and_not_a_random_one(make):
    run = make()
    path = run.path / "04_lora/adapter/adapter_model.safetensors"
    kept = tensors(run)
    gone = sorted(kept)[0]
    del kept[gone]
    save_file(kept, path)
    with pytest.raises(StageError, match=f"1 tensors don't fit the model, such as {re.escape(gone)}"):
        attach(model.load(run.json("03_load_model/model.json"), CPU), path.parent)


@pytest.mark.parametrize("knobs, name", [
    ({"lora_target_roles": ["language", "head"]}, "lm_head"),
    ({"lora_target_modules": ["q_proj", "embed_tokens"]}, "model.embed_tokens")])
def test_lora_on_one_of_two_that_share_a_weight_is_refused(knobs, name, make):
    with pytest.raises(StageError, match=f"{name} shares its weight, head and embedding of Gemma3ForCausalLM"):
        make("gemma3_text", **knobs)


# ---- trained further ----

@pytest.fixture
def planned_llava(tmp_path_factory):
    """A function: knobs -> (plan, knobs) for LLaVA."""
    subject = find("llava", tmp_path_factory)
    return lambda **changes: (subject.plan, subject.knobs(**changes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, zoo):
    """The adapter of a finished training on LLaVA: r=4 on the layers that read, of the language model."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run = Run(folder, monkeypatch, zoo("llava"), max_steps=2, lora_target_modules=["q_proj", "v_proj"],
                  lora_alpha=8, learning_rate=1e-2)
        return run.upto("05_train").path / "05_train/adapter"


def test_an_adapter_is_trained_further_as_it_is_whatever_the_recipe_says(trained, make, capsys):
    run = make(upto="05_train", lora_model_dir=str(trained), lora_r=16, peft_use_rslora=True, max_steps=2)
    facts, before = run.json("04_lora/adapter.json"), load_file(trained / "adapter_model.safetensors")
    assert facts["method"] == "LoRA r=4 alpha=8" and facts["modules"] == {"language": 4, "vision": 2}
    assert ("is trained further, on its own targets, lora_r 4 (the recipe: 16), lora_alpha 8 (the recipe: 32), "
            "peft_use_rslora False (the recipe: True)") in " ".join(capsys.readouterr().out.split())
    start, after = tensors(run), load_file(run.path / "05_train/adapter/adapter_model.safetensors")
    assert all(torch.equal(start[name], before[name]) for name in before) and start.keys() == before.keys()
    assert not any(torch.equal(after[name], before[name]) for name in before)
    assert str(trained / "adapter_model.safetensors") in run.json("04_lora/stage.json")["reads"]["outside"]


def like(weights=lambda tensors: tensors, **config):
    """An adapter that differs from a good one in some tensors or keys of its configuration."""
    def write(path, good):
        shutil.copytree(good, path, dirs_exist_ok=True)
        known = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        (path / "adapter_config.json").write_text(json.dumps(known | config), encoding="utf-8")
        save_file(weights(load_file(path / "adapter_model.safetensors")), path / "adapter_model.safetensors")
    return write


def renamed(tensors):
    return {name.replace("language_model", "text_model"): tensor for name, tensor in tensors.items()}


def widened(tensors):
    return {name: torch.zeros(4, 96) if name.endswith("lora_A.weight") else t for name, t in tensors.items()}


def one_less(tensors):
    return {name: tensors[name] for name in sorted(tensors)[1:]}


FIRST = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
ELSE = "name the base_model that it was trained on, and its tokens if it has any"
MISFITS = {
    "an adapter of a model with other layers": (
        like(renamed), "an adapter of another model: LlavaForConditionalGeneration has no layer for "
        "base_model.model.model.text_model.layers.0.self_attn.q_proj.lora_A.weight",
        f"{ELSE}; other versions of transformers may have named its layers otherwise"),
    "an adapter of a wider model": (
        like(widened), f"an adapter of another model: {FIRST} is [4, 96], base_model takes [4, 64]", ELSE),
    "an adapter without one of its tensors": (
        like(one_less), f"an adapter of another model: {FIRST} is none, base_model takes [4, 64]", ELSE),
    "an adapter of another rank than it says": (
        like(r=2), f"an adapter of another model: {FIRST} is [4, 64], base_model takes [2, 64]", ELSE),
    "an adapter that isn't LoRA": (like(peft_type="IA3"), "is of the kind …IA3", "name a LoRA adapter"),
    "an adapter whose configuration is damaged": (
        lambda path, good: like()(path, good) or (path / "adapter_config.json").write_text("{"),
        "is damaged: …", "copy it there again"),
    "an adapter whose weights are cut short": (
        lambda path, good: like()(path, good) or os.truncate(path / "adapter_model.safetensors", 200),
        "is damaged: …", "copy it there again"),
    "an adapter with whole modules": (
        like(modules_to_save=["lm_head"]), "has modules_to_save, which isn't trained here",
        "name an adapter without it"),
    "an adapter with biases": (
        like(bias="all"), "has bias, which isn't trained here", "name an adapter without it"),
    "an adapter that began as part of the base's weights": (
        like(init_lora_weights="pissa"), "has init_lora_weights: pissa, which isn't trained here",
        "name an adapter without it"),
    "an adapter with ranks of their own": (
        like(rank_pattern={"q_proj": 8}), "has rank_pattern, which isn't trained here",
        "name an adapter without it"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_an_adapter_that_doesnt_fit_is_refused_by_its_first_misfit(name, trained, tmp_path, planned_llava):
    write, what, fix = MISFITS[name]
    write(tmp_path / "old", trained)
    with pytest.raises(StageError) as refusal:
        model.new_adapter(*planned_llava(lora_model_dir=str(tmp_path / "old")))
    what = f"lora_model_dir: {tmp_path / 'old'} {'is ' * what.startswith('an ')}{what}"
    harness.assert_two_lines(refusal.value.what, refusal.value.fix, Bad(name, [], what, fix))


# ---- full fine-tuning ----

@pytest.mark.parametrize("knobs, expected", [
    ({}, {"language", "embedding", "head", "vision", "projector"}),
    ({"train_roles": ["projector"]}, {"projector"}),
    ({"freeze_mm_modules": True}, {"language", "embedding", "head"}),
])
def test_full_fine_tuning_trains_the_named_roles(knobs, expected, make):
    run = make(upto="05_train", adapter=None, max_steps=2, **knobs)
    planned, facts = run.json("03_load_model/model.json"), run.json("04_lora/adapter.json")
    assert set(facts["trained_parameters"]) == expected
    roles, base = Roles.of_plan(planned), model.load(planned, CPU)
    tuned = model.load(planned | {"base_model": str(run.path / "05_train/model")}, CPU)
    pairs = zip(base.named_parameters(), tuned.parameters())
    assert {roles.of(name) for (name, before), after in pairs if not torch.equal(before, after)} == expected


def test_named_parameters_of_the_wanted_roles_train_in_bf16_and_what_serves_is_what_was_trained(make):
    named = ["model.language_model.layers.1.mlp.down", "^model.multi_modal_projector", "lm_head"]
    run = make(upto="06_save", adapter=None, bf16=True, max_steps=2, train_roles=["language", "projector"],
               unfrozen_parameters=named)
    facts = run.json("04_lora/adapter.json")
    assert facts["modules"] == {"language": 1, "projector": 2}                 # the head is of no wanted role
    masters = load_file(run.path / "05_train/checkpoints/step-2/weights.safetensors")
    assert len(masters) == 5 and {tensor.dtype for tensor in masters.values()} == {torch.float32}
    assert run.json("06_save/check.json")["exports"]["model"]["max_logit_difference"] == 0
    with pytest.raises(StageError, match="unfrozen_parameters: none that trains is named so in Llava"):
        make(adapter=None, train_roles=["language"], unfrozen_parameters=["lm_head"])


def test_every_regex_of_unfrozen_parameters_has_to_name_something(make):
    with pytest.raises(StageError, match=r"unfrozen_parameters: Llava\S+ has no parameter named 'layers.1.mlp'"):
        make(adapter=None, unfrozen_parameters=["lm_head", "layers.1.mlp"])    # names begin with model.


def test_a_dot_in_a_named_parameter_is_a_dot():
    roles = Roles({"model": "language"})
    assert model.trains("model.layers.1.mlp", roles, ["all"], ["model.layers.1."])
    assert not model.trains("model.layers.12.mlp", roles, ["all"], ["model.layers.1."])
    assert model.trains("model.layers.12.mlp", roles, ["language"], [r"model\.layers.*mlp$"])
    assert not model.trains("model.layers.12.mlp", roles, ["vision"], ["model"])


def test_a_head_that_is_the_embedding_cant_train_alone(make):
    with pytest.raises(StageError, match="is its embedding, one tensor"):
        make("gemma3", adapter=None, train_roles=["head"])
    run = make("gemma3", adapter=None, train_roles=["head", "embedding"])
    assert set(run.json("04_lora/adapter.json")["modules"]) == {"embedding"}
