"""01_config: what a recipe may say, what becomes of it, and how its reader hears what is wrong with it."""

import contextlib
import importlib
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lib.config import knobs
from lib.config.recipe import read_overrides, written
from lib.config.rules import RULES
from lib.run.code import source
from lib.run.errors import StageError
from lib.run.stage import ROOT, STAGES
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
BLOCKS = re.split(r"(?m)^(?=\w)", GOOD)[1:]
FILES = {"old/adapter_config.json": "{}", "old/adapter_model.safetensors": "",
         "base/config.json": "{}", "rows.jsonl": "{}\n", "r.yaml": GOOD}


@pytest.fixture
def folder(tmp_path):
    """A folder with a base model, rows and a good recipe r.yaml, in which the test runs."""
    harness.write(tmp_path, FILES)
    with contextlib.chdir(tmp_path):
        yield tmp_path


def resolve(text, *overrides):
    """(Recipe, given, notes) of a recipe's text."""
    return config.configure(Path("r.yaml"), text, overrides)


def resolved(text, *overrides):
    """The Recipe of a recipe's text."""
    return resolve(text, *overrides)[0]


def problems(text, *overrides):
    """[(what, fix)] of a recipe that is refused, as they are printed."""
    with pytest.raises(StageError) as caught:
        resolve(text, *overrides)
    lines = f"error: {caught.value.what}\n  fix: {caught.value.fix}".split("\n")
    whats, fixes = lines[::2], lines[1::2]
    assert all(what.startswith("error: ") for what in whats)
    assert all(fix.startswith("  fix: ") for fix in fixes)
    return [(what[len("error: "):], fix[len("  fix: "):]) for what, fix in zip(whats, fixes, strict=True)]


def without(key):
    """The good recipe without one key."""
    return "".join(block for block in BLOCKS if not block.startswith(f"{key}:"))


def key_of(row):
    """The key of a `key: value` line."""
    return row.partition(":")[0]


# ---- the schema ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KNOBS)
def test_every_knob_says_why_and_who_reads_it_and_takes_its_own_default(name):
    kind, meta = KNOBS[name]
    assert meta["why"] and meta["stages"] and set(meta["stages"]) <= set(STAGES)
    if meta["default"] is not knobs.REQUIRED and meta["default"] is not None:
        (entry,), _ = read_overrides([f"{name}={written(meta['default'])}"])
        assert knobs.convert_within(entry.node, kind, meta) == meta["default"]


def test_a_minimal_recipe_resolves_every_knob(folder):
    k = resolved("base_model: ./base\ndatasets: [{path: rows.jsonl}]\n")
    assert set(vars(k)) == set(KNOBS)
    defaults = {name: meta["default"] for name, (_, meta) in knobs.knobs_of(config.Dataset).items()}
    assert k.datasets == [defaults | {"path": "rows.jsonl"}]
    assert (k.warmup_ratio, k.warmup_steps, k.load_in_4bit, k.output_dir) == (0.03, None, False, "runs/r")
    assert (k.adapter, k.full_finetune, k.lora_target_linear, k.train_roles) == (None, True, True, ["all"])


def test_null_means_the_default_for_every_knob_that_has_one(folder):
    others = [name for name in KNOBS if f"{name}:" not in GOOD]
    nulls = [f"{name}: {null}\n" for name, null in zip(others, ["null", "~", ""] * len(others))]
    assert resolved(GOOD + "".join(nulls)) == resolved(GOOD)


@pytest.mark.parametrize("stem", STAGES[1:])
def test_what_a_script_reads_declares_that_script(stem):
    script = (ROOT / f"{stem}.py").read_text(encoding="utf-8")
    read = set(re.findall(r"\bconfig\.(\w+)", script)) & set(KNOBS)
    assert {name for name in read if stem not in KNOBS[name][1]["stages"]} == set()


@pytest.mark.parametrize("stem", STAGES[1:])
def test_what_declares_a_script_is_read_by_it(stem):
    code = "\n".join((ROOT / file).read_text(encoding="utf-8") for file in source(stem, {}))
    declared = [name for name, (_, meta) in KNOBS.items() if stem in meta["stages"]]
    assert [name for name in declared if not re.search(rf"\.{name}\b|\"{name}\"", code)] == []


def test_01_starts_fast_because_it_imports_no_torch():
    program = "import importlib, sys; importlib.import_module('01_config'); print(*sys.modules)"
    modules = subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True).split()
    assert not {"torch", "transformers", "numpy", "datasets", "peft"} & set(modules)


