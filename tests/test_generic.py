"""The generic record: what tests/classified.json says of every model type that transformers' table lists."""
import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers

from lib import registry
from lib.collator import supervised_positions
from lib.data.counting import TokenCounter
from lib.models import trainable
from lib.run.errors import StageError
from lib.text.chat import Encoder
from lib.text.processor import load_processor, tokenizer_of
from lib.text.template import Template
from lib.training import logits, loss
from tests import classify, tiny
from tests.runner import Run, colour_rows, text_rows
from tests.test_families import SEEING, picture, text
from tests.tiny import END
from tests.zoo.checkpoint import Parts, write
from tests.zoo.vocabulary import gpt_like, sentencepiece

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
                                        "idefics2", "muse_glimmer", "t5gemma2", "qwen3_omni_moe_thinker",
                                        "qianfan_ocr"])
def test_a_type_tried_again_gets_the_same_entry(model_type, tmp_path):
    assert classify.classify(model_type, tmp_path) == TYPES[model_type]


def test_the_readme_counts_what_the_file_holds():
    readme = " ".join((classify.FILE.parent.parent / "README.md").read_text(encoding="utf-8").split())
    assert classify.sentence(FILED) in readme


def test_rows_that_change_one_another_in_a_batch_stop_a_training(tmp_path, monkeypatch):
    """HunYuan-VL numbers the pictures of a batch, not of a row."""
    base = write(tiny.parts("hunyuan_vl", picture(0), {}), tmp_path / "base", seed=0, dtype="float32")
    run = Run(tmp_path, monkeypatch, base, colour_rows(4), val_set_size=0, micro_batch_size=2, bf16=False, max_steps=1)
    run.upto("04_lora")
    with pytest.raises(StageError, match="micro_batch_size: rows of one batch change one another") as caught:
        run("05_train")
    assert caught.value.fix == "micro_batch_size: 1"
    run.upto("05_train", caught.value.fix.replace(": ", "="))
    assert len([row for row in run.metrics() if "loss" in row]) == 1


def fast_vlm() -> Parts:
    """FastVLM, whose tower has batch norms."""
    tokenizer = gpt_like(last=("<|user|>", "<|assistant|>", END, "<s>", "<pad>", "<image>"), bos_token="<s>",
                         eos_token=END, pad_token="<pad>", extra_special_tokens={"image_token": "<image>"})
    template = tiny.TEMPLATE.replace("IMAGE", "<image>")
    size = {"height": 64, "width": 64}
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size=size, do_center_crop=False, crop_size=size), tokenizer, patch_size=32,
        vision_feature_select_strategy="full", chat_template=template, num_additional_image_tokens=0)
    text = transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")})
    tower = dict(model_type="timm_wrapper", architecture="fastvit_t8", do_pooling=True, global_pool="avg",
                 hidden_size=768, model_args={"inference_mode": True})
    config = transformers.FastVlmConfig(text_config=text, vision_config=tower, image_seq_length=4,
                                        image_token_index=tokenizer.convert_tokens_to_ids("<image>"))
    return Parts(config, processor, (END,), tokenizer=tokenizer)


