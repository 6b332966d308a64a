"""01_config: a recipe becomes a configuration in which every knob has a value.

    python 01_config.py recipes/demo.yaml runs/demo [key=value ...]
    python 01_config.py --knobs          shows every knob with its default

Reads:  a flat YAML recipe in Axolotl's vocabulary, and overrides. The argument without `=` after the recipe
        is the run folder; without one, the recipe's output_dir is.
Writes: 01_config/config.json (every knob with its value: no default exists after this), 01_config/stages.json
        (the knobs that each stage reads), origin.json (the commit of a hub's model, kept from then on), and
        the run's name into runs/latest.
Source: docs.axolotl.ai/docs/config-reference.html says what the keys mean to those who write them.
Fork me to: add a knob (a line in Recipe); a contradiction or a warning is a row in lib/config/rules.py.
"""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from lib.config.checks import (
    bnb_arguments, day, filled, limits, model_overrides, name_ends, name_regexes, properties, regex,
    role_words, side, size, special_tokens, template_arguments, words)
from lib.config.kept import commit_kept, first_day
from lib.config.knobs import REQUIRED, Hook, knob, readers
from lib.config.listing import show, show_knobs
from lib.config.paths import adapter_path, chat_template, data_path, hook, metrics, model_path
from lib.config.recipe import Entry, read_text
from lib.config.resolve import as_override, read_checked, sort_arguments
from lib.config.rules import MEDIA_ROLES
from lib.run import stage, terminal
from lib.run.errors import StageError
from lib.run.ledger import write_json

# ---- the schema ------------------------------------------------------------------------------------------
# A knob a line: its name, type and default, the scripts that read it, why, its unit and limits. None is null.

Adapter = Literal["lora", "qlora"] | None
BadRow = Literal["error", "skip"]
Count = int | None
Ends = Literal["turn", "all", "last", "none"]
Excess = Literal["drop", "error", "shrink_media", "truncate"]
FileType = Literal["json", "jsonl", "csv", "tsv", "parquet", "arrow"] | None
ImageSize = int | list[int] | None
Init = Literal[True, "gaussian"]
Kernel = Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"]
Key = str | None
Loss = Literal["cross_entropy"] | Hook
Metrics = list[Literal["exact_match", "contains", "anls", "json_f1"] | Hook]
Names = list[str] | None
Optimizer = Literal["adamw_torch_fused", "adamw_torch", "adamw_bnb_8bit", "paged_adamw_8bit"] | Hook
PagesHold = Literal["none", "eval", "all"]
Rate = float | None
Rerun = bool | Literal["auto", "offload"]
Role = Literal["language", "vision", "audio", "projector", "cross_attention", "head", "embedding", "experts",
               "router"]
Roles = list[Role]
QuantisedRoles = list[Literal["language", "vision", "audio"]]
RolesOrAll = list[Role | Literal["all"]]
Resize = Literal["bilinear", "bicubic", "lanczos"]
RowType = Literal["chat_template", "sharegpt"]
Schedule = Literal["cosine", "linear", "constant"] | Hook
Spread = Literal["auto"] | None
Switch = bool | Literal["auto"]
Texts = str | list[str] | None
Turns = list[Literal["system", "user", "assistant", "tool"]]
MODEL = "02 03 04 05 06"