# ---- values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row, value", [
    ("learning_rate: 1e-4", 1e-4), ("learning_rate: '2e-5'", 2e-5), ("learning_rate: 1", 1.0),
    ("weight_decay: 0", 0.0), ("lora_dropout: .5", 0.5), ("merge: on", True), ("peft_use_dora: no", False),
    ("bf16: true", True), ("bf16: auto", "auto"), ("bf16: off", False),
    ("val_set_size: 0.0", 0.0), ("val_set_size: 200", 200), ("seed: 010", 10), ("seed: 1_000", 1000),
    ("revision: 0123456", "0123456"), ("revision: 12345e7", "12345e7"), ("revision: no", "no"),
    ("revision: 2024-01-02", "2024-01-02"), ("revision: 'null'", "null"), ("revision: 1:30", "1:30"),
    ("num_epochs: 0.5", 0.5), ("num_epochs: 3", 3), ("num_epochs: 3.0", 3.0),
    ("peft_init_lora_weights: true", True), ("peft_init_lora_weights: gaussian", "gaussian"),
    (r"lora_target_modules: 'layers.[\d]+.(q|v)_proj'", r"layers.[\d]+.(q|v)_proj"),
    ("lora_target_modules: [q_proj, v_proj]", ["q_proj", "v_proj"]),
    ("lora_target_modules:\n- q_proj\n- v_proj", ["q_proj", "v_proj"]),
    ("chat_template: qwen2_vl", "qwen2_vl"), ("chat_template: tokenizer_default_fallback_chatml", "tokenizer_default"),
    ("template_date: 2026-07-14", "2026-07-14"),
    ("chat_template: tokenizer_default", "tokenizer_default"), ("chat_template: '{{ messages }}'", "{{ messages }}"),
    ("chat_template: |\n  {% for m in messages %}\n  {% endfor %}", "{% for m in messages %}\n{% endfor %}"),
    ("processor_kwargs: {a: no, b: {c: 1e2}, d: '1', e: 010, f: true}",
     {"a": "no", "b": {"c": 100.0}, "d": "1", "e": 10, "f": True}),
    ("attn_implementation: eager", "eager"), ("attn_implementation: flash_attention_2", "flash_attention_2"),
    ("tf32: auto", True), ("tf32: true", True),
])
def test_a_value_takes_the_type_that_its_knob_declares(folder, row, value):
    got = getattr(resolved(without(key_of(row)) + row), key_of(row))
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("override, value", [
    ("learning_rate=1e-4", 1e-4), ("max_steps=3", 3), ("max_steps=null", None), ("max_steps=", None),
    ("merge=yes", True), ("revision=0123456", "0123456"), ("revision='null'", "null"), ("revision=x", "x"),
    ("lora_target_modules=[q_proj, v_proj]", ["q_proj", "v_proj"]),
    (r"lora_target_modules=.*\.(q|v)_proj", r".*\.(q|v)_proj"), ("revision=a: b #c", "a: b #c"),
    ("processor_kwargs={size: {height: 32}}", {"size": {"height": 32}}),
    ("chat_template={{ messages }}", "{{ messages }}"),
])
def test_an_override_is_converted_by_the_declared_type(folder, override, value):
    got = getattr(resolved(GOOD, override), override.partition("=")[0])
    assert got == value and type(got) is type(value)


def test_an_override_takes_the_place_of_the_recipes_value_even_of_a_wrong_one(folder):
    assert resolved(GOOD + "lora_r: sixteen\nfp16: true", "lora_r=8", "fp16=false").lora_r == 8
    assert resolved(GOOD + "warmup_ratio: 0.1", "warmup_ratio=null", "warmup_steps=5").warmup_ratio is None
    k, _, notes = resolve(GOOD + "flash_attention: true", "attn_implementation=eager")
    assert k.attn_implementation == "eager" and not notes


def test_what_follows_from_other_knobs_is_settled(folder):
    assert resolved(GOOD, "adapter=qlora").load_in_4bit is True
    assert resolved(GOOD, "warmup_steps=0").warmup_ratio is None
    assert resolved(GOOD, "lora_target_modules=[q_proj]").lora_target_linear is False
    frozen = resolved(GOOD, "adapter=null", "freeze_mm_modules=true").train_roles
    assert "language" in frozen and not {"all", "vision", "audio", "projector"} & set(frozen)


# ---- Axolotl's vocabulary --------------------------------------------------------------------------------

