"""The generic record: what tests/classified.json says of every model type that transformers' table lists."""
import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import transformers

from lib import logits, loss, trainable
from lib.stage import StageError
from tests import classify, tiny
from tests.test_families import SEEING

FILED = json.loads(classify.FILE.read_text(encoding="utf-8"))
TYPES = FILED["types"]
COUNTS = Counter(entry["verdict"] for entry in TYPES.values())
VERDICTS = {"passes", "refused", "can't be built tiny", "stops"}
ZOO = ["tests/test_families.py"]
same_version = pytest.mark.skipif(
    FILED["transformers"] != transformers.__version__,
    reason=f"tests/classified.json is of transformers {FILED['transformers']}: run python -m tests.classify")


@same_version
def test_every_type_of_the_table_is_classified_and_no_other():
    assert set(TYPES) == set(tiny.MODELS)


def test_none_fails_and_at_least_forty_pass():
    assert set(COUNTS) <= VERDICTS
    assert COUNTS["passes"] >= 40


def test_what_passes_held_every_check_and_what_doesnt_has_a_reason():
    every = [check.__name__ for check in classify.CHECKS]
    for model_type, entry in TYPES.items():
        if entry["verdict"] == "passes":
            assert entry["checks"] in (every, ZOO), model_type
            assert entry["roles"]["language"] > 0, model_type
        else:
            assert entry["reason"], model_type


def test_the_types_of_the_zoo_are_its_variants():
    named = [entry["reason"].split()[4:] for entry in TYPES.values() if entry["checks"] == ZOO]
    assert sorted(sum(named, [])) == sorted(set(SEEING) - {"voxtral"})   # it hears: another table


@same_version
@pytest.mark.parametrize("model_type", ["idefics3", "qwen2_5_omni_thinker", "lighton_ocr", "mistral4", "blip",
                                        "idefics2", "muse_glimmer", "t5gemma2"])
def test_a_type_tried_again_gets_the_same_entry(model_type, tmp_path):
    assert classify.classify(model_type, tmp_path) == TYPES[model_type]


def test_the_readme_counts_what_the_file_holds():
    readme = " ".join((classify.FILE.parent.parent / "README.md").read_text(encoding="utf-8").split())
    assert classify.sentence(FILED) in readme


# ---- refusals that the classification asked for ----

def model_that(config, source_class):
    with torch.device("meta"):
        return source_class._from_config(config)


SIZES = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
             vocab_size=32, tie_word_embeddings=False)


@pytest.mark.parametrize("name, options", [
    ("Granite", {"logits_scaling": 8}), ("Granite", {"logits_scaling": 1.0}), ("Cohere2", {"logit_scale": 0.0625}),
    ("HyperCLOVAX", {"logits_scaling": 0.3}), ("Gemma2", {"final_logit_softcapping": 0.5, "head_dim": 8})])
def test_what_a_model_makes_of_its_logits_its_loss_does_too(name, options):
    config = getattr(transformers, f"{name}Config")(**SIZES, **options, pad_token_id=0)
    torch.manual_seed(0)
    net = getattr(transformers, f"{name}ForCausalLM")(config)
    net.lm_head.weight.data = torch.randn_like(net.lm_head.weight)
    trainable.refuse_other_losses(net)
    ids = torch.arange(12).view(2, 6)
    positions, targets = loss.supervised_positions(ids)
    hidden = net.model.embed_tokens.weight
    own = net(input_ids=ids, labels=ids, use_cache=False).loss * 10
    (wanted,) = torch.autograd.grad(own, hidden)
    for trains in (True, False):
        net.lm_head.weight = torch.nn.Parameter(net.lm_head.weight.detach().clone(), trains)
        found, _ = loss.forward_loss(net, {"input_ids": ids, "positions": positions, "targets": targets})
        torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.autograd.grad(found, hidden)[0], wanted, rtol=1e-4, atol=1e-6)


def test_a_model_that_does_something_else_to_its_logits_is_refused(monkeypatch):
    net = model_that(transformers.LlamaConfig(**SIZES), transformers.LlamaForCausalLM)

    def forward(self, labels=None):
        logits = self.lm_head(0)
        logits = logits ** self.config.power
        return logits
    monkeypatch.setattr(type(net), "forward", forward)
    logits.source.cache_clear()
    with pytest.raises(StageError, match=r"changes its logits .*\(logits \*\* self\.config\.power\)"):
        trainable.refuse_other_losses(net)
    logits.source.cache_clear()


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Qwen3", "Mistral", "GPTNeoX", "Phi3"])
def test_usual_text_models_are_not_refused(name):
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                 vocab_size=32, tie_word_embeddings=False)
    config = getattr(transformers, f"{name}Config")(**sizes, pad_token_id=0)
    trainable.refuse_other_losses(model_that(config, getattr(transformers, f"{name}ForCausalLM")))


def test_an_encoder_decoder_is_refused():
    with pytest.raises(StageError, match="t5 is an encoder-decoder"):
        trainable.refuse_other_objectives(SimpleNamespace(is_encoder_decoder=True, model_type="t5"))