@dataclass(kw_only=True)
class Dataset:
    """One entry of `datasets` or `test_datasets`."""

    path: str                        = knob(REQUIRED, "02", "a file, a folder or a hub id", check=data_path)
    name: str | None                 = knob(None, "02", "which configuration of a hub's data set")
    revision: str | None             = knob(None, "02", "branch, tag or commit on the hub; null: main")
    data_files: Texts                = knob(None, "02", "files taken of a folder or hub id", check=filled)
    ds_type: FileType                = knob(None, "02", "the format of a file; null: by its name")
    split: str | None                = knob(None, "02", "rows to take: train, train[:1%], train[500:]")
    weight: float                    = knob(1.0, "02", "times a sample is seen per epoch; 0.5: half", above=0)
    media_root: str | None           = knob(None, "02", "the media's folder; null: beside the data file")
    type: RowType                    = knob("chat_template", "02", "rows are conversations")
    field_messages: str | None       = knob(None, "02", "column of the conversation; null: the usual ones")
    field_tools: str                 = knob("tools", "02", "the column that holds the tools on offer")
    field_thinking: str | None       = knob(None, "02", "older: message_property_mappings.reasoning_content")
    message_property_mappings: dict  = knob({}, "02", "{property of a message: its key}", check=properties)
    message_field_role: str | None   = knob(None, "02", "older: message_property_mappings.role")
    message_field_content: Key       = knob(None, "02", "older: message_property_mappings.content")
    message_field_training: str      = knob("train", "02", "the key of a message that says if it is trained")
    roles: dict                      = knob({}, "02", "{role: words by which rows name it}", check=role_words)
    system_prompt: str | None        = knob(None, "02", "a system message for rows that have none")
    drop_system_message: bool        = knob(False, "02", "remove the rows' own system messages")
    shards: int | None               = knob(None, "02", "take one of N seeded parts of its rows", low=1)
    shards_idx: int                  = knob(0, "02", "which of the shards is taken, from 0", low=0)
    chat_template: str | None        = knob(None, "02", "null: the recipe's template", check=chat_template)
    train_on_inputs: bool | None     = knob(None, "02", "null: the recipe's train_on_inputs")
    roles_to_train: Turns | None     = knob(None, "02", "null: the recipe's roles_to_train", check=filled)
    train_on_eos: Ends | None        = knob(None, "02", "null: the recipe's train_on_eos")


Datasets = list[Dataset]