HONOURED = """
base_model: ./base | model_type: AutoModelForImageTextToText | processor_type: AutoProcessor
processor_kwargs: {} | trust_remote_code: true | chat_template: tokenizer_default | load_in_4bit: false
load_in_8bit: true | bnb_config_kwargs: {} | attn_implementation: flash_attention_2
attn_implementation: sdpa | flash_attention: true | attn_implementation: flex_attention
sdp_attention: true | eager_attention: true | xformers_attention: true | flex_attention: true
bfloat16: true | freeze_mm_modules: true | full_finetune: false | sequence_len: 8192
datasets: [{path: rows.jsonl, type: chat_template, split: 'train[:1%]', field_messages: messages}]
val_set_size: 0.0 | adapter: lora | adapter: qlora | lora_r: 32 | lora_alpha: 16 | lora_dropout: 0.05
lora_target_modules: 'model.language_model.layers.[\\d]+.(_checkpoint_wrapped_module.)?mlp.(up|down)_proj'
lora_target_modules: [q_proj, k_proj] | lora_target_linear: true | peft_use_dora: false
lora_target_parameters: [mlp.experts.gate_up_proj, mlp.experts.down_proj]
lora_target_parameters: experts.down_proj | bnb_config_kwargs: {bnb_4bit_quant_type: fp4}
special_tokens: {pad_token: <pad>} | special_tokens: {eos_token: <end>, additional_special_tokens: [<a>, <b>]}
tokens: [<left>, <right>] | special_tokens: {bos_token: null}
peft_use_rslora: true | peft_init_lora_weights: true | micro_batch_size: 1 | gradient_accumulation_steps: 4
num_epochs: 1 | max_steps: 10 | optimizer: adamw_torch_fused | lr_scheduler: cosine | learning_rate: 2e-4
learning_rate: '0.0002' | bf16: true | bf16: auto | warmup_ratio: 0.1 | warmup_steps: 10 | weight_decay: 0.0
gradient_checkpointing: true | logging_steps: 1 | evals_per_epoch: 1 | saves_per_epoch: 1
overrides_of_model_config: {rope_theta: 1000000, rope_scaling: {rope_type: linear, factor: 2.0}}
device_map: auto | eval_steps: 50 | eval_max_new_tokens: 128 | fp16: true | float16: true
output_dir: ./outputs/out | tf32: true | tf32: false | tf32: auto
train_on_inputs: true | roles_to_train: [assistant, user] | train_on_eos: all | train_on_eos: none
chat_template_kwargs: {enable_thinking: false} | excess_length_strategy: truncate
excess_length_strategy: raise | datasets: [{path: owner/rows, split: 'train[:1%]', revision: main}]
datasets: [{path: rows.jsonl, type: sharegpt, ds_type: json, name: main, data_files: [a.json], weight: 2}]
datasets: [{path: rows.jsonl, roles: {user: [human]}, message_property_mappings: {role: from}}]
image_size: 512 | image_size: [640, 480] | image_resize_algorithm: lanczos
datasets: [{path: json, data_files: a.json, message_field_role: from, message_field_content: value}]
datasets: [{path: rows.jsonl, train_on_eos: last, roles_to_train: [user], message_field_training: learn}]
"""
WITHOUT_MEANING = """
eot_tokens: [<end>] | flex_attn_compile_kwargs: {dynamic: false} | strict: false
skip_prepare_dataset: true | dataset_prepared_path: last_run_prepared | remove_unused_columns: false
pad_to_sequence_len: false | pad_to_sequence_len: true | lora_mlp_kernel: true | lora_qkv_kernel: true
lora_o_kernel: true | cut_cross_entropy: true
gradient_checkpointing_kwargs: {use_reentrant: false} | liger_rope: true | ddp_find_unused_parameters: true
liger_rms_norm: true | liger_glu_activation: true | liger_layer_norm: true
liger_fused_linear_cross_entropy: true | use_kernels: true | use_scattermoe: true | use_sonicmoe: true
experts_implementation: scattermoe
"""
DONE_ANYWAY = """
tokenizer_use_mistral_common: false | special_tokens: | tokens: | special_tokens: {}
quantize_moe_experts: false | llama4_linearized_experts: false
flash_attention: false | roles_to_train: [assistant] | train_on_inputs: false
train_on_inputs: no | gptq: false | train_on_eos: turn | fp16: | fp16: false | fsdp: []
fsdp_config: | activation_offloading: false | deepspeed: | resume_from_checkpoint:
resume_from_checkpoint: true | dataset_prepared_path: | eot_tokens: | tf32:
plugins: [axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin]
plugins: [axolotl.integrations.liger.LigerPlugin, axolotl.integrations.kernels.KernelsPlugin]
wandb_project: | wandb_entity: | wandb_watch: | wandb_name: | wandb_log_model: | wandb_mode: disabled
image_size: | max_memory: | gpu_memory_limit: | image_resize_algorithm: | role_boundaries:
quant_type: | lora_modules_to_save: | rope_theta: | rope_scaling:
"""
NOT_YET = """
tokenizer_use_mistral_common: true | added_tokens_overrides: {128041: <left>} | quant_type: nf4
gptq: true | quantize_moe_experts: true | llama4_linearized_experts: true | gpu_memory_limit: 20GiB
role_boundaries: [{role: user}]
lora_modules_to_save: [lm_head, embed_tokens] | activation_offloading: true
fsdp: [full_shard] | plugins: [mine.Plugin] | resume_from_checkpoint: ./checkpoint-5
wandb_log_model: checkpoint | optimizer: paged_adamw_32bit | optimizer: adamw_torch_8bit
optimizer: adamw_torch_4bit | lr_scheduler: rex | chat_template: chatml | deepspeed: ds.json | rl: dpo
peft_init_lora_weights: pissa | gradient_checkpointing: offload_disk | loraplus_lr_embedding: 1e-6
rope_theta: 1000000 | rope_scaling: {type: linear, factor: 2.0}
unfrozen_parameters: ['embed_tokens.weight$[:100]'] | liger_use_token_scaling: true
"""


def rows_of(table):
    """The `key: value` lines of a table."""
    return [row for line in table.strip().split("\n") for row in re.split(r" \| ?(?=[a-z_0-9]+:)", line)]


@pytest.mark.parametrize("row", rows_of(HONOURED))
def test_a_key_of_axolotl_is_honoured(folder, row):
    _, given, _ = resolve(without(key_of(row)) + row)
    assert key_of(row) in {entry.name for entry in given.values()}


@pytest.mark.parametrize("row", rows_of(WITHOUT_MEANING))
def test_a_key_of_axolotl_without_meaning_changes_nothing_and_is_named_with_the_reason(folder, row):
    k, _, [(name, reason)] = resolve(GOOD + row)
    assert k == resolved(GOOD) and name == key_of(row) and reason


@pytest.mark.parametrize("row", rows_of(DONE_ANYWAY))
def test_a_key_of_axolotl_that_asks_for_what_is_done_anyway_is_accepted_without_a_word(folder, row):
    k, _, notes = resolve(GOOD + row)
    assert k == resolved(GOOD) and not notes


@pytest.mark.parametrize("row", rows_of(NOT_YET))
def test_a_key_of_axolotl_that_no_code_honours_is_refused_with_a_word_and_a_fix(folder, row):
    [(what, fix)] = problems(without(key_of(row)) + row)
    assert re.match(rf"r\.yaml:\d+: {key_of(row)}: ", what) and fix


USUAL = r"""
base_model: ./base
processor_type: AutoProcessor
chat_template: qwen2_vl
datasets:
  - path: rows.jsonl
    type: chat_template
    split: train[:1%]
dataset_prepared_path:
val_set_size: 0.0
output_dir: ./outputs/out
skip_prepare_dataset: true
remove_unused_columns: false
sample_packing: false
sequence_len: 8192
pad_to_sequence_len: false
adapter: lora
lora_model_dir:
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: 'model.language_model.layers.[\d]+.(mlp|self_attn).(up|down|gate|q|k|v|o)_proj'
wandb_project:
wandb_entity:
wandb_watch:
wandb_name:
wandb_log_model:
gradient_accumulation_steps: 4
micro_batch_size: 1
num_epochs: 1
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: true
fp16:
tf32: true
gradient_checkpointing: true
logging_steps: 1
flash_attention: true
eager_attention:
warmup_ratio: 0.1
evals_per_epoch: 1
saves_per_epoch: 1
weight_decay: 0.0
"""


def test_a_usual_axolotl_recipe_needs_no_override(folder):
    k, _, notes = resolve(USUAL)
    assert (k.lora_alpha, k.learning_rate, k.output_dir) == (16, 2e-4, "./outputs/out")
    assert {name for name, _ in notes} == {"skip_prepare_dataset", "remove_unused_columns",
                                           "pad_to_sequence_len"}


