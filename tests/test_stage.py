"""The run folder and its ledger, tried on a miniature kit: six tiny scripts on a copy of the real lib."""

import fcntl
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lib.run import code, folder, ledger, stage
from lib.run.errors import StageError
from tests.minikit import PARTS, Done, start, started

RUN = Path("runs/demo")


def actions(**options) -> dict[str, str]:
    """{stem: action} of every stage but the first, were it started now."""
    return {stem: stage.decide(stem, RUN, **options).action for stem in stage.STAGES[1:]}


def reconfigure(*overrides: str) -> None:
    """01 has run with these overrides."""
    done = start(" ".join(["01_config.py recipe.json runs/demo", *overrides]))
    assert done.returncode == 0, done.stderr


def edit(path: str | Path, old: str, new: str) -> None:
    """One text of a file is replaced by another."""
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new))


def content(path: Path) -> dict[str, str]:
    """{file: text} of a folder, for comparing."""
    return {str(file.relative_to(path)): file.read_text() for file in path.rglob("*") if file.is_file()}


# ---- finished means stage.json ----


def test_a_finished_stage_is_up_to_date_and_names_the_next_command(kit):
    assert set(actions().values()) == {"skip"}
    done = start("02_data.py runs/demo")
    assert done.returncode == 0
    assert done.stdout == (
        "02_data is up to date: runs/demo/02_data\nnext: python 03_load_model.py runs/demo\n"
    )


def test_a_stage_is_finished_exactly_when_its_stage_json_is_there(kit):
    (RUN / "04_lora/stage.json").unlink()
    assert stage.decide("04_lora", RUN).action == "run"
    refusal = stage.decide("05_train", RUN)
    assert refusal.action == "refuse"
    assert "runs/demo/04_lora is not there" in refusal.what
    assert refusal.fix == "run first: python 04_lora.py runs/demo"


def test_the_ledger_holds_what_was_read_and_what_was_written(kit):
    written = json.loads((RUN / "02_data/stage.json").read_text())
    assert written["stage"] == "02_data"
    reads = written["reads"]
    assert reads["knobs"] == {"rows": 2}
    assert reads["upstream"] == {}
    parts = {f"lib/run/{part}.py" for part in PARTS}
    assert set(reads["source"]) == {"02_data.py", "lib/__init__.py", "lib/words.py", "lib/tools.py", *parts}
    assert set(reads["outside"]) == {"rows.txt", "images/", "images/one.png"}
    assert set(reads["outside"]["rows.txt"]) == {"bytes", "mtime_ns", "sha256"}
    assert set(written["wrote"]) == {"rows.txt"}
    train = json.loads((RUN / "05_train/stage.json").read_text())
    assert set(train["reads"]["upstream"]) == {"02_data", "03_load_model", "04_lora"}
    assert set(train["wrote"]) == {"adapter.txt"}


def test_a_finished_folder_has_no_marks_of_its_start(kit):
    assert sorted(os.listdir(RUN / "02_data")) == ["rows.txt", "seconds.json", "stage.json"]
    assert sorted(os.listdir(RUN)) == list(stage.STAGES)


def test_kill_9_in_the_middle_of_a_stage_leaves_only_a_partial(kit):
    shutil.rmtree(RUN / "02_data")
    process = started("02_data.py runs/demo", WAIT="1")
    process.kill()
    process.communicate()
    assert not (RUN / "02_data").exists()
    assert (RUN / "02_data.partial/rows.txt").exists()
    (RUN / "02_data.partial/left-over.txt").write_text("of the killed start")
    assert start("02_data.py runs/demo").returncode == 0
    assert not (RUN / "02_data.partial").exists()
    assert not (RUN / "02_data/left-over.txt").exists()
    assert set(actions().values()) == {"skip"}


def test_the_finished_folder_stays_until_its_successor_is_whole(kit):
    reconfigure("rows=3")
    process = started("02_data.py runs/demo", WAIT="1")
    assert (RUN / "02_data/rows.txt").read_text() == "A ROW\n" * 2
    process.kill()
    process.communicate()
    assert (RUN / "02_data/rows.txt").read_text() == "A ROW\n" * 2


