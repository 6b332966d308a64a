"""01_config: what a recipe may say, what becomes of it, and how it says what is wrong."""

import contextlib
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lib import knobs, ledger
from lib.stage import ROOT, STAGES, StageError
from tests import harness
from tests.harness import Bad, bad_input

config = importlib.import_module("01_config")
KNOBS = knobs.knobs_of(config.Recipe)
GOOD = """base_model: ./base
datasets:
  - path: rows.jsonl
    type: chat_template
val_set_size: 0.1
adapter: lora
"""
OURS = {"base/config.json": "{}", "rows.jsonl": "{}\n"}


@pytest.fixture
def folder(tmp_path):
    """A folder with a base model, rows and a good recipe r.yaml, in which the test runs."""
    harness.write(tmp_path, OURS | {"r.yaml": GOOD})
    with contextlib.chdir(tmp_path):
        yield tmp_path


def resolve(text, *overrides):
    """(Recipe, given, notes) of a recipe's text."""
    return config.configure(Path("r.yaml"), text, overrides)


def resolved(text, *overrides):
    """The Recipe of a recipe's text."""
    return resolve(text, *overrides)[0]


def problems(text, *overrides):
    """[(what, fix)] of a recipe that is refused."""
    with pytest.raises(StageError) as caught:
        resolve(text, *overrides)
    lines = f"error: {caught.value.what}\n  fix: {caught.value.fix}".split("\n")
    assert all(line.startswith("error: ") for line in lines[::2]) and all(line.startswith("  fix: ") for line in lines[1::2])
    return [(what[len("error: "):], fix[len("  fix: "):]) for what, fix in zip(lines[::2], lines[1::2], strict=True)]


# ---- the schema ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KNOBS)
def test_every_knob_says_why_and_who_reads_it_and_its_default_is_allowed(name):
    kind, meta = KNOBS[name]
    assert meta["why"] and meta["stages"] and set(meta["stages"]) <= set(STAGES)
    if meta["default"] is not knobs.REQUIRED and meta["default"] is not None:
        entries, _ = config.read_overrides([f"{name}={config.written(meta['default'])}"])
        assert knobs.convert_within(entries[0].node, kind, meta | {"check": None}) == meta["default"]


def test_a_minimal_recipe_resolves_every_knob(folder):
    k = resolved("base_model: ./base\ndatasets: [{path: rows.jsonl}]\n")
    assert set(vars(k)) == set(KNOBS)
    assert k.datasets == [{"path": "rows.jsonl", "split": None, "type": "chat_template", "field_messages": None}]
    assert (k.warmup_ratio, k.warmup_steps, k.load_in_4bit, k.output_dir) == (0.03, None, False, "runs/r")
    assert (k.adapter, k.full_finetune, k.lora_target_linear, k.train_roles) == (None, True, True, ["all"])


def test_null_means_the_default_for_every_knob_that_has_one(folder):
    nulls = [f"{name}: {null}" for name, null in zip(KNOBS, ["null", "~", ""] * len(KNOBS)) if name not in GOOD]
    assert resolved(GOOD + "\n".join(nulls)) == resolved(GOOD)


def test_what_is_read_by_a_script_declares_that_script():
    for stem in STAGES[1:]:
        script = (ROOT / f"{stem}.py").read_text(encoding="utf-8")
        for name in set(re.findall(r"\bconfig\.(\w+)", script)) & set(KNOBS):
            assert stem in KNOBS[name][1]["stages"], f"{stem}.py reads {name}"


def test_no_knob_is_without_a_reader():
    own = {"01_config.py", "lib/axolotl.py", "lib/checks.py", "lib/knobs.py", "lib/recipe.py"}
    for stem in STAGES[1:]:
        texts = [(ROOT / file).read_text(encoding="utf-8") for file in ledger.source(stem) if file not in own]
        code = "\n".join(texts)
        unread = [name for name, (_, meta) in KNOBS.items()
                  if stem in meta["stages"] and not re.search(rf"\.{name}\b|\"{name}\"", code)]
        assert not unread, f"{stem} declares what it doesn't read"


