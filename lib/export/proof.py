"""proof: load an exported adapter or model as a stranger would, and compare it with what training had.

    python lib/export/proof.py task.json result.json

It runs as a process of its own, on plain transformers and peft. All of it is in this one file, which imports
nothing of the kit, so that nothing of the kit can help. 06_save.py writes task.json: where the exports and
golden.safetensors are, and held-out rows as texts with media files.
"""
import base64
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

ROUNDS = {"BF16": torch.finfo(torch.bfloat16).eps, "F16": torch.finfo(torch.float16).eps}


def main(task_path: str, result_path: str) -> None:
    """Write {processor, exports, answers}: what differs from training, and the answers of base and tuned."""
    task = json.loads(Path(task_path).read_text(encoding="utf-8"))
    processor = transformers.AutoProcessor.from_pretrained(
        task["export"], trust_remote_code=task["trust_remote_code"])
    getattr(processor, "tokenizer", processor).padding_side = "right"            # as in training
    golden = golden_rows(task["golden"])
    result = {"processor": processor_difference(processor, task, golden)} | prove(task, processor, golden)
    if task["merged"]:
        result["exports"]["merged"] = prove_merged(task, golden)
    Path(result_path).write_text(json.dumps(result, indent=1), encoding="utf-8")


def prove(task: dict, processor, golden: list[dict]) -> dict:
    """{"exports": {name: differences from training}, "answers": the base's and the trained model's}."""
    model = load(task, task["base_model"], task["revision"])
    before = [answer(model, processor, row, task) for row in task["rows"]]
    if task["adapter"]:
        from peft import get_peft_model_state_dict
        model = with_adapter(model, task)
        weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    else:
        model = load(task | {"quantisation": None}, task["export"])
        weights = model.state_dict()
    after = [answer(model, processor, row, task) for row in task["rows"]]
    found = compare(logits(model, golden, task), [row["logits"] for row in golden])
    exports = {"adapter" if task["adapter"] else "model": found | {"changed_tensors": changed(weights, task)}}
    return {"exports": exports, "answers": [{"base": b, "tuned": a} for b, a in zip(before, after)]}


def prove_merged(task: dict, golden: list[dict]) -> dict:
    """The merged model's differences from base plus adapter: in tensors, and by rounding in logits.

    The sums are checked tensor by tensor, since logits can't tell: in bfloat16 any rounding may change how a
    router decides a near tie. Then the same weights must give the same logits, or the configuration differs.
    """
    base = load(task | {"quantisation": task["without_quantisation"]}, task["base_model"], task["revision"])
    weights = dict(base.named_parameters())            # still these objects when peft has wrapped the layers
    tuned = with_adapter(base, task)
    wanted = logits(tuned, golden, task) if task["quantisation"] else [row["logits"] for row in golden]
    merged = load(task | {"quantisation": None, "device": "cpu"}, task["merged"])
    odd = not_the_sum(tuned, weights, merged.state_dict(), rounding_of(task["merged"]))
    same_weights = logits(tuned, golden, task)
    del base, weights, tuned                           # before the other one comes to the device
    found = logits(merged.to(task["device"]), golden, task)
    return compare(found, wanted) | {"changed_tensors": odd, "max_difference_with_the_same_weights":
                                     compare(found, same_weights)["max_logit_difference"]}


# ---- loading ----

def load(task: dict, path: str, revision: str | None = None):
    """The model in `path`, by its own class, in eval mode; the process ends where a tensor is missing."""
    source = {"trust_remote_code": task["trust_remote_code"], "revision": revision}
    options = {"dtype": getattr(torch, task["dtype"]), "attn_implementation": task["attn_implementation"]}
    if task["quantisation"]:
        kind, arguments = task["quantisation"]
        options |= {"quantization_config": getattr(transformers, kind)(**arguments),
                    "device_map": {"": task["device"]}}
    if task["spread"]:
        device_map, limits = task["spread"]
        options |= {"device_map": device_map, "max_memory": dict(limits) or None}
    if task["text_config"]:
        options["config"] = transformers.AutoConfig.from_pretrained(path, **source)
        for name, value in task["text_config"].items():
            setattr(options["config"].get_text_config(), name, value)
    cls = getattr(transformers, task["class"])
    model, info = cls.from_pretrained(path, output_loading_info=True, **source, **options)
    for kind in ("missing_keys", "mismatched_keys"):
        if info[kind]:
            sys.exit(f"{path}: {kind}: {sorted(map(str, info[kind]))[:3]}")
    if task["grown_to"] > len(model.get_input_embeddings().weight):
        torch.manual_seed(0)                           # of rows that only an adapter knows
        model.resize_token_embeddings(task["grown_to"], mean_resizing=False)
    for module in model.modules():                     # bitsandbytes: keep one layout, so that logits compare
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval() if "device_map" in options else model.eval().to(task["device"])


