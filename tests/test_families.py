"""Every family, held to the same points: roles, labels, batches, LoRA, gradients, loss, checkpointing, export, own answers.

One tiny checkpoint per family, built and loaded once. What is expected stands here by hand, per family; nothing is asked of the
code that is tested.
"""
import contextlib
import dataclasses
import importlib
import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lib import registry
from lib.batches.sampler import Batcher
from lib.models import adapter, model, roles
from lib.models.plan import make_plan
from lib.models.saved import attach, save_adapter
from lib.run.errors import StageError
from lib.text import chat, processor
from lib.text.template import Template
from lib.training import loss
from tests import zoo

NAMES = list(zoo.NAMES)
SEEING = [name for name in NAMES if name not in zoo.TEXT_ONLY]      # or hearing: voxtral takes sounds, no pictures

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
LLAMA = dict.fromkeys(ATTENTION + MLP, 2)
LINEAR_ATTENTION = dict.fromkeys(("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"), 3)
QWEN3_5 = dict.fromkeys(ATTENTION, 1) | LINEAR_ATTENTION | dict.fromkeys(MLP, 4)
GLM = dict.fromkeys((*ATTENTION, "gate_up_proj", "down_proj"), 2)

# The linear layers of the language model that LoRA adapts by default, counted by their last name.
LORA = {
    "mllama": dict.fromkeys(ATTENTION + MLP, 3),
    "llama4": dict.fromkeys(ATTENTION + MLP, 4),
    "gemma3n": dict.fromkeys(("q_proj", "o_proj", *MLP, "linear_left", "linear_right", "per_layer_input_gate",
                              "per_layer_projection"), 4) | {"k_proj": 2, "v_proj": 2},
    "gemma4_e2b": dict.fromkeys(("q_proj", "o_proj", *MLP, "per_layer_input_gate", "per_layer_projection"), 4)
    | {"k_proj": 2, "v_proj": 2},
    "gemma4_moe": LLAMA | {"v_proj": 1},
    "qwen3_vl_moe": dict.fromkeys(ATTENTION, 2),
    "qwen3_5": QWEN3_5, "qwen3_5_moe": QWEN3_5, "minicpmv": QWEN3_5,
    "mistral4": dict.fromkeys(("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", *MLP), 2),
    "glm4v": GLM, "glm46v": GLM, "glm4v_moe": dict.fromkeys(ATTENTION, 2),
    "lfm2_vl": dict.fromkeys(("w1", "w2", "w3", "out_proj"), 4) | dict.fromkeys(("in_proj", "q_proj", "k_proj", "v_proj"), 2),
}

# The 3-D parameters of the experts: where they lie, and in which layers.
EXPERTS = {
    "llama4": ("language_model.model.layers.{}.feed_forward.experts", (0, 1, 2, 3)),
    "gemma4_moe": ("model.language_model.layers.{}.experts", (0, 1)),
    "qwen3_vl_moe": ("model.language_model.layers.{}.mlp.experts", (0, 1)),
    "qwen3_5_moe": ("model.language_model.layers.{}.mlp.experts", (0, 1, 2, 3)),
    "mistral4": ("model.language_model.layers.{}.mlp.experts", (0, 1)),
    "glm4v_moe": ("model.language_model.layers.{}.mlp.experts", (1,)),
}

# What is trained of the replies "a red fox" and "no", to the last character.
REPLIES = {
    "llama_text": "{}<|eot_id|>", "llava": " {}</s>", "mllama": "{}<|eot_id|>", "llama4": "{}<|eot|>",
    "gemma3_text": "{}<end_of_turn>", "gemma3": "{}<end_of_turn>", "gemma3n": "{}<end_of_turn>",
    "gemma4_e2b": "{}<turn|>", "gemma4_moe": "{}<turn|>", "smolvlm2": " {}<end_of_utterance>",
    "pixtral": "{}</s>", "mistral3": "{}</s>", "mistral4": "{}</s>", "magistral": "{}</s>", "voxtral": "{}</s>", "paddleocr_vl": "{}</s>",
    "paligemma": "{}<eos>", "qwen3_5": "\n</think>\n\n{}<|im_end|>", "qwen3_5_moe": "\n</think>\n\n{}<|im_end|>", "glm4v": "{}<|user|>",
    "glm46v": "\n<think></think>\n{}<|user|>", "glm4v_moe": "\n<think></think>\n{}<|user|>",
}
REPLIES |= dict.fromkeys([name for name in NAMES if name not in REPLIES], "{}<|im_end|>")


