"""Axolotl's keys and values that are no knobs here, and what becomes of them: respelled, replaced, refused or
left out.

A key is refused as "not built yet" where nothing here does what it asks for and leaving it out would change
the training. It is left out, as one without meaning, where the kit does the same in its own way.
"""

from fnmatch import fnmatchcase

import yaml

from lib.config.checks import Wrong
from lib.config.recipe import FALSE, TEXT_TAG, TRUE, Entry, is_null, plain, source

SPELLINGS = {  # an older key: the knob and value it means where it is switched on
    "flash_attention": ("attn_implementation", "flash_attention_2"),
    "flex_attention": ("attn_implementation", "flex_attention"),
    "xformers_attention": ("attn_implementation", "xformers"),
    "sdp_attention": ("attn_implementation", "sdpa"),
    "eager_attention": ("attn_implementation", "eager"),
    "bfloat16": ("bf16", "true"),
    "float16": ("fp16", "true"),
}

REPLACED = {  # a knob: its values, what they become, why that is the same
    "attn_implementation": ("flash xformers sage", "sdpa", "another kernel with the same result"),
    "tf32": ("auto", True, "the same on every GPU that has it"),
    "optimizer": ("adamw_8bit", "adamw_bnb_8bit", "the same one under another name"),
    "excess_length_strategy": ("raise", "error", "the same under another name"),
    "gradient_checkpointing": ("unsloth", "offload", "the same under another name"),
    "lr_scheduler": ("constant_with_warmup", "constant", "every schedule here begins with the warm-up"),
}

REFUSED = {  # a knob: its values, why they can't be had, the value that can
    "optimizer": ("adamw_torch_8bit adamw_torch_4bit adamw_torch_fp8 paged_adamw paged_adamw_32bit "
                  "adamw_apex_fused adamw_hf adafactor lion_8bit lion_32bit sgd muon galore_adamw "
                  "schedule_free_adamw optimi_adamw",
                  "is not built yet, and its steps are others", "adamw_torch_fused"),
    "lr_scheduler": ("cosine_with_restarts cosine_with_min_lr polynomial rex one_cycle "
                     "inverse_sqrt warmup_stable_decay", "is not built yet", "cosine"),
    "gradient_checkpointing": ("offload_disk", "is not built yet", "offload"),
    "peft_init_lora_weights": ("pissa olora loftq eva corda",
                               "rewrites the base, so the adapter would not fit the published one", True),
    "lora_target_modules": ("all-linear", "would reach into the vision tower", None),
}

NOT_YET = {  # a key or pattern: what it asks for, and the values that mean what is done anyway
    "added_tokens_overrides": ("other words for a tokenizer's own tokens",),
    "rope_theta": ("a second key for it; write overrides_of_model_config: {rope_theta: …}",),
    "rope_scaling": ("a second key for it; write overrides_of_model_config: {rope_scaling: …}",),
    "overrides_of_model_kwargs": ("other arguments for loading",),
    "tokenizer_type": ("another tokenizer",),
    "tokenizer_config": ("another tokenizer",),
    "tokenizer_use_mistral_common": ("Mistral's own tokenizer", False),
    "quant_type": ("another kind of quantisation",),
    "gptq": ("a GPTQ base", False),
    "quantize_moe_experts": ("quantised experts", False),
    "llama4_linearized_experts": ("a rewritten Llama-4", False),
    "lora_modules_to_save": ("whole modules saved with the adapter",),
    "loraplus_lr_embedding": ("another rate for embeddings",),
    "role_boundaries": ("finding turns by their tokens; the template's render shows where they are",),
    "chat_template_jinja": ("a second key for the template; write its text into chat_template",),
    "activation_offloading": ("activations in host memory; gradient_checkpointing: offload does it", False),
    "gpu_memory_limit": ("a limit to a GPU's memory",),
    "fsdp": ("sharding by FSDP 1; fsdp_version: 2 shards the frozen base",),
    "deepspeed": ("sharding over ranks",),
    "resume_from_checkpoint": ("going on from another run's checkpoint", False, True),
    "neftune_noise_alpha": ("noise on embeddings",),
    "torch_compile": ("compiled layers", False),
    "shuffle_merged_datasets": ("rows in the order of their files", True),
    "lr_scheduler_kwargs": ("other schedules",),
    "plugins": ("other plugins than the kernels that are replaced anyway",
                "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin",
                "axolotl.integrations.liger.LigerPlugin", "axolotl.integrations.kernels.KernelsPlugin"),
    "liger_use_token_scaling": ("another weight for each token", False),
    "wandb_watch": ("gradients sent to Weights & Biases", False, "false"),
    "wandb_log_model": ("weights sent to Weights & Biases", False, "false"),
    "wandb_*": ("another setting of Weights & Biases; its own environment variables work", False, "disabled"),
    "mlflow_*": ("MLflow; 05_train/metrics.jsonl holds every figure",),
    "comet_*": ("Comet; 05_train/metrics.jsonl holds every figure",),
    "hub_model_id": ("uploading to the hub",),
    "rl": ("reinforcement learning",),
}

