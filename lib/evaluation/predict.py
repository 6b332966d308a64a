"""predict: the trained model's answers to the rows of a file, beside their references, and their scores."""
from pathlib import Path

from lib.data import sources
from lib.data.finished import encoder_of
from lib.data.rows import Rows
from lib.evaluation.evaluate import generate
from lib.evaluation.scores import metrics_of
from lib.models import model
from lib.models.plan import quiet, read_plan
from lib.run import ledger, stage, terminal
from lib.run.errors import StageError
from lib.text.chat import Encoder
from lib.text.template import Template
from lib.training import devices

OWN_TO_A_FILE = ("data_files", "name", "revision", "ds_type", "split", "media_root")


def evaluate_file(run: Path, path: str, out: Path) -> None:
    """Write a line for each sample of a data file, read like the recipe's first data set; say the scores.

    This is the view `06_save.py RUN --evaluate FILE --out FILE`: the run folder stays as it is.
    """
    if out.exists():
        raise StageError(f"--out: {out} is there already", "name another file, or remove that one")
    if not out.parent.is_dir():
        raise StageError(f"--out: {out.parent} is no folder", "make it, or name a file elsewhere")
    work, data = stage.view("06_save", run), stage.view("02_data", run, own=True)
    plan = read_plan(work)
    encoder = encoder_of(work)
    samples = read(path, data, encoder)                             # what is wrong, before weights are loaded
    metrics = metrics_of(work.config.eval_metrics)
    lines, net = [], trained_model(work, plan)
    with quiet(), terminal.Progress(f"answering {path}", len(samples)) as progress:
        for place, sample in enumerate(samples, start=1):
            text, shown, reference = encoder.prompt(sample)
            own = encoder.bounded(sample["image_bounds"])
            answer = generate(net, own, text, shown, work.config.max_new_tokens)
            scores = {name: metric([answer], [reference]) for name, metric in metrics.items()}
            lines.append({"sample_id": sample["sample_id"], "row": sample["row"], "answer": answer,
                          "reference": reference, **scores})
            progress.update(place)
    ledger.write_whole(out, ledger.in_lines(lines))
    answers, references = [[line[side] for line in lines] for side in ("answer", "reference")]
    means = [[name.replace("_", " "), f"{metric(answers, references):.1%}"]
             for name, metric in metrics.items()]
    terminal.table(f"{len(lines)} answers, in {out}", ["metric", "mean"], means)


def read(path: str, data, encoder: Encoder) -> list[dict]:
    """The samples of a data file; StageError for the first row that can't be used."""
    spec = data.config.datasets[0] | {"path": path} | dict.fromkeys(OWN_TO_A_FILE)
    template = Template(encoder.processor, day=data.config.template_date)
    rows = list(sources.rows(spec))
    if not rows:
        raise StageError(f"--evaluate: {path}: holds no row", "name a file with rows")
    found, rejects = Rows.of(spec, Path(path).stem, data, template, encoder).measured(rows)
    for reject in rejects[:1]:
        raise StageError(f"--evaluate: {reject['where']}: {reject['reason']}", reject["fix"])
    return found


def trained_model(work, plan: dict):
    """The trained model in eval mode: the base with the adapter, or the fully fine-tuned one."""
    trained, device = work.input("05_train"), devices.pick_device()
    spread = devices.spread(work.config, device)
    if work.config.adapter is None:
        plan = plan | {"base_model": str(trained / "model"), "revision": None}
        return model.load(plan, device, "inference", spread=spread)
    return model.load(plan, device, "inference", trained / "adapter", spread)