def text(words):
    return {"type": "text", "text": words}


def picture(seed):
    """A picture with content, so that features differ: a gradient from a seeded colour."""
    image = Image.new("RGB", (44, 32), (40 + 60 * seed % 200, 90, 200 - 50 * seed % 150))
    image.paste((250, 240 - 70 * seed % 200, 30), (4 + 5 * seed % 20, 6, 20 + 5 * seed % 20, 26))
    return image


def sound(seed):
    """A second of a tone in noise, other ones for other seeds."""
    tone = 0.4 * torch.sin(torch.arange(16_000) * (0.1 + 0.05 * seed))
    return (tone + 0.05 * torch.randn(16_000, generator=torch.Generator().manual_seed(seed))).numpy()


@dataclass
class Subject:
    """A family's tiny checkpoint, planned, loaded and with its encoder."""
    name: str
    folder: Path

    @property
    def kind(self):
        """What its rows hold, of all kinds that it takes."""
        return "audio" if self.name == "voxtral" else "image"

    @property
    def tower(self):
        return {"audio": "audio", "image": "vision"}[self.kind]

    def media(self, count):
        return [{"audio": sound, "image": picture}[self.kind](n) for n in range(count)]

    def knobs(self, **changes):
        """The recipe's knobs that planning and LoRA read."""
        defaults = dict(base_model=str(self.folder), revision=None, trust_remote_code=False, model_type=None, bf16=False,
                        fp16=False, attn_implementation="sdpa", overrides_of_model_config={}, sequence_len=2048,
                        load_in_4bit=False, load_in_8bit=False, bnb_config_kwargs={},
                        lora_target_modules=None, lora_target_roles=["language"], lora_r=2, lora_alpha=4,
                        lora_target_parameters=None, quantize_roles=["language"],
                        lora_dropout=0.0, lora_model_dir=None, tokens=[], special_tokens={}, peft_use_dora=False, peft_use_rslora=False, peft_init_lora_weights=True, seed=1)
        return SimpleNamespace(**defaults | changes)

    @cached_property
    def plan(self):
        return make_plan(self.knobs())

    @cached_property
    def roles(self):
        return roles.Roles.of_plan(self.plan)

    @cached_property
    def family(self):
        return registry.family_of(self.plan["model_type"])

    @cached_property
    def base(self):
        return model.load(self.plan, torch.device("cpu"), mode="inference")

    @cached_property
    def processor(self):
        return processor.complete(processor.load_processor(self.folder), self.family)

    @cached_property
    def encoder(self):
        return chat.Encoder.of(self.processor, self.family)

    @cached_property
    def template(self):
        return Template(self.processor, processor.stop_tokens(self.folder, self.processor))

    def conversation(self, *turns):
        """Messages from (number of media, question, answer) turns."""
        messages = []
        for pictures, question, answer in turns:
            count = max(pictures, self.family.prefix) if self.name in SEEING else 0     # PaliGemma takes no text alone
            messages.append({"role": "user", "content": [*({"type": self.kind} for _ in range(count)), text(question)]})
            messages.append({"role": "assistant", "content": [text(answer)]})
        return messages

    def rows(self, *turns):
        """The encoded samples of a conversation."""
        samples = self.template.conversations(self.conversation(*turns))
        token = getattr(self.processor, f"{self.kind}_token", None)
        return [self.encoder.encode(s.text, s.spans, self.media(s.text.count(token) if token else 0)) for s in samples]

    def batch(self, rows):
        return Batcher(self.encoder.pad_id, self.encoder.collate)(rows)

    def trained_text(self, row):
        ids = [i for i in row["labels"][0].tolist() if i != -100]
        return processor.tokenizer_of(self.processor).decode(ids, skip_special_tokens=False)

    def adapter(self, tmp_path, **changes):
        """(the model with a fresh adapter whose B matrices are not zero, the adapter's folder)."""
        peft_model, _ = model.new_adapter(self.plan, self.knobs(**changes))
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.trained_parameters(peft_model).items():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
        folder = tmp_path / "adapter"
        save_adapter(peft_model, folder)
        loaded = model.load(self.plan, torch.device("cpu"))
        return attach(loaded, folder), folder


