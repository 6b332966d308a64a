"""All six scripts, one after the other, on every family: two steps of LoRA, exported and proved in a fresh process."""
import importlib
import json
import math
import os
import subprocess
import sys

import pytest
from PIL import Image

from lib.export import proof
from lib.run import stage
from tests import zoo

NAMES = list(zoo.NAMES)
AS_PROCESSES = ["llava", "qwen2_5_vl"]
NEEDS = {"gemma3n": "timm", "voxtral": "mistral_common"}
# As real checkpoints are. Routers, a state and a tower that takes pictures in its own type show what float32 hides.
IN_BF16 = ("llama4", "mistral4", "qwen3_5", "qwen3_5_moe", "gemma3n", "internvl")
ANSWERS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220)}


def write_medium(path, answer):
    """Write a picture of that colour or, as a wav of 12,000 Hz, a tone that goes by the colour's name."""
    if path.suffix == ".png":
        Image.new("RGB", (40, 32), ANSWERS[answer]).save(path)
        return
    import soundfile
    soundfile.write(path, [0.4 * math.sin(n * len(answer) / 20) for n in range(12_000)], 12_000)


def write_rows(folder, kind, text_alone=True):
    """A data file of six rows: one medium of this kind (None: none), two of them, and, if it may be, one of text."""
    rows = []
    for number, answer in enumerate([*ANSWERS] * 2):
        name = f"{number}{'.wav' if kind == 'audio' else '.png'}"
        media = [] if number == 4 and text_alone or not kind else [name] * (2 if number == 5 else 1)
        for medium in media:
            write_medium(folder / medium, answer)
        content = [*({"type": kind} for _ in media), {"type": "text", "text": "Which colour?"}]
        rows.append({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}],
                     f"{kind}s": media})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def recipe(name, folder):
    """The smallest recipe for a family's tiny checkpoint in `folder`."""
    bf16 = name in IN_BF16
    checkpoint = zoo.build(name, folder / name, dtype="bfloat16" if bf16 else "float32")
    write_rows(folder, None if name in zoo.TEXT_ONLY else "audio" if name == "voxtral" else "image", name != "paligemma")
    text = [f"base_model: {checkpoint}", f"datasets: [{{path: {folder / 'rows.jsonl'}}}]", "val_set_size: 2",
            "adapter: lora", "lora_r: 2", "micro_batch_size: 2", "gradient_accumulation_steps: 2", "max_steps: 2",
            "learning_rate: 1e-3", f"bf16: {str(bf16).lower()}", "max_new_tokens: 4", "golden_rows: 2", "merge: true"]
    (folder / "recipe.yaml").write_text("\n".join(text) + "\n", encoding="utf-8")
    return folder / "recipe.yaml"


def assert_whole(run, in_bf16=False):
    """Every stage finished, training was logged and the export reproduced it."""
    assert all((run / stem / "stage.json").exists() for stem in stage.STAGES)
    rows = [json.loads(line) for line in (run / "05_train" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    check = json.loads((run / "06_save" / "check.json").read_text(encoding="utf-8"))
    adapter, merged = (check["exports"][name] for name in ("adapter", "merged"))
    assert adapter["max_logit_difference"] < 1e-4
    assert merged["max_difference_with_the_same_weights"] < 1e-4
    if in_bf16:                       # what was added up is rounded, and with it any near tie of a router may fall
        assert 0 < merged["max_logit_difference"]
    else:
        assert merged["max_logit_difference"] < 1e-3 and merged["argmax_agreement"] == 1.0
    assert set(check["exact_match"]) == {"base", "tuned"}
    assert (run / "06_save" / "adapter" / "README.md").exists() and (run / "06_save" / "report.html").exists()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in AS_PROCESSES])
def test_a_family_goes_through_all_six_scripts(name, tmp_path, monkeypatch):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{name} needs {NEEDS[name]}")
    path, run = recipe(name, tmp_path), tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    importlib.import_module("01_config").main([str(path), str(run)])
    monkeypatch.setattr(subprocess, "run", prove_in_this_process)      # a process each would take minutes in all
    for stem in stage.STAGES[1:]:
        importlib.import_module(stem).main([str(run)])
    assert_whole(run, name in IN_BF16)


def prove_in_this_process(words, **options):
    """06's fresh process, not fresh: the families below have real ones."""
    proof.main(*map(str, words[-2:]))
    return subprocess.CompletedProcess(words, 0, "", "")


@pytest.mark.parametrize("name", AS_PROCESSES)
def test_a_family_goes_through_all_six_scripts_as_a_user_starts_them(name, tmp_path):
    path, run = recipe(name, tmp_path), tmp_path / "run"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for stem in stage.STAGES:
        given = [path, run] if stem == "01_config" else []         # afterwards, runs/latest names the run
        done = subprocess.run([sys.executable, stage.ROOT / f"{stem}.py", *given], cwd=tmp_path, env=environment,
                              capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr[-2000:]
        assert "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr[-2000:]
    assert_whole(run)