def test_01_is_fast_because_it_imports_no_torch():
    imported = subprocess.run([sys.executable, "-c", "import importlib, sys; importlib.import_module('01_config'); "
                               "print(*sys.modules)"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "numpy", "datasets", "peft"} & set(imported)


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written, name, value", [
    ("learning_rate: 1e-4", "learning_rate", 1e-4), ("learning_rate: '2e-5'", "learning_rate", 2e-5),
    ("learning_rate: 1", "learning_rate", 1.0), ("weight_decay: 0", "weight_decay", 0.0),
    ("gradient_checkpointing: no", "gradient_checkpointing", False), ("merge: on", "merge", True),
    ("bf16: true", "bf16", True), ("bf16: auto", "bf16", "auto"), ("bf16: off", "bf16", False),
    ("val_set_size: 0.0", "val_set_size", 0.0), ("val_set_size: 200", "val_set_size", 200),
    ("revision: 0123456", "revision", "0123456"), ("revision: 12345e7", "revision", "12345e7"),
    ("revision: no", "revision", "no"), ("revision: 2024-01-02", "revision", "2024-01-02"),
    ("revision: 'null'", "revision", "null"), ("seed: 010", "seed", 10), ("seed: 1_000", "seed", 1000),
    ("num_epochs: 0.5", "num_epochs", 0.5), ("num_epochs: 3", "num_epochs", 3), ("num_epochs: 3.0", "num_epochs", 3.0),
    ("peft_init_lora_weights: true", "peft_init_lora_weights", True),
    ("peft_init_lora_weights: gaussian", "peft_init_lora_weights", "gaussian"),
    (r"lora_target_modules: 'layers.[\d]+.(q|v)_proj'", "lora_target_modules", r"layers.[\d]+.(q|v)_proj"),
    ("lora_target_modules: [q_proj, v_proj]", "lora_target_modules", ["q_proj", "v_proj"]),
    ("lora_target_modules:\n- q_proj\n- v_proj", "lora_target_modules", ["q_proj", "v_proj"]),
    ("chat_template: tokenizer_default", "chat_template", None),
    ("chat_template: '{{ messages }}'", "chat_template", "{{ messages }}"),
    ("processor_kwargs: {do_resize: no, size: {height: 1e2}, x: '1', y: 010}", "processor_kwargs",
     {"do_resize": "no", "size": {"height": 100.0}, "x": "1", "y": 10}),
    ("attn_implementation: eager", "attn_implementation", "eager"), ("eager_attention: true", "attn_implementation", "eager"),
    ("flash_attention: true", "attn_implementation", "sdpa"), ("flash_attention: false", "attn_implementation", "sdpa"),
    ("attn_implementation: flash_attention_2", "attn_implementation", "sdpa"), ("bfloat16: true", "bf16", True),
])
def test_a_value_takes_the_type_that_its_knob_declares(folder, written, name, value):
    got = getattr(resolved(GOOD.replace("val_set_size: 0.1\n", "") + written), name)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("override, value", [
    ("learning_rate=1e-4", 1e-4), ("max_steps=3", 3), ("max_steps=null", None), ("max_steps=", None), ("merge=yes", True),
    ("revision=0123456", "0123456"), ("revision='null'", "null"), ("base_model=base", "base"),
    ("lora_target_modules=[q_proj, v_proj]", ["q_proj", "v_proj"]), (r"lora_target_modules=.*\.(q|v)_proj", r".*\.(q|v)_proj"),
    ("lora_target_modules=*", None), ("processor_kwargs={size: {height: 32}}", {"size": {"height": 32}}),
    ("chat_template={{ messages }}", "{{ messages }}"),
])
def test_an_override_is_converted_by_the_declared_type(folder, override, value):
    if override.endswith("=*"):                                  # text goes unread by YAML, so this is a regex, a bad one
        return pytest.raises(StageError, resolved, GOOD, override)
    got = getattr(resolved(GOOD, override), override.partition("=")[0])
    assert got == value and type(got) is type(value)