def test_a_tower_with_batch_norms_is_read_as_it_is_however_samples_are_cut(tmp_path, monkeypatch):
    base, losses = write(fast_vlm(), tmp_path / "base", seed=0, dtype="float32"), []
    for micro in (1, 4):
        folder = tmp_path / str(micro)
        folder.mkdir()
        run = Run(folder, monkeypatch, base, colour_rows(), num_epochs=2, micro_batch_size=micro, bf16=False,
                  gradient_accumulation_steps=4 // micro, val_set_size=1, golden_rows=1)
        losses.append(run.upto("05_train").losses())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    run("06_save")
    assert run.json("06_save/check.json")["max_logit_difference"] < 1e-3


def test_packing_is_tried_on_rows_with_pictures(tmp_path, monkeypatch):
    """Molmo2 numbers the pictures of a row, not of a sample; rows of texts show nothing of it."""
    base = write(tiny.parts("molmo2", picture(0), {}), tmp_path / "base", seed=0, dtype="float32")
    run = Run(tmp_path, monkeypatch, base, text_rows(9) + colour_rows(6), sample_packing=True, sequence_len=200,
              val_set_size=0, bf16=False).upto("04_lora")
    with pytest.raises(StageError, match="sample_packing: samples of a packed row see one another"):
        run("05_train")


def test_a_processor_that_opens_every_text_itself_is_heard(tmp_path):
    """Molmo2's templates write no first token, and its processor does."""
    tried = classify.Try("molmo2", write(tiny.parts("molmo2", picture(0), {}), tmp_path, seed=0, dtype="float32"))
    assert tried.template.opening == "<s>"
    (row,) = tried.rows((1, "What is it?", "a red fox"))
    text = f"<|user|>{tried.processor.image_token}\nWhat is it?<|end|><|assistant|>"
    plain = tried.processor(text=[text], images=[picture(0)])["input_ids"]
    assert row["input_ids"][0, :len(plain[0])].tolist() == list(plain[0])


def test_an_adapter_that_peft_does_not_read_whole_is_refused_when_it_is_attached(tmp_path):
    """transformers renames Mistral-Large-4's shared experts on reading, although an adapter's have their new names."""
    folder = write(tiny.parts("mistral_large4", picture(0), {}), tmp_path / "base", seed=0, dtype="float32")
    with pytest.raises(StageError, match=r"peft doesn't read 6 tensors of .*MistralLarge4.*shared_experts"):
        classify.Try("mistral_large4", folder).adapter(tmp_path)


def idefics2(tokenizer, folder):
    """(the encoder, the template) of an Idefics2Processor around a tokenizer, with Idefics2's own turns."""
    own = transformers.Idefics2Processor(tiny.small_pictures(transformers.Idefics2ImageProcessor), tokenizer, 4)
    own.chat_template = (
        "{% for m in messages %}{{ m.role.capitalize() }}:{% for part in m.content %}"
        "{{ '<image>' if part.type == 'image' else ' ' + part.text }}{% endfor %}<end_of_utterance>\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}")
    own.save_pretrained(folder)
    encoder = Encoder.of(load_processor(folder), registry.family_of("idefics2"))
    return encoder, Template(encoder.processor, ("<end_of_utterance>",))


@pytest.mark.parametrize("vocabulary", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("asked", ["What is it?", "<image"])
def test_what_a_processor_wrote_without_saying_so_is_read_off_its_tokens(vocabulary, asked, tmp_path):
    """Idefics2's writes five times as many tokens as it has, and joins those of pictures side by side."""
    tokenizer = tiny.tokenizer_for(transformers.Idefics2Processor, [])
    if vocabulary == "sentencepiece":
        words, merges = sentencepiece(("<unk>", "<s>", "</s>"))
        named = {"image_token": "<image>", "image_boundary_token": "<fake_token_around_image>"}
        tokenizer = transformers.LlamaTokenizer(vocab=words, merges=merges, add_bos_token=True, pad_token="</s>",
                                                extra_special_tokens=named)
    encoder, template = idefics2(tokenizer, tmp_path)
    ask = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, text(asked), {"type": "image"}]},
           {"role": "assistant", "content": [text("a red fox")]},
           {"role": "user", "content": [text(asked)]}, {"role": "assistant", "content": [text("no")]}]
    (sample,) = template.conversations(ask)
    row = encoder.encode(sample.text, sample.spans, [picture(n) for n in range(3)])
    trained = [i for i in row["labels"][0].tolist() if i != -100]
    decoded = tokenizer_of(encoder.processor).decode(trained)
    assert decoded.replace(" ", "") == "aredfox<end_of_utterance>no<end_of_utterance>"
    own = encoder.processor(text=[sample.text], images=[picture(n) for n in range(3)], return_tensors="pt")
    assert row["input_ids"].tolist() == own["input_ids"].tolist()


def test_what_was_read_off_one_text_is_not_counted_in_another(tmp_path):
    """Behind a picture Idefics2's processor writes a space where a word follows, and none before a line's end."""
    encoder, template = idefics2(tiny.tokenizer_for(transformers.Idefics2Processor, []), tmp_path)
    counter = TokenCounter(encoder)
    for asked in ("\nWhat?", "What?", "\nWhat?"):
        answer = {"role": "assistant", "content": [text("no")]}
        (sample,) = template.conversations([{"role": "user", "content": [{"type": "image"}, text(asked)]}, answer])
        sample = replace(sample, text=sample.text.replace("<image> ", "<image>"),
                         spans=[(start - 1, end - 1) for start, end in sample.spans])
        row = encoder.encode(sample.text, sample.spans, [picture(0)])
        ids, labels = row["input_ids"][0].numpy(), row["labels"][0].numpy()
        assert counter.row(sample.text, sample.spans, [picture(0)]) == encoder.counts(ids, labels)
        assert encoder.processor.tokenizer.decode([i for i in labels if i != -100]).strip() == "no<end_of_utterance>"


def test_what_is_no_tensor_is_refused_by_name(tmp_path):
    folder = write(tiny.parts("unlimited_ocr", picture(0), {}), tmp_path, seed=0, dtype="float32")
    with pytest.raises(StageError, match="its UnlimitedOcrProcessor makes num_local_patches a list"):
        classify.Try("unlimited_ocr", folder).rows((1, "What is it?", "a red fox"))


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
    positions, targets = supervised_positions(ids)
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


def test_a_factor_that_is_unset_and_then_skipped_is_none_to_the_loss():
    config = tiny.configuration("cohere_compass")
    for scale, factor in ((0.5, 0.5), (None, 1)):
        config.text_config.logit_scale = scale
        net = model_that(config, transformers.CohereCompassForConditionalGeneration)
        trainable.refuse_other_losses(net)
        assert logits.Finish.of(net).factor == factor


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Qwen3", "Mistral", "GPTNeoX", "Phi3"])
def test_usual_text_models_are_not_refused(name):
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                 vocab_size=32)
    config = getattr(transformers, f"{name}Config")(**sizes, pad_token_id=0)
    trainable.refuse_other_losses(model_that(config, getattr(transformers, f"{name}ForCausalLM")))


def test_an_encoder_decoder_is_refused():
    with pytest.raises(StageError, match="t5 is an encoder-decoder"):
        trainable.refuse_other_objectives(SimpleNamespace(is_encoder_decoder=True, model_type="t5"))