def with_adapter(base, task: dict):
    """The base with the exported adapter on it."""
    from peft import PeftModel
    return PeftModel.from_pretrained(base, task["export"]).eval()


# ---- comparing ----

def golden_rows(path: str) -> list[dict]:
    """The golden rows of a file, each as {name: tensor}."""
    rows: dict[int, dict] = {}
    for key, tensor in load_file(path).items():
        row, _, name = key.partition(".")
        rows.setdefault(int(row), {})[name] = tensor
    return [rows[row] for row in sorted(rows)]


@torch.no_grad()
def logits(model, golden: list[dict], task: dict) -> list[torch.Tensor]:
    """The model's float32 logits [positions, V] of each golden row."""
    found = []
    for row in golden:
        given = to_model({key: row[key] for key in row.keys() - {"positions", "logits"}}, model, task)
        found.append(model(**given, use_cache=False).logits[0].cpu()[row["positions"]].float())
    return found


@torch.no_grad()
def not_the_sum(tuned, weights: dict[str, torch.Tensor], merged: dict[str, torch.Tensor],
                stored: float) -> list[str]:
    """Names of merged tensors that are not base plus adapter, added up by peft in float32 and rounded once.

    weights: the base's own, which are in `tuned`; afterwards they hold the merged ones. stored: the relative
    rounding of the files' dtype.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    adapted = [layer for layer in tuned.modules() if isinstance(layer, (LoraLayer, TrainableTokensLayer))]
    layers = {id(layer.get_param() if hasattr(layer, "get_param") else layer.get_base_layer().weight): layer
              for layer in adapted}
    odd = []
    for name, weight in weights.items():
        before, found = weight.data, merged[name].to(weight.device)
        if layer := layers.get(id(weight)):
            weight.data = before.float()
            layer.merge()
            loaded = torch.finfo(before.dtype)
            rounding = max(loaded.eps, stored) * (before.abs() + weight.abs())             # of base and sum
            rounding += loaded.smallest_normal * loaded.eps                # of the least that float16 holds
            order = 1e-5 * (weight - before).abs().max()                       # in which the sum was added up
            if not bool(((found - weight).abs() <= rounding + order).all()):
                odd.append(name)
        elif not torch.equal(before, found):
            odd.append(name)
        weight.data = found
    return odd


def rounding_of(folder: str) -> float:
    """The relative rounding of the coarsest dtype in a folder's files."""
    found = {0.0}
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {ROUNDS.get(file.get_slice(key).get_dtype(), 0.0) for key in file.keys()}
    return max(found)


def compare(found: list[torch.Tensor], expected: list[torch.Tensor]) -> dict:
    """{max_logit_difference, max_logit, argmax_agreement} over all rows."""
    found, expected = torch.cat(found), torch.cat(expected)
    return {"max_logit_difference": float((found - expected).abs().max()),
            "max_logit": float(expected.abs().max()),
            "argmax_agreement": float((found.argmax(-1) == expected.argmax(-1)).float().mean())}


def changed(weights: dict[str, torch.Tensor], task: dict) -> list[str]:
    """Names of the tensors that are not, bit for bit, what training had, or that only one side has."""
    with safe_open(task["golden"], "pt") as file:
        trained = json.loads(file.metadata()["golden"])["sha256"]
    found = {name: hashlib.sha256(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()).hexdigest()
             for name, tensor in weights.items()}
    return sorted({name for name, _ in found.items() ^ trained.items()})


