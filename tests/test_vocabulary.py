"""Tokens of one's own: new rows of embedding and head train, nothing else of them does, and all scripts know them."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoTokenizer

from lib import fast
from lib.batches.sampler import Batcher
from lib.evaluation.evaluate import stops
from lib.export import merge, serving
from lib.models import model
from lib.models.plan import make_plan, on_meta
from lib.models.roles import Roles
from lib.run.errors import StageError
from lib.text import vocabulary
from lib.text.chat import Encoder
from lib.training.loss import forward_loss
from tests.runner import Run, colour_rows, text_rows
from tests.test_families import difference, find
from tests.test_save import prove_here

CPU = torch.device("cpu")
GIVEN = {"tokens": ["<left>", "<right>"], "special_tokens": {"additional_special_tokens": ["<mark>"]}}
TRAINED = {"max_steps": 3, "save_steps": 3, "learning_rate": 1e-2}


def with_words(rows):
    """Rows of a data file, in which two of the new tokens stand."""
    for number, row in enumerate(rows):
        row["messages"][0]["content"][-1]["text"] += " <left> or <right>?"
        row["messages"][1]["content"] += f" <{('left', 'right')[number % 2]}>"
    return rows


class Case:
    """A finished training with new tokens: its plan, its processor, its adapter's new rows."""

    def __init__(self, folder, monkeypatch, base, rows, upto="05_train", **knobs):
        self.run = Run(folder, monkeypatch, base, with_words(rows), **TRAINED | GIVEN | knobs).upto(upto)
        self.plan = self.run.json("03_load_model/model.json")
        self.encoder = Encoder.load(self.run.path / "02_data/processor")
        self.adapter = self.run.path / "05_train/adapter"

    def rows(self, stem):
        """{embedding or head: the new rows [R, D]} as an adapter holds them."""
        found = load_file(self.run.path / stem / "adapter/adapter_model.safetensors")
        return {name.split(".")[-3]: tensor for name, tensor in found.items() if "tokens_delta" in name}

    def batch(self):
        """A batch of two training samples."""
        import datasets
        records = datasets.load_from_disk(self.run.path / "02_data/train")
        with contextlib.chdir(self.run.folder):
            rows = [self.encoder(records[n]) for n in (0, 1)]
        return Batcher(self.encoder.pad_id, self.encoder.collate)(rows)


@pytest.fixture(scope="module", params=["untied", "tied, in 4 bits"])
def case(request, tmp_path_factory, zoo):
    """LLaVA with its head apart, packed and with kept features; Llama whose head is its embedding, in 4 bits."""
    folder = tmp_path_factory.mktemp("vocabulary")
    with pytest.MonkeyPatch.context() as monkeypatch:
        if request.param == "untied":
            made = Case(folder, monkeypatch, zoo("llava"), colour_rows(), merge=True, answer_rows=0, golden_rows=1,
                        sample_packing=True, sequence_len=200, cache_vision_features=True)
            prove_here(made.run, monkeypatch)
            return made
        return Case(folder, monkeypatch, zoo("llama_text"), text_rows(), adapter="qlora", bf16=True)


def test_each_new_word_is_one_token_with_a_row_of_its_own(case):
    tokenizer, rows = vocabulary.tokenizer_of(case.encoder.processor), case.plan["new_rows"]
    ids = tokenizer("<left><right><mark>", add_special_tokens=False)["input_ids"]
    assert sorted(ids) == rows and len(rows) == 3 and case.plan["grown_to"] == rows[-1] + 1
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "<left><right>"     # words, and a mark


def test_new_rows_begin_as_the_mean_and_they_alone_train(case):
    before, after = case.rows("04_lora"), case.rows("05_train")
    assert before.keys() == after.keys() == ({"embed_tokens"} if case.plan["tied_head"] else {"embed_tokens", "lm_head"})
    net = model.load(case.plan, CPU, mode="reference")
    for name, found in before.items():
        layer = net.get_input_embeddings() if name == "embed_tokens" else net.get_output_embeddings()
        old = layer.weight[:case.plan["new_rows"][0]].float()
        assert all(torch.allclose(row, old.mean(0), atol=2**-8 * float(old.abs().max())) for row in found)
    assert not any(torch.equal(after[name], before[name]) for name in before)
    facts = case.run.json("04_lora/adapter.json")
    width = net.get_input_embeddings().weight.shape[1]
    assert facts["new_rows"] == 3
    assert {role: n for role, n in facts["trained_parameters"].items() if role != "language"} == dict.fromkeys(
        ("embedding",) if case.plan["tied_head"] else ("embedding", "head"), 3 * width)
    weights = load_file(case.run.path / "05_train/checkpoints/step-3/weights.safetensors")
    assert sum("trainable_tokens_delta" in name for name in weights) == len(before)


