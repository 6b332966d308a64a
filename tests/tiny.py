"""A tiny checkpoint of any model type, without a line about the type: its classes' defaults, made small.

Numbers are known by their names. Every width becomes 64, of towers as of the language model, so that what was
equal stays equal; layers are two, or one of each kind; pictures have 32 pixels a side in patches of 8. The
processor is the type's own class, around its own preparation of pictures and a byte-level tokenizer with the
special tokens that the class's source names.
"""
import copy
import inspect
import itertools
import re
import sys
from collections import Counter
from pathlib import Path

import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES as EARS
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES as EYES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MODELS
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES as PROCESSORS
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES as FILMS

from tests.zoo.checkpoint import Parts
from tests.zoo.vocabulary import gpt_like

WIDTH, HEADS, LAYERS, SIDE, PATCH, EXPERTS = 64, 4, 2, 32, 8, 4
HEAD = WIDTH // HEADS
END = "<|end|>"
TURNS = ("<s>", "<pad>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", END)
SPARE = [f"<spare_{n}>" for n in range(24)]                        # for ids that only a configuration names
GRID = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
# A picture's placeholder stands where IMAGE is written here.
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}IMAGE\n{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")
TURN = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]

# The largest that a number of a configuration may be: the first pattern that fits its whole name counts.
LARGEST = (
    (r"(num|in|out)_channels|(spatial_)?merge_size|temporal_\w+|max_position_embeddings", 4096),
    (r"(image|min_image|max_image|max_img)_size|resolution|sliding_window\w*", SIDE),
    (r"(\w+_)?patch_size", PATCH),
    (r"(moe|share)\w*(intermediate_size|_dim)", WIDTH // 2),
    (r"\w*(intermediate_size|ffn_dim|mlp_dim|ffn_hidden_size|d_ff)", 2 * WIDTH),
    (r"\w*(head_dim|d_kv|dim_head)", HEAD),
    (r"\w*lora_rank", WIDTH // 2),
    (r"\w*(num_heads|n_heads|attention_heads|key_heads|value_heads|resampler_heads)", HEADS),
    (r"num_kv_shared_layers|num_nextn_predict_layers", 0),
    (r"(num|n)_(routed_|local_)?experts|moe_num_experts", EXPERTS),
    (r"num_experts_per_tok|moe_k|moe_topk|top_k_experts", 2),
    (r"first_k_dense_replace|n_group|topk_group|\w*layer_id", 1),
    (r"\w*(hidden_size|embed_dim|d_model|hidden_dim|output_dim|output_proj_dims|projection_dim|proj_dim|patch_dim"
     r"|adapter_\w+_(dim|size))", WIDTH),
)
DEPTH = r"\w*(num_\w*layers|n_layers|encoder_layers|decoder_layers|layers)|depth"
PLACES = r"\w*(indexes|indices|idxs|layer_ids?|_layers|vision_feature_layer)"      # lists of layers' numbers
ID = re.compile(r"_token_(id|index)$|^im_\w+_id$|^image_patch_id$")
ASKED = re.compile(r"""tokenizer(?:\.|, ["'])(?!add_|bos|eos|pad|unk|sep|cls|mask)(\w+_token(?:_id)?)\b""")
KINDS = ("layer_types", "mlp_layer_types", "indexer_types", "layers_block_type")    # lists of layers' kinds
UNSET = {"head_dim": HEAD, "mlp_layer_types": ["dense", "sparse"], "deepstack_layer_map": [[0, 0], [1, 1]],
         "spatial_target_layers": [0, 1], "downsample_rate": "2/4",      # what some types have no default for
         "num_experts": EXPERTS, "top_k_experts": 2, "moe_intermediate_size": WIDTH // 2, "logit_scale": 0.5,
         "indexer_n_heads": HEADS, "indexer_kv_heads": 1, "indexer_head_dim": HEAD, "indexer_budget": WIDTH,
         "indexer_compress_ratio": 4}
# A tower of timm's has no sizes of its own, but its architecture's, and what it is given.
TIMM = {"architecture": "vit_pe_core_tiny_patch16_384",
        "model_args": {"embed_dim": WIDTH, "img_size": [SIDE] * 2, "patch_size": PATCH, "depth": LAYERS,
                       "num_heads": HEADS, "global_pool": "", "ref_feat_shape": [SIDE // PATCH] * 2}}


# ---- the configuration ----

def configuration(model_type: str, vocabulary: int = 400, ids=None, times: int = 1):
    """The type's configuration, small; `ids` gives {name: token id} for those that it holds.

    times: how many times larger than SIDE its pictures are.
    """
    cls = CONFIG_MAPPING[model_type]
    values = cls().to_dict()
    for name, part in cls.sub_configs.items():
        if "vision" in name and values.get(name) is None and hasattr(part, "model_type"):
            values[name] = part().to_dict()
    values = enlarged(small(values, vocabulary), times)
    source = inspect.getsource(sys.modules[getattr(transformers, MODELS[model_type]).__module__])
    for name in re.findall(r"self\.config\.(\w+_token_id)\b", source):
        values.setdefault(name, 0)
    text = values.get("text_config") or values
    if "create_sliding_window_causal_mask(" in source and text.get("sliding_window", 0) is None:
        text["sliding_window"] = SIDE                              # some make this mask for no layer
    if "rope_parameters[layer_type]" in source and text.get("rope_parameters", 0) in (None, {}):
        text["rope_parameters"] = {kind: {"rope_type": "default", "rope_theta": 10_000.0}
                                   for kind in text["layer_types"]}
    values = with_ids(values, ids or (lambda name: 0))
    return cls.from_dict(values)


def enlarged(values: dict, times: int) -> dict:
    """The dictionary with larger pictures."""
    return {key: enlarged(value, times) if isinstance(value, dict) else
            times * value if (key, value) == ("image_size", SIDE) else value for key, value in values.items()}


def small(values: dict, vocabulary: int) -> dict:
    """A configuration's dictionary with every size in it small."""
    if values.get("model_type") == "timm_wrapper" and not values.get("model_args"):
        return values | TIMM
    kinds = {key: list(dict.fromkeys(values[key])) for key in KINDS if values.get(key)}
    depth = max([LAYERS, *map(len, kinds.values())])
    layers = next((values[key] for key in ("num_hidden_layers", "depth", "num_layers")
                   if isinstance(values.get(key), int)), 0)
    found = {}
    for key, value in values.items():
        if key in kinds:
            found[key] = [kinds[key][n % len(kinds[key])] for n in range(depth)]
        elif key == "per_layer_config" and value:
            found[key] = {depth - 1: small(next(iter(value.values())), vocabulary)}
        elif isinstance(key, str) and key.startswith("rope") and isinstance(value, dict):
            found[key] = small_rope(value, values)
        elif value is None and key in UNSET:
            found[key] = UNSET[key]
        elif key == "num_position_embeddings":
            found[key] = (SIDE // PATCH) ** 2
        elif isinstance(value, dict):
            found[key] = small(value, vocabulary) if "label" not in str(key) else value
        elif isinstance(value, list) and value:
            found[key] = value[:depth] if len(value) == layers > LAYERS else small_list(key, value, depth)
        else:
            found[key] = small_number(key, value, values, depth, vocabulary) if type(value) is int else value
    return found


def small_number(key, value: int, around: dict, depth: int, vocabulary: int) -> int:
    """One number of a configuration; `around` is the dictionary that it stands in."""
    if not isinstance(key, str) or value <= 0:
        return value
    if "vocab_size" in key:
        return vocabulary
    if re.fullmatch(DEPTH, key) and not re.fullmatch(r"num_(kv_shared|nextn_predict)_layers", key):
        return min(value, depth)
    if re.fullmatch(r"\w*(key_value_heads|kv_heads)", key):
        return HEADS if value == around.get("num_attention_heads") else min(value, HEADS // 2)
    halves = [around.get(f"qk_{half}_head_dim") or 0 for half in ("nope", "rope")]
    if key.endswith("head_dim") and 0 not in halves and value == sum(halves):
        return 2 * HEAD                   # the one and the other half
    if key == "out_hidden_size":          # a merger may hand on several patches side by side
        own = [around.get("hidden_size"), (around.get("vision_config") or {}).get("hidden_size")]
        return WIDTH * next((value // width for width in own if width and value / width in (4, 9, 16)), 1)
    return min(value, next((largest for pattern, largest in LARGEST if re.fullmatch(pattern, key)), value))


def small_list(key, value: list, depth: int) -> list:
    """One list of a configuration: layers' numbers, sizes of pictures, or anything else as it is."""
    if isinstance(value[0], (list, tuple)) and "pinpoints" in key:
        least = min(map(min, value))
        return [[max(1, round(side / least)) * SIDE for side in sides] for sides in value][:6]
    if type(value[0]) is int and re.fullmatch(PLACES, key):
        return [n % depth - (depth if min(value) < 0 else 0) for n in range(len(value))]
    if key == "overlap_margins":
        return [1] * len(value)
    if key in ("image_size", "patch_size"):
        return [SIDE if key == "image_size" else PATCH] * len(value)
    return value


def small_rope(values: dict, around: dict) -> dict:
    """A rope's parameters, whose sections share half of a small head among them."""
    found = {key: small_rope(value, around) if isinstance(value, dict) else value
             for key, value in values.items()}
    text = "vision" not in str(around.get("model_type"))
    if found.get("mrope_section") or text and "rope_theta" in found:
        partial = found.get("partial_rotary_factor") or around.get("partial_rotary_factor") or 1
        parts = len(found.get("mrope_section") or (0, 0, 0))
        share, rest = divmod(int(HEAD * partial) // 2, parts)
        found["mrope_section"] = [share] * (parts - 1) + [share + rest] if share else [1, 1, 0]
    return found


def with_ids(values: dict, ids) -> dict:
    """The dictionary with the tokenizer's ids for every token that it names."""
    found = {}
    for key, value in values.items():
        if isinstance(value, dict):
            value = with_ids(value, ids)
        elif ID.search(str(key)) and (value is None or type(value) is int):
            value = ids(key)
        elif str(key).endswith("_token_ids") and isinstance(value, list):
            value = [ids(f"{key}.{n}") for n in range(len(value))]
        found[key] = value
    return found


# ---- the processor ----

PICTURES = ("size", "crop_size", "max_image_size", "high_res_size", "tile_size", "patch_size",
            "encoder_patch_size", "vision_patch_size", "min_pixels", "max_pixels", "image_size",
            "image_grid_pinpoints")


def processor_class(model_type: str) -> type | None:
    """The class that transformers' tables name for the type, or for another with the same model class."""
    alike = [model_type, *(other for other, name in MODELS.items() if name == MODELS[model_type])]
    name = next((PROCESSORS[other] for other in [*alike, *ancestors(model_type)] if PROCESSORS.get(other)), None)
    name = name or MODELS[model_type].split("For")[0].removesuffix("Thinker") + "Processor"
    return getattr(transformers, name, None)


def ancestors(model_type: str) -> list[str]:
    """The types on whose classes the source of this one builds, as transformers' modular files say."""
    folder = Path(inspect.getsourcefile(getattr(transformers, MODELS[model_type]))).parent
    modular = folder / f"modular_{folder.name}.py"
    source = modular.read_text(encoding="utf-8") if modular.exists() else ""
    return re.findall(r"^from \.\.(\w+)\.modeling_\1 import", source, re.M)


def part_class(model_type: str, cls: type, table: dict) -> type:
    """The class of a processor's part: the type's own, or that of another type with the same processor."""
    alike = [model_type, *(other for other, name in PROCESSORS.items() if name == cls.__name__)]
    name = next((table[other] for other in alike if table.get(other)), None)
    if name is None:
        raise LookupError("transformers' tables name no class for a part of its processor")
    name = name if isinstance(name, str) else name.get("torchvision") or name.get("pil")
    return getattr(transformers, name)


def tokenizer_for(cls: type, more: list[str]):
    """A byte-level tokenizer with the special tokens that a processor's source names, and `more`."""
    modules = {base.__module__ for base in cls.__mro__ if base.__module__.startswith("transformers.models.")}
    source = "".join(inspect.getsource(sys.modules[name]) for name in sorted(modules))
    asked = {name.removesuffix("_id") for name in ASKED.findall(source)}
    own = dict(re.findall(r'self\.(\w+_token) = "(<[^<>"]+>)"$', source, re.M))
    named = {name: own.get(name) or f"<{name.removesuffix('_token')}>" for name in sorted(asked)}
    written = sorted(set(re.findall(r"""["'](<[^<>"'\s{}\\]+>)["']""", source)))
    rest = dict.fromkeys([*TURNS, *written, *GRID, *SPARE, *more])
    last = tuple(token for token in rest if token not in named.values())
    return gpt_like(last=last, bos_token="<s>", eos_token=END, pad_token="<pad>", unk_token="<unk>",
                    extra_special_tokens=named)


def small_pictures(cls: type, times: int = 1):
    """An image or video processor with small pictures; times as in `configuration`."""
    changes, defaults = {}, cls()
    if getattr(defaults, "draw_on_frames", False):                 # it writes with a font of its own
        changes["draw_on_frames"] = False
    if getattr(defaults, "overlap_margins", None):
        changes["overlap_margins"] = small_list("overlap_margins", defaults.overlap_margins, LAYERS)
    for key in PICTURES:
        value, pixels = getattr(defaults, key, None), {"min_pixels": SIDE**2, "max_pixels": 4 * SIDE**2}
        if isinstance(value, int):
            changes[key] = pixels.get(key, PATCH if "patch" in key else SIDE)
        elif isinstance(value, (list, tuple)) and value:
            changes[key] = small_list(key, value, LAYERS)
        elif value is not None:
            sides = [side for side, size in dict(value).items() if size is not None]
            area = SIDE if (dict(value).get("longest_edge") or 0) > 10_000 else 1      # then it is no edge
            changes[key] = dict.fromkeys(sides, PATCH if "patch" in key else SIDE * area)
            if {"shortest_edge", "longest_edge"} <= set(sides):
                changes[key]["longest_edge"] *= 4 if area > 1 else 2
    if "vision_patch_size" in changes:                             # then the other one is a tile's side
        changes["patch_size"] = SIDE
    if times > 1:
        changes |= {key: {side: times * value for side, value in changes[key].items()}
                    for key in changes.keys() & {"size", "crop_size"}}
    return cls(**changes)


def processor_for(model_type: str, facts: dict, more: tuple = ()):
    """The type's processor. `facts` are numbers, by name, that it has to share with the model."""
    cls = processor_class(model_type)
    patches = (SIDE // PATCH) ** 2
    facts = dict.fromkeys(("image_seq_length", "image_seq_len", "num_image_tokens"), patches) | facts
    if cls is None:
        raise LookupError("transformers' tables name no processor for it")
    tokenizer, parts = tokenizer_for(cls, list(more)), {}
    for name in cls.get_attributes():
        table = EYES if "image" in name else FILMS if "video" in name else EARS
        parts[name] = tokenizer if "tokenizer" in name else part_class(model_type, cls, table)
        if isinstance(parts[name], type):
            times = facts.get("times", 1)
            parts[name] = parts[name]() if table is EARS else small_pictures(parts[name], times)
    for name in set(facts) & {"image_seq_length", "image_patch_size"}:      # some ask this part for it
        setattr(parts["image_processor"], name.replace("image_patch", "patch"), facts[name])
    asked = inspect.signature(cls.__init__).parameters.values()
    open_ones = [p for p in asked if p.name not in {*parts, "self"} and p.kind == p.POSITIONAL_OR_KEYWORD]
    wanted = {p.name: facts.get(p.name, patches) for p in open_ones if p.name in facts or p.default is p.empty
              or p.default is None and p.name.startswith("num_")}
    processor = cls(**parts, **wanted)
    tokens = [token for key, token in vars(processor).items() if key.endswith("_token")]
    missing = [token for token in tokens if isinstance(token, str) and token not in tokenizer.get_vocab()]
    if missing and not more:
        return processor_for(model_type, facts, tuple(missing))
    processor.chat_template = TEMPLATE.replace("IMAGE", getattr(processor, "image_placeholder_token", None)
                                               or getattr(processor, "image_token", None) or "<image>")
    return processor


# ---- both ----

SHARED = ("patch_size", "spatial_merge_size", "downsample_factor", "scale_factor",
          "vision_feature_select_strategy", "downsample_rate")


def written_of(processor, picture) -> list[int]:
    """The ids of a turn with a picture."""
    text = processor.apply_chat_template(TURN, tokenize=False)
    return processor(text=[text], images=[picture], return_tensors="pt")["input_ids"][0].tolist()


def parts(model_type: str, picture, facts: dict) -> Parts:
    """Configuration and processor of a model type; `facts` as in `processor_for`."""
    plain = configuration(model_type)
    if processor_class(model_type) is None and not plain.sub_configs:      # the table has text-only types
        tokenizer = tokenizer_for(transformers.ProcessorMixin, [])
        tokenizer.chat_template = TEMPLATE
        # The copy makes `write` ask the multimodal table for the class: the causal one may not have it.
        config = configuration(model_type, len(tokenizer))
        return Parts(config, copy.copy(tokenizer), (END,), tokenizer=tokenizer)
    values = {**plain.to_dict(), **(getattr(plain, "vision_config", None) or plain).to_dict()}
    shared = {name: values[name] for name in SHARED if name in values}
    if "projector_pooling_ratio" in values:
        shared["pooling_ratio"] = values["projector_pooling_ratio"]
    sizes = {"patch_size": PATCH, "img_size": SIDE, "image_size": SIDE}
    processor = processor_for(model_type, sizes | shared | facts)
    tokenizer = processor.tokenizer
    try:
        written = written_of(processor, picture)
    except ValueError:                    # some want a picture's own start and end around its token
        around = [getattr(processor, f"image_{end}_token", "") for end in ("start", "end")]
        processor.chat_template = processor.chat_template.replace(processor.image_token,
                                                                  processor.image_token.join(around))
        written = written_of(processor, picture)
    own = set(tokenizer("".join(TURNS) + "What?")["input_ids"])
    media = [i for i, _ in Counter(i for i in written if i not in own).most_common()]
    spare = itertools.cycle(tokenizer.convert_tokens_to_ids(SPARE))

    def ids(name: str) -> int:
        """The id of a configuration's token: what was written most often, the tokenizer's own, a spare."""
        name = re.sub(r"_(id|index)$", "", name)
        if name in ("image_token", "image_patch") and media:
            own = getattr(processor, "image_token_id", None)
            return own if own in media else media[0]
        known = (getattr(owner, f"{name}_id", None) for owner in (tokenizer, processor))
        return next((i for i in known if isinstance(i, int)), None) or next(spare)

    config = configuration(model_type, len(tokenizer), ids, facts.get("times", 1))
    return Parts(config, processor, stop=(END,), tokenizer=tokenizer)
