"""report: report.html, the page that a person forwards: what was trained on what, how well, and proved how.

Fork me to: leave out a section or add one (`write_report`).
"""
from pathlib import Path

from lib.data import summary
from lib.export import serving
from lib.models.plan import public_name
from lib.pages import answers, page, tokens
from lib.pages.charts import curve
from lib.pages.facts import Facts, datasets, licence_in_words, origin, recipe_of
from lib.run import terminal
from lib.run.ledger import read_json
from lib.text.processor import tokenizer_of
from lib.training.metrics import loss_series, read_lines

PROOF_COLUMNS = ["export", "largest logit difference", "largest logit", "same argmax"]
SAME = "max_difference_with_the_same_weights"
PARTS = ("trained", "gradients", "optimizer")


def write_report(work, facts: Facts, encoder, rows: list[dict]) -> None:
    """Write report.html, and figure.svg for a README. rows: held-out ones, as `answers.cards` takes them."""
    timings = read_lines(work.input("05_train") / "timings.jsonl")
    html = page.document(f"{public_name(facts.plan)}, fine-tuned", [
        ("Result", result(facts, timings)),
        ("Answers", answers.cards(rows)),
        ("Curves", curves(work.input("05_train") / "metrics.jsonl", timings)),
        ("Data", data(facts) + learnt(work.input("02_data") / "preview.jsonl", encoder)),
        ("Recipe", recipe(facts)),
        ("What trained", roles(facts)),
        ("Memory", memory(work, timings)),
        ("Proof", proof(facts.check)),
        ("Use it", use(facts)),
    ], f"{facts.plan['family']}, {facts.plan['class']}. {licence_in_words(facts.plan)}",
        page.MEDIA_SHOWN[work.config.report_media])
    (work.path / "report.html").write_text(html, encoding="utf-8")
    if rows:
        best = sorted(rows, key=lambda row: (row["base_right"], not row["tuned_right"]))
        caption = f"exact match on {facts.check['rows']} rows: {score(facts.check)}"
        figure = answers.figure(best, "Held-out rows, before and after", caption)
        (work.path / "figure.svg").write_text(figure, encoding="utf-8")


def score(check: dict) -> str:
    """Exact match before and after training, in words."""
    scores = check["exact_match"]
    return f"{scores['base']:.0%} -> {scores['tuned']:.0%}" if check["rows"] else "no held-out rows"


def result(facts: Facts, timings: list[dict]) -> str:
    """HTML: key figures, and which step's weights these are."""
    seconds, trained = sum(line["seconds"] for line in timings), facts.method["trained_parameters"].values()
    total = sum(facts.plan["parameters"].values())
    kind = next(iter(facts.check["exports"]))
    return page.tiles([
        (score(facts.check), f"exact match on {facts.check['rows']} held-out rows"),
        (facts.data["counts"]["train_samples"], "training samples"),
        (sum(trained), f"trained parameters, {sum(trained) / total:.2%} of the base's"),
        (terminal.duration(seconds), f"in {facts.saved['trained_steps']:,} steps"),
    ]) + page.note(f"{facts.method['method']}. {origin(kind, facts)}")


def curves(metrics: Path, timings: list[dict]) -> str:
    """HTML: losses and, smaller, accuracy, gradient norms by role, learning rate and throughput."""
    every = read_lines(metrics)
    roles = sorted({key for line in every for key in line if key.startswith("grad_norm_")})
    norms = {key: key.removeprefix("grad_norm_").replace("_", " ") for key in roles}
    small = [("token accuracy", every, {"token_accuracy": "training", "eval_token_accuracy": "held out"}),
             ("gradient norm", every, norms or {"grad_norm": "gradient norm"}),
             ("learning rate", every, {"learning_rate": "learning rate"}),
             ("tokens per second", timings, {"tokens_per_second": "tokens per second"})]
    return curve(loss_series(metrics), "optimizer step", "loss per token") + page.small("".join(
        curve({name: [(line["step"], line[key]) for line in lines if key in line]
               for key, name in names.items()}, "optimizer step", label) for label, lines, names in small))


def data(facts: Facts) -> str:
    """HTML: the data sets, by names without folders, and what was rejected or changed."""
    counts = facts.data["counts"]
    more = [f"{name.replace('_', ' ')}: {counts[name]:,}" for name in
            ("tokens_per_picture", "rows_over_sequence_len", "samples_cut_to_sequence_len",
             "replies_ended_by_the_kit", "rows_that_tell_the_day") if counts[name]]
    table = page.table(summary.DATASET_COLUMNS, summary.dataset_rows(datasets(facts)))
    return table + (page.note("; ".join(more)) if more else "")


