"""06_save: export what was trained, prove in a fresh process that it works, and show what it learnt.

    python 06_save.py runs/demo [--force]
    python 06_save.py runs/demo --ask photo.jpg "What is this?"     # with and without the training; writes nothing

Reads:  05_train (adapter or model, golden.safetensors, metrics.jsonl), 02_data, 03_load_model/model.json, 04_lora/adapter.json.
Writes: 06_save/adapter/ or model/ (with tokenizer, processor, README.md), merged/ if asked, check.json, report.html, figure.svg.
Source: PEFT's adapter format; the proof is lib/proof.py, on plain transformers and peft.
Fork me to: change the model card (`card`), the page (`write_report`), or what counts as a right answer (lib/evaluate.py).
"""
import json
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import datasets

from lib import chat, media, merge, model, parallel, quant, report, stage, terminal
from lib.chat import Encoder
from lib.evaluate import exact_match, generate
from lib.golden import read_sample_ids
from lib.metrics import loss_series
from lib.stage import StageError

TOLERANCE = {"adapter": 1e-3, "model": 1e-3, "merged": 5e-2}     # of the largest logit; a bf16 merge rounds once


def main(argv=None):
    """Export, merge if asked, prove, answer, report."""
    parser = stage.arguments(__doc__)
    parser.add_argument("--ask", nargs="+", metavar=("PHOTO", "QUESTION"), help="pictures, then a question")
    args = parser.parse_args(argv)
    run = stage.resolve_run(args.run)
    if args.ask:
        return ask(stage.view("06_save", run), args.ask[:-1], args.ask[-1])

    # 1. Start the stage, unless its outputs are still true.
    work = stage.begin(stage.decide("06_save", run, force=args.force))
    if work is None:
        return
    trained, config = work.input("05_train"), work.config
    plan = read_json(work.input("03_load_model") / "model.json")
    encoder = Encoder.load(work.input("02_data") / "processor", config.trust_remote_code)
    # 2. Export: the weights, and beside them the tokenizer, processor and template that training used.
    kind = "model" if config.adapter is None else "adapter"
    exports = [export(work, kind, trained / kind, encoder)]
    if config.merge and kind == "adapter":
        merge.write_merged(plan, trained / "adapter", work.path / "merged")
        exports.append(export(work, "merged", None, encoder))
    # 3. Prove it in a process that knows nothing of the kit, which also answers held-out rows.
    rows = held_out_rows(work, encoder)
    proof = prove(work, plan, encoder, exports, rows)
    check = checked(proof, rows, exports)
    (work.path / "check.json").write_text(json.dumps(check, indent=1) + "\n", encoding="utf-8")
    # 4. Describe it: a model card in every export, one page for people.
    for folder in exports:
        (folder / "README.md").write_text(card(work, plan, check, folder.name), encoding="utf-8")
    shutil.copy(exports[0] / "README.md", work.path / "README.md")
    write_report(work, plan, check, answer_cards(rows, proof["answers"]))
    say_results(work, check)
    work.finish(volatile=("report.html", "figure.svg"))
    terminal.say(f"look at: {work.run / '06_save' / 'report.html'}", "bold")