def rewrite(text: str, force: bool) -> None:
    """04_lora has run again in this process and written this text, unless it was up to date."""
    work = stage.begin(stage.decide("04_lora", RUN, force=force))
    if work is not None:
        (work.path / "out.txt").write_text(text)
        work.finish()


def dies_before_step(number: int, function, *arguments) -> bool:
    """Whether a child process that calls the function was killed before its n-th change to the disk."""
    child = os.fork()
    if child == 0:
        left = number

        def counted(system_call):
            def step(*args, **kwargs):
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return system_call(*args, **kwargs)

            return step

        for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            function(*arguments)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("before", ["first", "forced twice"])       # more by tests/test_crash_states.py
def test_kill_9_at_any_step_loses_nothing_and_the_next_start_heals(kit, before):
    finished, old, force = RUN / "04_lora", RUN / "04_lora.old", before.startswith("forced")
    if before == "again":
        edit(finished / "stage.json", '"lora_r": 16', '"lora_r": 8')
    if before == "forced twice":
        shutil.copytree(finished, old)
        (old / "out.txt").write_text("older")
    was, outcomes, steps = content(finished), set(), 0
    if before == "first":
        shutil.rmtree(finished)
    shutil.copytree(RUN, kit / "untouched")
    while dies_before_step(steps, rewrite, "new", force):
        whole = [path for path in RUN.glob("04_lora*") if ledger.finished(path)]
        assert before == "first" or was in map(content, whole) or "new" in map(text_of, whole)
        rewrite("new", force=False)
        assert stage.decide("04_lora", RUN).action == "skip"
        assert sorted(os.listdir(finished)) == ["out.txt", "stage.json"]
        assert not (RUN / "04_lora.discarded").exists()
        outcomes.add(text_of(finished))
        if force:
            assert was in (content(finished), content(old))
        else:
            assert text_of(finished) == "new" and not (RUN / "04_lora.partial").exists()
        for path in RUN.glob("04_lora*"):
            shutil.rmtree(path)
        for path in (kit / "untouched").glob("04_lora*"):
            shutil.copytree(path, RUN / path.name)
        steps += 1
    assert steps > 8
    assert outcomes == ({"new", was["out.txt"]} if force else {"new"})


def test_a_whole_partial_is_put_in_place_and_not_written_again(kit):
    was = content(RUN / "05_train")
    (RUN / "05_train").rename(RUN / "05_train.partial")
    assert "up to date" in start("05_train.py runs/demo").stdout
    assert content(RUN / "05_train") == was
    assert sorted(os.listdir(RUN)) == list(stage.STAGES)


def text_of(path: Path) -> str:
    """What a folder of 04_lora says."""
    return (path / "out.txt").read_text()


# ---- knobs ----


def test_an_override_of_one_knob_re_runs_only_the_stages_that_read_it(kit):
    reconfigure("lora_r=8")
    assert stage.decide("02_data", RUN).action == stage.decide("03_load_model", RUN).action == "skip"
    lora = stage.decide("04_lora", RUN)
    assert (lora.action, lora.what) == ("run", 'lora_r changed: 16 -> "8"')
    train = stage.decide("05_train", RUN)
    assert (train.action, train.fix) == ("refuse", "run first: python 04_lora.py runs/demo")
    assert train.what == 'runs/demo/04_lora is out of date: lora_r changed: 16 -> "8"'


def test_the_same_override_again_re_runs_nothing(kit):
    reconfigure("lora_r=8")
    assert "up to date" in start("01_config.py recipe.json runs/demo lora_r=8").stdout


def test_a_knob_outside_the_identity_is_readable_and_re_runs_nothing(kit):
    reconfigure("workers=8")
    assert set(actions().values()) == {"skip"}
    assert stage.view("02_data", RUN).config.workers == "8"