@dataclass(kw_only=True)
class Recipe:
    """Every knob of the kit."""

    # The model
    base_model: str                  = knob(REQUIRED, MODEL, "a hub id or a folder", check=model_path)
    revision: str | None             = knob(None, MODEL, "branch, tag or commit on the hub; null: main")
    trust_remote_code: bool          = knob(False, MODEL, "run Python code that comes with the checkpoint")
    model_type: str | None           = knob(None, "03", "a transformers class; null: by config.json")
    processor_type: str | None       = knob(None, "02", "a processor class; null: the checkpoint's")
    processor_kwargs: dict           = knob({}, "02", "arguments for the processor, saved with it")
    special_tokens: dict             = knob({}, "02 03", "{bos_token: <s>, …}", check=special_tokens)
    tokens: list[str]                = knob([], "02 03", "words to add as single tokens", check=words)
    chat_template: str | None        = knob(None, "02", "null: the checkpoint's own", check=chat_template)
    chat_template_kwargs: dict       = knob({}, "02", "arguments for the template", check=template_arguments)
    template_date: str | None        = knob(None, "02 06", "date printed; null: of first run", check=day)
    load_in_4bit: bool | None        = knob(None, "03", "quantise the frozen base to 4 bits; null: if qlora")
    load_in_8bit: bool               = knob(False, "03", "quantise the frozen base to 8 bits")
    quantize_roles: QuantisedRoles   = knob(["language"], "03", "roles to quantise", check=filled)
    bnb_config_kwargs: dict          = knob({}, "03", "bitsandbytes' arguments", check=bnb_arguments)
    attn_implementation: Kernel      = knob("sdpa", "03", "attention kernel; sdpa where it is lacking")
    bf16: Switch                     = knob("auto", "03 05", "auto: refuse GPUs without it; false: float32")
    fp16: bool                       = knob(False, "03", "float16, for cards without bfloat16 (T4, V100)")
    overrides_of_model_config: dict  = knob({}, "03", "rope_theta, rope_scaling, …", check=model_overrides)
    tf32: bool                       = knob(False, "05", "float32 products in TF32; only with bf16: false")

    # The data
    datasets: Datasets               = knob(REQUIRED, "02", "the rows to train on", check=filled)
    test_datasets: Datasets | None   = knob(None, "02", "the rows to evaluate on", check=filled)
    val_set_size: int | float        = knob(0, "02", "rows held out for evaluation: number or share", low=0)
    train_on_inputs: bool            = knob(False, "02", "train on all turns, not just the assistant's")
    roles_to_train: Turns            = knob(["assistant"], "02", "whose turns are trained", check=filled)
    train_on_eos: Ends               = knob("turn", "02", "which ends of turns train; turn: of trained turns")
    sequence_len: int                = knob(2048, "02 03 05", "longest sample, with media", "tokens", low=1)
    excess_length_strategy: Excess   = knob("drop", "02", "what becomes of longer samples; media stay whole")
    max_images: int | None           = knob(None, "02", "most pictures in a row; others are rejected", low=0)
    image_max_pixels: int | None     = knob(None, "02", "larger ones are shrunk; null: checkpoint's", low=1)
    image_min_pixels: int | None     = knob(None, "02", "smaller pictures are enlarged to it", low=1)
    max_image_tokens: int | None     = knob(None, "02", "the most tokens that a picture may take", low=1)
    image_size: ImageSize            = knob(None, "02", "fit pictures into N or [width, height]", check=side)
    image_resize_algorithm: Resize   = knob("bilinear", "02", "how image_size resizes pictures")
    video_fps: float                 = knob(2.0, "02", "frames taken of a clip", "per second", above=0)
    video_max_frames: int            = knob(32, "02", "most frames of a clip, evenly spread", "frames", low=1)
    url_timeout_seconds: float       = knob(30.0, "02", "how long to wait for a server", "seconds", above=0)
    url_max_mib: float               = knob(64.0, "02", "the largest medium behind a url", "MiB", above=0)
    url_retries: int                 = knob(3, "02", "how often to try again where a server fails", low=0)
    url_hosts: list[str]             = knob([], "02", "private hosts from which media may be fetched")
    dataset_processes: int | None    = knob(None, "02", "null: one for each core", low=1, identity=False)
    on_bad_row: BadRow               = knob("error", "02", "after all rows are read: stop, or skip bad ones")

    # What trains
    adapter: Adapter                 = knob(None, "04 05 06", "null: full fine-tuning; qlora: LoRA on 4 bits")
    lora_r: int                      = knob(16, "04", "rank of the update", low=1)
    lora_alpha: int | float          = knob(32, "04", "the update is scaled by lora_alpha / lora_r", above=0)
    lora_dropout: float              = knob(0.0, "04", "share of adapter inputs dropped", low=0, below=1)
    lora_target_roles: Roles         = knob(["language"], "04", "roles whose layers get LoRA", check=filled)
    lora_target_linear: bool | None  = knob(None, "01", "LoRA on all linear layers of the roles")
    lora_target_modules: Texts       = knob(None, "04", "layers: a regex, or last names", check=regex)
    lora_target_parameters: Texts    = knob(None, "04", "experts, by names' ends", check=name_ends)
    lora_model_dir: str | None       = knob(None, "04", "an adapter to train further", check=adapter_path)
    peft_use_dora: bool              = knob(False, "04", "DoRA: magnitudes learned apart from directions")
    peft_use_rslora: bool            = knob(False, "04", "rsLoRA: scaled by lora_alpha / sqrt(lora_r)")
    peft_init_lora_weights: Init     = knob(True, "04", "how A begins (true: Kaiming); B begins at zero")
    train_roles: RolesOrAll          = knob(["all"], "04 05", "roles to fully fine-tune", check=filled)
    unfrozen_parameters: Names       = knob(None, "04 05", "regexes: only these train", check=name_regexes)
    freeze_mm_modules: bool          = knob(False, "01", "take vision, audio, projector out of train_roles")
    full_finetune: bool | None       = knob(None, "01", "must agree with adapter; null: follows it")

    # The training
    micro_batch_size: int            = knob(1, "05", "rows in one forward pass of one rank", low=1)
    gradient_accumulation_steps: int = knob(1, "05", "forward passes in an optimizer step", low=1)
    num_epochs: int | float          = knob(1, "05", "passes over the data", above=0)
    max_steps: int | None            = knob(None, "05", "optimizer steps, in place of num_epochs", low=1)
    optimizer: Optimizer             = knob("adamw_torch_fused", "05", "AdamW, or your function", check=hook)
    lr_scheduler: Schedule           = knob("cosine", "05", "the learning rate after the warm-up", check=hook)
    loss: Loss                       = knob("cross_entropy", "05", "a token's, or your function", check=hook)
    cosine_min_lr_ratio: float       = knob(0.0, "05", "cosine's last rate, as a share", low=0, below=1)
    learning_rate: float             = knob(2e-4, "05", "the highest learning rate", above=0)
    learning_rate_vision: Rate       = knob(None, "05", "the vision tower's; null: learning_rate", above=0)
    learning_rate_audio: Rate        = knob(None, "05", "the audio tower's; null: learning_rate", above=0)
    learning_rate_projector: Rate    = knob(None, "05", "the projector's; null: learning_rate", above=0)
    loraplus_lr_ratio: float         = knob(1.0, "05", "LoRA+: how much faster B learns than A", above=0)
    warmup_ratio: float | None       = knob(None, "05", "warm-up, share of steps; null: 0.03", low=0, below=1)
    warmup_steps: int | None         = knob(None, "05", "steps of warm-up, in place of warmup_ratio", low=0)
    weight_decay: float              = knob(0.0, "05", "AdamW's weight decay, on matrices only", low=0)
    weight_decay_vision: Rate        = knob(None, "05", "the vision tower's; null: weight_decay", low=0)
    weight_decay_audio: Rate         = knob(None, "05", "the audio tower's; null: weight_decay", low=0)
    weight_decay_projector: Rate     = knob(None, "05", "the projector's; null: weight_decay", low=0)
    adam_beta1: float                = knob(0.9, "05", "decay of AdamW's mean of gradients", low=0, below=1)
    adam_beta2: float                = knob(0.999, "05", "decay of AdamW's mean of squares", low=0, below=1)
    adam_epsilon: float              = knob(1e-8, "05", "keeps AdamW's division finite", above=0)
    max_grad_norm: float             = knob(1.0, "05", "a larger gradient norm is scaled to it", above=0)
    fsdp_version: int | None         = knob(None, "05", "2: shard the base", low=2, high=2, identity=False)
    device_map: Spread               = knob(None, "03 05 06", "auto: spread over GPUs", identity=False)
    max_memory: dict | None          = knob(None, "03 05 06", "{0: 20GiB, …}", check=limits, identity=False)
    sample_packing: bool             = knob(False, "05", "put several samples into a row of sequence_len")
    cache_vision_features: bool      = knob(False, "05", "run a frozen tower once for each picture")
    group_by_length: bool            = knob(False, "05", "samples of a step are of similar length")
    gradient_checkpointing: Rerun    = knob("auto", "05", "auto: as far as needed", identity=False)
    seed: int                        = knob(42, "02 04 05", "of split, adapter, order", low=0, high=2**32 - 1)
    golden_rows: int                 = knob(4, "05", "held-out rows whose logits 06 compares", low=1)
    early_stopping_patience: Count   = knob(None, "05", "evaluations without a gain; null: off", low=1)
    load_best_model_at_end: bool     = knob(False, "05", "save the best evaluation's weights, not the last")
    metric_for_best_model: str       = knob("eval_loss", "05", "the evaluation's figure that picks the best")
    greater_is_better: bool | None   = knob(None, "05", "null: false if the metric ends in loss")
    skip_nonfinite: int              = knob(0, "05", "steps that may have a non-finite loss", low=0)
    logging_steps: int               = knob(1, "05", "show every N steps", low=1, identity=False)
    evals_per_epoch: int             = knob(1, "05", "evaluations in an epoch", low=0, identity=False)
    eval_steps: int | None           = knob(None, "05", "every N, not evals_per_epoch", low=1, identity=False)
    eval_answer_rows: int            = knob(0, "05", "held-out rows that each evaluation answers", low=0)
    eval_max_new_tokens: int         = knob(64, "05", "longest answer in an evaluation", "tokens", low=1)
    eval_metrics: Metrics            = knob(["exact_match", "contains", "anls"], "05 06", "scores of answers",
                                            check=metrics)
    saves_per_epoch: int             = knob(1, "05", "checkpoints in an epoch", low=0, identity=False)
    save_steps: int | None           = knob(None, "05", "every N, not saves_per_epoch", low=1, identity=False)
    save_total_limit: int            = knob(3, "05", "newest checkpoints to keep", low=1, identity=False)
    use_tensorboard: bool            = knob(False, "05", "figures to RUN/tensorboard", identity=False)
    wandb_project: str | None        = knob(None, "05", "where figures are sent", identity=False)
    wandb_entity: str | None         = knob(None, "05", "who owns wandb_project", identity=False)
    wandb_name: str | None           = knob(None, "05", "the run's; null: its folder's name", identity=False)
    dataloader_num_workers: int      = knob(0, "05", "processes that encode", low=0, identity=False)

    # What comes out
    report_media: PagesHold          = knob("all", "02 06", "whose pictures pages may embed")
    answer_rows: int                 = knob(64, "06", "held-out rows answered before and after", low=0)
    max_new_tokens: int              = knob(64, "06", "longest answer", "tokens", low=1)
    merge: bool                      = knob(False, "06", "also write base and adapter merged as one model")
    max_shard_size: str | None       = knob(None, "06", "largest merged file; null: as base", check=size)
    output_dir: str | None           = knob(None, "01", "the run folder; null: runs/ and the recipe's name")