def test_an_override_replaces_the_recipes_value_even_a_wrong_one(folder):
    assert resolved(GOOD + "lora_r: sixteen\nsample_packing: true", "lora_r=8", "sample_packing=false").lora_r == 8
    assert resolved(GOOD + "warmup_ratio: 0.1", "warmup_ratio=null", "warmup_steps=5").warmup_ratio is None
    assert resolved(GOOD + "flash_attention: true", "attn_implementation=eager").attn_implementation == "eager"


def test_what_follows_from_other_knobs_is_settled(folder):
    assert resolved(GOOD, "adapter=qlora").load_in_4bit is True
    assert resolved(GOOD, "warmup_steps=0").warmup_ratio is None
    assert resolved(GOOD, "lora_target_modules=[q_proj]").lora_target_linear is False
    frozen = resolved(GOOD, "adapter=null", "freeze_mm_modules=true").train_roles
    assert "language" in frozen and not {"all", "vision", "audio", "projector"} & set(frozen)


# ---- Axolotl's vocabulary --------------------------------------------------------------------------------------------

HONOURED = """
base_model: ./base | model_type: AutoModelForImageTextToText | processor_type: AutoProcessor | trust_remote_code: true
chat_template: tokenizer_default | load_in_4bit: false | load_in_8bit: true | bnb_config_kwargs: {}
attn_implementation: flash_attention_2 | attn_implementation: sdpa | attn_implementation: flex_attention
flash_attention: true | sdp_attention: true | eager_attention: true | xformers_attention: true | flex_attention: true
freeze_mm_modules: true | full_finetune: false | processor_kwargs: {} | sequence_len: 8192 | val_set_size: 0.0
datasets: [{path: rows.jsonl, type: chat_template, split: 'train[:1%]', field_messages: messages}]
adapter: lora | adapter: qlora | lora_r: 32 | lora_alpha: 16 | lora_dropout: 0.05 | lora_target_linear: true
lora_target_modules: 'model.language_model.layers.[\\d]+.(_checkpoint_wrapped_module.)?(mlp|self_attn).(up|q)_proj'
lora_target_modules: [q_proj, k_proj] | peft_use_dora: false | peft_use_rslora: true | peft_init_lora_weights: true
micro_batch_size: 1 | gradient_accumulation_steps: 4 | num_epochs: 1 | max_steps: 10 | optimizer: adamw_torch_fused
lr_scheduler: cosine | learning_rate: 2e-4 | learning_rate: '0.0002' | warmup_ratio: 0.1 | warmup_steps: 10
weight_decay: 0.0 | bf16: true | bf16: auto | gradient_checkpointing: true | logging_steps: 1 | evals_per_epoch: 1
saves_per_epoch: 1 | output_dir: ./outputs/out
"""
ACCEPTED = """
tokenizer_use_mistral_common: false | special_tokens: | special_tokens: {pad_token: <pad>} | eot_tokens: [<end>]
quantize_moe_experts: false | flex_attn_compile_kwargs: {dynamic: false} | llama4_linearized_experts: false
strict: false | device_map: auto | flash_attention: false | dataset_prepared_path: last_run_prepared
skip_prepare_dataset: true | remove_unused_columns: false | sample_packing: false | pad_to_sequence_len: false
pad_to_sequence_len: true | roles_to_train: [assistant] | train_on_inputs: false | train_on_inputs: no
train_on_eos: turn | lora_model_dir: | lora_mlp_kernel: true | lora_qkv_kernel: true | lora_o_kernel: true | fp16:
fp16: false | tf32: true | tf32: false | gradient_checkpointing_kwargs: {use_reentrant: false} | fsdp: [] | fsdp_config:
activation_offloading: false | ddp_find_unused_parameters: true | resume_from_checkpoint: | deepspeed: | gptq: false
plugins: [axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin, axolotl.integrations.liger.LigerPlugin]
cut_cross_entropy: true | liger_rope: true | liger_rms_norm: true | liger_glu_activation: true | liger_layer_norm: true
liger_fused_linear_cross_entropy: true | use_kernels: true | use_scattermoe: true | use_sonicmoe: true
experts_implementation: scattermoe | wandb_project: | wandb_entity: | wandb_watch: | wandb_name: | wandb_log_model:
wandb_mode: disabled | quant_type: | max_memory: | gpu_memory_limit: | image_size: | image_resize_algorithm:
role_boundaries: | lora_target_parameters: | lora_modules_to_save:
"""
NOT_YET = """
tokenizer_use_mistral_common: true | special_tokens: {pad_token: <pad>, eos_token: <end>} | quant_type: nf4 | gptq: true
quantize_moe_experts: true | llama4_linearized_experts: true | device_map: balanced | max_memory: {0: 20GiB}
gpu_memory_limit: 20GiB | sample_packing: true | image_size: 512 | image_resize_algorithm: bilinear | train_on_inputs: true
roles_to_train: [assistant, user] | train_on_eos: all | role_boundaries: [{role: user}] | fp16: true
lora_target_parameters: [experts.gate_up_proj] | lora_modules_to_save: [lm_head, embed_tokens] | lora_model_dir: ./old
activation_offloading: true | fsdp: [full_shard] | fsdp_version: 2 | fsdp_config: {fsdp_offload_params: true}
fsdp_config: {reshard_after_forward: true} | resume_from_checkpoint: ./checkpoint-5 | plugins: [mine.Plugin]
wandb_project: mine | optimizer: adamw_bnb_8bit | optimizer: adamw_torch_8bit | optimizer: adamw_8bit
optimizer: adamw_torch_4bit | lr_scheduler: rex | chat_template: gemma3 | deepspeed: ds.json | rl: dpo
peft_init_lora_weights: pissa | gradient_checkpointing: offload | loraplus_lr_ratio: 16 | unfrozen_parameters: [lm_head]
"""