def test_a_knob_that_the_stage_did_not_declare_cannot_be_read(kit):
    config = stage.view("02_data", RUN).config
    assert vars(config) == {"rows": 2, "workers": 1}
    with pytest.raises(AttributeError, match=r"lora_r .*add its number to those that read the knob.*01_config\.py"):
        config.lora_r  # noqa: B018
    with pytest.raises(AttributeError, match="rows is read-only"):
        config.rows = 3


def test_only_a_declared_upstream_can_be_read(kit):
    work = stage.view("03_load_model", RUN)
    assert work.input("02_data") == RUN / "02_data"
    with pytest.raises(KeyError, match="05_train"):
        work.input("05_train")


# ---- files from outside ----


def test_a_changed_data_file_is_noticed_by_its_stage_and_by_all_later_ones(kit):
    Path("rows.txt").write_text("b row\n")
    data = stage.decide("02_data", RUN)
    assert (data.action, data.what) == ("run", "rows.txt changed")
    for stem in stage.STAGES[2:]:
        later = stage.decide(stem, RUN)
        assert later.action == "refuse"
        assert later.what == "runs/demo/02_data is out of date: rows.txt changed"
        assert later.fix == "run first: python 02_data.py runs/demo"


def test_a_touched_or_copied_data_file_is_no_change(kit):
    os.utime("rows.txt", ns=(1, 1))
    assert set(actions().values()) == {"skip"}


def test_a_longer_data_file_with_the_old_time_is_noticed(kit):
    time_ns = Path("rows.txt").stat().st_mtime_ns
    Path("rows.txt").write_text("a longer row\n")
    os.utime("rows.txt", ns=(time_ns, time_ns))
    assert stage.decide("02_data", RUN).what == "rows.txt changed"


def test_a_data_file_that_is_gone_is_named(kit):
    Path("rows.txt").unlink()
    assert stage.decide("02_data", RUN).what == "rows.txt is gone"


def test_a_file_added_to_a_used_folder_is_noticed(kit):
    Path("images/two.png").write_text("two")
    Path("images/.DS_Store").write_text("of a file manager")
    assert stage.decide("02_data", RUN).what == "images/two.png is new"


def test_a_data_file_is_hashed_before_it_is_read(kit):
    work = stage.begin(stage.decide("02_data", RUN, force=True))
    work.uses("rows.txt")
    Path("rows.txt").write_text("c row\n")  # by somebody else, while the stage runs
    work.finish()
    assert stage.decide("02_data", RUN).what == "rows.txt changed"


def test_a_hash_that_the_stage_hands_in_is_kept(kit):
    work = stage.begin(stage.decide("02_data", RUN, force=True))
    work.uses("rows.txt", sha256="0" * 64)
    work.finish()
    outside = json.loads((RUN / "02_data/stage.json").read_text())["reads"]["outside"]
    assert outside["rows.txt"]["sha256"] == "0" * 64


def test_a_link_back_up_in_a_used_folder_ends(kit):
    Path("images/again").symlink_to("..")
    assert len(ledger.files_under(Path("images"))) < 200


# ---- outputs ----


def test_a_hand_edited_output_is_refused_and_the_named_command_mends_it(kit):
    edit(RUN / "03_load_model/out.txt", "03_load_model", "by hand")
    for stem in stage.STAGES[2:]:
        refusal = stage.decide(stem, RUN)
        assert refusal.action == "refuse"
        assert refusal.what == "runs/demo/03_load_model/out.txt changed since 03_load_model wrote it"
    own = start("03_load_model.py runs/demo")
    assert own.returncode == 1
    assert own.stdout == ""
    assert own.stderr.count("\n") == 2 and "Traceback" not in own.stderr
    assert start(own.stderr.rpartition(": ")[2].strip()).returncode == 0
    assert "by hand" in (RUN / "03_load_model.old/out.txt").read_text()
    assert set(actions().values()) == {"skip"}