def learnt(preview: Path, encoder) -> str:
    """HTML: the first training sample, token by token."""
    row, media = read_lines(preview)[0], list(encoder.never_trained)
    names = tokenizer_of(encoder.processor).convert_ids_to_tokens(media)
    view = tokens.view(row["tokens"], row["input_ids"], row["labels"], names)
    return tokens.KEY + tokens.card("The first sample", "", view, [("tokens", len(row["input_ids"])),
                                                                   ("media", row["media_tokens"])])


def recipe(facts: Facts) -> str:
    """HTML: what the recipe sets, and folded away all other knobs."""
    rest = recipe_of(facts, given=False)
    return (page.table(["knob", "value"], recipe_of(facts), "ll")
            + page.folded(f"{len(rest)} more, as they are by default",
                          page.table(["knob", "value"], rest, "ll")))


def roles(facts: Facts) -> str:
    """HTML: parameters by role, how many of them train, and where."""
    method, parameters = facts.method, facts.plan["parameters"]
    rows = [[role, parameters.get(role, 0), method["modules"].get(role, 0), trained,
             ".".join(next(iter(method["first_hits"].get(role, [])), "").split(".")[-4:])]
            for role, trained in method["trained_parameters"].items()]
    rows += [[role, number, None, None, "frozen"] for role, number in parameters.items()
             if role not in method["trained_parameters"]]
    return page.table(["role", "parameters", "modules trained", "parameters trained", "such as"], rows)


def memory(work, timings: list[dict]) -> str:
    """HTML: the memory that 03 forecast for its kind of device, beside what loading and training took."""
    folder = work.input("03_load_model")
    load = read_json(folder / "load.json")
    rows, peaks = [["loading", None, None, size(load["peak_memory_gib"])]], [None, None]
    if (folder / "forecast.json").exists():
        found = read_json(folder / "forecast.json")
        parts = {**{f"weights, {kind}": gib for kind, gib in found["weights_gib"].items()},
                 **{part: found[f"{part}_gib"] for part in PARTS}}
        ways = [found[way] for way in ("checkpointed", "kept")]
        rows = [*([part, size(gib), size(gib), None] for part, gib in parts.items()),
                ["activations", *(size(way["activations_gib"]) for way in ways), None], *rows]
        peaks = [size(way["peak_gib"]) for way in ways]
    used = max((line["peak_memory_gib"] for line in timings), default=None)
    rows.append(["training, at its peak", *peaks, None if used is None else size(used)])
    where = "" if load["device"].startswith("cuda") else " On a CPU the whole process counts, libraries too."
    head = ["", "forecast, checkpointed", "forecast, activations kept", f"used ({load['device']})"]
    return page.table(head, rows) + page.note(f"The forecast is of one device at the longest row.{where}")


def size(gib: float) -> str:
    """A size of memory in words."""
    return f"{gib:.2f} GiB" if gib >= 0.1 else f"{gib * 1024:.3g} MiB"


def proofs(check: dict) -> list[list]:
    """Rows of PROOF_COLUMNS, one for each export, as the page and the terminal show them."""
    return [[name, f"{found['max_logit_difference']:.3g}", f"{found['max_logit']:.3g}",
             f"{found['argmax_agreement']:.1%}"] for name, found in check["exports"].items()]


def proof(check: dict) -> str:
    """HTML: what the fresh process found."""
    words = ("A fresh process, in which nothing of the kit was imported, loaded each export with plain "
             "transformers and peft. Every tensor was what training had, the exported processor made the "
             "same inputs, and the answers on this page are its own. Its logits, beside those right after "
             "training:")
    same = [f"{name}: with the same weights, added up in memory, its logits differ by {found[SAME]:.3g}."
            for name, found in check["exports"].items() if SAME in found]
    return page.paragraph(words) + page.table(PROOF_COLUMNS, proofs(check)) + "".join(map(page.note, same))


def use(facts: Facts) -> str:
    """HTML: how each export is loaded and served."""
    html = ""
    for kind in facts.check["exports"]:
        html += page.heading(f"{kind}/") + page.code(serving.loading(kind, facts))
        html += "".join(page.paragraph(words) + (page.code(command) if command else "")
                        for words, command in serving.serving(kind, facts))
    return html