def rows_of(table):
    """[`key: value` lines] of a table."""
    return [row.strip() for line in table.strip().split("\n") for row in re.split(r" \| ?(?=[a-z_0-9]+:)", line)]


def with_row(row):
    """A good recipe that has this line, in place of its own line for that key."""
    key = row.partition(":")[0]
    clashing = {"warmup_ratio": (), "full_finetune": ("adapter",)}
    kept = [block for block in re.split(r"(?m)^(?=\w)", GOOD) if block and not block.startswith(f"{key}:")]
    return "".join(kept) + row + "\n"


@pytest.mark.parametrize("row", [row for row in rows_of(HONOURED) if row != "full_finetune: false"])
def test_a_key_of_axolotl_is_honoured(folder, row):
    _, given, _ = resolve(with_row(row))
    assert any(entry.name == row.partition(":")[0] for entry in given.values())


@pytest.mark.parametrize("row", rows_of(ACCEPTED))
def test_a_key_of_axolotl_that_asks_for_nothing_else_is_accepted(folder, row):
    k, given, notes = resolve(GOOD + row)
    assert k == resolved(GOOD)
    assert [name for name, _ in notes] == ([row.partition(":")[0]] if row.partition(":")[0] in _noted(row) else [])


def _noted(row):
    """The key of a row whose value is no null and is without meaning here."""
    key, _, value = row.partition(":")
    return {key} if value.strip() and any(config_key_matches(key, p) for p in axolotl.NO_MEANING) else set()


@pytest.mark.parametrize("row", rows_of(NOT_YET))
def test_a_key_of_axolotl_that_no_code_honours_is_refused_and_says_so(folder, row):
    [(what, fix)] = problems(with_row(row))
    assert what.startswith("r.yaml:") and f": {row.partition(':')[0]}: " in what and fix
