"""Every family, held to the same points: roles, labels, batches, LoRA, gradients, loss, checkpointing, export, own answers.

One tiny checkpoint per family, built and loaded once. What is expected stands here by hand, per family; nothing is asked of the
code that is tested.
"""
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
from safetensors import safe_open

from lib import chat, loss, model, processor, registry, roles
from lib.sampler import Batcher
from lib.stage import StageError
from lib.template import Template
from tests import zoo

NAMES = [name for name in zoo.NAMES if name != "voxtral"]          # sounds are not read yet
SEEING = [name for name in NAMES if name not in zoo.TEXT_ONLY]

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
    "qwen3_5": QWEN3_5, "qwen3_5_moe": QWEN3_5,
    "mistral4": dict.fromkeys(("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", *MLP), 2),
    "glm4v": GLM, "glm46v": GLM, "glm4v_moe": dict.fromkeys(ATTENTION, 2),
    "lfm2_vl": dict.fromkeys(("w1", "w2", "w3", "out_proj"), 4) | dict.fromkeys(("in_proj", "q_proj", "k_proj", "v_proj"), 2),
}

# What is trained of the replies "a red fox" and "no", to the last character.
REPLIES = {
    "llama_text": "{}<|eot_id|>", "llava": " {}</s>", "mllama": "{}<|eot_id|>", "llama4": "{}<|eot|>",
    "gemma3_text": "{}<end_of_turn>", "gemma3": "{}<end_of_turn>", "gemma3n": "{}<end_of_turn>",
    "gemma4_e2b": "{}<turn|>", "gemma4_moe": "{}<turn|>", "smolvlm2": " {}<end_of_utterance>",
    "pixtral": "{}</s>", "mistral3": "{}</s>", "mistral4": "{}</s>", "magistral": "{}</s>", "paddleocr_vl": "{}</s>",
    "qwen3_5": "\n</think>\n\n{}<|im_end|>", "qwen3_5_moe": "\n</think>\n\n{}<|im_end|>", "glm4v": "{}<|user|>",
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


@dataclass
class Subject:
    """A family's tiny checkpoint, planned, loaded and with its encoder."""
    name: str
    folder: Path

    def knobs(self, **changes):
        """The recipe's knobs that planning and LoRA read."""
        defaults = dict(base_model=str(self.folder), revision=None, trust_remote_code=False, model_type=None, bf16=False,
                        attn_implementation="sdpa", load_in_4bit=False, load_in_8bit=False, bnb_config_kwargs={},
                        lora_target_modules=None, lora_target_roles=["language"], lora_r=2, lora_alpha=4,
                        lora_dropout=0.0, peft_use_dora=False, peft_use_rslora=False, peft_init_lora_weights=True, seed=1)
        return SimpleNamespace(**defaults | changes)

    @cached_property
    def plan(self):
        return model.make_plan(self.knobs())

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
        """Messages from (number of pictures, question, answer) turns."""
        messages = []
        for pictures, question, answer in turns:
            count = pictures if self.name in SEEING else 0
            messages.append({"role": "user", "content": [*({"type": "image"} for _ in range(count)), text(question)]})
            messages.append({"role": "assistant", "content": [text(answer)]})
        return messages

    def rows(self, *turns):
        """The encoded samples of a conversation."""
        samples = self.template.conversations(self.conversation(*turns))
        token = getattr(self.processor, "image_token", None)
        return [self.encoder.encode(s.text, s.spans, [picture(n) for n in range(s.text.count(token) if token else 0)])
                for s in samples]

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
        model.save_adapter(peft_model, folder)
        loaded = model.load(self.plan, torch.device("cpu"))
        return model.attach(loaded, folder), folder


SUBJECTS: dict[str, Subject] = {}


@pytest.fixture(params=NAMES)
def subject(request, tmp_path_factory):
    return find(request.param, tmp_path_factory)


@pytest.fixture(params=SEEING)
def seeing(request, tmp_path_factory):
    return find(request.param, tmp_path_factory)


def find(name, tmp_path_factory):
    if name == "gemma3n":
        pytest.importorskip("timm", reason="Gemma-3n's tower needs timm")
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
    assert all(subject.roles.of(name) in roles.ROLES for name, _ in subject.base.named_parameters())
    expected = {"language", "embedding"} | ({"vision", "projector"} if subject.name in SEEING else set())
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
    if seeing.name == "glm4v_moe":          # peft would move its targets; nothing trains elsewhere in silence
        with pytest.raises(StageError, match="peft adapts other layers than asked"):
            model.new_adapter(seeing.plan, seeing.knobs(lora_target_roles=["vision", "projector"]))
        return
    _, hits = model.new_adapter(seeing.plan, seeing.knobs(lora_target_roles=["vision", "projector"]))
    # Gemma-3n's tower convolves, and Gemma-3's projector is a bare matrix: neither has a linear layer.
    assert set(hits) == {"gemma3n": {"projector"}, "gemma3": {"vision"}}.get(seeing.name, {"vision", "projector"})


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
    with watched_tower(net, seeing.roles) as runs:
        again_loss, again = step(seeing, net, rows)
    assert again_loss == pytest.approx(plain_loss, rel=1e-5)
    assert plain.keys() == again.keys()
    assert all(difference(again[name], plain[name]) < 1e-3 for name in plain)
    assert runs and max(Counter(name for name, _ in runs).values()) == 1, "a frozen tower ran more than once"
    assert not any(has_graph for _, has_graph in runs), "a frozen tower built a graph"


class watched_tower:
    """Records (module, whether its output has a graph) for each forward of the tower's own layers."""

    def __init__(self, net, roles):
        self.layers = {name: module for name, module in net.named_modules()
                       if roles.of(model.base_name(name)) == "vision" and name.rsplit(".", 1)[-1].isdigit()
                       and name.rsplit(".", 2)[-2] in ("layers", "layer", "blocks")}

    def __enter__(self):
        runs = []

        def record(name):
            def hook(module, given, result):
                first = result[0] if isinstance(result, tuple) else result
                runs.append((name, first.requires_grad))
            return hook
        self.handles = [module.register_forward_hook(record(name)) for name, module in self.layers.items()]
        if not self.layers:
            runs.append(("no layers to watch: a convolutional tower", False))
        return runs

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()


# ------------------------------------------------------------------------------------------------ j. export

def test_plain_peft_reads_the_adapter_and_merging_keeps_names_and_logits(subject, tmp_path):
    import transformers
    from peft import PeftModel

    from lib import merge
    net, folder = subject.adapter(tmp_path)
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
    assert tensor_names(tmp_path / "merged") == tensor_names(subject.folder)


def tensor_names(folder):
    names = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    return names


def test_the_saved_processor_makes_identical_tensors(subject, tmp_path):
    subject.encoder.save(tmp_path)
    again = chat.Encoder.load(tmp_path)
    messages = subject.conversation((1, "What is it?", "a red fox"))
    (sample,) = subject.template.conversations(messages)
    pictures = [picture(0)] if subject.name in SEEING else []
    ours, theirs = (e.encode(sample.text, sample.spans, pictures) for e in (subject.encoder, again))
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
    prompt, pictures = sample.text[:reply], [picture(0)] if subject.name in SEEING else []
    asked = subject.encoder.encode(prompt, [(sample.spans[0][0], reply)], pictures)
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