NEEDS = {"gemma3n": "timm", "voxtral": "mistral_common", "smolvlm2": "num2words"}
SUBJECTS: dict[str, Subject] = {}


@pytest.fixture(params=NAMES)
def subject(request, tmp_path_factory):
    return find(request.param, tmp_path_factory)


@pytest.fixture(params=SEEING)
def seeing(request, tmp_path_factory):
    return find(request.param, tmp_path_factory)


def find(name, tmp_path_factory):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{name} needs {NEEDS[name]}")
    if name not in SUBJECTS:
        SUBJECTS[name] = Subject(name, zoo.build(name, tmp_path_factory.mktemp(name) / name))
    return SUBJECTS[name]


def inputs(batch):
    return {key: value for key, value in batch.items() if key not in ("labels", "positions", "targets")}


def difference(a, b):
    return float((a - b).abs().max() / b.abs().max())


# ------------------------------------------------------------------------------------------------ a. roles

def test_a_record_gives_every_parameter_a_role(subject):
    assert subject.plan["roles_guessed"] == (subject.name in zoo.TEXT_ONLY)
    known = importlib.import_module("01_config").Role.__args__
    assert all(subject.roles.of(name) in known for name, _ in subject.base.named_parameters())
    expected = {"language", "embedding"} | ({subject.tower, "projector"} if subject.name in SEEING else set())
    assert expected <= set(subject.plan["parameters"])


def test_the_loaded_class_is_the_checkpoints_own(subject):
    written = json.loads((subject.folder / "config.json").read_text(encoding="utf-8"))
    assert type(subject.base).__name__ == subject.plan["class"] == written["architectures"][0]


def test_without_its_record_a_family_gets_the_same_language_model(subject, monkeypatch):
    monkeypatch.setattr(registry, "FAMILIES", ())
    guessed = roles.roles_of(subject.base, registry.family_of(subject.plan["model_type"]))
    for name, _ in subject.base.named_parameters():
        assert (guessed.of(name) == "language") == (subject.roles.of(name) == "language"), name


# ------------------------------------------------------------------------------------------------ b. labels

def test_only_the_reply_and_the_end_of_its_turn_are_trained(subject):
    (row,) = subject.rows((1, "What is it?", "a red fox"))
    assert subject.trained_text(row).strip(" ") == REPLIES[subject.name].format("a red fox").strip(" ")


def test_several_turns_are_trained_each_once(subject):
    rows = subject.rows((2, "Two?", "a red fox"), (1, "and now", "no"))
    wanted = [REPLIES[subject.name].format("a red fox"), REPLIES[subject.name].format("no")]
    assert sum(int((row["labels"] != -100).sum()) for row in rows) > 0
    assert "".join(subject.trained_text(row) for row in rows).replace(" ", "") in (
        "".join(wanted).replace(" ", ""), "".join(wanted[::-1]).replace(" ", ""))


def test_no_media_token_is_ever_trained(seeing):
    for row in seeing.rows((2, "Two?", "yes"), (1, "and now", "no")):
        trained = set(row["labels"][0].tolist())
        media = {i for kind in ("image", "video", "audio") for i in getattr(seeing.processor, f"{kind}_token_ids", [])}
        assert not trained & media


