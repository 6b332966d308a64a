"""06_save: export what was trained, prove in a fresh process that it works, and show what it learnt.

    python 06_save.py runs/demo [--force]
    python 06_save.py runs/demo --ask photo.jpg "What is this?"     # or speech.wav, clip.mp4; writes nothing
    python 06_save.py runs/demo --evaluate rows.jsonl --out predictions.jsonl
    python 06_save.py runs/a runs/b --compare

Reads:  05_train (adapter or model, golden.safetensors, metrics.jsonl), 02_data, 03_load_model/model.json,
        04_lora/adapter.json.
Writes: 06_save/adapter/ or model/ (with tokenizer, processor, README.md), merged/ if asked, check.json,
        report.html, figure.svg.
Source: PEFT's adapter format; the proof is lib/export/proof.py, on plain transformers and peft.
Fork me to: change the model card (lib/export/card.py), the page (lib/pages/report.py), or what counts as a
        right answer (lib/evaluation/scores.py).
"""
import json
import os
import shutil
from pathlib import Path

from lib.data.finished import encoder_of, samples_of
from lib.data.messages import text_parts
from lib.evaluation.compare import compare
from lib.evaluation.evaluate import generate
from lib.evaluation.predict import evaluate_file, trained_model
from lib.evaluation.scores import exact_match
from lib.export import fresh, merge
from lib.export.card import model_card
from lib.media import media
from lib.media.locating import MediaError
from lib.models import model
from lib.models.plan import public_name, quiet, read_plan
from lib.models.saved import attach
from lib.pages import page, report
from lib.pages.facts import Facts
from lib.run import stage, terminal
from lib.run.errors import RowError, StageError
from lib.run.ledger import read_json, write_json
from lib.text.chat import Encoder
from lib.text.render import stop_clock
from lib.text.template import Template
from lib.training import devices


def main(argv=None):
    """Export, merge if asked, prove the exports in a fresh process, answer held-out rows, report."""
    parser = stage.arguments(__doc__)
    parser.add_argument("--ask", nargs="+", metavar="FILE",
                        help="pictures, sounds, clips, then a question: only answer, before and after")
    parser.add_argument("--evaluate", metavar="FILE", help="only answer and score the rows of a data file")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where --evaluate writes its answers")
    parser.add_argument("--compare", action="store_true", help="only print these runs side by side")
    parser.add_argument("more", nargs="*", help="for --compare, more run folders")
    args = parser.parse_intermixed_args(argv)
    run = stage.resolve_run(args.run)
    if args.compare:
        return compare([run, *map(stage.resolve_run, args.more)])
    if args.more:
        raise StageError(f"{args.more[0]}: 06_save works on one run", "leave it out, or add --compare")
    if bool(args.evaluate) != bool(args.out):
        raise StageError("--evaluate and --out need one another", "--evaluate FILE --out predictions.jsonl")
    if args.evaluate:
        return evaluate_file(run, args.evaluate, args.out)
    if args.ask:
        return ask(stage.view("06_save", run), args.ask[:-1], args.ask[-1])

    # 1. Start the stage, unless its outputs are still true.
    work = stage.begin(stage.decide("06_save", run, force=args.force))
    if work is None:
        return
    plan = read_plan(work)
    encoder = encoder_of(work)
    # 2. Export the weights, and beside them the tokenizer, processor and template that training used.
    exports = export(work, plan, encoder)
    # 3. Prove it in a process that knows nothing of the kit, which also answers held-out rows.
    rows = held_out_rows(work, encoder)
    proved = fresh.prove(work, plan, encoder, exports, rows)
    check = fresh.checked(proved, rows, plan)
    write_json(work.path / "check.json", check)
    # 4. Describe it: a model card in every export, one page for people.
    facts = Facts.of(work, plan, check)
    for folder in exports:
        (folder / "README.md").write_text(model_card(folder.name, facts), encoding="utf-8")
    shutil.copy(exports[0] / "README.md", work.path)
    pictures = page.may_show(work.config.report_media, held_out=True)
    report.write_report(work, facts, encoder, answered(rows, proved["answers"], pictures))
    say_results(check)
    work.finish(volatile=("report.html", "figure.svg"))
    if work.config.adapter and Path(plan["base_model"]).is_dir():
        terminal.say(f"adapter/ knows its base as {public_name(plan)!r}, without the folder that it lies in: "
                     f"{work.path / 'adapter/README.md'} shows how to load it")
    terminal.say(f"look at: {work.path / 'report.html'}", "bold")


# ---- export ----