# ---- a recipe to a configuration -----------------------------------------------------------------------


def configure(recipe_path: Path, text: str, overrides=()) -> tuple[Recipe, dict[str, Entry], list]:
    """(the Recipe of a text, {knob: the entry that gave its value}, notes as (key, words)).

    Raises StageError with all problems of the recipe at once.
    """
    reading = read_checked(Recipe, recipe_path, text, overrides)
    return settle(Recipe(**reading.values), recipe_path), reading.given, reading.notes


def settle(k: Recipe, recipe_path: Path) -> Recipe:
    """The Recipe, with knobs that follow from others filled in; no value depends on this machine."""
    k.load_in_4bit = k.adapter == "qlora" or bool(k.load_in_4bit)
    k.full_finetune = k.adapter is None
    k.lora_target_linear = k.lora_target_modules is None
    if k.warmup_ratio is None and k.warmup_steps is None:
        k.warmup_ratio = 0.03
    if k.freeze_mm_modules and k.train_roles == ["all"] and not k.adapter:
        k.train_roles = [role for role in Role.__args__ if role not in MEDIA_ROLES]
    if k.greater_is_better is None:
        k.greater_is_better = not k.metric_for_best_model.endswith("loss")
    k.output_dir = k.output_dir or f"runs/{recipe_path.stem}"
    return k