SAME_KERNELS = "a kernel for what PyTorch computes with the same result"
NO_MEANING = {  # a key or pattern: why it changes nothing here
    "dataset_prepared_path": "02_data keeps what it made in the run folder",
    "skip_prepare_dataset": "02_data looks at every row first, and training reads nothing else",
    "remove_unused_columns": "a sample holds what training reads and no more",
    "pad_to_sequence_len": "padding is never trained on; a batch ends within 7 tokens of its longest sample",
    "eot_tokens": "what ends a turn is seen in the chat template's render",
    "cut_cross_entropy": "logits exist for trained tokens only, a chunk at a time",
    "liger_*": SAME_KERNELS,
    "lora_*_kernel": SAME_KERNELS,
    "use_kernels": SAME_KERNELS,
    "use_scattermoe": SAME_KERNELS,
    "use_sonicmoe": SAME_KERNELS,
    "experts_implementation": SAME_KERNELS,
    "flex_attn_compile_kwargs": SAME_KERNELS,
    "gradient_checkpointing_kwargs": "checkpointing is of the non-reentrant kind, with the same gradients",
    "ddp_find_unused_parameters": "ranks may use different parameters in the same step",
    "auto_resume_from_checkpoints": "05_train goes on from its newest checkpoint by itself",
    "save_safetensors": "tensors are saved as safetensors and never otherwise",
    "dataloader_pin_memory": "05_train chooses",
    "dataloader_prefetch_factor": "05_train chooses",
    "eval_sample_packing": "held-out samples are packed where the others are; their loss is the same",
    "fsdp_config": "fsdp_version: 2 shards the language model's layers, and what trains is on every rank",
    "strict": "an unknown key, a missing weight and an unexpected one are always errors",
    "dataset_num_proc": "dataset_processes says how many processes measure",
}

NOT_YET_IN_DATASETS = """
    trust_remote_code preprocess_shards conversation message_field_training_detail
    field_human field_model
""".split()

KEYS = [key for key in (*SPELLINGS, *NOT_YET, *NO_MEANING) if "*" not in key]


def respelled(entry: Entry) -> Entry:
    """The entry under today's knob and value, if it is an older spelling that is switched on; else itself."""
    if entry.key not in SPELLINGS or source(entry.node).lower() not in TRUE:
        return entry
    key, value = SPELLINGS[entry.key]
    node = yaml.ScalarNode(TEXT_TAG, value, entry.node.start_mark, entry.node.end_mark)
    return Entry(key, entry.name, node, entry.path)


def replacement(entry: Entry) -> tuple | None:
    """(the value that replaces a knob's, words on it) or None; raises Wrong for a refused value."""
    text = entry.node.value if isinstance(entry.node, yaml.ScalarNode) else None
    values, words, instead = REFUSED.get(entry.key, ("", "", None))
    if text in values.split():
        raise Wrong(words, entry.edit(instead))
    values, instead, words = REPLACED.get(entry.key, ("", None, ""))
    return (instead, f"{text} is replaced by {instead}, {words}") if text in values.split() else None


def meaning(entry: Entry) -> str:
    """Why a key that is no knob changes nothing here; "" where nothing need be said.

    Raises Wrong where it would change something, and KeyError where Axolotl doesn't know it either.
    """
    if entry.key in SPELLINGS:                                   # one that is switched off
        return ""
    for pattern, (words, *harmless) in NOT_YET.items():
        if fnmatchcase(entry.key, pattern):
            if is_null(entry.node) or all(atom in harmless for atom in atoms(plain(entry.node))):
                return ""
            one_value = harmless and isinstance(entry.node, yaml.ScalarNode)
            fix = entry.edit(harmless[0]) if one_value else f"remove {entry.name}"
            raise Wrong(f"asks for {words}: not built yet", fix)
    for pattern, words in NO_MEANING.items():
        if fnmatchcase(entry.key, pattern):
            return "" if is_null(entry.node) else words
    raise KeyError(entry.key)


def atoms(value) -> list:
    """[scalars] of a list, [keys] of a mapping, else [the value]; yes and no are booleans."""
    if isinstance(value, list):
        return [atom for item in value for atom in atoms(item)]
    if isinstance(value, str) and value.lower() in TRUE + FALSE:
        return [value.lower() in TRUE]
    return list(value) if isinstance(value, dict) else [value]
