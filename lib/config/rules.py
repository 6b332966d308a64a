"""rules: which knobs of a recipe contradict each other, and which allowed settings seldom work.

Fork me to: add a contradiction (a row in RULES) or a warning (a row in WARNINGS). `k` is 01_config's Recipe.
"""
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

MEDIA_ROLES = ("vision", "audio", "projector")


class Rule(NamedTuple):
    """The names of knobs, with blanks between; when they contradict each other, why, and how to mend it."""

    knobs: str
    contradict: Callable
    why: str
    fix: str


def not_both(first: str, second: str, why: str) -> Rule:
    """The rule that allows only one of two knobs."""
    return Rule(f"{first} {second}", lambda k: getattr(k, first) and getattr(k, second), why,
                "remove one of them")


def adapts_experts(k) -> bool:
    """Whether a recipe puts LoRA on experts."""
    return bool(k.lora_target_parameters) or not k.lora_target_modules and "experts" in k.lora_target_roles


def is_missing(module: str) -> bool:
    """Whether a Python package is not installed; no error yet, since 05 may run on another machine."""
    return importlib.util.find_spec(module) is None


RULES = (
    Rule("fp16 bf16", lambda k: k.fp16 and k.bf16 is True, "a product has one type or the other",
         "remove one of them"),
    not_both("load_in_4bit", "load_in_8bit", "a weight has 4 bits or 8"),
    Rule("load_in_4bit adapter", lambda k: k.load_in_4bit and not k.adapter,
         "full fine-tuning can't train weights of 4 bits", "adapter: qlora, or remove load_in_4bit"),
    Rule("load_in_8bit adapter", lambda k: k.load_in_8bit and not k.adapter,
         "full fine-tuning can't train weights of 8 bits", "adapter: lora, or remove load_in_8bit"),
    Rule("load_in_8bit adapter", lambda k: k.load_in_8bit and k.adapter == "qlora",
         "qlora means a base in 4 bits, not in 8", "adapter: lora, or remove load_in_8bit"),
    Rule("load_in_4bit adapter", lambda k: k.load_in_4bit is False and k.adapter == "qlora",
         "qlora means a base in 4 bits", "adapter: lora, or remove load_in_4bit"),
    Rule("lora_model_dir adapter", lambda k: k.lora_model_dir and not k.adapter,
         "full fine-tuning trains no adapter", "adapter: lora, or remove lora_model_dir"),
    not_both("full_finetune", "adapter", "with an adapter, the model itself doesn't train"),
    Rule("full_finetune adapter", lambda k: k.full_finetune is False and not k.adapter,
         "without an adapter, the model itself trains", "adapter: lora, or remove full_finetune"),
    Rule("train_roles adapter", lambda k: k.train_roles != ["all"] and k.adapter,
         "with an adapter, only the adapter trains",
         "say where in lora_target_roles, and remove train_roles"),
    Rule("unfrozen_parameters adapter", lambda k: k.unfrozen_parameters and k.adapter,
         "with an adapter, only the adapter trains", "say where in lora_target_modules"),
    Rule("train_roles", lambda k: "all" in k.train_roles and len(k.train_roles) > 1,
         "all is more than these", "train_roles: [all], or the list without all"),
    Rule("freeze_mm_modules lora_target_roles",
         lambda k: k.freeze_mm_modules and k.adapter and set(k.lora_target_roles) & set(MEDIA_ROLES),
         "what is frozen gets no LoRA", "remove one of them"),
    Rule("freeze_mm_modules train_roles",
         lambda k: k.freeze_mm_modules and set(k.train_roles) & set(MEDIA_ROLES),
         "what is frozen doesn't train", "remove one of them"),
    not_both("lora_target_linear", "lora_target_modules", "the targets are all linear layers or the named"),
    Rule("lora_target_linear lora_target_modules",
         lambda k: k.lora_target_linear is False and not k.lora_target_modules and k.adapter,
         "LoRA has no target", "name modules, or remove lora_target_linear"),
    Rule("lora_target_parameters lora_target_roles lora_dropout peft_use_dora",
         lambda k: (k.lora_dropout or k.peft_use_dora) and k.adapter and adapts_experts(k),
         "peft's LoRA on experts has no dropout and no DoRA", "lora_dropout: 0 and peft_use_dora: false"),
    not_both("val_set_size", "test_datasets", "the rows to evaluate on come from one of them"),
    Rule("image_size image_max_pixels image_min_pixels max_image_tokens",
         lambda k: k.image_size and (k.image_max_pixels or k.image_min_pixels or k.max_image_tokens),
         "image_size fixes what the others bound", "remove image_size, or the bounds"),
    not_both("image_max_pixels", "max_image_tokens", "pictures have one upper bound, in pixels or tokens"),
    Rule("image_min_pixels image_max_pixels",
         lambda k: k.image_min_pixels and k.image_max_pixels and k.image_min_pixels > k.image_max_pixels,
         "a picture can't be larger than the one and smaller than the other",
         "give the smaller number first"),
    Rule("datasets", lambda k: any(spec["shards_idx"] >= (spec["shards"] or 1) for spec in k.datasets),
         "shards_idx counts from 0, below shards", "for example shards: 4 with shards_idx: 3 for the last"),
    Rule("test_datasets", lambda k: any(spec["weight"] != 1 for spec in k.test_datasets or ()),
         "a weight shares out an epoch, and held-out rows are in none", "remove weight from test_datasets"),
    Rule("val_set_size", lambda k: isinstance(k.val_set_size, float) and k.val_set_size >= 1,
         "this is neither a share below 1 nor a whole number of rows",
         "for example val_set_size: 0.05 or 500"),
    Rule("cosine_min_lr_ratio lr_scheduler", lambda k: k.cosine_min_lr_ratio and k.lr_scheduler != "cosine",
         "only cosine ends above zero", "lr_scheduler: cosine, or remove cosine_min_lr_ratio"),
    Rule("fsdp_version adapter", lambda k: k.fsdp_version and not k.adapter,
         "what is sharded is the frozen base below an adapter", "adapter: lora, or remove fsdp_version"),
    not_both("fsdp_version", "cache_vision_features",
             "features are kept rank by rank, and a sharded model runs on all ranks at once"),
    not_both("device_map", "fsdp_version", "one process shares a model out over GPUs, or ranks shard it"),
    not_both("device_map", "merge", "a merged model is proved on one device"),
    Rule("max_memory device_map", lambda k: k.max_memory and not k.device_map,
         "what limits a GPU's part says nothing where one holds all",
         "device_map: auto, or remove max_memory"),
    not_both("sample_packing", "group_by_length", "packed rows are full, whatever their samples' lengths"),
    Rule("attn_implementation bf16 fp16",
         lambda k: k.attn_implementation.startswith("flash") and k.bf16 is False and not k.fp16,
         "flash attention computes in 16 bits", "attn_implementation: sdpa, or bf16: auto"),
    Rule("attn_implementation sample_packing micro_batch_size",
         lambda k: k.attn_implementation.startswith("flash") and k.sample_packing and k.micro_batch_size > 1,
         "flash attention tells packed samples apart in batches of one row only",
         "micro_batch_size: 1 and more gradient_accumulation_steps, or attn_implementation: sdpa"),
    Rule("early_stopping_patience load_best_model_at_end evals_per_epoch eval_steps val_set_size "
         "test_datasets",
         lambda k: (k.early_stopping_patience or k.load_best_model_at_end)
         and not ((k.evals_per_epoch or k.eval_steps) and (k.val_set_size or k.test_datasets)),
         "nothing is evaluated, so no step is the best", "val_set_size: 0.05 with evals_per_epoch: 1"),
    Rule("warmup_ratio warmup_steps", lambda k: k.warmup_ratio is not None and k.warmup_steps is not None,
         "the warm-up is a share of the steps or a number of them", "remove one of them"),
)

