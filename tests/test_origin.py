"""Base models of a hub: refusals say what to do, `main` becomes a commit and stays one, a cut download goes on."""

import json
import os
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from lib.models import origin
from lib.run.errors import StageError
from lib.run.stage import ROOT
from tests.harness import Bad, assert_two_lines, process
from tests.hub import COMMIT, Hub, serve
from tests.runner import KNOBS, colour_rows, write_rows

BOTH = """
import importlib, json, sys
from lib.run.errors import StageError
for words in json.loads(sys.argv[1]):
    try:
        importlib.import_module(words[0]).main(words[1:])
    except StageError as error:
        print("REFUSED", error.what, "FIX", error.fix)
"""


@pytest.fixture
def hub(tmp_path):
    """A local hub, with its address and what a process that asks it has in its environment."""
    server = serve()
    address = f"http://127.0.0.1:{server.server_port}"
    env = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
           "HF_HUB_DISABLE_TELEMETRY": "1"}
    yield SimpleNamespace(address=address, env=env, cache=tmp_path / "home" / "hub")
    server.shutdown()


def recipe(folder, base, **knobs):
    """A recipe on a model of the hub, with its rows."""
    write_rows(folder, colour_rows())
    given = KNOBS | {"base_model": base} | knobs
    text = [*(f"{name}: {json.dumps(value)}" for name, value in given.items()), "datasets: [{path: rows.jsonl}]"]
    (folder / "recipe.yaml").write_text("\n".join(text), encoding="utf-8")


def both(folder, env, *commands):
    """What scripts said, one after the other in one process, which saw the hub only through its environment."""
    done = subprocess.run([sys.executable, "-c", BOTH, json.dumps(commands)], cwd=folder, text=True, encoding="utf-8",
                          capture_output=True, env=os.environ | env | {"PYTHONPATH": str(ROOT), "COLUMNS": "400"})
    assert done.returncode == 0, done.stderr
    return done.stdout


REFUSED = (
    Bad("a gated model, and nobody is logged in", ["base_model=gated/unknown"],
        "base_model: gated/unknown is gated: its licence has to be accepted first",
        "accept it at ADDRESS/gated/unknown, then say who you are: `hf auth login`, or set HF_TOKEN"),
    Bad("a gated model for others", ["base_model=gated/no"],
        "base_model: gated/no is gated, and your token has no access to it",
        "ask for access at ADDRESS/gated/no; with another token: `hf auth login`, or set HF_TOKEN"),
    Bad("a model that isn't there", ["base_model=nobody/nothing"],
        "base_model: ADDRESS has no nobody/nothing, or it is private",
        "correct base_model; for a private one: `hf auth login`, or set HF_TOKEN"),
    Bad("a branch that isn't there", ["revision=v9"], "revision: some/llava has no v9",
        "name a branch, a tag or a commit of ADDRESS/some/llava/commits/main"),
    Bad("weights without a config", ["base_model=some/weights"],
        "base_model: some/weights has no config.json, so transformers can't load it",
        "name the converted checkpoint, if there is one: ADDRESS/some/weights"),
)


def test_what_the_hub_refuses_is_said_by_01_with_the_page_and_the_command(hub, zoo, tmp_path):
    (tmp_path / "empty").mkdir()
    Hub.models |= {"some/llava": zoo("llava"), "some/weights": tmp_path / "empty"}
    recipe(tmp_path, "some/llava")
    said = both(tmp_path, hub.env, *(["01_config", "recipe.yaml", "run", *case.argv] for case in REFUSED))
    lines = [line for line in said.splitlines() if line.startswith("REFUSED ")]
    assert len(lines) == len(REFUSED)
    for line, case in zip(lines, REFUSED):
        what, fix = line.removeprefix("REFUSED ").replace(hub.address, "ADDRESS").split(" FIX ")
        assert_two_lines(what, fix, case)
    assert not (tmp_path / "run").exists()


def test_main_becomes_a_commit_that_is_kept_and_a_cut_download_goes_on(hub, zoo, tmp_path):
    Hub.models["some/llava"] = sharded(zoo("llava"), tmp_path / "base")
    recipe(tmp_path, "some/llava")
    Hub.mood = {"model-1.safetensors": ["cut"], "model-2.safetensors": ["broken"]}
    said = both(tmp_path, hub.env, ["01_config", "recipe.yaml", "run"], ["02_data", "run"],
                ["03_load_model", "run"], ["03_load_model", "run"])
    assert json.loads((tmp_path / "run/01_config/config.json").read_text())["revision"] == COMMIT
    assert "downloading some/llava: 2 files, 0.00 GiB; " in said
    assert f"GiB free in {hub.cache}; if it is cut off, the same command goes on" in said
    asked = Counter(path.rpartition("/")[2] for method, path in Hub.asked if method == "GET")
    assert asked["model-1.safetensors"] == 2                    # the library itself goes on after a cut
    # The first 03 ended there; the second one only asked for what was missing.
    assert "REFUSED base_model: some/llava: the download was cut off: " in said
    assert "downloading some/llava: 1 files" in said and "03_load_model finished" in said
    assert asked["model-2.safetensors"] == 2
    # `main` moves on; the run stays where it began, and without a network another one takes what the cache has.
    Hub.head, Hub.asked = "f" * 40, []
    for words, env in ((["run"], hub.env), (["another"], hub.env | {"HF_HUB_OFFLINE": "1"})):
        done = process("01_config", ["recipe.yaml", *words, "lora_r=8"], tmp_path, **env)
        assert f"main is commit {COMMIT}" in done.stdout and Hub.asked == []


def sharded(source, folder):
    """A checkpoint in two files with an index."""
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for name, part in parts.items():
        save_file({each: tensors[each] for each in part}, folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {each: name for name, part in parts.items() for each in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def test_a_cache_without_room_is_refused_before_the_download(tmp_path):
    with pytest.raises(StageError) as caught:
        origin.say_download("some/model", tmp_path / "not" / "yet", [2**60])
    assert caught.value.what.startswith("base_model: some/model takes 1,073,741,824.00 GiB more, and there are ")
    assert caught.value.fix == "make room, or name another folder for the cache: HF_HOME"


def test_code_that_would_run_is_named_with_what_it_imports(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoConfig": "configuration_x.XConfig", "AutoModel": "o/r--far.X"}}')
    (tmp_path / "configuration_x.py").write_text("from .helpers import x\n")
    (tmp_path / "helpers.py").write_text("x = 1\n")
    origin.say_code(str(tmp_path), None)
    assert "configuration_x.py, helpers.py, o/r--far.py" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "config.json").write_text("{}")
    origin.say_code(str(tmp_path), None)
    assert "brings no code to run" in " ".join(capsys.readouterr().out.split())
