"""06: the export is what was trained, plain libraries load it, and it tells nothing of this machine."""

import contextlib
import dataclasses
import functools
import importlib
import json
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lib.evaluation.evaluate import generate
from lib.evaluation.scores import anls, contains, edits, exact_match
from lib.export import card, fresh, proof, serving
from lib.models import model
from lib.pages import answers, facts, report
from lib.run import stage
from lib.run.errors import StageError
from lib.run.ledger import stamp
from lib.text.chat import Encoder
from tests import harness
from tests.harness import Bad, bad_input
from tests.runner import COLOURS, Run, fork, lines, text_rows

CPU = torch.device("cpu")
ROPE = {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
save = importlib.import_module("06_save")


@pytest.fixture
def make(tmp_path, monkeypatch, zoo):
    """A function: family, 01's overrides and knobs -> a run in a folder of its own, with 05_train finished."""
    def make(name="llava", overrides=(), **knobs):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        rows = text_rows() if name.endswith("_text") else None
        return Run(folder, monkeypatch, zoo(name), rows, **{"max_steps": 2} | knobs).upto("05_train", *overrides)
    return make


@pytest.fixture(scope="module")
def adapter_run(tmp_path_factory, zoo):
    """A run with an adapter and a merged model, saved as a user does it, proved in a fresh process."""
    folder = tmp_path_factory.mktemp("adapter")
    knobs = {"merge": True, "max_steps": 4, "answer_rows": 1, "overrides_of_model_config": ROPE}
    with pytest.MonkeyPatch.context() as monkeypatch:
        return Run(folder, monkeypatch, zoo("llava"), **knobs).upto("06_save")


@pytest.fixture(scope="module")
def full_run(tmp_path_factory, zoo):
    """A run of full fine-tuning, saved likewise."""
    folder = tmp_path_factory.mktemp("full")
    with pytest.MonkeyPatch.context() as monkeypatch:
        return Run(folder, monkeypatch, zoo("llava"), adapter=None, max_steps=2).upto("06_save")


def prove_here(run, monkeypatch):
    """06, with its proof in this process, which saves the ten seconds of a fresh one."""
    monkeypatch.setattr(fresh.subprocess, "run", lambda command, **_: proof.main(*map(str, command[-2:])))
    run("06_save")


def tensor_names(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


# ---- what is exported ----

PROCESSOR = {"processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


def test_card_and_merged_model_have_the_rope_that_was_trained(adapter_run):
    rope = {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}
    card = (adapter_run.path / "06_save/adapter/README.md").read_text(encoding="utf-8")
    assert f"config.get_text_config().rope_parameters = {rope}\n" in card and ".from_pretrained(BASE, config=config, " in card
    assert "Serve the merged model, not this adapter: its rotary positions are not the base's" in card
    merged = adapter_run.json("06_save/merged/config.json")
    assert merged["text_config"]["rope_parameters"] == rope
    assert "config=config" not in (adapter_run.path / "06_save/merged/README.md").read_text(encoding="utf-8")


def test_an_adapter_folder_holds_adapter_tokenizer_processor_template_and_card(adapter_run):
    names = {path.name for path in (adapter_run.path / "06_save/adapter").iterdir()}
    assert names == {"adapter_model.safetensors", "adapter_config.json", "README.md"} | PROCESSOR


def test_a_template_without_a_clock_is_exported_byte_for_byte(adapter_run, zoo):
    for kind in ("adapter", "merged"):
        exported = adapter_run.path / "06_save" / kind / "chat_template.jinja"
        assert exported.read_bytes() == (zoo("llava") / "chat_template.jinja").read_bytes()


def test_model_folders_hold_a_whole_model_beside_the_processor(adapter_run, full_run):
    for folder in (adapter_run.path / "06_save/merged", full_run.path / "06_save/model"):
        names = {path.name for path in folder.iterdir()}
        assert names - PROCESSOR == {"config.json", "generation_config.json", "model.safetensors",
                                     "README.md"}
        assert PROCESSOR < names


@pytest.mark.parametrize("which", ["adapter_run", "full_run"])
def test_check_json_says_that_the_export_is_exact_and_how_good_it_is(which, request):
    run = request.getfixturevalue(which)
    check = run.json("06_save/check.json")
    export = check["exports"]["adapter" if which == "adapter_run" else "model"]
    assert export["max_logit_difference"] == 0 and export["argmax_agreement"] == 1
    assert set(check["exact_match"]) == {"base", "tuned"}
    assert all(0 <= score <= 1 for score in check["exact_match"].values())
    assert check["max_logit_difference"] == max(e["max_logit_difference"] for e in check["exports"].values())
    assert check["max_logit_difference"] < 1e-3 and check["processor_identical"] is True


def test_a_merged_model_has_the_bases_tensor_names_and_types(adapter_run, zoo):
    merged = adapter_run.path / "06_save/merged"
    assert tensor_names(merged) == tensor_names(zoo("llava"))
    base, ours = load_file(zoo("llava") / "model.safetensors"), load_file(merged / "model.safetensors")
    assert all(ours[name].dtype == base[name].dtype and ours[name].shape == base[name].shape for name in base)
    changed = {name for name in base if not torch.equal(base[name], ours[name])}
    assert len(changed) == 14 and all("language_model.model.layers" in name for name in changed)


def test_full_fine_tuning_ends_in_a_base_model_for_the_next_run(full_run, tmp_path, monkeypatch):
    again = Run(tmp_path, monkeypatch, full_run.path / "06_save/model", max_steps=1).upto("05_train")
    before = [line["eval_loss"] for line in full_run.metrics() if "eval_loss" in line][-1]
    assert again.metrics()[0]["eval_loss"] == pytest.approx(before, rel=1e-5)


def test_nothing_that_is_exported_tells_a_path_of_this_machine(adapter_run, full_run, zoo):
    for run in (adapter_run, full_run):
        paths = [path for path in (run.path / "06_save").rglob("*") if path.is_file()]
        ledger = {run.path / "06_save" / name for name in ("stage.json", "started.json")}      # stays in the run
        assert len(paths) > 10
        for path in set(paths) - ledger:
            content = path.read_bytes()
            for secret in (str(run.folder), str(zoo("llava")), str(Path.home()), str(Path.cwd()), "/tmp/"):
                assert secret.encode() not in content, f"{path.name} tells {secret}"


def test_the_page_tells_the_whole_story_and_the_figure_shows_both_answers(adapter_run):
    page = (adapter_run.path / "06_save/report.html").read_text(encoding="utf-8")
    headings = re.findall(r"<h2>([^<]*)</h2>", page)
    assert headings == ["Result", "Answers", "Curves", "Data", "Recipe", "What trained", "Memory", "Proof", "Use it"]
    for part in ("Which colour is number", "data:image", "step 4 of 4", "rows.jsonl", "gradient norm by", "<mark>",
                 "tokens per second by", "token accuracy by", "learning rate by", "forecast, checkpointed", "activations",
                 "largest logit difference", "with the same weights", "vllm serve", "(report_media: all)"):
        assert part in page, part
    assert (adapter_run.path / "06_save/figure.svg").exists()


@pytest.mark.parametrize("width, dark", [(1280, False), (390, True)], ids=["desktop", "phone at night"])
@pytest.mark.parametrize("name", ["02_data/preview.html", "06_save/report.html"])
def test_a_real_browser_shows_every_part_of_a_page_within_its_width_and_asks_for_nothing(
        name, width, dark, adapter_run, browser):
    browser.open(adapter_run.path / name, width, dark)
    assert browser.complaints == [] and browser.requests == []
    sections = browser.find("""[...document.querySelectorAll('section')].map(section => [
        section.querySelector('h2').innerText, section.getBoundingClientRect().height,
        section.innerText.length + 99 * section.querySelectorAll('svg').length])""")
    assert len(sections) >= 6 and all(height > 50 and content > 20 for _, height, content in sections)
    assert browser.find("[...document.images].every(image => image.naturalWidth > 0)")
    assert browser.find("document.images.length") >= 1
    assert browser.find("document.documentElement.scrollWidth") <= width
    tokens = "[...document.querySelectorAll('.tokens span[title]')]"
    assert browser.find(f"{tokens}.length > 10 && {tokens}.every(token => /^id \\d+$/.test(token.title))")


def test_the_page_holds_no_picture_where_report_media_forbids_it(make, monkeypatch):
    run = make(report_media="none", lora_target_roles=["language", "vision"], image_size=[40, 32])
    prove_here(run, monkeypatch)
    page = (run.path / "06_save/report.html").read_text(encoding="utf-8")
    assert "data:image" not in page and "(report_media: none)" in page and "Which colour is number" in page
    assert "data:image" not in (run.path / "06_save/figure.svg").read_text(encoding="utf-8")
    assert all(f">{role}</text>" in page for role in ("language", "vision"))      # of the gradient norms
    card = (run.path / "06_save/README.md").read_text(encoding="utf-8")
    assert "Serve the merged model, not this adapter: vision trained" in card and "vllm" not in card
    assert "`merge: true` in the recipe writes it" in card and "fitted into 40 x 32 pixels" in card


def test_what_gained_most_and_what_lost_most_come_first():
    rows = [{"pictures": [], "question": f"q{n}", "reference": "a heron", "base": base, "tuned": tuned,
             "base_right": False, "tuned_right": False} for n, (base, tuned) in enumerate(
                 [("a herring", "a heron"), ("a heron", "xyz"), *[("same", "same")] * 9, ("", "a heron")])]
    shown = answers.cards(rows)
    order = re.findall(r">(Most improved|Most worsened|All other 9 rows|q\d+)<", shown)
    assert order[:5] == ["Most improved", "q11", "q0", "Most worsened", "q1"]
    assert order[5:] == ["All other 9 rows", *(f"q{n}" for n in range(2, 11))]


def test_06_is_up_to_date_until_training_changes(adapter_run, capsys):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(adapter_run.folder)
        adapter_run("06_save")
    assert "06_save is up to date" in capsys.readouterr().out


# ---- the card ----

def snippet(folder, **filled):
    """The card's code, its BASE and FOLDER filled in, after it has run: the names that it defines.

    It asks about the photo.jpg of its folder, as a reader of the card would.
    """
    Image.new("RGB", (40, 32), "red").save(folder.parent.parent.parent / "photo.jpg")
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.S)[1]
    for name, value in filled.items():
        code, found = re.subn(rf'^{name} = ".*?"', f"{name} = {str(value)!r}", code, flags=re.M)
        assert found == 1
    names = {}
    with contextlib.chdir(folder.parent.parent.parent):
        exec(code, names)                                          # noqa: S102
    return names


@pytest.mark.parametrize("kind", ["adapter", "merged", "model"])
def test_the_cards_snippet_loads_what_was_trained_and_gets_an_answer(kind, adapter_run, full_run, zoo):
    run = full_run if kind == "model" else adapter_run
    folder = run.path / "06_save" / kind
    names = snippet(folder, FOLDER=folder, **({"BASE": zoo("llava")} if kind == "adapter" else {}))
    golden = load_file(run.path / "05_train/golden.safetensors")
    row = {key[2:]: tensor for key, tensor in golden.items() if key.startswith("0.")}
    positions, logits = row.pop("positions"), row.pop("logits")
    with torch.no_grad():
        found = names["model"].eval()(**row, use_cache=False).logits[0, positions]
    assert (found - logits).abs().max() <= (1e-3 if kind == "merged" else 0)
    assert type(names["processor"]).__name__ == "LlavaProcessor"


def test_the_card_says_what_the_base_is_how_it_was_made_and_how_good_it_is(adapter_run):
    text = (adapter_run.path / "06_save/adapter/README.md").read_text(encoding="utf-8")
    for part in ("base_model: llava", "library_name: peft", "image-text-to-text", "LoRA r=4 alpha=32",
                 "Exact match", "on 1 held-out rows", "7 samples; 2 were held out", "transformers 5.",
                 "the weights of step 4 of 4", "| rows.jsonl | 7 | 2 | 0 |", "lora_r: 4", "its card doesn't name"):
        assert part in text, part
    assert text == (adapter_run.path / "06_save/README.md").read_text(encoding="utf-8")
    merged = (adapter_run.path / "06_save/merged/README.md").read_text(encoding="utf-8")
    assert "vllm serve ." in merged and "transformers serve ." in merged and "library_name: transformers" in merged


@pytest.fixture
def told(adapter_run):
    """What the cards of a run with the base's own rope tell."""
    work, plan = stage.view("06_save", adapter_run.path), adapter_run.json("03_load_model/model.json")
    return facts.Facts.of(work, plan | {"text_config": {}}, adapter_run.json("06_save/check.json"))


@pytest.mark.parametrize("part, change, kind, words", [
    ("method", {"experts": 8}, "adapter", "experts trained, which not every engine takes from an adapter"),
    ("method", {"method": "DoRA r=4 alpha=8"}, "adapter", "DoRA is more than the LoRA that engines know"),
    ("config", {"image_max_pixels": 1000}, "adapter", "image_max_pixels changed the processor"),
    ("config", {"max_image_tokens": 64}, "adapter", "max_image_tokens changed the processor"),
    ("plan", {"new_rows": [9]}, "adapter", "new tokens have rows in the adapter, which engines pass over"),
    ("plan", {"text_config": {"rope_theta": 1e6}}, "adapter", "its rotary positions are not the base's"),
    ("method", {"lora_r": 1024}, "adapter", "a rank of 1024 is more than vLLM takes"),
    ("method", {"trained_parameters": {"vision": 1, "projector": 1}}, "adapter", "It is in `merged/`"),
    ("plan", {"stored_as": "fp8"}, "merged", "The base's 8-bit floats were merged into float32"),
    ("plan", {"quantisation": {"bits": 4}}, "merged", "had 4 bits; here its original weights are merged"),
    ("plan", {"revision": "abc"}, "adapter", "vllm serve llava --revision abc"),
    ("plan", {"revision": "abc"}, "adapter", 'from_pretrained(BASE, revision="abc", dtype='),
    ("plan", {"revision": "abc", "text_config": {"rope_theta": 1e6}}, "adapter", 'config=config, revision="abc", dtype='),
    ("saved", {"step": 2, "best": {"eval_loss": 0.5}}, "adapter", "step 2 of 4, whose eval_loss was the best (0.5)"),
    ("saved", {"step": 3, "trained_steps": 3}, "adapter", "step 3 of 4, where training stopped early"),
    ("data", {"counts": {"rows_that_tell_the_day": 2}}, "adapter", "as in training. Without the template's first line"),
])
def test_the_card_says_only_what_holds(part, change, kind, words, told):
    assert words not in (plain := card.model_card(kind, told))
    assert kind == "merged" or "vllm serve llava --chat-template chat_template.jinja \\\n  --enable-lora " \
                               "--max-lora-rank 8 --lora-modules tuned=." in plain
    if part == "data":
        change = {"counts": told.data["counts"] | change["counts"]}
    changed = dataclasses.replace(told, **{part: getattr(told, part) | change})
    text = card.model_card(kind, changed)
    assert words in text
    assert ("--enable-lora" in text) == (kind == "adapter" and not serving.needs_merging(changed))


def test_the_card_takes_the_licence_of_the_bases_card(tmp_path, told):
    said = "---\nlicense: other\nlicense_name: gemma\nlicense_link: there\n---\n# Base\n"
    (tmp_path / "README.md").write_text(said, encoding="utf-8")
    text = card.model_card("adapter", dataclasses.replace(told, plan=told.plan | {"base_model": str(tmp_path)}))
    assert "\nlicense: other\nlicense_name: gemma\nlicense_link: there\n" in text
    assert "the base model (gemma)" in text


def test_a_knobs_value_tells_no_folder_of_this_machine():
    value = [{"path": "/home/me/data/rows.jsonl", "name": None, "weight": 2.0}, {"path": "owner/data"}]
    assert facts.without_folders(value) == '\n  - {"path": "rows.jsonl", "weight": 2.0}\n  - {"path": "owner/data"}'
    assert [facts.without_folders(path) for path in ("/a/b", "~/a/b", "../a/b", "./b", "lib/export/card.py", "a/b")] == [
        '"b"', '"b"', '"b"', '"b"', '"card.py"', '"a/b"']


def test_neither_card_nor_page_tells_private_hosts_or_whose_the_project_is(told):
    secret = {"url_hosts": ["pictures.example.internal"], "wandb_entity": "us", "output_dir": "runs/secret"}
    told = dataclasses.replace(told, config=told.config | secret, given=[*told.given, *secret])
    text = card.model_card("adapter", told) + report.recipe(told)
    assert "lora_r" in text and "internal" not in text and "wandb" not in text and "secret" not in text


def test_a_text_only_adapter_says_so_and_nothing_is_answered_without_held_out_rows(
        make, monkeypatch, capsys, zoo):
    run = make("llama_text", val_set_size=0)
    prove_here(run, monkeypatch)
    assert "pipeline_tag: text-generation" in (run.path / "06_save/README.md").read_text(encoding="utf-8")
    assert "No row was held out" in (run.path / "06_save/README.md").read_text(encoding="utf-8")
    assert run.json("06_save/check.json")["exact_match"] == {"base": None, "tuned": None}
    adapter = run.path / "06_save/adapter"
    assert "answer" in snippet(adapter, FOLDER=adapter, BASE=zoo("llama_text"))
    assert "no held-out rows" in capsys.readouterr().out


# ---- the proof ----

def test_a_tampered_adapter_tensor_fails_by_name(make, monkeypatch):
    run = make()
    path = run.path / "05_train/adapter/adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[3]
    tensors[name][0, 0] += 1e-6
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(StageError, match="adapter_model.safetensors"):  # the ledger sees it first
        run("06_save")
    ledger = run.path / "05_train/stage.json"
    content = json.loads(ledger.read_text(encoding="utf-8"))
    content["wrote"]["adapter/adapter_model.safetensors"] = stamp(path)
    ledger.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(StageError) as caught:                      # and if it hadn't, the proof does
        prove_here(run, monkeypatch)
    assert caught.value.what == f"adapter: 1 tensors are not what was trained, such as {name}"
    assert not (run.path / "06_save").exists() and (run.path / "06_save.partial/adapter").exists()


def test_another_processor_than_trainings_fails_by_the_tensor_it_changes(make, monkeypatch):
    run = make()
    exported = save.export

    def export(*given):
        folders = exported(*given)
        path = folders[0] / "processor_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["image_processor"]["image_mean"] = [0.1, 0.1, 0.1]
        path.write_text(json.dumps(config), encoding="utf-8")
        return folders
    monkeypatch.setattr(save, "export", export)
    with pytest.raises(StageError, match="the exported processor makes another pixel_values of rows-"):
        prove_here(run, monkeypatch)


@pytest.mark.parametrize("difference", [0.1, float("nan")])
def test_other_logits_than_trainings_fail(difference):
    exports = {"adapter": {"max_logit_difference": difference, "max_logit": 5.0}}
    with pytest.raises(StageError, match=f"adapter: logits in a fresh process differ by {difference} of 5 "):
        fresh.checked({"processor": "", "answers": [], "exports": exports}, [], {"dtype": "float32"})


def test_an_export_that_plain_transformers_cant_load_says_so(make, monkeypatch):
    run = make(golden_rows=1, answer_rows=0)
    exported = save.export

    def export(*given):
        folders = exported(*given)
        (folders[0] / "adapter_config.json").unlink()
        return folders
    monkeypatch.setattr(save, "export", export)
    with pytest.raises(StageError, match="transformers can't load or run the export: .*adapter_config.json"):
        run("06_save")


def test_the_fresh_process_imports_nothing_of_the_kit():
    text = Path(proof.__file__).read_text(encoding="utf-8")
    assert set(re.findall(r"^\s*(?:from|import) (\w+)", text, re.M)) == {
        "base64", "hashlib", "json", "sys", "pathlib", "numpy", "torch", "transformers", "PIL", "safetensors", "peft",
        "soundfile"}


@pytest.mark.parametrize("knobs", [{"adapter": "qlora"}, {"load_in_8bit": True}, {"peft_use_dora": True}])
def test_quantised_bases_and_dora_go_through_to_a_merged_model(knobs, make, monkeypatch, zoo):
    run = make(bf16=True, merge=True, **knobs)
    prove_here(run, monkeypatch)
    exports = run.json("06_save/check.json")["exports"]
    assert exports["adapter"]["max_logit_difference"] < 1e-3 * exports["adapter"]["max_logit"]
    assert exports["merged"]["max_logit_difference"] < 5e-2 * exports["merged"]["max_logit"]
    assert tensor_names(run.path / "06_save/merged") == tensor_names(zoo("llava"))


def test_a_merged_tensor_that_is_not_the_sum_fails_by_name(make, monkeypatch):
    run = make(merge=True, bf16=True, golden_rows=1, answer_rows=0)
    exported = save.export

    def export(*given):
        folders = exported(*given)
        tensors = load_file(folders[1] / "model.safetensors")
        tensors["language_model.model.layers.1.mlp.up_proj.weight"][5, 5] += 0.05
        save_file(tensors, folders[1] / "model.safetensors", metadata={"format": "pt"})
        return folders
    monkeypatch.setattr(save, "export", export)
    with pytest.raises(StageError, match="merged: 1 tensors are not what was trained, such as "
                                         "model.language_model.layers.1.mlp.up_proj.weight"):
        prove_here(run, monkeypatch)


def test_a_merged_model_with_another_configuration_fails_though_its_weights_are_right(make, monkeypatch):
    run = make(merge=True, bf16=True, golden_rows=1, answer_rows=0)
    exported = save.export

    def export(*given):
        folders = exported(*given)
        config = json.loads((folders[1] / "config.json").read_text(encoding="utf-8"))
        config["text_config"]["rms_norm_eps"] = 0.1
        (folders[1] / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return folders
    monkeypatch.setattr(save, "export", export)
    with pytest.raises(StageError, match="merged: logits in a fresh process differ by .* from those of the base "
                                         "with the same weights"):
        prove_here(run, monkeypatch)


def test_a_full_disk_in_the_middle_of_a_merge_leaves_nothing_under_a_final_name(make):
    run = make(merge=True, answer_rows=0)
    most_bytes = (run.path / "05_train/adapter/adapter_model.safetensors").stat().st_size + 200_000
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    child = fork("06_save", "run", before=limit).wait()
    assert child.code == 1 and "a file of this size is not allowed" in child.said, child.said
    assert not (run.path / "06_save").exists()
    assert not list((run.path / "06_save.partial").rglob("stage.json"))


# ---- answers ----

def test_exact_match_is_the_share_of_equal_answers():
    assert exact_match(["a", " b ", "c"], ["a", "b", "d"]) == pytest.approx(2 / 3)
    assert exact_match([], []) == 0


def test_contains_looks_for_the_reference_in_the_answer_whatever_the_case():
    assert contains(["It is Red.", "blue", ""], ["red", "bluer", "a"]) == pytest.approx(1 / 3)


def test_anls_is_likeness_in_edits_and_zero_from_half_alike_down():
    assert edits("kitten", "sitting") == 3 and edits("", "abc") == 3 and edits("abc", "abc") == 0
    # kitten/sitting: 1 - 3/7; ab/cd: nothing alike; abcd/abxy: half alike, so 0; A/a: the same
    assert anls(["kitten", "ab", "abcd", "A "], ["sitting", "cd", "abxy", "a"]) == pytest.approx((4 / 7 + 1) / 4)


def test_an_answer_is_the_argmax_token_by_token(make, monkeypatch):
    run = make()
    record = load_from_disk(run.path / "02_data/eval")[0]
    encoder = Encoder.load(run.path / "02_data/processor")
    text, pictures, reference = encoder.prompt(record)
    net = model.load(run.json("03_load_model/model.json"), CPU, mode="inference")
    row = encoder.encode(text, [], pictures)
    row.pop("labels")
    ids, stops = [], set(net.generation_config.eos_token_id)
    for _ in range(3):
        with torch.no_grad():
            ids.append(int(net(**row).logits[0, -1].argmax()))
        row["input_ids"] = torch.cat([row["input_ids"], torch.tensor([[ids[-1]]])], dim=1)
        row["attention_mask"] = torch.ones_like(row["input_ids"])
    assert not stops & set(ids) and reference in COLOURS
    expected = encoder.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert generate(net, encoder, text, pictures, 3) == expected


@pytest.mark.parametrize("adapter", ["lora", None])
def test_ask_shows_both_answers_to_a_prompt_like_the_rows_and_writes_nothing(adapter, make, capsys, monkeypatch):
    template = "{{ mood }} {% for m in messages %}{{ m.role }}:{% for p in m.content %}{{ p.text or '<image>' }}{% endfor %}" \
        "</s>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    run = make(overrides=["datasets=[{path: rows.jsonl, system_prompt: Be brief.}]"], adapter=adapter,
               chat_template=template, chat_template_kwargs={"mood": "calm"})
    prompts, generate = [], save.generate
    monkeypatch.setattr(save, "generate", lambda *given: prompts.append(given[2]) or generate(*given))
    before = harness.contents(run.folder)
    capsys.readouterr()
    run("06_save", "--ask", "red.png", "Which colour is it?")
    said = capsys.readouterr().out
    assert "Which colour is it?" in said and "before" in said and "after" in said
    assert prompts == 2 * ["calm system:Be brief.</s>user:<image>Which colour is it?</s>assistant:"]
    assert load_from_disk(run.path / "02_data/train")[0]["text"].startswith("calm system:Be brief.</s>user:")
    assert harness.contents(run.folder) == before


@pytest.mark.parametrize("adapter", ["lora", None])
def test_evaluate_writes_each_answer_beside_its_reference_and_nothing_into_the_run(adapter, make, capsys):
    run = make(adapter=adapter)
    before = harness.contents(run.path)
    run("06_save", "--evaluate", "rows.jsonl", "--out", "predictions.jsonl")
    found = lines(run.folder / "predictions.jsonl")
    assert [line["reference"] for line in found] == list(COLOURS) and [line["row"] for line in found] == list(range(9))
    assert all(line["exact_match"] == (line["answer"] == line["reference"]) for line in found)
    assert "9 answers, in predictions.jsonl" in capsys.readouterr().out
    assert harness.contents(run.path) == before


def test_compare_shows_what_differs_and_what_came_of_it(adapter_run, make, capsys):
    other = make(lora_r=2, max_steps=2)
    capsys.readouterr()
    other("06_save", str(adapter_run.path), "--compare")
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["knob", "run", str(adapter_run.path)] in said and ["lora_r", "2", "4"] in said
    assert ["steps", "2", "4"] in said and ["max_steps", "2", "4"] in said
    assert not any(line[:1] in (["learning_rate"], ["output_dir"]) for line in said)
    last = [run.losses()[-1] for run in (other, adapter_run)]
    (drawn,) = [line for line in said if line[:2] == ["training", "loss"]]
    assert [drawn[4], drawn[7]] == [f"{loss:.4f}" for loss in last] and set(drawn[3]) <= set("▁▂▃▄▅▆▇█")
    assert ["tokens", "per", "picture", "16", "16"] in said
    assert {"peak", "time", "longest", "held-out"} <= {line[0] for line in said if line}
    (after,) = [line for line in said if line[:3] == ["exact", "match", "after"]]
    assert after[3] == "-" and after[4].endswith("%")


ASKED = (
    Bad("a picture that isn't there", ["run", "--ask", "nope.png", "What?"], "--ask: nope.png: no such file",
        "files come first, then one question in quotes"),
    Bad("a file that is no picture", ["run", "--ask", "rows.jsonl", "What?"], "--ask: rows.jsonl: …",
        "files come first, then one question in quotes"),
    Bad("a question with a special token", ["run", "--ask", "red.png", "What is <image>?"],
        "--ask: the question spells the special token '<image>'", "ask without it"),
    Bad("a question before any training", ["run2", "--ask", "red.png", "What?"],
        "run2/05_train is not there: 05_train has not finished", "run first: python 05_train.py run2"),
)


@pytest.fixture
def trained(make):
    run = make(answer_rows=0)
    shutil.rmtree(run.copy("run2") / "05_train")
    return run


@bad_input(ASKED)
def test_a_question_that_cant_be_asked_ends_in_two_lines(case, trained):
    harness.check(case, "06_save", trained.folder)
