"""fresh: lib/export/proof.py run in a process of its own, and what it found there, judged.

The process gets files alone: the exports, golden.safetensors, and samples as plain texts and lossless media.
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from lib import quant, registry
from lib.data.finished import samples_of
from lib.evaluation.golden import read_header
from lib.evaluation.scores import exact_match
from lib.export import proof
from lib.media import media, sounds
from lib.models import kernels, model
from lib.run import terminal
from lib.run.errors import StageError
from lib.text.chat import Encoder
from lib.training import devices

SAME = 1e-3                    # of the largest logit: differences allowed with the same weights and forward
ROUNDED = 5e-2                 # of the largest logit: differences that rounding merged weights may explain


def prove(work, plan: dict, encoder: Encoder, exports: list[Path], rows: list[dict]) -> dict:
    """What proof.py found in a process that can import neither the kit nor anything in its folder."""
    with tempfile.TemporaryDirectory() as scratch:
        given, found = Path(scratch, "task.json"), Path(scratch, "result.json")
        task = proof_task(work, plan, encoder, exports, rows, Path(scratch))
        given.write_text(json.dumps(task), encoding="utf-8")
        process = subprocess.run([sys.executable, "-I", proof.__file__, given, found], cwd=scratch,
                                 capture_output=True, text=True, encoding="utf-8")
        if not found.exists():
            last = (process.stderr.strip() or "no message").splitlines()[-1]
            raise StageError(f"{exports[0]}: plain transformers can't load or run the export: {last}",
                             "this is a bug of the kit or of the library versions; 05_train is untouched")
        return json.loads(found.read_text(encoding="utf-8"))


def proof_task(work, plan, encoder: Encoder, exports: list[Path], rows: list[dict], scratch: Path) -> dict:
    """The proof's task.json: absolute paths, the plan's facts, samples as texts and lossless media."""
    golden, base = work.input("05_train") / "golden.safetensors", Path(plan["base_model"])
    if plan["stored_as"] == "gptq":                      # plain transformers reads it by other packages only
        base = scratch / "base"
        model.save_full(model.load(quant.unquantised(plan), torch.device("cpu"), "inference"), base)
    merged = str(exports[1].absolute()) if len(exports) > 1 else None
    facts, device = ("revision", "trust_remote_code", "class", "dtype", "text_config"), devices.pick_device()
    spread = devices.spread(work.config, device)
    return {**{fact: plan[fact] for fact in facts}, "adapter": work.config.adapter is not None,
            "export": str(exports[0].absolute()), "merged": merged, "golden": str(golden.absolute()),
            "base_model": str(base.absolute() if base.exists() else base),
            "quantisation": quant.arguments(plan), "device": str(device),
            "spread": spread and [spread["device_map"], [*(spread["max_memory"] or {}).items()]],
            "attn_implementation": kernels.here(plan["attn_implementation"], device.type == "cuda"),
            "without_quantisation": quant.arguments(plan | {"quantisation": None}),
            "cast_pictures": bool(registry.family_of(plan["model_type"]).uncast),
            "grown_to": plan["grown_to"] or 0,
            "max_new_tokens": work.config.max_new_tokens, "pad_id": encoder.pad_id,
            "golden_rows": [proof_row(row, encoder, scratch) for row in golden_records(work, golden)],
            "rows": [proof_row(row, encoder, scratch) for row in rows]}


def golden_records(work, golden: Path) -> list[dict]:
    """The samples of golden.safetensors: held-out ones or, where there are none, training samples."""
    parts = (samples_of(work, part) for part in ("eval", "train"))
    records = next(part for part in parts if len(part))
    places = {sample_id: place for place, sample_id in enumerate(records["sample_id"])}
    return [records[places[sample_id]] for sample_id in read_header(golden)["sample_ids"]]


def proof_row(record: dict, encoder: Encoder, scratch: Path) -> dict:
    """A sample for the proof: its prompt, as text and as messages, and files with its media."""
    prompt, shown, _ = encoder.prompt(record)
    files = []
    for place, medium in enumerate(encoder.open(record["media"])):
        files.append(lossless(medium, scratch / f"{record['sample_id']}-{place}", encoder))
    messages = json.loads(record["messages"])
    replies = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    last = replies[-1] if replies else None
    return {"sample_id": record["sample_id"], "prompt": prompt, "messages": messages[:last],
            "media": files[:len(shown)], "whole": len(files) == len(shown),
            "image_bounds": json.loads(record["image_bounds"] or "{}")}


def lossless(medium, stem: Path, encoder: Encoder) -> dict:
    """{kind, path, metadata} of a decoded medium, written to a file that any library reads."""
    kind, stem = media.kind_of(medium), str(stem)
    path = Path(stem + {"image": ".png", "audio": ".wav", "video": ".npy"}[kind])
    if kind == "image":
        medium.save(path)
    elif kind == "audio":
        path.write_bytes(sounds.as_wav(medium, encoder.decoding.sampling_rate))
    else:
        np.save(path, medium.frames, allow_pickle=False)
    return {"kind": kind, "path": str(path), "metadata": medium.metadata if kind == "video" else None}


def checked(found: dict, rows: list[dict], plan: dict) -> dict:
    """The content of check.json; StageError where the fresh process found other than what training had."""
    fix = "the export is in 06_save.partial for a look; 05_train is untouched"
    if found["processor"]:
        raise StageError(f"the exported processor makes another {found['processor']} than training had", fix)
    for name, export in found["exports"].items():
        if odd := export.pop("changed_tensors", []):
            raise StageError(f"{name}: {len(odd)} tensors are not what was trained, such as {odd[0]}", fix)
        merged, largest = name == "merged", export["max_logit"]
        difference = export["max_difference_with_the_same_weights" if merged else "max_logit_difference"]
        if not difference <= largest * SAME:
            those = "of the base with the same weights" if merged else "after training"
            raise StageError(f"{name}: logits in a fresh process differ by {difference:.3g} of {largest:.3g} "
                             f"from those {those}", fix)
        if not export["max_logit_difference"] <= largest * ROUNDED:
            if plan["dtype"] == "float32":
                raise StageError(f"{name}: its logits differ by {export['max_logit_difference']:.3g} of "
                                 f"{largest:.3g} from those of base and adapter", fix)
            terminal.warn(f"{name}: rounding the sums to {plan['dtype']} moves its logits by up to "
                          f"{export['max_logit_difference']:.3g} of {largest:.3g}; its weights are right")
    references = [row["reference"] for row in rows]
    scores = {which: exact_match([answer[which] for answer in found["answers"]], references) if rows else None
              for which in ("base", "tuned")}
    differences = [export["max_logit_difference"] for export in found["exports"].values()]
    return {"exact_match": scores, "rows": len(rows), "max_logit_difference": max(differences),
            "processor_identical": True, "exports": found["exports"]}