def test_a_hand_edited_config_is_refused_everywhere_and_01_mends_it(kit):
    reconfigure("lora_r=8", "rows=5")
    edit(RUN / "01_config/config.json", '"steps": 3', '"steps": 4')
    refusal = stage.decide("02_data", RUN)
    assert refusal.what == "runs/demo/01_config/config.json changed since 01_config wrote it"
    mend = "python 01_config.py recipe.json runs/demo lora_r=8 rows=5 --force"
    assert refusal.fix.endswith(mend)
    assert start(mend).returncode == 0
    assert stage.decide("02_data", RUN).action == "run"


def test_a_deleted_output_is_refused(kit):
    (RUN / "03_load_model/out.txt").unlink()
    assert stage.decide("04_lora", RUN).what.startswith("runs/demo/03_load_model/out.txt is gone")


def test_a_volatile_output_may_change_and_a_touched_one_is_no_change(kit):
    (RUN / "02_data/seconds.json").write_text("0")
    (RUN / "05_train/checkpoints/step-3/state.json").unlink()
    os.utime(RUN / "02_data/rows.txt", ns=(1, 1))
    assert set(actions().values()) == {"skip"}


def test_the_same_outputs_written_again_re_run_nothing(kit):
    assert start("02_data.py runs/demo --force").returncode == 0
    assert set(actions().values()) == {"skip"}


def test_a_broken_ledger_is_an_error_of_two_lines_that_force_mends(kit):
    (RUN / "03_load_model/stage.json").write_text('{"stage": ')
    for stem in ("03_load_model", "04_lora"):
        refusal = stage.decide(stem, RUN)
        assert refusal.action == "refuse"
        assert "03_load_model/stage.json is not whole JSON" in refusal.what
        assert "03_load_model.py again with --force" in refusal.fix
    assert start("03_load_model.py runs/demo --force").returncode == 0
    assert set(actions().values()) == {"skip"}


# ---- source ----


def test_an_edited_script_re_runs_itself_and_only_warns_downstream(kit):
    edit("02_data.py", "int(work.config.rows)", "int(work.config.rows) * 1")
    data = stage.decide("02_data", RUN)
    assert (data.action, data.what) == ("run", "02_data.py was edited")
    for stem in stage.STAGES[2:]:
        later = stage.decide(stem, RUN)
        assert later.action == "skip"
        again = "python 02_data.py runs/demo"
        assert later.warnings == [f"edited since 02_data ran: 02_data.py; to run it again: {again}"]
    assert "warning: edited since 02_data ran" in start("03_load_model.py runs/demo").stdout


def test_comments_wrapping_and_docstrings_are_no_edit(kit):
    edit("02_data.py", '"""02_data: turns rows into samples."""', '"""Another sentence."""\n\n# a comment')
    edit("lib/words.py", "return tools", '"""Says what is returned."""\n    return tools')
    edit("lib/words.py", "upper(text)", "upper(\n        text\n    )  # louder")
    assert set(actions().values()) == {"skip"}


def test_a_lib_file_counts_for_the_stages_that_import_it_if_only_through_another(kit):
    edit("lib/tools.py", "text.upper()", "text.title()")
    assert stage.decide("02_data", RUN).what == "lib/tools.py was edited"
    assert stage.decide("03_load_model", RUN).action == "skip"
    Path("lib/unused.py").write_text("x = 1\n")
    assert stage.decide("03_load_model", RUN).action == "skip"


@pytest.mark.parametrize("line", [
    "import lib.words", "import lib.words as w", "from lib import words", "from lib.words import louder",
    "def inside():\n    from lib.words import louder", "if True:\n    import json, lib.words",
])  # fmt: skip
def test_every_way_to_import_a_lib_file_is_seen(kit, line):
    Path("07_more.py").write_text(f"{line}\n")
    assert set(code.source("07_more", {})) == {"07_more.py", "lib/__init__.py", "lib/words.py", "lib/tools.py"}


def test_the_hash_of_a_source_is_the_same_in_every_python_version(kit):
    text = "def f(x: int, *, y=None):\n    return f'{x!r:>8} {y}', {**x}, x[1:], None\n"
    Path("07_more.py").write_text(text)
    assert code.source("07_more", {})["07_more.py"].startswith("3e5767b702192404")