def test_a_tied_head_says_new_tokens_by_the_rows_that_the_embedding_reads(case):
    net = model.load(case.plan, CPU, "inference", case.adapter)
    rows, ids = case.rows("05_train"), case.plan["new_rows"]
    hidden = torch.randn(2, rows["embed_tokens"].shape[1]).to(net.dtype)
    with torch.no_grad():
        said = net.get_output_embeddings()(hidden)[:, ids]
        read = net.get_input_embeddings()(torch.tensor(ids))
    assert torch.equal(read, rows["embed_tokens"].to(net.dtype))
    of_head = rows["embed_tokens" if case.plan["tied_head"] else "lm_head"].to(net.dtype)
    assert difference(said.float(), (hidden @ of_head.T).float()) < 1e-2


def step(net, batch):
    """(loss, {name: gradient of new rows}) of one forward and backward."""
    net.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=net.dtype == torch.bfloat16):
        loss, _ = forward_loss(net, batch)
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in net.named_parameters() if "tokens_delta" in name}


def test_the_fast_path_computes_what_peft_does(case):
    net, batch = model.load(case.plan, CPU, "train", case.adapter), case.batch()
    loss, gradients = step(net, batch)
    with fast.paths(net, Roles.of_plan(case.plan)):
        layers = [module for module in net.modules() if "forward" in vars(module)]
        assert sum("Tokens" in type(layer).__name__ for layer in layers) == 2      # embedding and head
        other, others = step(net, batch)
    assert other == pytest.approx(loss, rel=1e-2 if net.dtype == torch.bfloat16 else 1e-5)
    for name, gradient in gradients.items():
        assert bool(gradient.any()) and difference(others[name], gradient) < (5e-2 if case.plan["quantisation"] else 1e-4)


def test_the_fast_path_scales_new_rows_where_the_embedding_does(tmp_path_factory):
    subject = find("gemma3", tmp_path_factory)
    knobs = subject.knobs(tokens=["<left>"])
    plan = make_plan(knobs)
    net, _ = model.new_adapter(plan, knobs)
    vocabulary.add_tokens(subject.processor, knobs)
    batch = subject.batch(subject.rows((1, "What is <left>?", "a red fox")))
    assert plan["new_rows"][0] in batch["input_ids"]
    loss, gradients = step(net.train(), batch)
    with fast.paths(net, Roles.of_plan(plan)):
        other, others = step(net, batch)
    assert other == pytest.approx(loss, rel=1e-5) and len(gradients) == 1
    assert all(difference(others[name], gradient) < 1e-4 for name, gradient in gradients.items())


def test_the_merged_model_has_the_new_rows_and_needs_no_peft(case, tmp_path):
    merged = case.run.path / "06_save/merged"
    if not merged.exists():
        merged = tmp_path / "merged"
        merge.write_merged(case.plan, case.adapter, merged, "0.05MB")                # and in several files
    cls = getattr(transformers, case.plan["class"])
    net = cls.from_pretrained(merged, dtype=getattr(torch, case.plan["dtype"])).eval()
    assert net.config.get_text_config().vocab_size == case.plan["grown_to"] == len(net.get_output_embeddings().weight)
    for name, layer in (("embed_tokens", net.get_input_embeddings()), ("lm_head", net.get_output_embeddings())):
        rows = case.rows("05_train")["embed_tokens" if case.plan["tied_head"] else name]
        assert torch.equal(layer.weight[case.plan["new_rows"]], rows.to(net.dtype))
    whole = model.load(case.plan | {"quantisation": None}, CPU, "inference", case.adapter)
    ids = torch.tensor([[5, 6, *case.plan["new_rows"], 7]])
    with torch.no_grad():
        ours, theirs = (each(input_ids=ids).logits.float() for each in (net, whole))
    assert difference(ours, theirs) < (5e-2 if net.dtype == torch.bfloat16 else 1e-4)


def test_a_fresh_process_answers_as_training_did(case):
    if case.plan["quantisation"] is None:
        exports = case.run.json("06_save/check.json")["exports"]
        assert all(found["max_logit_difference"] < 1e-4 * found["max_logit"] for found in exports.values())


