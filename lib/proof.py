"""proof: load an exported adapter or model as a stranger would, and compare it with what training computed.

    python lib/proof.py task.json result.json

Runs as a process of its own on plain transformers and peft; nothing of the kit is imported, so nothing of it can help. task.json is
written by 06_save.py: where the export lies, golden.safetensors, and held-out rows as texts with picture files.
"""
import json
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file


def main(task_path: str, result_path: str) -> None:
    """Write {proofs, answers}: per export the largest logit difference, and every row's base and tuned answer."""
    task = json.loads(Path(task_path).read_text(encoding="utf-8"))
    processor = transformers.AutoProcessor.from_pretrained(task["export"], trust_remote_code=task["trust_remote_code"])
    processor = with_right_padding(processor)
    result = {"processor": processor_difference(processor, task), "exports": {}, "answers": []}
    if task["adapter"]:
        from peft import PeftModel
        base = load(task, task["base_model"], task["revision"])
        tuned = PeftModel.from_pretrained(base, task["export"]).eval()
        result["exports"]["adapter"] = compare(tuned, task) | {"odd_keys": odd_adapter_keys(tuned, task["export"])}
        with tuned.disable_adapter():
            before = [answer(tuned, processor, row, task) for row in task["rows"]]
    else:
        base = load(task, task["base_model"], task["revision"])
        before = [answer(base, processor, row, task) for row in task["rows"]]
        del base
        tuned = load(task, task["export"])
        result["exports"]["model"] = compare(tuned, task)
    after = [answer(tuned, processor, row, task) for row in task["rows"]]
    del tuned
    if task["merged"]:
        merged = load(task | {"quantisation": None}, task["merged"])
        result["exports"]["merged"] = compare(merged, task)
    result["answers"] = [{"base": b, "tuned": a} for b, a in zip(before, after, strict=True)]
    Path(result_path).write_text(json.dumps(result, indent=1), encoding="utf-8")


def with_right_padding(processor):
    """The processor, padding on the right as in training."""
    getattr(processor, "tokenizer", processor).padding_side = "right"
    return processor


def load(task: dict, path: str, revision: str | None = None):
    """The model in `path` by its plain class, in eval mode; a missing or unexpected tensor is an error."""
    options = {"dtype": getattr(torch, task["dtype"]), "attn_implementation": task["attn_implementation"],
               "trust_remote_code": task["trust_remote_code"], "revision": revision}
    if task["quantisation"]:
        options |= {"quantization_config": transformers.BitsAndBytesConfig(**task["quantisation"]),
                    "device_map": {"": task["device"]}}
    model, info = getattr(transformers, task["class"]).from_pretrained(path, output_loading_info=True, **options)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            sys.exit(f"{path}: {kind}: {sorted(map(str, info[kind]))[:3]}")
    for module in model.modules():                     # bitsandbytes: keep one layout, so that logits compare
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval() if task["quantisation"] else model.eval().to(task["device"])


def odd_adapter_keys(model, folder: str) -> list[str]:
    """Adapter tensors that are in the file or in the model, but not in both."""
    from peft import get_peft_model_state_dict
    return sorted(get_peft_model_state_dict(model).keys() ^ load_file(Path(folder) / "adapter_model.safetensors").keys())


@torch.no_grad()
def compare(model, task: dict) -> dict:
    """{max_logit_difference, max_logit, argmax_agreement} against the golden rows."""
    worst, largest, same, count = 0.0, 0.0, 0, 0
    for row in golden_rows(task["golden"]):
        positions, logits = row.pop("positions"), row.pop("logits")
        found = model(**{key: value.to(model.device) for key, value in row.items()}, use_cache=False).logits
        found = found[0].cpu()[positions].float()
        worst = max(worst, float((found - logits).abs().max()))
        largest = max(largest, float(logits.abs().max()))
        same += int((found.argmax(-1) == logits.argmax(-1)).sum())
        count += len(positions)
    return {"max_logit_difference": worst, "max_logit": largest, "argmax_agreement": same / max(1, count)}


def golden_rows(path: str) -> list[dict]:
    """The golden rows as {name: tensor}."""
    rows: dict[int, dict] = {}
    with safe_open(path, "pt") as file:
        for key in file.keys():
            row, _, name = key.partition(".")
            rows.setdefault(int(row), {})[name] = file.get_tensor(key)
    return [rows[row] for row in sorted(rows)]


def processor_difference(processor, task: dict) -> str:
    """The first tensor that the exported processor makes otherwise than training had it; "" when none."""
    for row, golden in zip(task["golden_rows"], golden_rows(task["golden"]), strict=True):
        made = inputs(processor, row["text"], row["images"])
        for name in sorted((golden.keys() | made.keys()) - {"positions", "logits"}):
            if name not in made or name not in golden or not torch.equal(made[name], golden[name]):
                return f"{name} of {row['sample_id']}"
    return ""


def inputs(processor, text: str, images: list[str]) -> dict:
    """The model's inputs for a rendered text and picture files, [1, ...]."""
    options = {"return_tensors": "pt", "add_special_tokens": False}
    if not hasattr(processor, "tokenizer"):
        return dict(processor([text], **options))
    pictures = [Image.open(path) for path in images]
    return dict(processor(text=[text], images=pictures or None, **options))


@torch.no_grad()
def answer(model, processor, row: dict, task: dict) -> str:
    """The greedy answer to a row's prompt."""
    made = {key: value.to(model.device) for key, value in inputs(processor, row["prompt"], row["prompt_images"]).items()}
    output = model.generate(**made, do_sample=False, max_new_tokens=task["max_new_tokens"], pad_token_id=task["pad_id"])
    tokenizer = getattr(processor, "tokenizer", processor)
    return tokenizer.decode(output[0, made["input_ids"].shape[1]:], skip_special_tokens=True).strip()


if __name__ == "__main__":
    main(*sys.argv[1:])