def test_a_script_that_is_no_python_is_an_error_of_two_lines(kit):
    Path("lib/tools.py").write_text("def upper(:\n")
    refusal = stage.decide("03_load_model", RUN)
    assert (refusal.action, refusal.fix) == ("refuse", "edit lib/tools.py")
    assert refusal.what.startswith("lib/tools.py:1 is not Python")


# ---- upstream ----


def test_following_the_named_commands_makes_an_edited_recipe_true_again(kit):
    edit("recipe.json", '"rows": 2', '"rows": 4')
    command, taken = "python 04_lora.py runs/demo", []
    while (done := start(command)).returncode:
        mend = done.stderr.rpartition("run first: ")[2].strip()
        assert start(mend).returncode == 0
        taken.append(mend)
    assert taken == [
        "python 01_config.py recipe.json runs/demo",
        "python 02_data.py runs/demo",
        "python 03_load_model.py runs/demo",
    ]
    assert (RUN / "04_lora/out.txt").read_text().startswith("A ROW\n" * 4)


def test_a_stage_without_01_names_the_command_of_01(kit):
    shutil.rmtree(RUN / "01_config")
    refusal = stage.decide("02_data", RUN)
    assert (refusal.action, refusal.fix) == ("refuse", "run first: python 01_config.py RECIPE runs/demo")


def test_a_refusal_comes_before_anything_is_written(kit):
    reconfigure("rows=5")
    before = content(RUN)
    assert start("04_lora.py runs/demo --force").returncode == 1
    assert content(RUN) == before


# ---- training is never thrown away by an edit ----


def interrupt_training(step: int, *flags: str) -> None:
    """05_train was killed: the checkpoint before this step is whole, the one of this step half-written."""
    process = started(" ".join(["05_train.py runs/demo", *flags]), STOP_AT=str(step))
    process.kill()
    process.communicate()


def test_a_finished_training_is_not_thrown_away_by_an_edited_knob_and_06_still_saves_it(kit):
    reconfigure("steps=9")
    refusal = stage.decide("05_train", RUN)
    assert refusal.action == "refuse"
    assert refusal.what == 'runs/demo/05_train is a finished training, and since then steps changed: 3 -> "9"'
    assert "to keep it: python 06_save.py runs/demo" in refusal.fix
    assert "python 05_train.py runs/demo --force" in refusal.fix
    shutil.rmtree(RUN / "06_save")
    save = stage.decide("06_save", RUN)
    assert save.action == "run"
    assert save.warnings == ['runs/demo/05_train is kept as it was trained, but steps changed: 3 -> "9"']


def test_a_finished_training_on_other_data_is_refused_by_05_and_by_06(kit):
    Path("rows.txt").write_text("b row\n")
    for stem in ("02_data", "03_load_model", "04_lora"):
        assert start(f"{stem}.py runs/demo").returncode == 0
    for stem in ("05_train", "06_save"):
        refusal = stage.decide(stem, RUN)
        assert refusal.action == "refuse"
        assert "the outputs of 02_data changed (and 2 more)" in refusal.what
    assert "undo that" in stage.decide("05_train", RUN).fix


def test_a_training_without_the_reads_of_its_start_is_refused(kit):
    shutil.rmtree(RUN / "05_train")
    interrupt_training(3)
    (RUN / "05_train.partial/started.json").unlink()
    refusal = stage.decide("05_train", RUN)
    assert (refusal.action, refusal.what) == ("refuse", "runs/demo/05_train.partial/started.json is gone")
    assert stage.decide("05_train", RUN, force=True).action == "run"


def test_an_edited_training_script_does_not_throw_a_training_away(kit):
    edit("05_train.py", "first + 1", "1 + first")
    assert stage.decide("05_train", RUN).action == "refuse"
    assert stage.decide("06_save", RUN).action == "skip"