def test_the_card_says_how_many_rows_the_base_needs(case):
    text = serving.loading("adapter", SimpleNamespace(plan=case.plan, config={"max_new_tokens": 4}))
    line = f"model.resize_token_embeddings({case.plan['grown_to']}, mean_resizing=False)"
    assert text.index(line) < text.index("PeftModel.from_pretrained(model")


def test_an_adapter_with_new_tokens_is_trained_further(case):
    knobs = SimpleNamespace(**case.run.json("01_config/config.json") | {"lora_model_dir": str(case.adapter)})
    net, _ = model.new_adapter(case.plan, knobs)
    again = {name.split(".")[-4]: p.detach() for name, p in net.named_parameters() if "tokens_delta" in name}
    assert all(torch.equal(again[name], rows) for name, rows in case.rows("05_train").items())
    with pytest.raises(StageError, match="tokens_delta is .*, base_model takes none"):
        model.new_adapter(case.plan | {"new_rows": [], "grown_to": None}, knobs)


# ---- without an adapter, and what can't be ----

def test_full_fine_tuning_exports_a_model_with_more_tokens(tmp_path, monkeypatch, zoo):
    case = Case(tmp_path, monkeypatch, zoo("llava"), colour_rows(), adapter=None, train_roles=["embedding", "head"])
    net = model.load(case.plan | {"base_model": str(case.run.path / "05_train/model")}, CPU)
    base = model.load(case.plan, CPU)
    assert len(net.get_input_embeddings().weight) == case.plan["grown_to"] == net.config.text_config.vocab_size
    new = case.plan["new_rows"]
    assert not torch.equal(net.get_output_embeddings().weight[new], base.get_output_embeddings().weight[new])


def test_tokens_that_the_tokenizer_has_make_no_row(tmp_path_factory):
    subject = find("llava", tmp_path_factory)
    known = subject.processor.tokenizer.convert_ids_to_tokens(5)
    plan = make_plan(subject.knobs(tokens=[known], special_tokens={"pad_token": "</s>"}))
    assert plan["new_rows"] == [] and plan["grown_to"] is None
    assert plan == subject.plan


def test_rows_that_an_embedding_has_to_spare_train_without_growing(tmp_path_factory):
    subject = find("llava", tmp_path_factory)
    net = on_meta(subject.plan)
    with torch.device("meta"):
        net.resize_token_embeddings(len(net.get_input_embeddings().weight) + 10, mean_resizing=False)
    rows = vocabulary.new_rows(net, subject.knobs(tokens=["<left>"]))
    assert len(rows) == 1 and vocabulary.grow(net, rows) is None


REFUSED = {
    "a model whose head has fewer rows": ("mllama", {}, "Mllama takes no new token: its head has fewer rows than …"),
    "a model whose layers have embeddings, too": ("gemma4_e2b", {}, "Gemma-4 takes no new token: its layers have …"),
    "LoRA on the head": ("llava", {"lora_target_roles": ["language", "head"]}, "lm_head can't have LoRA, since its rows …"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_new_tokens_that_could_not_be_learnt_are_refused(name, tmp_path_factory):
    family, changes, what = REFUSED[name]
    knobs = find(family, tmp_path_factory).knobs(tokens=["<left>"], **changes)
    with pytest.raises(StageError, match=what.removesuffix("…")):
        model.new_adapter(make_plan(knobs), knobs)


def test_an_answer_ends_at_a_recipes_own_eos_too(tmp_path_factory):
    subject = find("llama_text", tmp_path_factory)
    own, tokenizer = subject.base.generation_config.eos_token_id, AutoTokenizer.from_pretrained(subject.folder)
    vocabulary.add_tokens(tokenizer, subject.knobs(special_tokens={"eos_token": "<end>"}))
    assert tokenizer.eos_token == "<end>"
    assert set(stops(subject.base, tokenizer)) == {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id}


def test_full_fine_tuning_without_the_head_leaves_no_new_row_behind(tmp_path, monkeypatch, zoo):
    with pytest.raises(StageError, match="rows of new tokens would stay as they are in embedding and head") as refusal:
        Case(tmp_path, monkeypatch, zoo("llava"), colour_rows(), adapter=None, train_roles=["language"])
    assert refusal.value.fix == 'train_roles: ["language", "embedding", "head"]'