WARNINGS = (  # when, on a settled recipe; what seldom works about it
    (lambda k: k.adapter and k.learning_rate > 1e-3,
     "learning_rate {learning_rate:g}: above 1e-3, LoRA seldom stays stable"),
    (lambda k: not k.adapter and k.learning_rate > 5e-5,
     "learning_rate {learning_rate:g}: above 5e-5, full fine-tuning soon damages a pretrained model "
     "(one that is trained from scratch may need it)"),
    (lambda k: k.max_steps and k.max_steps < 50,
     "max_steps {max_steps}: fewer than 50 steps seldom change a model"),
    (lambda k: k.max_steps and k.warmup_steps and k.warmup_steps >= k.max_steps,
     "warmup_steps {warmup_steps}: the run of {max_steps} steps ends before its warm-up does"),
    (lambda k: not k.val_set_size and not k.test_datasets,
     "no evaluation: neither val_set_size nor test_datasets holds rows out"),
    (lambda k: k.bnb_config_kwargs and not k.load_in_4bit and not k.load_in_8bit,
     "bnb_config_kwargs: without effect, since nothing is quantised"),
    (lambda k: k.quantize_roles != ["language"] and not k.load_in_4bit and not k.load_in_8bit,
     "quantize_roles: without effect, since nothing is quantised"),
    (lambda k: k.tf32 and k.bf16 is not False,
     "tf32: without effect, since products are of bfloat16; what stays in float32 keeps its precision"),
    (lambda k: k.revision and Path(k.base_model).is_dir(),
     "revision: without effect, since {base_model} is a folder"),
    (lambda k: k.use_tensorboard and is_missing("tensorboard"),
     "use_tensorboard: tensorboard, which 05_train needs, is not installed here: pip install tensorboard"),
    (lambda k: k.wandb_project and is_missing("wandb"),
     "wandb_project: wandb, which 05_train needs, is not installed here: pip install wandb"),
)