# ---- the command -----------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Write the run's 01_config/ from the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="RECIPE [RUN] [key=value ...]")
    parser.add_argument("--force", action="store_true", help="run in any case; what it replaces is STEM.old")
    parser.add_argument("--knobs", action="store_true", help="show every knob, and do nothing else")
    args, unknown = parser.parse_known_args(argv)
    if args.knobs:
        return show_knobs(Recipe)
    if unknown:
        raise StageError(f"{unknown[0]}: no such flag", f"knobs go without dashes: {as_override(*unknown)}")

    # 1. Read the whole recipe; where something in it is wrong, this stops before anything is written.
    recipe_path, run, overrides = sort_arguments(args.words)
    text, sha256 = read_text(recipe_path)
    k, given, notes = configure(recipe_path, text, overrides)
    k.output_dir = run or k.output_dir
    run = Path(k.output_dir)
    k.template_date = k.template_date or first_day(run)
    # 2. Start the stage, unless its outputs are still true.
    given_words = {"recipe": str(recipe_path), "overrides": overrides}
    decision = stage.decide("01_config", run, args.force, knobs=given_words)
    pinned = commit_kept(run, k.base_model, k.revision) if decision.action == "run" else None
    work = stage.begin(decision)
    stage.remember_latest(run)
    if work is None:
        return
    work.uses(recipe_path, sha256)
    # 3. Write every knob, and who reads it.
    if pinned:
        terminal.say(f"{k.base_model}: {pinned['revision']} is commit {pinned['commit']}")
        k.revision = pinned["commit"]
        write_json(work.path / "origin.json", pinned)
    write_json(work.path / "config.json", asdict(k))
    write_json(work.path / "stages.json", readers(Recipe) | {"given": sorted(given)})
    show(k, given, notes, Dataset)
    work.finish()


if __name__ == "__main__":
    stage.run_script(main)