def test_force_keeps_the_old_folder_and_an_ordinary_run_leaves_it_alone(kit):
    reconfigure("steps=4")
    assert start("05_train.py runs/demo --force").returncode == 0
    assert (RUN / "05_train.old/adapter.txt").read_text() == "0 to 3"
    assert (RUN / "05_train/adapter.txt").read_text() == "0 to 4"
    assert start("06_save.py runs/demo --force").returncode == 0
    kept = content(RUN / "06_save.old")
    edit("06_save.py", "out.txt", "result.txt")
    assert start("06_save.py runs/demo").returncode == 0
    assert content(RUN / "06_save.old") == kept
    assert start("06_save.py runs/demo --force").returncode == 0
    assert "result.txt" in content(RUN / "06_save.old")


def test_the_same_inputs_resume_from_the_newest_whole_checkpoint(kit):
    shutil.rmtree(RUN / "05_train")
    interrupt_training(3)
    assert stage.newest_checkpoint(RUN / "05_train.partial").name == "step-2"
    done = start("05_train.py runs/demo")
    assert "goes on from runs/demo/05_train.partial/checkpoints/step-2" in done.stdout
    assert (RUN / "05_train/adapter.txt").read_text() == "2 to 3"
    assert stage.decide("06_save", RUN).what == "the outputs of 05_train changed"


def test_a_training_without_a_whole_checkpoint_starts_over(kit):
    shutil.rmtree(RUN / "05_train")
    interrupt_training(1)
    assert stage.newest_checkpoint(RUN / "05_train.partial") is None
    assert stage.decide("05_train", RUN).action == "run"
    assert stage.decide("05_train", RUN, resume=True).action == "run"
    assert start("05_train.py runs/demo").returncode == 0
    assert (RUN / "05_train/adapter.txt").read_text() == "0 to 3"


def test_an_unfinished_training_with_other_inputs_is_refused_and_resume_goes_on(kit):
    shutil.rmtree(RUN / "05_train")
    interrupt_training(3)
    reconfigure("steps=5")
    refusal = stage.decide("05_train", RUN)
    assert refusal.action == "refuse"
    assert 'since its training began steps changed: 3 -> "5"' in refusal.what
    assert "--resume" in refusal.fix and "--force" in refusal.fix
    done = start("05_train.py runs/demo --resume")
    assert 'goes on although: steps changed: 3 -> "5"' in done.stdout
    assert (RUN / "05_train/adapter.txt").read_text() == "2 to 5"
    written = json.loads((RUN / "05_train/stage.json").read_text())
    assert written["resumed_over"] == ['steps changed: 3 -> "5"']
    assert stage.decide("05_train", RUN).action == "skip"


def test_force_keeps_an_unfinished_training_too(kit):
    shutil.rmtree(RUN / "05_train")
    interrupt_training(3)
    assert start("05_train.py runs/demo --force").returncode == 0
    assert stage.newest_checkpoint(RUN / "05_train.old").name == "step-2"
    assert (RUN / "05_train/adapter.txt").read_text() == "0 to 3"


def test_a_forced_training_that_was_interrupted_goes_on_without_force_and_keeps_the_old_one(kit):
    interrupt_training(3, "--force")
    assert (RUN / "05_train/adapter.txt").read_text() == "0 to 3"
    assert stage.decide("05_train", RUN).action == "resume"
    assert start("05_train.py runs/demo").returncode == 0
    assert (RUN / "05_train/adapter.txt").read_text() == "2 to 3"
    assert (RUN / "05_train.old/adapter.txt").read_text() == "0 to 3"


def test_a_folder_without_a_ledger_is_kept(kit):
    (RUN / "04_lora/stage.json").unlink()
    (RUN / "04_lora/notes.txt").write_text("mine")
    assert start("04_lora.py runs/demo").returncode == 0
    assert (RUN / "04_lora.old/notes.txt").read_text() == "mine"


# ---- several processes ----