def export(work, plan: dict, encoder: Encoder) -> list[Path]:
    """The folders of the exports, which this writes: adapter/ or model/, and merged/ if asked."""
    trained = work.input("05_train") / ("adapter" if work.config.adapter else "model")
    folders = [work.path / trained.name]
    shutil.copytree(trained, folders[0])
    if work.config.merge and work.config.adapter:
        folders.append(work.path / "merged")
        merge.write_merged(plan, trained, folders[1], work.config.max_shard_size)
    if read_json(work.input("02_data") / "report.json")["counts"]["rows_that_tell_the_day"]:
        stop_clock(encoder.processor, work.config.template_date)
    for folder in folders:
        encoder.processor.save_pretrained(folder)
    return folders


def held_out_rows(work, encoder: Encoder) -> list[dict]:
    """The first `answer_rows` held-out samples, which are answered, each with its reference."""
    records = samples_of(work, "eval")
    chosen = records.select(range(min(len(records), work.config.answer_rows)))
    return [record | {"reference": encoder.prompt(record)[2]} for record in chosen]


# ---- page ----

def answered(rows: list[dict], answers: list[dict], pictures: bool) -> list[dict]:
    """Rows as `answers.cards` takes them: pictures, question, reference, both answers, which are right."""
    return [{"pictures": [media.poster(medium) for medium in row["media"]] if pictures else [],
             "question": last_question(json.loads(row["messages"])), "reference": row["reference"], **both,
             **{f"{which}_right": bool(exact_match([both[which]], [row["reference"]])) for which in both}}
            for row, both in zip(rows, answers, strict=True)]


def last_question(messages: list[dict]) -> str:
    """The text of the last user message."""
    asked = [message for message in messages if message["role"] == "user"][-1:]
    return " ".join(part["text"] for m in asked for part in m["content"] if part["type"] == "text")


def say_results(check: dict) -> None:
    """Print the proof and the exact match before and after training as tables."""
    terminal.table("in a fresh process", report.PROOF_COLUMNS, report.proofs(check))
    if check["rows"]:
        terminal.table(f"exact match on {check['rows']} held-out rows", ["before", "after"],
                       [[f"{check['exact_match'][which]:.1%}" for which in ("base", "tuned")]])
    else:
        terminal.warn("no held-out rows: nothing was answered (set val_set_size or test_datasets)")


# ---- try it ----

def prompt_about(files: list[str], question: str, encoder: Encoder, template: Template,
                 before: list[dict]) -> tuple[str, list]:
    """(the prompt of a question about media files, these decoded); StageError where it can't be asked.

    before: the messages that stand before the question.
    """
    if os.path.isfile(question):            # Path's own is_file refuses a long question
        raise StageError(f"--ask: {question} is a file, and no question follows it",
                         "files come first, then one question in quotes")
    if found := template.special.search(question):
        raise StageError(f"--ask: the question spells the special token {found.group()!r}", "ask without it")
    kinds = [media.KIND_OF.get(Path(file).suffix.lower(), "image") for file in files]
    content = [*({"type": kind} for kind in kinds), {"type": "text", "text": question}]
    try:
        if unknown := set(kinds) - set(template.placeholders):
            raise RowError(f"base_model takes no {unknown.pop()}", "ask about another file")
        opened = [media.read_medium(file, Path(), kind, encoder.decoding)[1]
                  for file, kind in zip(files, kinds)]
        text = template.render([*before, {"role": "user", "content": content}], prompt=True)
        encoder.encode(text, [], opened)                       # refused here, before the model is loaded
    except (MediaError, RowError) as error:
        raise StageError(f"--ask: {error}", "files come first, then one question in quotes") from None
    return text, opened


def ask(work, files: list[str], question: str) -> None:
    """Print the answer to a question about some media, before and after training: the view `--ask`.

    It is asked like the rows of the first data set: with its system prompt, and the template's arguments.
    """
    data = stage.view("02_data", work.run, own=True).config
    plan = read_plan(work)
    encoder = encoder_of(work)
    template = Template(encoder.processor, day=work.config.template_date)
    template = template.with_options([], **data.chat_template_kwargs)
    prompt = data.datasets[0]["system_prompt"]
    before = [{"role": "system", "content": text_parts(prompt)}] if prompt else []
    text, opened = prompt_about(files, question, encoder, template, before)
    device, most, answers = devices.pick_device(), work.config.max_new_tokens, []
    base = model.load(plan, device, "inference", spread=devices.spread(work.config, device))
    with quiet():
        answers.append(["before", generate(base, encoder, text, opened, most) or "(nothing)"])
        tuned = trained_model(work, plan) if work.config.adapter is None else \
            attach(base, work.input("05_train") / "adapter", trainable=False).eval()
        answers.append(["after", generate(tuned, encoder, text, opened, most) or "(nothing)"])
    terminal.table(question, ["model", "answer"], answers)


if __name__ == "__main__":
    stage.run_script(main)