def processor_difference(processor, task: dict, golden: list[dict]) -> str:
    """The first tensor that the exported processor makes differently from training's; "" where none differs.

    Only prompts are compared, with which serving starts: the end of one may merge with the reply's start.
    """
    for row, had in zip(task["golden_rows"], golden, strict=True):
        made = inputs(processor, row)
        for name in sorted((had.keys() | made.keys()) - {"positions", "logits"}):
            ours, theirs = had.get(name), made.get(name)
            if ours is not None and theirs is not None and ours.shape != theirs.shape:
                ours = ours[:, :theirs.shape[1]]             # along the tokens
            same = ours is not None and theirs is not None and torch.equal(ours, theirs)
            if not same and (row["whole"] or name == "input_ids"):       # else the reply shows media, too
                return f"{name} of {row['sample_id']}"
    return ""


# ---- answering ----

def inputs(processor, row: dict) -> dict:
    """The model's inputs for a row's prompt and media files, [1, ...]; floats in float32."""
    text = row["prompt"]
    if not hasattr(processor, "tokenizer"):
        return dict(processor([text], return_tensors="pt", add_special_tokens=False))
    if not getattr(processor.tokenizer, "is_fast", False):               # Mistral's own, which reads messages
        return dict(processor.apply_chat_template(with_files(row), return_tensors="pt"))
    bos = processor.tokenizer.bos_token                # LLaVA's template leaves it to the tokenizer
    options = {"return_tensors": "pt", "add_special_tokens": not (bos and text.startswith(bos))}
    made = processor(text=[text], **media_arguments(row["media"], row["image_bounds"]), **options)
    made.pop("labels", None)                           # PaliGemma's processor makes some, of no use here
    return {key: value.float() if value.is_floating_point() else value for key, value in made.items()}


def media_arguments(media: list[dict], image_bounds: dict) -> dict:
    """The processor's arguments for media files; clips are sampled already: their metadata say how.

    image_bounds: what 02 has set in the image processor for this row alone, whose pictures it shrank.
    """
    files = {kind: [medium["path"] for medium in media if medium["kind"] == kind]
             for kind in ("image", "audio", "video")}
    given = {"images_kwargs": image_bounds} if image_bounds else {}
    if files["image"]:
        given["images"] = [Image.open(path) for path in files["image"]]
    if files["audio"]:
        import soundfile
        given["audio"] = [soundfile.read(path, dtype="float32")[0] for path in files["audio"]]
    if files["video"]:
        given["videos"] = [np.load(path) for path in files["video"]]
        metadata = [medium["metadata"] for medium in media if medium["kind"] == "video"]
        given["videos_kwargs"] = {"do_sample_frames": False, "input_data_format": "channels_last",
                                  "video_metadata": metadata}
    return given


def with_files(row: dict) -> list[dict]:
    """The row's messages with each medium's file as base64; by its path, a sound would be cut to 16 bits."""
    files = (base64.b64encode(Path(medium["path"]).read_bytes()).decode() for medium in row["media"])
    return [{**message, "content": [part if part["type"] == "text" else {**part, "base64": next(files)}
                                    for part in message["content"]]} for message in row["messages"]]


def to_model(given: dict, model, task: dict) -> dict:
    """The inputs on the model's device; pictures in its dtype, if the model doesn't cast them itself."""
    types = {"pixel_values": model.dtype} if task["cast_pictures"] else {}
    return {key: value.to(model.device, types.get(key, value.dtype)) for key, value in given.items()}


@torch.no_grad()
def answer(model, processor, row: dict, task: dict) -> str:
    """The greedy answer to a row's prompt."""
    made, tokenizer = inputs(processor, row), getattr(processor, "tokenizer", processor)
    own = model.generation_config.eos_token_id
    stops = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
    output = model.generate(**to_model(made, model, task), do_sample=False, eos_token_id=sorted(stops),
                            max_new_tokens=task["max_new_tokens"], pad_token_id=task["pad_id"])
    return tokenizer.decode(output[0, made["input_ids"].shape[1]:], skip_special_tokens=True).strip()


if __name__ == "__main__":
    main(*sys.argv[1:])
