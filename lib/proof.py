"""proof: load an exported adapter or model as a stranger would, and compare it with what training had.

    python lib/proof.py task.json result.json

Runs as a process of its own on plain transformers and peft: nothing of the kit is imported, so nothing of it
can help. 06_save.py writes task.json: where exports and golden.safetensors lie, and held-out rows as texts
with picture files.
"""
import hashlib
import json
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors import safe_open


def main(task_path: str, result_path: str) -> None:
    """Write {processor, exports, answers}: what differs from training, and the answers of base and tuned."""
    task = json.loads(Path(task_path).read_text(encoding="utf-8"))
    processor, golden = load_processor(task), golden_rows(task["golden"])
    result = {"processor": processor_difference(processor, task, golden)} | prove(task, processor, golden)
    if task["merged"]:
        merged = logits(load(plain(task), task["merged"]), golden)
        result["exports"]["merged"] = compare(merged, expected(task, golden))
    Path(result_path).write_text(json.dumps(result, indent=1), encoding="utf-8")


def prove(task: dict, processor, golden: list[dict]) -> dict:
    """{exports, answers} of the exported adapter or model, and the base's own answers."""
    base = load(task, task["base_model"], task["revision"])
    if task["adapter"]:
        tuned, weights = with_adapter(base, task["export"])
        with tuned.disable_adapter():
            before = [answer(tuned, processor, row, task) for row in task["rows"]]
    else:
        before = [answer(base, processor, row, task) for row in task["rows"]]
        base = tuned = load(task, task["export"])
        weights = tuned.state_dict()
    after = [answer(tuned, processor, row, task) for row in task["rows"]]
    found = compare(logits(tuned, golden), [row["logits"] for row in golden])
    exports = {"adapter" if task["adapter"] else "model": found | {"changed_tensors": changed(weights, task)}}
    answers = [{"base": b, "tuned": a} for b, a in zip(before, after, strict=True)]
    return {"exports": exports, "answers": answers}


# ---- loading ----

def load_processor(task: dict):
    """The export's processor, padding on the right as in training."""
    trust = task["trust_remote_code"]
    processor = transformers.AutoProcessor.from_pretrained(task["export"], trust_remote_code=trust)
    getattr(processor, "tokenizer", processor).padding_side = "right"
    return processor


def load(task: dict, path: str, revision: str | None = None):
    """The model in `path` by its own class, in eval mode; a tensor that the file lacks is an error."""
    options = {"dtype": getattr(torch, task["dtype"]), "attn_implementation": task["attn_implementation"],
               "trust_remote_code": task["trust_remote_code"], "revision": revision}
    if task["quantisation"]:
        options |= {"quantization_config": transformers.BitsAndBytesConfig(**task["quantisation"]),
                    "device_map": {"": task["device"]}}
    cls = getattr(transformers, task["class"])
    model, info = cls.from_pretrained(path, output_loading_info=True, **options)
    for kind in ("missing_keys", "mismatched_keys"):
        if info[kind]:
            sys.exit(f"{path}: {kind}: {sorted(map(str, info[kind]))[:3]}")
    for module in model.modules():                     # bitsandbytes: keep one layout, so that logits compare
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval() if task["quantisation"] else model.eval().to(task["device"])


def with_adapter(base, folder: str):
    """(the base with the adapter on it, the adapter's tensors as loaded)."""
    from peft import PeftModel, get_peft_model_state_dict
    tuned = PeftModel.from_pretrained(base, folder).eval()
    return tuned, get_peft_model_state_dict(tuned, save_embedding_layers=False)


def plain(task: dict) -> dict:
    """The task without quantisation."""
    return task | {"quantisation": None}


# ---- comparing ----

def golden_rows(path: str) -> list[dict]:
    """The golden rows as {name: tensor}."""
    rows: dict[int, dict] = {}
    with safe_open(path, "pt") as file:
        for key in file.keys():
            row, _, name = key.partition(".")
            rows.setdefault(int(row), {})[name] = file.get_tensor(key)
    return [rows[row] for row in sorted(rows)]


@torch.no_grad()
def logits(model, golden: list[dict]) -> list[torch.Tensor]:
    """The model's float32 logits [positions, V] of each golden row."""
    found = []
    for row in golden:
        given = {key: row[key].to(model.device) for key in row.keys() - {"positions", "logits"}}
        found.append(model(**given, use_cache=False).logits[0].cpu()[row["positions"]].float())
    return found


def expected(task: dict, golden: list[dict]) -> list[torch.Tensor]:
    """The logits that a merge has to give: training's; if the base is quantised, those of the whole one."""
    if not task["quantisation"]:
        return [row["logits"] for row in golden]
    tuned, _ = with_adapter(load(plain(task), task["base_model"], task["revision"]), task["export"])
    return logits(tuned, golden)


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
    """The first tensor that the exported processor makes otherwise than training had it; "" where none.

    Compared is the prompt, with which serving starts: its last characters may merge with the reply's first.
    """
    for row, had in zip(task["golden_rows"], golden, strict=True):
        made = inputs(processor, row["prompt"], row["prompt_images"])
        whole = row["prompt_images"] == row["images"]        # else the reply shows pictures, too
        for name in sorted((had.keys() | made.keys()) - {"positions", "logits"}):
            ours, theirs = had.get(name), made.get(name)
            if ours is not None and theirs is not None and ours.shape != theirs.shape:
                ours = ours[:, :theirs.shape[1]]             # along the tokens
            same = ours is not None and theirs is not None and torch.equal(ours, theirs)
            if not same and (whole or name == "input_ids"):
                return f"{name} of {row['sample_id']}"
    return ""


# ---- answering ----

def inputs(processor, text: str, images: list[str]) -> dict:
    """The model's inputs for a rendered text and picture files, [1, ...]; floats in float32."""
    if not hasattr(processor, "tokenizer"):
        return dict(processor([text], return_tensors="pt", add_special_tokens=False))
    bos = processor.tokenizer.bos_token                # LLaVA's template leaves it to the tokenizer
    options = {"return_tensors": "pt", "add_special_tokens": not (bos and text.startswith(bos))}
    pictures = [Image.open(path) for path in images]
    made = processor(text=[text], images=pictures or None, **options)
    return {key: value.float() if value.is_floating_point() else value for key, value in made.items()}


@torch.no_grad()
def answer(model, processor, row: dict, task: dict) -> str:
    """The greedy answer to a row's prompt."""
    made = inputs(processor, row["prompt"], row["prompt_images"])
    output = model.generate(**{key: value.to(model.device) for key, value in made.items()}, do_sample=False,
                            max_new_tokens=task["max_new_tokens"], pad_token_id=task["pad_id"])
    tokenizer = getattr(processor, "tokenizer", processor)
    return tokenizer.decode(output[0, made["input_ids"].shape[1]:], skip_special_tokens=True).strip()


if __name__ == "__main__":
    main(*sys.argv[1:])