# ---- problems --------------------------------------------------------------------------------------------


def test_all_problems_of_a_recipe_are_told_at_once_each_with_key_value_line_and_fix(folder):
    bad = GOOD + """lora_r: sixteen
lora_rr: 8
rl: dpo
lora_dropout: 1.5
load_in_8bit: true
load_in_4bit: true
lora_dropout: 0
"""
    assert problems(bad, "seed=-1", "max_step=3") == [
        ("r.yaml:13: lora_dropout is given a second time, after line 10", "keep one of the two lines"),
        ("r.yaml:7: lora_r: sixteen must be a whole number", "for example lora_r: 16 (rank of the update)"),
        ("r.yaml:8: lora_rr: 8: no such knob", "remove it, or did you mean lora_r?"),
        ("r.yaml:9: rl: dpo asks for reinforcement learning: not built yet", "remove rl"),
        ("r.yaml:10: lora_dropout: 1.5 must be a number from 0 and below 1",
         "for example lora_dropout: 0.0 (share of adapter inputs dropped)"),
        ("on the command line: seed=-1 must be a whole number from 0 and up to 4,294,967,295",
         "for example seed=42 (of split, adapter, order)"),
        ("on the command line: max_step=3: no such knob", "remove it, or did you mean max_steps?"),
        ("r.yaml:12: load_in_4bit: true with load_in_8bit: true (line 11): a weight has 4 bits or 8",
         "remove one of them"),
    ]


def test_a_process_prints_every_problem_in_two_lines(folder):
    done = harness.process("01_config", ["r.yaml", "lora_r=x", "seed=y"], folder)
    assert done.returncode == 1
    assert [line.split(": ")[0] for line in done.stderr.splitlines()] == ["error", "  fix", "error", "  fix"]


def test_no_contradiction_is_seen_in_a_knob_that_could_not_be_read(folder):
    [(what, _)] = problems(GOOD + "load_in_4bit: true", "adapter=lorra")
    assert what == "on the command line: adapter=lorra must be lora or qlora"


CONTRADICTIONS = (
    ["device_map=auto", "fsdp_version=2"], ["device_map=auto", "merge=true"], ["max_memory={0: 20GiB}"],
    ["attn_implementation=flash_attention_2", "bf16=false"],
    ["attn_implementation=flash_attention_3", "sample_packing=true", "micro_batch_size=2"],
    ["load_in_4bit=true", "load_in_8bit=true"],
    ["load_in_4bit=true", "adapter=null"],
    ["load_in_8bit=true", "adapter=null"],
    ["load_in_8bit=true", "adapter=qlora"],
    ["load_in_4bit=false", "adapter=qlora"],
    ["full_finetune=true"],
    ["lora_model_dir=old", "adapter=null"],
    ["full_finetune=false", "adapter=null"],
    ["train_roles=[vision]"],
    ["train_roles=[all, vision]", "adapter=null"],
    ["freeze_mm_modules=true", "lora_target_roles=[language, vision]"],
    ["freeze_mm_modules=true", "train_roles=[projector]", "adapter=null"],
    ["lora_target_linear=true", "lora_target_modules=[q_proj]"],
    ["load_best_model_at_end=true", "evals_per_epoch=0"],
    ["lora_target_linear=false"],
    ["lora_target_parameters=[experts.down_proj]", "lora_dropout=0.1"],
    ["test_datasets=[{path: rows.jsonl}]"],
    ["image_size=64", "image_max_pixels=4096"],
    ["max_image_tokens=64", "image_max_pixels=4096"], ["datasets=[{path: rows.jsonl, shards: 2, shards_idx: 2}]"],
    ["image_min_pixels=4097", "image_max_pixels=4096"],
    ["val_set_size=0", "test_datasets=[{path: rows.jsonl, weight: 2}]"],
    ["val_set_size=1.0"],
    ["warmup_ratio=0.1", "warmup_steps=5"],
    ["sample_packing=true", "group_by_length=true"],
    ["cosine_min_lr_ratio=0.1", "lr_scheduler=linear"],
    ["fp16=true", "bf16=true"],
    ["unfrozen_parameters=[lm_head]"],
    ["fsdp_version=2", "adapter=null"],
    ["fsdp_version=2", "cache_vision_features=true"],
)


@pytest.mark.parametrize("given", CONTRADICTIONS)
def test_knobs_that_contradict_each_other_are_refused(folder, given):
    [(what, fix)] = problems(GOOD, *given)
    assert re.match(r"(on the command line: |r\.yaml:\d+: )", what) and fix


def test_every_rule_is_broken_by_one_of_these_contradictions(folder):
    said = [what for given in CONTRADICTIONS for what, _ in problems(GOOD, *given)]
    assert [rule.why for rule in RULES if not any(what.endswith(rule.why) for what in said)] == []


@pytest.mark.parametrize("overrides, words", [
    (["learning_rate=2e-3"], "learning_rate 0.002: above 1e-3"),
    (["adapter=null", "learning_rate=2e-4"], "trained from scratch may need it"),
    (["max_steps=20"], "max_steps 20: fewer than 50 steps"),
    (["max_steps=100", "warmup_steps=100"], "ends before its warm-up does"),
    (["val_set_size=0"], "no evaluation"),
    (["bnb_config_kwargs={llm_int8_threshold: 4.0}"], "nothing is quantised"),
    (["quantize_roles=[language, vision]"], "quantize_roles: without effect"),
    (["revision=main"], "./base is a folder"),
    (["tf32=true"], "tf32: without effect"),
    (["adapter=null", "learning_rate=1e-5", "lora_r=8"], "lora_r: without effect"),
])
def test_settings_that_seldom_work_are_warned_of(folder, capsys, overrides, words):
    config.main(["r.yaml", "runs/a", *overrides])
    [warning] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert words in warning