def test_a_second_start_is_refused_while_the_first_one_writes(kit):
    first = started("02_data.py runs/demo --force", WAIT="1")
    second = start("02_data.py runs/demo --force")
    first.kill()
    first.communicate()
    assert second.returncode == 1
    assert f"is being written by process {first.pid} on " in second.stderr
    assert start("02_data.py runs/demo --force").returncode == 0


def test_a_lock_on_a_folder_that_was_put_in_place_meanwhile_is_none(kit, monkeypatch):
    partial, flock = RUN / "02_data.partial", fcntl.flock
    partial.mkdir()

    def late(*arguments):
        partial.rename(RUN / "moved")  # what the first process does between this one's open and its lock,
        partial.mkdir()
        (partial / "lock").touch()  # and a third one then
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(StageError, match="put in its place by another process"):
        folder.lock(partial)


def test_a_file_system_without_locks_is_warned_of_and_worked_on(kit, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    rewrite("new", force=True)
    assert "no locks" in capsys.readouterr().out
    assert (RUN / "04_lora/out.txt").read_text() == "new"


def test_a_decision_reaches_the_other_ranks_as_it_was_taken(kit):
    reconfigure("lora_r=8")
    edit("02_data.py", "time.time()", "time.time() + 1")
    for stem in stage.STAGES[1:]:
        decision = stage.decide(stem, RUN)
        assert pickle.loads(pickle.dumps(decision)) == decision


def test_a_follower_writes_nothing_and_obeys_in_silence(kit, capfd):
    before = content(RUN)
    work = stage.begin(stage.decide("05_train", RUN, force=True), leader=False)
    work.uses("rows.txt")
    work.finish()
    assert work.config.steps == 3 and not work.path.exists()
    assert stage.begin(stage.decide("05_train", RUN), leader=False) is None
    reconfigure("rows=5")
    with pytest.raises(SystemExit) as stop:
        stage.begin(stage.decide("05_train", RUN), leader=False)
    assert stop.value.code == 1
    reconfigure()
    assert content(RUN / "05_train") == {k[9:]: v for k, v in before.items() if k.startswith("05_train/")}
    assert capfd.readouterr() == ("", "")


# ---- the command line ----


def test_a_bare_command_means_the_run_that_01_wrote_last(kit):
    assert start("01_config.py recipe.json runs/other rows=9").returncode == 0
    assert Path("runs/latest").read_text() == "runs/other\n"
    assert start("02_data.py").returncode == 0
    assert (Path("runs/other/02_data/rows.txt")).read_text() == "A ROW\n" * 9


def test_commands_name_the_script_as_it_was_named_from_another_folder(monkeypatch):
    for given, named in (("05_train.py", "03_load_model.py"), ("/a kit/02_data.py", "'/a kit/03_load_model.py'")):
        monkeypatch.setattr("sys.argv", [given, "runs/x"])
        assert stage.command("03_load_model", Path("runs/x")) == f"python {named} runs/x"


def test_a_run_folder_that_is_not_there_is_an_error_of_two_lines(kit):
    for value in ("runs/nowhere", "lora_r=8"):
        done = start(f"02_data.py {value}")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == (
            f"error: {value}, given on the command line, is no run folder\n"
            "  fix: make one: python 01_config.py recipes/demo.yaml runs/demo\n"
        )
    Path("runs/latest").write_text("runs/removed\n")
    assert "runs/removed, named in runs/latest, is no run folder" in start("02_data.py").stderr
    Path("runs/latest").unlink()
    assert "no run folder given, and there is no runs/latest in" in start("02_data.py").stderr


def test_help_is_the_docstring(kit):
    assert "\n02_data: turns rows into samples.\n" in start("02_data.py --help").stdout


def test_a_view_writes_nothing(kit):
    reconfigure("steps=7")
    before = {path: path.stat().st_mtime_ns for path in RUN.rglob("*")}
    assert start("02_data.py runs/demo --show 1").stdout == "A ROW\nA ROW\n\n"
    stage.view("06_save", RUN)
    assert {path: path.stat().st_mtime_ns for path in RUN.rglob("*")} == before


def test_a_view_of_what_a_stage_wrote_needs_the_stage_and_any_other_needs_true_upstream_stages(kit):
    reconfigure("rows=7")
    assert stage.view("04_lora", RUN, own=True).path == RUN / "04_lora"
    with pytest.raises(StageError, match="02_data is out of date"):
        stage.view("04_lora", RUN)
    shutil.rmtree(RUN / "04_lora")
    with pytest.raises(StageError, match="04_lora has not finished"):
        stage.view("04_lora", RUN, own=True)


def test_stage_imports_neither_torch_nor_transformers_nor_numpy(kit):
    check = "import sys, lib.run.stage; sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


# ---- how a script stops ----


def ends(body: str) -> Done:
    """The end of a script with this main()."""
    lines = textwrap.indent(textwrap.dedent(body), "    ")
    guard = "if __name__ == '__main__':\n    stage.run_script(main)\n"
    Path("07_more.py").write_text(f"import errno\nfrom lib.run import stage\n\ndef main():\n{lines}\n\n{guard}")
    return start("07_more.py")


def test_ctrl_c_says_what_is_kept_and_how_to_go_on(kit):
    shutil.rmtree(RUN / "05_train")
    for command, step, line in [
        ("02_data.py runs/demo --force", "0", "02_data interrupted: what it wrote counts for nothing"),
        ("05_train.py runs/demo", "1", "05_train interrupted: what it wrote counts for nothing"),
        ("05_train.py runs/demo", "3", "05_train interrupted: step-2 is kept"),
    ]:
        process = started(command, WAIT="1", STOP_AT=step)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
        assert process.returncode == 130
        how = "go on from it" if "kept" in line else "start again"
        again = command.removesuffix(" --force")
        assert errors == f"error: {line}\n  fix: {how}: python {again}\n"
    assert (RUN / "02_data/stage.json").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to write to")
def test_a_full_disk_is_an_error_of_two_lines_and_harms_nothing(kit):
    done = start("02_data.py runs/demo --force", FULL="1")
    assert done.returncode == 1
    first, second = done.stderr.splitlines()
    assert first.startswith("error: no space left on the file system of runs/demo/02_data.partial: ")
    assert first.endswith(" MiB free")
    assert second == "  fix: free some space and run the same command again"
    assert set(actions().values()) == {"skip"}
    assert start("02_data.py runs/demo --force").returncode == 0


def test_a_full_disk_is_seen_through_the_errors_that_libraries_make_of_it(kit):
    for body in (
        "raise ValueError from OSError(errno.ENOSPC, 'full', 'rows.txt')",
        "raise RuntimeError('IoError(Os { code: 28, message: \"No space left on device\" })')",
    ):
        done = ends(body)
        assert done.returncode == 1
        assert done.stderr.startswith("error: no space left on the file system of ")


def test_a_mistake_ends_in_two_lines_even_where_a_library_wraps_it(kit):
    for body in (
        "raise stage.StageError('it', 'mend it')",
        "raise ValueError from stage.StageError('it', 'mend it')",
    ):
        done = ends(body)
        assert (done.returncode, done.stderr) == (1, "error: it\n  fix: mend it\n")


def test_a_mistake_found_by_a_dataloader_worker_keeps_its_two_lines():
    trace = "Caught StageError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):"
    error = StageError(f"{trace}\n  ...\nlib.ledger.StageError: it: 3\nmend it\n")
    assert (error.what, error.fix) == ("it: 3", "mend it")


def test_a_bug_keeps_its_traceback(kit):
    done = ends("return {}['a bug']")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "KeyError: 'a bug'" in done.stderr


def test_a_closed_pipe_is_quiet(kit):
    viewer = subprocess.Popen(
        [sys.executable, "02_data.py", "runs/demo", "--show", "9999"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert viewer.stdout.readline() == "A ROW\n"
    viewer.stdout.close()
    assert viewer.wait() == 141
    assert viewer.stderr.read() == ""
    viewer.stderr.close()
