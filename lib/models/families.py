"""families: what the kit knows about a model family, in one record per family and nowhere else.

A record holds facts and names of strategies, never code: each strategy (`collate="stack"`) is written once,
where it is used. A model type without a record gets a generic one, whose roles are guessed (roles.py).

Fork me to: add a family (one `Family(...)` below and one builder in tests/zoo).
"""
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Family:
    """One family's facts. Module paths are those of the loaded model, as `named_modules()` gives them.

    A field that says why something can't be done is empty where it can.
    """
    name: str
    model_types: tuple[str, ...]
    roles: dict[str, str] = field(default_factory=dict)   # module path -> role; the longest path wins
    wrappers: tuple[str, ...] = ()       # tokens that the template, not the processor, puts around media
    collate: str = "cat"                 # how media make a batch: "cat", "line" or "stack" of lib/collator.py
    batch: str = "any"                   # which rows share a batch: a rule of SHARING in batches/sampler.py
    idle: str = ""                       # which parameters no forward reaches: a rule in roles.idle_modules
    no_lora: tuple[str, ...] = ()        # path components that LoRA leaves alone, with linear layers in them
    no_quant: tuple[str, ...] = ()       # path components that bitsandbytes or the model can't run quantised
    new_tokens: str = ""                 # why it can't have more tokens
    expert_lora: str = ""                # why LoRA can't be put on its experts
    eager: tuple[str, ...] = ()          # sub-configs whose part of the model has no sdpa attention
    no_flash: str = ""                   # why flash attention would compute something else for it
    uncast: str = ""                     # a module that takes pictures in the dtype of its weights only
    longest_sound_seconds: float | None = None            # the processor silently cuts longer sounds
    one_kind: bool = False               # a row can't have pictures and clips: one is taken for the other
    prefix: bool = False                 # a prompt's tokens see one another, up to where the reply begins
    float16: str = ""                    # why it can't compute in float16
    packing: str = ""                    # why samples can't share a row
    block_masks: tuple[str, ...] = ()    # kinds of layers where all tokens of a picture see one another
    pixels: str = ""                     # how pictures are bounded: a strategy in lib/media/resolution.py
    unbounded: str = "makes every picture of one size"    # why pictures can't be bounded, without a strategy
    template: str = ""                   # in lib/text/templates, where the published checkpoint has none
    template_names: tuple[str, ...] = () # what Axolotl's recipes call its own chat template
    special_tokens: dict[str, str] = field(default_factory=dict)    # {name: token} that its tokenizer lacks
    packages: dict[str, str] = field(default_factory=dict)          # {module: pip name and version} it needs
    transformers: str = ""               # the oldest that it works with, where the kit's own is too old
    absent: dict[str, str] = field(default_factory=dict)  # {module: pip name} of kernels that need CUDA, and
    #                                      that transformers takes wherever they are installed
    unread: tuple[str, ...] = ()         # regexes on tensors of its checkpoints that the class has no use for
    use_instead: dict[str, str] = field(default_factory=dict)       # published id -> the same model converted
    first_loss_note: str = ""            # why a high first loss is no sign of a mistake here, and who says so
    note: str = ""


TOWER = {"model.vision_tower": "vision", "model.multi_modal_projector": "projector",
         "model.language_model": "language"}
VISUAL = {"model.visual": "vision", "model.visual.merger": "projector", "model.language_model": "language"}
QWEN_WRAPPERS = ("<|vision_start|>", "<|vision_end|>")
STATE = "its layers hand a state from token to token, over the border between samples"
PREFIX = "a prompt's tokens see one another, up to where the reply begins"
OVERFLOW = "its activations pass 65504, the largest number there, and become infinite"
CONVOLUTION = {"causal_conv1d": "causal-conv1d"}
GEMMA_WRAPPERS = ("<start_of_image>", "<end_of_image>", "<start_of_audio>", "<end_of_audio>")
GLM_WRAPPERS = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")