def read_json(path: Path) -> dict:
    """A JSON file's content."""
    return json.loads(path.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------ export and proof

def export(work, name: str, weights: Path | None, encoder: Encoder) -> Path:
    """06_save/NAME with weights (copied, unless already there), tokenizer, processor and chat template."""
    folder = work.path / name
    if weights is not None:
        shutil.copytree(weights, folder)
    encoder.processor.save_pretrained(folder)
    return folder


def held_out_rows(work, encoder: Encoder) -> list[dict]:
    """The samples that are answered, with their reference: the first `answer_rows` held-out ones, or none."""
    records = datasets.load_from_disk(str(work.input("02_data") / "eval"))
    chosen = records.select(range(min(len(records), work.config.answer_rows)))
    return [record | {"reference": encoder.prompt(record)[2]} for record in chosen]


def prove(work, plan: dict, encoder: Encoder, exports: list[Path], rows: list[dict]) -> dict:
    """What lib/proof.py found in a fresh process that has neither the kit nor its folder on its path."""
    golden = work.input("05_train") / "golden.safetensors"
    by_id = {r["sample_id"]: r for name in ("eval", "train")
             for r in datasets.load_from_disk(str(work.input("02_data") / name))}
    with tempfile.TemporaryDirectory() as scratch:
        task = {"export": str(exports[0]), "merged": str(exports[1]) if len(exports) > 1 else None,
                "adapter": work.config.adapter is not None, "golden": str(golden),
                **{key: plan[key] for key in ("base_model", "revision", "trust_remote_code", "class", "dtype",
                                              "attn_implementation")},
                "quantisation": quant.plain_options(plan), "device": str(parallel.pick_device()),
                "max_new_tokens": work.config.max_new_tokens, "pad_id": encoder.pad_id,
                "golden_rows": [task_row(by_id[i], encoder, Path(scratch)) for i in read_sample_ids(golden)],
                "rows": [task_row(row, encoder, Path(scratch)) for row in rows]}
        for key in ("export", "merged", "golden"):
            task[key] = task[key] and str(Path(task[key]).absolute())
        if Path(task["base_model"]).exists():
            task["base_model"] = str(Path(task["base_model"]).absolute())
        given, found = Path(scratch, "task.json"), Path(scratch, "result.json")
        given.write_text(json.dumps(task), encoding="utf-8")
        process = subprocess.run([sys.executable, "-I", str(Path(merge.__file__).with_name("proof.py")), given, found],
                                 cwd=scratch, capture_output=True, text=True, encoding="utf-8")
        if process.returncode:
            last = (process.stderr.strip() or "no message").splitlines()[-1]
            raise StageError(f"{exports[0]}: plain transformers can't load or run the export: {last}",
                             "this is a bug of the kit or of the library versions; 05_train is untouched")
        return read_json(found)


def task_row(record: dict, encoder: Encoder, scratch: Path) -> dict:
    """A sample as plain texts and lossless picture files."""
    prompt, pictures, reference = encoder.prompt(record)
    files = []
    for medium in record["media"]:
        path = scratch / f"{medium['sha256']}.png"
        if not path.exists():
            media.open_image(medium).save(path)
        files.append(str(path))
    return {"sample_id": record["sample_id"], "text": record["text"], "images": files, "prompt": prompt,
            "prompt_images": files[:len(pictures)], "reference": reference}


def checked(proof: dict, rows: list[dict], exports: list[Path]) -> dict:
    """check.json; a StageError where the fresh process computed something else than training did."""
    fix = "the export is in the .partial folder for a look; 05_train is untouched"
    if proof["processor"]:
        raise StageError(f"the exported processor makes another {proof['processor']} than training had", fix)
    for name, found in proof["exports"].items():
        if found.get("odd_keys"):
            raise StageError(f"{name}: {len(found['odd_keys'])} adapter tensors don't fit, such as {found['odd_keys'][0]}", fix)
        if not found["max_logit_difference"] <= TOLERANCE[name] * found["max_logit"]:
            raise StageError(f"{name}: logits in a fresh process differ by {found['max_logit_difference']:.3g} "
                             f"of {found['max_logit']:.3g} from those after training", fix)
    references = [row["reference"] for row in rows]
    answers = proof["answers"]
    return {"exports": proof["exports"], "processor_identical": True,
            "max_logit_difference": max(found["max_logit_difference"] for found in proof["exports"].values()),
            "rows": len(rows),
            "exact_match": {which: exact_match([a[which] for a in answers], references) if rows else None
                            for which in ("base", "tuned")}}


# ------------------------------------------------------------------------------------------------ card and page

def card(work, plan: dict, check: dict, name: str) -> str:
    """The model card of an export: what it is, how to load it, how good it is, how it was made."""
    adapter = work.config.adapter is not None
    data = read_json(work.input("02_data") / "report.json")["counts"]
    load = [f"model = {plan['class']}.from_pretrained(BASE, dtype=\"{plan['dtype']}\")" if name == "adapter" else
            f"model = {plan['class']}.from_pretrained(FOLDER, dtype=\"{plan['dtype']}\")"]
    imports = [f"from transformers import AutoProcessor, {plan['class']}"]
    if name == "adapter":
        imports.append("from peft import PeftModel")
        load.append("model = PeftModel.from_pretrained(model, FOLDER)")
    base = Path(plan["base_model"]).name if Path(plan["base_model"]).exists() else plan["base_model"]
    scores = check["exact_match"]
    lines = ["---", f"base_model: {base}", f"library_name: {'peft' if name == 'adapter' else 'transformers'}",
             "pipeline_tag: image-text-to-text", "---", "", f"# {base}, fine-tuned", "",
             f"{'A LoRA adapter for' if name == 'adapter' else 'A full model made from'} `{base}`"
             + (f" at revision `{plan['revision']}`." if plan["revision"] else "."), "",
             "## Load it", "", "```python", *imports, "",
             *(['BASE = "…"      # the base model'] if name == "adapter" else []), 'FOLDER = "…"    # this folder', *load,
             "processor = AutoProcessor.from_pretrained(FOLDER)", "```", "",
             "## Results", "", f"Exact match by greedy generation on {check['rows']} held-out rows: "
             + (f"{scores['base']:.1%} before, {scores['tuned']:.1%} after." if check["rows"] else "none were held out."), "",
             "## Made from", "", f"{data['train_samples']} samples, {data['supervised_tokens']} supervised tokens"
             f" ({data['rejected_rows']} rows rejected). Method: {read_json(work.input('04_lora') / 'adapter.json')['method']}.",
             "", "Versions: " + ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft")) + ".",
             "The licence is the base model's, together with that of the data.", ""]
    return "\n".join(line for line in lines if adapter or "peft" not in line or "Versions" in line)


def answer_cards(rows: list[dict], answers: list[dict]) -> list[dict]:
    """The rows as lib/report.py shows them: pictures, question, reference, both answers with their marks."""
    return [{"pictures": [media.open_image(m) for m in row["media"]],
             "question": last_question(json.loads(row["messages"])), "reference": row["reference"], **found,
             **{f"{which}_right": bool(exact_match([found[which]], [row["reference"]])) for which in found}}
            for row, found in zip(rows, answers, strict=True)]


def last_question(messages: list[dict]) -> str:
    """The text of the last user message."""
    asked = [m for m in messages if m["role"] == "user"][-1:]
    return " ".join(part["text"] for m in asked for part in m["content"] if part["type"] == "text")


def write_report(work, plan: dict, check: dict, cards: list[dict]) -> None:
    """report.html, and figure.svg for a README: what was trained, on what, how well, proved how."""
    config = read_json(work.run / "01_config" / "config.json")
    adapter, data = read_json(work.input("04_lora") / "adapter.json"), read_json(work.input("02_data") / "report.json")
    scores = check["exact_match"]
    score = f"{scores['base']:.0%} -> {scores['tuned']:.0%}" if cards else "no held-out rows"
    loss = report.curve(loss_series(work.input("05_train") / "metrics.jsonl"), "optimizer step", "loss per token")
    proofs = [[name, f"{found['max_logit_difference']:.3g}", f"{found['max_logit']:.3g}", f"{found['argmax_agreement']:.1%}"]
              for name, found in check["exports"].items()]
    page = report.page(f"{Path(plan['base_model']).name}, fine-tuned", [
        ("Result", report.tiles([(score, f"exact match on {check['rows']} held-out rows"),
                                 (sum(adapter["trained_parameters"].values()), "trained parameters"),
                                 (data["counts"]["train_samples"], "training samples"), (adapter["method"], "method")])),
        ("Answers", report.answers(cards)),
        ("Loss", loss),
        ("Recipe", report.table(["knob", "value"], [[k, json.dumps(v) if v is not None else None]
                                                    for k, v in config.items()])),
        ("What trained", report.table(["role", "modules", "parameters"],
                                      [[r, adapter["modules"].get(r, 0), n]
                                       for r, n in adapter["trained_parameters"].items()])),
        ("Data", report.table(["what", "count"], [[k.replace("_", " "), v] for k, v in data["counts"].items()])),
        ("Proof", report.paragraph("A fresh process loaded each export with plain transformers and peft and compared "
                                   "its logits with those right after training.")
         + report.table(["export", "largest logit difference", "largest logit", "same argmax"], proofs)),
        ("How to load it", report.code((work.path / "README.md").read_text(encoding="utf-8"))),
    ], subtitle=f"{plan['family']}, {plan['class']}")
    (work.path / "report.html").write_text(page, encoding="utf-8")
    if cards:
        best = sorted(cards, key=lambda c: (c["base_right"], not c["tuned_right"]))[:8]
        figure = report.figure(best, "Held-out rows, before and after", f"exact match on {check['rows']} rows: {score}")
        (work.path / "figure.svg").write_text(figure, encoding="utf-8")


def say_results(work, check: dict) -> None:
    """The result as a table."""
    rows = [[name, f"{found['max_logit_difference']:.3g}", f"{found['argmax_agreement']:.1%}"]
            for name, found in check["exports"].items()]
    terminal.table("in a fresh process", ["export", "largest logit difference", "same argmax"], rows)
    if check["rows"]:
        terminal.table(f"exact match on {check['rows']} held-out rows", ["before", "after"],
                       [[f"{check['exact_match']['base']:.1%}", f"{check['exact_match']['tuned']:.1%}"]])
    else:
        terminal.warn("no held-out rows: nothing was answered (set val_set_size or test_datasets)")


# ------------------------------------------------------------------------------------------------ try it

def ask(work, photos: list[str], question: str) -> None:
    """The view `--ask`: the model's answer to a question about some pictures, before and after training."""
    plan = read_json(work.input("03_load_model") / "model.json")
    encoder = Encoder.load(work.input("02_data") / "processor", work.config.trust_remote_code)
    try:
        pictures = [media.open_image(media.read_medium(photo, Path())) for photo in photos]
    except media.MediaError as error:
        raise StageError(str(error), "name a picture file") from None
    content = [*({"type": "image"} for _ in photos), {"type": "text", "text": question}]
    text = chat.Template(encoder.processor).render([{"role": "user", "content": content}], prompt=True)
    device, trained = parallel.pick_device(), work.input("05_train")
    base = model.load(plan, device, mode="inference")
    before = generate(base, encoder, text, pictures, work.config.max_new_tokens)
    if work.config.adapter is None:
        tuned = model.load(plan | {"base_model": str(trained / "model"), "revision": None}, device, mode="inference")
    else:
        tuned = model.attach(base, trained / "adapter", trainable=False).eval()
    after = generate(tuned, encoder, text, pictures, work.config.max_new_tokens)
    terminal.table(question, ["model", "answer"], [["before", before], ["after", after]])


if __name__ == "__main__":
    stage.run_script(main)