def test_the_prompt_is_what_inference_would_see(subject):
    messages = subject.conversation((1, "What is it?", "a red fox"))
    (sample,) = subject.template.conversations(messages)
    prompt = subject.template.render(messages[:-1], prompt=True)
    start = sample.spans[0][0]
    assert sample.text[:start] == prompt or subject.name in ("gemma4_moe", "pixtral")


# ------------------------------------------------------------------------------------------------ c. batches

def test_batched_logits_equal_single_ones_in_any_order(subject):
    rows = [*subject.rows((1, "What is it?", "a red fox")), *subject.rows((0, "Hi", "Hello")),
            *subject.rows((2, "Two here?", "yes"))]
    if subject.family.batch == "alike":
        rows = [*subject.rows((2, "Look", "one")), *subject.rows((2, "Two pictures here?", "yes"))]
    with torch.no_grad():
        single = [subject.base(**inputs(subject.batch([row]))).logits[0] for row in rows]
        for order in (range(len(rows)), range(len(rows))[::-1]):
            logits = subject.base(**inputs(subject.batch([rows[n] for n in order]))).logits
            for place, n in enumerate(order):
                assert difference(logits[place, :single[n].shape[0]], single[n]) < 1e-4


# ------------------------------------------------------------------------------------------------ d. LoRA

def test_lora_is_on_exactly_the_language_models_linear_layers(subject):
    names = roles.lora_linears(subject.base, subject.roles, subject.family, ("language",))
    assert Counter(name.rsplit(".", 1)[-1] for name in names) == LORA.get(subject.name, LLAMA)
    assert {subject.roles.of(name) for name in names} <= {"language", "cross_attention"}