def test_a_trackers_package_that_is_not_installed_is_warned_of_before_the_work(folder, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    config.main(["r.yaml", "runs/a", "use_tensorboard=true", "wandb_project=mine"])
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert [line.rsplit(": ", 1)[-1] for line in warnings] == ["pip install tensorboard", "pip install wandb"]


def test_settings_that_work_are_not_warned_of(folder, capsys):
    config.main(["r.yaml", "runs/a"])
    assert "warning" not in capsys.readouterr().out


# ---- the stage -------------------------------------------------------------------------------------------


def test_config_json_holds_every_knob_and_stages_json_names_every_knob(folder):
    config.main(["r.yaml", "runs/a"])
    values = json.loads(Path("runs/a/01_config/config.json").read_text(encoding="utf-8"))
    stages = json.loads(Path("runs/a/01_config/stages.json").read_text(encoding="utf-8"))
    assert set(values) == set(KNOBS) and values["output_dir"] == "runs/a"
    not_identity, given = stages.pop("not_identity"), stages.pop("given")
    assert "base_model" in given and "lora_r" not in given
    assert list(stages) == list(STAGES) and set().union(*stages.values()) == set(KNOBS)
    assert set(not_identity) == {"logging_steps", "evals_per_epoch", "eval_steps", "saves_per_epoch",
                                 "save_steps", "save_total_limit", "dataloader_num_workers",
                                 "gradient_checkpointing", "use_tensorboard", "fsdp_version",
                                 "wandb_project", "wandb_entity", "wandb_name", "device_map", "max_memory",
                                 "dataset_processes"}


def test_what_the_recipe_gives_is_printed_by_stage(folder, capsys):
    config.main(["r.yaml", "runs/a", "lora_r=8", "xformers_attention=true"])
    lines = capsys.readouterr().out.splitlines()
    tables = [line for line in lines if line in STAGES]
    assert tables == [stem for stem in (*STAGES[1:], STAGES[0]) if stem in tables] and len(tables) > 2
    assert any(re.fullmatch(r" +lora_r +8 +the command line", line) for line in lines)
    assert not any(line.split()[:1] == ["lora_alpha"] for line in lines)         # as by default
    assert any(re.fullmatch(r" +base_model +./base +line 1 +03 04 05 06", line) for line in lines)
    assert any(re.fullmatch(r" +datasets +\[{path: \S+}\] .*", line) for line in lines)
    given = len(json.loads(Path("runs/a/01_config/stages.json").read_text(encoding="utf-8"))["given"])
    assert f"{len(KNOBS) - given} more knobs are as by default: python 01_config.py --knobs" in lines
    assert any(line.startswith("xformers_attention: xformers is replaced by sdpa") for line in lines)
    assert lines[-1] == "next: python 02_data.py runs/a"


def test_the_run_is_the_argument_without_an_equals_sign_and_else_output_dir(folder):
    config.main(["r.yaml"])
    assert Path("runs/latest").read_text(encoding="utf-8").strip() == "runs/r"
    config.main(["r.yaml", "output_dir=runs/b"])
    config.main(["r.yaml", "lora_r=8", "runs/lr=1e-4"])
    assert Path("runs/latest").read_text(encoding="utf-8").strip() == "runs/lr=1e-4"
    assert all(Path(run, "01_config/stage.json").is_file() for run in ("runs/r", "runs/b", "runs/lr=1e-4"))


def test_01_runs_again_for_another_recipe_or_override_and_is_up_to_date_otherwise(folder, capsys):
    def runs(*words):
        config.main([*words])
        return "up to date" not in capsys.readouterr().out

    assert runs("r.yaml", "runs/a") and not runs("r.yaml", "runs/a")
    assert runs("r.yaml", "runs/a", "lora_r=8")
    harness.write(folder, {"r.yaml": GOOD + "lora_r: 8", "other.yaml": GOOD})
    assert runs("r.yaml", "runs/a") and runs("other.yaml", "runs/a") and runs("r.yaml", "runs/b")
    assert not runs("other.yaml", "runs/a")
    assert Path("runs/latest").read_text(encoding="utf-8").strip() == "runs/a"


def test_a_recipe_that_went_wrong_leaves_the_last_good_configuration_in_place(folder):
    config.main(["r.yaml", "runs/a"])
    before = harness.contents(folder / "runs")
    harness.refusal("01_config", ["r.yaml", "runs/a", "lora_r=0"], folder)
    assert harness.contents(folder / "runs") == before


def test_a_recipe_with_a_byte_order_mark_and_windows_lines_is_read(folder):
    harness.write(folder, {"r.yaml": b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode()})
    config.main(["r.yaml", "runs/a"])
    assert json.loads(Path("runs/a/01_config/config.json").read_text(encoding="utf-8"))["adapter"] == "lora"


def test_every_knob_is_shown_on_request_and_nothing_is_written(folder, capsys):
    config.main(["--knobs"])
    shown = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert set(KNOBS) <= shown and not Path("runs").exists()


def test_an_empty_key_that_nobody_knows_is_said_and_changes_nothing(folder, capsys):
    (folder / "r.yaml").write_text(GOOD + "local_rank:\ndebug: null\n", encoding="utf-8")
    config.main(["r.yaml", "runs/a"])
    said = capsys.readouterr().out
    assert all(f"{key}: no such knob; it is empty, so nothing is lost" in said for key in ("local_rank", "debug"))


@pytest.mark.parametrize("words, fix", [(["--lora_r", "8"], "lora_r=8"), (["--lora-r=8"], "lora_r=8"),
                                        (["--lora_r"], "lora_r=VALUE")])
def test_a_knob_as_a_flag_is_answered_with_how_it_is_written(words, fix, folder):
    with pytest.raises(StageError, match=r"--lora[_-]r.*: no such flag") as caught:
        config.main(["r.yaml", "runs/a", *words])
    assert caught.value.fix.endswith(f": {fix}")


def test_help_is_the_docstring():
    assert config.__doc__.strip() in harness.process("01_config", ["--help"], ROOT).stdout


# ---- bad input -------------------------------------------------------------------------------------------


def recipe(name, text, what, fix):
    """A row: a recipe of this text."""
    return Bad(name, ["r.yaml", "runs/a"], f"r.yaml{what}", fix, {"r.yaml": text})


def line(name, text, what, fix):
    """A row: a good recipe, and this as its seventh line. `what` follows on the place of that line."""
    return Bad(name, ["r.yaml", "runs/a"], f"r.yaml:7: {what}", fix, {"r.yaml": f"{GOOD}{text}\n"})


def override(name, words, what, fix):
    """A row: a good recipe and an override. `what` follows on the override."""
    return Bad(name, ["r.yaml", "runs/a", words], f"on the command line: {words}{what}", fix)


UNREADABLE = (
    Bad("no recipe", [], "no recipe is named", "python 01_config.py recipes/demo.yaml runs/demo"),
    Bad("a missing recipe", ["r.yml"], "r.yml: no such recipe", "did you mean r.yaml?"),
    Bad("a missing recipe with nothing like it", ["zzz"], "zzz: no such recipe", "ls recipes/"),
    Bad("a missing recipe in no folder", ["no/r.yaml"], "no/r.yaml: no such recipe", "there is no folder no"),
    Bad("a folder for a recipe", ["base"], "base: not readable as a recipe: Is a directory",
        "name a YAML file"),
    Bad("two recipes", ["r.yaml", "r.yaml"], "r.yaml is a file, no run folder",
        "python 01_config.py r.yaml runs/NAME"),
    Bad("an override with spaces", ["r.yaml", "runs/a", "lora_r", "=", "8"],
        "lora_r = 8: neither the recipe, nor the run folder, nor key=value",
        "write an override without spaces around its =, and quote it for the shell"),
    Bad("an override given twice", ["r.yaml", "runs/a", "seed=1", "seed=2"],
        "on the command line: seed is given a second time: seed=2", "keep one of the two"),
    recipe("an empty recipe", "", ": the recipe is empty",
           "write `key: value` lines, as in recipes/demo.yaml"),
    recipe("a recipe of comments", "# x\n", ": the recipe is empty", "write `key: value` lines, …"),
    recipe("a recipe that is a list", "- a\n", ":1: - a is no `key: value` line",
           "write one `key: value` a line, with a space after the colon"),
    recipe("a missing space after the colon", "lora_r:8\n", ":1: lora_r:8 is no `key: value` line",
           "write one `key: value` a line, with a space after the colon"),
    recipe("bytes that are no utf-8", b"a: 1\nb: \xff\n", ":2: byte 8 is not utf-8",
           "save the recipe as utf-8"),
    recipe("brackets without end", "a: " + "[" * 1000, ": not YAML: brackets within…", "close the brackets"),
    recipe("a tab", "processor_kwargs:\n\tx: 1\n",
           r":2: not YAML: found character '\t' that cannot start any token", "replace the tab by spaces"),
    line("a control character", "revision: a\x00b", "a control character, code 0", "remove it"),
    line("a regex in double quotes", r'lora_target_modules: "a.[\d]"',
         "not YAML: found unknown escape character 'd'",
         "put a regex into single quotes, where a backslash is a backslash"),
    line("a wrong indentation", "  lora_r: 8", "not YAML: mapping values are not allowed here",
         "check the quotes, brackets, colons and indentation there"),
    line("a second document", "---\na: 1", "not YAML: but found another document", "check the quotes, …"),
    line("an unknown alias", "revision: *x", "not YAML: found undefined alias 'x'", "check the quotes, …"),
    line("a duplicate key", "adapter: lora", "adapter is given a second time, after line 6",
         "keep one of the two lines"),
    line("a duplicate key inside", "processor_kwargs: {a: 1, a: 2}",
         "processor_kwargs: a is a key given twice", "keep one of the two"),
    line("a value that holds itself", "processor_kwargs: &x {a: *x}",
         "processor_kwargs: &x {a: *x} refers to itself", "write the value out"),
    line("a tag", "lora_r: !!python/name:os.system 3", "lora_r: !!python/name:os.system 3 has the tag …",
         "remove the tag: a knob knows its type"),
    override("an override's open bracket", "train_roles=[all", " is not YAML: …",
             "close its brackets and quotes, and quote it all: 'train_roles=[a, b]'"),
)
WRONG_VALUES = (
    line("an unknown key", "learning_rte: 1e-4", "learning_rte: 1e-4: no such knob",
         "remove it, or did you mean learning_rate?"),
    line("an unknown key like no other", "zzz: 1", "zzz: 1: no such knob",
         "remove it; all knobs: python 01_config.py --knobs"),
    line("a merge key", "<<: {lora_r: 8}", "<<: {lora_r: 8}: no such knob", "remove it; …"),
    line("text for a number", "learning_rate: fast", "learning_rate: fast must be a number",
         "for example learning_rate: 0.0002 (the highest learning rate)"),
    line("a fraction for a whole number", "lora_r: 8.5", "lora_r: 8.5 must be a whole number",
         "for example lora_r: 16 (rank of the update)"),
    line("a boolean for a number", "lora_r: true", "lora_r: true must be a whole number", "for example …"),
    line("a number for a boolean", "merge: 1", "merge: 1 must be true or false", "for example …"),
    line("a list for a number", "lora_r: [8]", "lora_r: [8] must be a whole number", "for example …"),
    line("text for a list", "train_roles: all", "train_roles: all must be a list of language, vision, …",
         "for example train_roles: [all] …"),
    line("a list for a mapping", "processor_kwargs: [1]", "processor_kwargs: [1] must be a mapping",
         "for example processor_kwargs: {} …"),
    line("infinity", "learning_rate: .inf", "learning_rate: .inf must be a number", "for example …"),
    line("not a number", "learning_rate: nan", "learning_rate: nan must be a number", "for example …"),
    line("a number too large", "learning_rate: 1e999", "learning_rate: 1e999 must be a number", "for …"),
    line("a number below its limit", "lora_r: 0", "lora_r: 0 must be a whole number from 1", "for example …"),
    line("a number at an open limit", "learning_rate: 0", "learning_rate: 0 must be a number above 0",
         "for example learning_rate: 0.0002 (the highest learning rate)"),
    line("a share of one", "warmup_ratio: 1.0", "warmup_ratio: 1.0 must be a number from 0 and below 1",
         "give a number from 0 and below 1 (warm-up, share of steps; null: 0.03)"),
    line("a choice that is none", "on_bad_row: drop", "on_bad_row: drop must be error or skip",
         "for example on_bad_row: error (after all rows are read: stop, or skip bad ones)"),
    line("a role that is none", "lora_target_roles: [language, lm]",
         "lora_target_roles: lm must be language, vision, …, experts or router",
         "for example lora_target_roles: [language] (roles whose layers get LoRA)"),
    line("an empty list", "lora_target_roles: []", "lora_target_roles: [] is empty",
         "name at least one, or remove the key"),
    line("a regex that is none", "lora_target_modules: '*_proj'",
         "lora_target_modules: '*_proj' is no regex: nothing to repeat at position 0",
         "mend it; a recipe holds a regex in single quotes"),
    line("layers to skip by name", "bnb_config_kwargs: {llm_int8_skip_modules: [lm_head]}",
         "bnb_config_kwargs: {llm_int8_skip_modules: [lm_head]} holds llm_int8_skip_modules, which is no …",
         "quantize_roles says what is quantised; this may hold bnb_4bit_quant_type, …"),
    line("a kind of 4 bits that is none", "bnb_config_kwargs: {bnb_4bit_quant_type: int4}",
         "bnb_config_kwargs: {bnb_4bit_quant_type: int4} holds bnb_4bit_quant_type: int4", "write nf4 or fp4"),
    line("a special token of no kind", "special_tokens: {end_token: <e>}",
         "special_tokens: {end_token: <e>} holds end_token, which is no special token",
         "its keys are bos_token, eos_token, pad_token, unk_token, additional_special_tokens"),
    line("one special token for several", "special_tokens: {additional_special_tokens: <e>}",
         "special_tokens: {additional_special_tokens: <e>} holds additional_special_tokens: <e>",
         "for example additional_special_tokens: ['<a>', '<b>']"),
    line("a token with blanks", "tokens: [' left']", "tokens: …' left'…, which can't be a token",
         "write texts without blanks around them"),
    line("an adapter that isn't there", "lora_model_dir: ./nope",
         "lora_model_dir: ./nope is no folder with adapter_config.json", "hf download …"),
    line("every linear layer, the tower's too", "lora_target_modules: all-linear",
         "lora_target_modules: all-linear would reach into the vision tower", "lora_target_modules: null"),
    line("an optimizer to come", "optimizer: adafactor",
         "optimizer: adafactor is not built yet, and its steps are others",
         "optimizer: adamw_torch_fused"),
    line("a width that only its weights know", "overrides_of_model_config: {hidden_size: 64}",
         "overrides_of_model_config: {hidden_size: 64} holds hidden_size, which its weights were made with",
         "it may hold rope_theta, rope_scaling, max_position_embeddings"),
    line("memory without its unit", "max_memory: {0: 20}", "max_memory: {0: 20} holds 0: 20",
         "for example {0: 20GiB, 1: 24GiB}"),
    line("a scaling that isn't named", "overrides_of_model_config: {rope_scaling: {factor: 2.0}}",
         "overrides_of_model_config: {rope_scaling: {factor: 2.0}} holds rope_scaling: {'factor': 2.0}",
         "for example {rope_theta: 1000000}, or {rope_scaling: {rope_type: linear, factor: 2.0}}"),
    line("an optimizer that is none", "optimizer: adamw",
         "optimizer: adamw must be adamw_torch_fused, adamw_torch, adamw_bnb_8bit or paged_adamw_8bit or "
         "path/to/file.py:function", "for example optimizer: adamw_torch_fused (AdamW, or your function)"),
    line("an initialisation that rewrites the base", "peft_init_lora_weights: pissa",
         "peft_init_lora_weights: pissa rewrites the base, so the adapter would not fit the published one",
         "peft_init_lora_weights: true"),
    recipe("two spellings that disagree", GOOD + "eager_attention: true\nflash_attention: true\n",
           ":8: flash_attention: true says otherwise than eager_attention: true (line 7)",
           "keep one of them"),
    recipe("two knobs that contradict each other", GOOD + "test_datasets: [{path: rows.jsonl}]\n",
           ":5: val_set_size: 0.1 with test_datasets: [{path: rows.jsonl}] (line 7): the rows to evaluate on "
           "come from one of them", "remove one of them"),
    Bad("no base model", ["r.yaml"], "base_model is missing", "add `base_model: …` (a hub id or a folder)",
        {"r.yaml": without("base_model")}),
    Bad("no data", ["r.yaml"], "datasets is missing", "add `datasets: …` (the rows to train on)",
        {"r.yaml": without("datasets")}),
)
WRONG_PATHS = (
    override("an unknown base model", "base_model=./bose", " is no folder here, and no hub id",
             "did you mean base?"),
    override("a base model in no folder", "base_model=/no/such/model", " is no folder here, and no hub id",
             "there is no folder /no/such"),
    override("a base model that is no hub id", "base_model=qwen", " is no folder here, and no hub id",
             "a hub id has exactly one slash: owner/name"),
    Bad("a base model of too long a name", ["r.yaml", f"base_model={'a' * 999}"],
        f"on the command line: base_model={'a' * 60}… is no folder here, and no hub id",
        "a hub id has exactly one slash: owner/name"),
    override("a base model by address", "base_model=https://hub.example/Qwen/Qwen2-VL-2B", " is an address",
             "write the hub id: Qwen/Qwen2-VL-2B"),
    override("a base model that is a file", "base_model=base/config.json", " is a file",
             "name the model's folder: base"),
    Bad("a model's folder without config.json", ["r.yaml", "base_model=up"],
        "on the command line: base_model=up is a folder without config.json", "did you mean up/model?",
        {"up/model/config.json": "{}"}),
    Bad("a folder that holds no model", ["r.yaml", "base_model=up"],
        "on the command line: base_model=up is a folder without config.json",
        "name the folder that holds config.json", {"up/x": ""}),
    Bad("an adapter for a base model", ["r.yaml", "base_model=up"],
        "on the command line: base_model=up is an adapter, not a model",
        "name the base model, which its adapter_config.json tells; lora_model_dir is for the adapter", {"up/adapter_config.json": "{}"}),
    override("missing rows", "datasets=[{path: row.jsonl}]", " is no file or folder here, and no hub id",
             "did you mean rows.jsonl?"),
    recipe("missing rows, by their line", GOOD.replace("rows", "row"),
           ":3: datasets: row.jsonl is no file or folder here, and no hub id", "did you mean rows.jsonl?"),
    override("rows of no hub", "datasets=[{path: owner/my/rows}]", " is no file or folder here, and no hub id",
             "there is no folder owner/my"),
    override("a role of no message", "datasets=[{path: rows.jsonl, roles: {bot: [gpt]}}]",
             " holds bot, which is no role", "its keys are system, user, assistant, tool"),
    override("a role's words that are none", "datasets=[{path: rows.jsonl, roles: {user: [1]}}]",
             " holds user: [1]", "for example user: [human, person]"),
    override("a property of no message", "datasets=[{path: rows.jsonl, message_property_mappings: {mood: x}}]",
             " holds mood: x, which is no property of a message with its key", "the properties are role, …"),
    override("an argument of the template that is 02's", "chat_template_kwargs={tokenize: true}",
             " holds tokenize, which 02_data gives itself", "remove tokenize"),
    override("a size of no picture", "image_size=[1, 2, 3]", " is no size of a picture", "for example 512, or …"),
    override("a weight of nothing", "datasets=[{path: rows.jsonl, weight: 0}]", " is for weight, and must be a number above 0",
             "give weight a number above 0 (…)"),
    override("an end of turns that is none", "train_on_eos=never", " must be turn, all, last or none", "for …"),
    override("a data set without a path", "datasets=[{split: train}]", " has no path",
             "add `path: …` (a file, a folder or a hub id)"),
    override("no data set in the list", "datasets=[]", " is empty", "name at least one, or remove the key"),
    override("a data set that is text", "datasets=rows.jsonl", " must be a list of mappings",
             "give a list of mappings (the rows to train on)"),
    override("a part of a list", "datasets[0].path=x", ": no such knob",
             "give datasets as a whole, 'datasets=[…]'"),
    recipe("an unknown key of a data set", GOOD.replace("type:", "kind:"),
           ":4: datasets: chat_template is for kind, which is no such key", "…"),
    override("a data set's key to come", "datasets=[{path: rows.jsonl, preprocess_shards: 2}]",
             " is for preprocess_shards: not built yet", "remove preprocess_shards"),
    Bad("a run folder for an adapter", ["r.yaml", "lora_model_dir=before"],
        "on the command line: lora_model_dir=before is no folder with adapter_config.json",
        "did you mean before/06_save/adapter?", {"before/06_save/adapter/adapter_config.json": "{}"}),
    override("a data set of another type", "datasets=[{path: rows.jsonl, type: alpaca}]",
             " is for type, and must be chat_template or sharegpt",
             "give type chat_template or sharegpt (rows are conversations)"),
    override("a template of no family", "chat_template=alpaca", " is a template that the kit doesn't hold",
             "write tokenizer_default for the checkpoint's own, or the path of a .jinja file"),
    override("a template's name with a slip", "chat_template=qwen_2_vl",
             " is a template that the kit doesn't hold", "did you mean qwen2_vl?"),
    override("a day in words", "template_date=yesterday", " is no day", "write year, month and day: 2026-07-14"),
    override("a day that no calendar has", "template_date=2026-02-30", " is no day",
             "write year, month and day: 2026-07-14"),
    override("a missing template", "chat_template=chat.jinja", " is no file here",
             "a relative path starts from /…"),
)


@bad_input(UNREADABLE + WRONG_VALUES + WRONG_PATHS)
def test_bad_input_ends_in_two_lines_and_writes_nothing(case, folder):
    harness.check(case, "01_config", folder)


@bad_input(UNREADABLE[1:2] + WRONG_VALUES[:1] + WRONG_PATHS[-1:])
def test_bad_input_ends_in_two_lines_of_stderr_without_a_traceback(case, folder):
    harness.check_process(case, "01_config", folder)


@pytest.mark.parametrize("seed", range(8))
def test_no_text_whatever_ends_in_a_traceback(folder, seed):
    draw = random.Random(seed)
    pieces = [*":-[]{}#&*!|>'\"%@`?,=~ \n\t\\0aé\x00", "", ": ", "\n  ", "1e9", "\n---\n", "&a ", "*a"]
    for _ in range(50):
        garbled = list(GOOD + "processor_kwargs: {size: {height: 1}}\nlora_target_modules: [q, 'v']\n")
        for _ in range(draw.randint(1, 6)):
            garbled[draw.randrange(len(garbled))] = draw.choice(pieces)
        with contextlib.suppress(StageError):
            resolve("".join(garbled), "lora_alpha=" + "".join(garbled[:9]))
