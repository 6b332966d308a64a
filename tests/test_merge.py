"""A merge: the base's own files but for the sums, in bounded memory, in files of the size that was asked for."""

import json

import pytest
import torch
from safetensors.torch import load_file

from bench import merge as bench
from lib.export import merge
from lib.models import shards
from lib.run.errors import StageError
from tests import zoo as variants
from tests.runner import Run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(plan, adapter folder, base folder) of a training on a base that is stored in bfloat16, as real ones are."""
    folder = tmp_path_factory.mktemp("merge")
    base = variants.build("llava", folder / "base", dtype="bfloat16")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run = Run(folder, monkeypatch, base, bf16=True, max_steps=2, learning_rate=1e-2).upto("05_train")
    return run.json("03_load_model/model.json"), run.path / "05_train/adapter", base


def kinds(folder):
    """{tensor: (type, shape)} of all files in a folder."""
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= {name: (place.dtype, place.shape) for name, place in shards.places(path).items()}
    return found


def tensors(folder):
    """{tensor: value} of all files in a folder."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_a_training_in_another_type_than_the_bases_files_is_merged_and_proved(tmp_path, monkeypatch):
    base = variants.build("llava", tmp_path / "base", dtype="bfloat16")
    run = Run(tmp_path, monkeypatch, base, fp16=True, bf16="auto", max_steps=2, learning_rate=1e-2, merge=True).upto("06_save")
    assert {dtype for dtype, _ in kinds(run.path / "06_save/merged").values()} == {"BF16"}
    assert run.json("03_load_model/model.json")["dtype"] == "float16" and "merged" in run.json("06_save/check.json")["exports"]


def test_merging_a_base_of_several_files_holds_less_than_one_of_them_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "HIDDEN", 1280)                       # of its layers, of which six make four files
    bench.prepare(tmp_path, gib=0.28, shards=4)
    found, base, merged = bench.in_a_process("merge", tmp_path), tmp_path / "base", tmp_path / "merge"
    sizes = {path.name: path.stat().st_size for path in base.glob("*.safetensors")}
    assert len(sizes) == 4 and found["peak_bytes"] < max(sizes.values()) < sum(sizes.values()) / 3
    assert kinds(merged) == kinds(base) and len(kinds(base)) > 30
    for name in ("config.json", shards.INDEX):
        assert (merged / name).read_bytes() == (base / name).read_bytes()


def test_each_sum_is_rounded_once_and_the_rest_is_the_bases_to_the_bit(trained, tmp_path):
    plan, adapter, base = trained
    merge.write_merged(plan, adapter, tmp_path / "merged")
    before, after = tensors(base), tensors(tmp_path / "merged")
    parts, summed = load_file(adapter / "adapter_model.safetensors"), 0
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    for name in before:
        start = "base_model.model." + name.replace("language_model.model", "model.language_model")[:-len(".weight")]
        if f"{start}.lora_A.weight" in parts:
            delta = 32 / 4 * parts[f"{start}.lora_B.weight"] @ parts[f"{start}.lora_A.weight"]
            exact = before[name].double() + delta.double()
            assert ((after[name] - exact).abs() <= exact.abs() * 2**-8 * 1.001 + 1e-9).all()
            assert not torch.equal(after[name], before[name])
            summed += 1
        else:
            assert torch.equal(after[name], before[name])
    assert summed == 14


def test_max_shard_size_cuts_the_merged_model_into_files_that_an_index_names(trained, tmp_path):
    from transformers import LlavaForConditionalGeneration
    plan, adapter, base = trained
    merge.write_merged(plan, adapter, tmp_path / "whole")
    merge.write_merged(plan, adapter, tmp_path / "cut", "0.1MB")
    files = {path.name: path.stat().st_size for path in (tmp_path / "cut").glob("*.safetensors")}
    index = json.loads((tmp_path / "cut" / shards.INDEX).read_text(encoding="utf-8"))
    assert len(files) > 3 and max(files.values()) < 1.1e5 and set(index["weight_map"].values()) == set(files)
    whole, cut = (LlavaForConditionalGeneration.from_pretrained(tmp_path / name, dtype=torch.bfloat16).state_dict()
                  for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole) and whole.keys() == cut.keys()


def test_a_base_whose_files_cant_take_the_sums_one_by_one_is_merged_in_memory(trained, tmp_path, monkeypatch, capsys):
    plan, adapter, base = trained
    merge.write_merged(plan, adapter, tmp_path / "a")
    monkeypatch.setattr(merge.Sums, "in_files", lambda self, name, tensor: {"fused.weight": tensor})
    merge.write_merged(plan, adapter, tmp_path / "b")
    assert "merging in memory, the model as a whole: the files hold model.language_model" in capsys.readouterr().out
    one, other = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert all(torch.equal(one[name], other[name]) for name in one) and one.keys() == other.keys()


def test_a_missing_file_of_the_base_is_named(trained, tmp_path):
    plan, adapter, base = trained
    copy = tmp_path / "base"
    copy.mkdir()
    (copy / "config.json").write_bytes((base / "config.json").read_bytes())
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (copy / shards.INDEX).write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(StageError, match="model-00001-of-00001.safetensors is missing"):
        merge.write_merged(plan | {"base_model": str(copy)}, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_how_many_files_are_written_at_a_time_changes_no_bit(trained, tmp_path, monkeypatch):
    plan, adapter, base = trained
    for number in (1, 8):
        monkeypatch.setattr(merge, "FILES_AT_A_TIME", number)
        merge.write_merged(plan, adapter, tmp_path / str(number), "0.1MB")
    one, other = ({path.name: path.read_bytes() for path in (tmp_path / str(number)).iterdir()} for number in (1, 8))
    assert one == other and len(one) > 5