def test_lora_of_the_tower_is_on_the_tower(seeing):
    _, hits = model.new_adapter(seeing.plan, seeing.knobs(lora_target_roles=[seeing.tower, "projector"]))
    # Gemma-3n's tower convolves, and Gemma-3's projector is a bare matrix: neither has a linear layer.
    assert set(hits) == {"gemma3n": {"projector"}, "gemma3": {"vision"}}.get(seeing.name, {seeing.tower, "projector"})


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("asked", [{"lora_target_roles": ["language", "experts"]}, {"lora_target_roles": ["experts"]},
                                   {"lora_target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}])
def test_lora_of_the_experts_is_on_every_expert_and_nothing_else(name, asked, tmp_path_factory):
    subject = find(name, tmp_path_factory)
    path, layers = EXPERTS[name]
    expected = [f"{path.format(n)}.{kind}_proj" for n in layers for kind in ("gate_up", "down")]
    assert subject.family.expert_lora == ""
    peft_model, hits = model.new_adapter(subject.plan, subject.knobs(**asked))
    assert sorted(hits.pop("experts")) == sorted(expected)
    linears = Counter(name.rsplit(".", 1)[-1] for names in hits.values() for name in names)
    assert linears == (LORA[name] if asked.get("lora_target_roles") != ["experts"] else {})
    assert adapter.adapted_experts(peft_model) == 4 * len(layers)
    assert peft_model.peft_config["default"].target_parameters == ["experts.down_proj", "experts.gate_up_proj"]


def test_one_of_the_experts_matrices_can_be_named(tmp_path_factory):
    subject = find("qwen3_vl_moe", tmp_path_factory)
    one = "model.language_model.layers.1.mlp.experts.down_proj"
    _, hits = model.new_adapter(subject.plan, subject.knobs(lora_target_parameters=[one]))
    assert hits["experts"] == [one]


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma4_e2b", "qwen_text"])
@pytest.mark.parametrize("asked", [{"lora_target_roles": ["language", "experts"]}, {"lora_target_parameters": ["experts.down_proj"]}])
def test_experts_that_arent_there_are_refused(name, asked, tmp_path_factory):
    subject = find(name, tmp_path_factory)
    with pytest.raises(StageError, match=f"{next(iter(asked))}: .*: this checkpoint has no experts"):
        model.new_adapter(subject.plan, subject.knobs(**asked))


def test_a_name_that_matches_no_expert_is_refused_with_the_names_there_are(tmp_path_factory):
    subject = find("llama4", tmp_path_factory)
    with pytest.raises(StageError, match="'mlp.experts.down_proj' matches no experts") as refusal:
        model.new_adapter(subject.plan, subject.knobs(lora_target_parameters=["mlp.experts.down_proj"]))
    assert refusal.value.fix == "write experts.down_proj, experts.gate_up_proj"


def test_a_record_can_refuse_lora_on_experts(tmp_path_factory, monkeypatch):
    subject = find("llama4", tmp_path_factory)
    refusing = dataclasses.replace(subject.family, expert_lora="for a reason")
    monkeypatch.setattr(registry, "FAMILIES", (refusing,))
    with pytest.raises(StageError, match="Llama-4: for a reason"):
        model.new_adapter(subject.plan, subject.knobs(lora_target_roles=["experts"]))


# ------------------------------------------------------------------------------------- e. f. g. gradients and loss

def step(subject, net, rows):
    """Gradients by name after one forward and backward of the chunked loss."""
    net.zero_grad(set_to_none=True)
    total, _ = loss.forward_loss(net, subject.batch(rows))
    total.backward()
    return float(total.detach()), {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def test_every_trainable_tensor_gets_a_gradient_and_no_other(subject, tmp_path):
    net, _ = subject.adapter(tmp_path)
    _, gradients = step(subject, net, subject.rows((1, "What is it?", "a red fox")))
    trained = set(model.trained_parameters(net))
    assert trained == set(gradients)
    assert all(bool(gradient.any()) for gradient in gradients.values())


def test_chunked_loss_and_gradients_equal_the_models_own(subject, tmp_path):
    net, _ = subject.adapter(tmp_path)
    rows = [*subject.rows((1, "What is it?", "a red fox")), *subject.rows((1, "And here, what is it?", "no"))]
    found, gradients = step(subject, net, rows)
    net.zero_grad(set_to_none=True)
    batch = subject.batch(rows)
    logits = net(**inputs(batch), use_cache=False).logits[:, :-1].float()
    own = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum")
    own.backward()
    assert found == pytest.approx(float(own.detach()), rel=1e-5)
    for name, parameter in net.named_parameters():
        if parameter.grad is not None:
            assert difference(gradients[name], parameter.grad) < 1e-3, name


def test_gradient_checkpointing_changes_nothing_and_leaves_the_frozen_tower_alone(seeing, tmp_path):
    net, _ = seeing.adapter(tmp_path)
    rows = seeing.rows((1, "What is it?", "a red fox"))
    plain_loss, plain = step(seeing, net.train(), rows)
    assert model.checkpoint_trained_layers(net, seeing.roles, {"language"}) > 0
    with torch.no_grad(), tower_calls(net, seeing.roles) as once:
        net(**inputs(seeing.batch(rows)), use_cache=False)
    with tower_calls(net, seeing.roles) as calls:
        again_loss, again = step(seeing, net, rows)
    assert again_loss == pytest.approx(plain_loss, rel=1e-5)
    assert plain.keys() == again.keys()
    assert all(difference(again[name], plain[name]) < 1e-3 for name in plain)
    assert len(once) >= 4 and Counter(name for name, _ in calls) == Counter(name for name, _ in once)
    assert not any(has_graph for _, has_graph in calls), "a frozen tower built a graph"


def test_the_last_layers_keep_their_activations_and_offloaded_inputs_change_nothing(tmp_path, tmp_path_factory):
    subject = find("llava", tmp_path_factory)
    net, _ = subject.adapter(tmp_path)
    rows = subject.rows((1, "What is it?", "a red fox"))
    plain_loss, plain = step(subject, net.train(), rows)
    layers = list(net.get_base_model().model.language_model.layers)
    for share, number in ((1.0, 0), (0.5, len(layers) - len(layers) // 2), (0.0, len(layers) - 1)):
        for layer in layers:
            layer.gradient_checkpointing = False
        assert model.checkpoint_trained_layers(net, subject.roles, {"language"}, share, offload=True) == number
        assert [layer.gradient_checkpointing for layer in layers] == [i < number for i in range(len(layers))]
        moved = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.autograd.graph, "save_on_cpu", lambda pin_memory: (
                torch.autograd.graph.saved_tensors_hooks(
                    lambda tensor: (moved.append(tensor.shape), tensor.clone())[1], lambda tensor: tensor)))
            loss, found = step(subject, net, rows)
        assert loss == plain_loss and all(torch.equal(found[name], plain[name]) for name in plain)
        assert len(moved) == number and all(len(shape) == 3 for shape in moved)   # inputs, and nothing else


def test_the_librarys_own_switch_would_run_a_frozen_tower_twice_with_a_graph(tmp_path, tmp_path_factory):
    subject = find("llava", tmp_path_factory)      # so the test above can fail
    net, _ = subject.adapter(tmp_path)
    net.train().gradient_checkpointing_enable({"use_reentrant": False})
    net.enable_input_require_grads()
    with tower_calls(net, subject.roles) as calls:
        step(subject, net, subject.rows((1, "What is it?", "a red fox")))
    assert max(Counter(name for name, _ in calls).values()) == 2 and any(has_graph for _, has_graph in calls)


@contextlib.contextmanager
def tower_calls(net, roles):
    """The list of (name, whether its output has a graph) of each call of a tower's linear or convolution.

    What is inside a layer is watched: recomputing in the backward pass goes around the hooks of the layer itself.
    """
    calls = []
    inner = {name: module for name, module in net.named_modules() if roles.of(name) in ("vision", "audio")
             and isinstance(module, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d))}
    handles = [module.register_forward_hook(lambda module, given, result, name=name:
                                            calls.append((name, result.requires_grad)))
               for name, module in inner.items()]
    yield calls
    for handle in handles:
        handle.remove()


def test_how_samples_are_cut_into_micro_batches_changes_no_gradient(subject, tmp_path):
    net, _ = subject.adapter(tmp_path)
    pictures = int(subject.name != "gemma3n")      # whose tower of convolutions takes a second
    turns = {"What is it?": "a red fox", "And here, what is it?": "no", "Hi": "two of them", "Which colour?": "blue"}
    rows = [row for question, answer in turns.items() for row in subject.rows((pictures, question, answer))]
    assert len(rows) == 4
    found = {}
    for size in (4, 2, 1):
        net.zero_grad(set_to_none=True)
        for start in range(0, 4, size):
            loss.forward_loss(net, subject.batch(rows[start:start + size]))[0].backward()
        found[size] = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    for size in (2, 1):
        assert found[size].keys() == found[4].keys()
        assert all(difference(found[size][name], found[4][name]) < 1e-3 for name in found[4])


# ------------------------------------------------------------------------------------------------ j. export

def test_plain_peft_reads_the_adapter_and_merging_keeps_names_and_logits(subject, tmp_path):
    check_export(subject, tmp_path)


@pytest.mark.parametrize("name", EXPERTS)
def test_plain_peft_reads_and_merges_trained_experts_too(name, tmp_path_factory, tmp_path):
    subject = find(name, tmp_path_factory)
    net = check_export(subject, tmp_path, lora_target_roles=["language", "experts"])
    model.checkpoint_trained_layers(net, subject.roles, {"language", "experts"})
    _, gradients = step(subject, net.train(), subject.rows((1, "What is it?", "a red fox")))
    assert set(gradients) == set(model.trained_parameters(net))
    assert all(bool(gradient.any()) for gradient in gradients.values())
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}


def check_export(subject, tmp_path, **changes):
    """The model with an adapter, after plain peft's logits and those of the merged model were equal to its own."""
    import transformers
    from peft import PeftModel

    from lib.export import merge
    from lib.models import shards
    net, folder = subject.adapter(tmp_path, **changes)
    batch = inputs(subject.batch(subject.rows((1, "What is it?", "a red fox"))))
    with torch.no_grad():
        ours = net.eval()(**batch, use_cache=False).logits
        cls = getattr(transformers, subject.plan["class"])
        attention = subject.plan["attn_implementation"]
        plain = PeftModel.from_pretrained(cls.from_pretrained(subject.folder, dtype=torch.float32,
                                                              attn_implementation=attention), folder).eval()
        assert difference(plain(**batch, use_cache=False).logits, ours) < 1e-6
        merge.write_merged(subject.plan, folder, tmp_path / "merged")
        merged = cls.from_pretrained(tmp_path / "merged", dtype=torch.float32, attn_implementation=attention).eval()
        assert difference(merged(**batch, use_cache=False).logits, ours) < 1e-4
    ours, theirs = (shards.places(path / "model.safetensors") for path in (tmp_path / "merged", subject.folder))
    kinds = [{name: (place.dtype, place.shape) for name, place in found.items()} for found in (ours, theirs)]
    assert kinds[0] == kinds[1]
    assert (tmp_path / "merged/config.json").read_bytes() == (subject.folder / "config.json").read_bytes()
    return net


def test_the_saved_processor_makes_identical_tensors(subject, tmp_path):
    subject.encoder.save(tmp_path)
    again = chat.Encoder.load(tmp_path)
    messages = subject.conversation((1, "What is it?", "a red fox"))
    (sample,) = subject.template.conversations(messages)
    media = subject.media(subject.name in SEEING)
    ours, theirs = (e.encode(sample.text, sample.spans, media) for e in (subject.encoder, again))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


# ------------------------------------------------------------------------------------------------ k. self-answer

def plain_letters(tokenizer):
    """Ids of single letters that never merge with each other, so that text and ids are one to one."""
    letters = {}
    for letter in "qzxjkvwygbfpmu":
        ids = tokenizer(f"a {letter}", add_special_tokens=False)["input_ids"]
        if all(len(tokenizer(f"{letter}{other}{letter}", add_special_tokens=False)["input_ids"]) ==
               len(tokenizer(letter, add_special_tokens=False)["input_ids"]) + 2 for other in [*letters, letter]):
            letters[letter] = tokenizer(f"{letter}{letter}", add_special_tokens=False)["input_ids"][-1]
        del ids
    return letters


def test_what_the_model_answers_it_predicts_again_in_training(subject):
    """Greedy answers through `generate` and its cache equal the teacher-forced argmax through our encoder and collator."""
    tokenizer = processor.tokenizer_of(subject.processor)
    letters = plain_letters(tokenizer)
    assert len(letters) >= 4
    allowed = torch.tensor(sorted(letters.values()))
    messages = subject.conversation((1, "What is it?", "reply"))
    (sample,) = subject.template.conversations(messages)
    reply = sample.text.index("reply", sample.spans[0][0])
    prompt, media = sample.text[:reply], subject.media(subject.name in SEEING)
    asked = subject.encoder.encode(prompt, [(sample.spans[0][0], reply)], media)
    asked.pop("labels")
    with torch.no_grad():
        output = subject.base.generate(**asked, max_new_tokens=6, min_new_tokens=6, do_sample=False,
                                       prefix_allowed_tokens_fn=lambda *_: allowed.tolist(),
                                       pad_token_id=subject.encoder.pad_id)
    answer = output[0, asked["input_ids"].shape[1]:].tolist()
    by_id = {i: letter for letter, i in letters.items()}
    words = "".join(by_id[i] for i in answer)
    (row,) = subject.rows((1, "What is it?", words))
    ids = row["input_ids"][0].tolist()
    start = next(n for n in range(len(ids), -1, -1) if ids[n:n + 6] == answer)
    other = subject.rows((0, "Hi", "Hello"))[0]
    rows = [row] if subject.family.batch == "alike" else [other, row]
    with torch.no_grad():
        logits = subject.base(**inputs(subject.batch(rows)), use_cache=False).logits[-1]
    scores = logits[start - 1:start + 5][:, allowed]
    best = scores.topk(2).values
    for place, wanted in enumerate(answer):
        if best[place, 0] - best[place, 1] > 1e-4:
            assert allowed[scores[place].argmax()] == wanted, f"position {place}"