FAMILIES = (
    Family("LLaVA-1.5 and Pixtral", ("llava",), TOWER, pixels="edge", idle="after_feature_layer",
           template_names=("llava", "pixtral"),
           use_instead={"mistralai/Pixtral-12B-2409": "mistral-community/pixtral-12b"}
           | {f"liuhaotian/llava-v1.5-{size}": f"llava-hf/llava-1.5-{size}-hf" for size in ("7b", "13b")}
           | {f"liuhaotian/llava-v1.6-{size}": f"llava-hf/llava-v1.6-{size}-hf"
              for size in ("vicuna-7b", "vicuna-13b", "mistral-7b", "34b")},
           note="Pixtral is this model type around a Mistral and its own tower"),
    Family("Mistral-Small 3.1 and 4, Magistral", ("mistral3",), TOWER, pixels="edge",
           template="mistral.jinja",
           template_names=("mistral_v7_tekken",),
           no_quant=("kv_b_proj",),                                 # mistral4's, whose input has 4 dimensions
           special_tokens={"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
           use_instead={"mistralai/Mistral-Small-4-119B-2603":      # published in 8-bit floats
                        "axolotl-ai-co/Mistral-Small-4-119B-2603-BF16"},
           first_loss_note="Magistral's loss and gradient are known to start high (Axolotl's guide warns of "
                           "it and knows no cause)",
           note="Mistral-Small-4 is this type around mistral4 (MLA, experts); Magistral ships no template"),
    Family("Mllama", ("mllama",),
           {"model.vision_model": "vision", "model.multi_modal_projector": "projector",
            "model.language_model": "language"},
           collate="stack", batch="alike", template_names=("llama3_2_vision",),
           packing="tokens before a picture attend to all pictures of the row",
           no_flash="which tokens see which picture is a mask that flash attention doesn't know",
           note="pictures enter by cross-attention; only rows with equally many share a batch"),
    Family("Llama-4", ("llama4",),
           {"vision_model": "vision", "vision_model.vision_adapter": "projector",
            "multi_modal_projector": "projector", "language_model": "language"},
           pixels="tiles", template_names=("llama4",), uncast="vision_model",
           no_quant=("patch_embedding",),                           # would keep the pixels' type for its norm
           use_instead={f"meta-llama/Llama-4-{name}-Original": f"meta-llama/Llama-4-{name}" for name in
                        ("Scout-17B-16E", "Scout-17B-16E-Instruct", "Maverick-17B-128E",
                         "Maverick-17B-128E-Instruct")},
           note="experts train only by lora_target_parameters"),
    Family("Gemma-3", ("gemma3",), TOWER, block_masks=("full_attention", "sliding_attention"),
           template_names=("gemma3",), float16=OVERFLOW,
           note="picture tokens attend in both directions, by token_type_ids"),
    Family("Gemma-3n", ("gemma3n",),
           {"model.vision_tower": "vision", "model.audio_tower": "audio", "model.embed_vision": "projector",
            "model.embed_audio": "projector", "model.language_model": "language"},
           wrappers=GEMMA_WRAPPERS, longest_sound_seconds=30, no_lora=("altup",),
           no_quant=("altup",),                                     # whose forward reads the weights itself
           new_tokens="ids above its vocabulary mean pictures and sounds to it",
           packages={"timm": "timm==1.0.31"}, transformers="5.23",  # before, it wrote where it didn't say
           template_names=("gemma3n",), float16=OVERFLOW,
           first_loss_note="Gemma-3n's loss and gradient are known to start high (Axolotl's guide suspects "
                           "the convolutions of its tower)"),
    Family("Gemma-4", ("gemma4",),
           {"model.vision_tower": "vision", "model.audio_tower": "audio", "model.embed_vision": "projector",
            "model.embed_audio": "projector", "model.language_model": "language"},
           pixels="levels",
           wrappers=("<|image>", "<image|>", "<|audio>", "<audio|>"), longest_sound_seconds=30,
           block_masks=("sliding_attention",), eager=("audio_config",),
           no_flash="its heads are up to 512 wide, and flash attention's at most 256",
           template_names=("gemma4", "gemma4_unified")),
    Family("PaliGemma", ("paligemma",), TOWER, prefix=True, template="paligemma.jinja", packing=PREFIX,
           no_flash=f"{PREFIX}, a mask that flash attention doesn't know",
           transformers="5.23",             # before, its processor wrote where it didn't say
           note="each reply is a sample of its own, with all before it as its prompt"),
    Family("Qwen2-VL", ("qwen2_vl",), VISUAL, QWEN_WRAPPERS, pixels="area", template_names=("qwen2_vl",)),
    Family("Qwen2.5-VL", ("qwen2_5_vl",), VISUAL, QWEN_WRAPPERS, pixels="area", template_names=("qwen2_vl",),
           note="native resolution; 3-D rope from mm_token_type_ids and image_grid_thw"),
    Family("Qwen3-VL", ("qwen3_vl", "qwen3_vl_moe"),
           VISUAL | {"model.visual.deepstack_merger_list": "projector"}, QWEN_WRAPPERS,
           pixels="area", template_names=("qwen2_vl",)),
    Family("Qwen3.5", ("qwen3_5", "qwen3_5_moe"), VISUAL, QWEN_WRAPPERS, pixels="area", packing=STATE,
           template_names=("qwen3_5",),
           absent=CONVOLUTION | {"fla": "flash-linear-attention"},
           note="linear attention; earlier turns lose their thoughts, so each reply is a sample of its own"),
    Family("GLM-4.1V and 4.6V", ("glm4v", "glm46v"), VISUAL, GLM_WRAPPERS, pixels="area_of_two",
           batch="clips_apart", one_kind=True,
           note="a clip's frames are pictures to it, so that clips share no row and no batch with pictures"),
    Family("GLM-4.5V and 4.6V, experts", ("glm4v_moe",), VISUAL, GLM_WRAPPERS, pixels="area_of_two",
           batch="clips_apart",
           one_kind=True, no_lora=("gate_proj", "up_proj", "down_proj"),
           note="LoRA on attention only: peft moves adapters on gate, up and down to the experts by itself"),
    Family("SmolVLM2", ("smolvlm",),
           {"model.vision_model": "vision", "model.connector": "projector", "model.text_model": "language"},
           pixels="edge_of_tiles",
           collate="stack", one_kind=True, packages={"num2words": "num2words==0.5.14"},
           note="tiles with row and column tokens; padding tiles are all zero"),
    Family("LFM2-VL", ("lfm2_vl",), TOWER, pixels="tiles_or_tokens", packing=STATE, absent=CONVOLUTION),
    Family("InternVL", ("internvl",), TOWER, pixels="tiles", one_kind=True,
           use_instead={f"OpenGVLab/InternVL3-{size}": f"OpenGVLab/InternVL3-{size}-hf"
                        for size in ("1B", "2B", "8B", "9B", "14B", "38B", "78B")}
           | {f"OpenGVLab/InternVL3_5-{size}": f"OpenGVLab/InternVL3_5-{size}-HF"
              for size in ("1B", "2B", "4B", "8B", "14B", "38B", "30B-A3B", "241B-A28B")}),
    Family("MiniCPM-V", ("minicpmv4_6", "minicpmv4_7", "minicpm_ocr"),
           {"model.vision_tower": "vision", "model.merger": "projector", "model.language_model": "language"},
           unbounded="sizes pictures by their shape, and no setting of its processor bounds them",
           collate="line", packing=STATE,
           wrappers=("<image>", "</image>", "<slice>", "</slice>", "<image_id>", "</image_id>"),
           absent=CONVOLUTION | {"fla": "flash-linear-attention"},
           note="a Qwen3.5 behind a SigLIP tower; all patches of a batch lie in one line"),
    Family("PaddleOCR-VL", ("paddleocr_vl",),
           {"model.visual": "vision", "model.projector": "projector", "model.language_model": "language"},
           pixels="area", wrappers=("<|IMAGE_START|>", "<|IMAGE_END|>")),
    Family("Voxtral", ("voxtral",),
           {"model.audio_tower": "audio", "model.multi_modal_projector": "projector",
            "model.language_model": "language"},
           template="mistral.jinja",
           packages={"mistral_common": "mistral-common[audio]==1.13.1", "soundfile": "soundfile==0.14.0"},
           transformers="5.23",
           note="its processor reads conversations only; here a template of ours writes them as text"),
)
