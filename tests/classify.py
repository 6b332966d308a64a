"""What becomes of each model type of transformers' image-text-to-text table, tried tiny: classified.json.

    python -m tests.classify              # all of them, some minutes
    python -m tests.classify idefics3     # only these; the others stay as they are in the file

passes               the checks that are listed held: the generic suite below or, for a variant of the zoo,
                     the whole of tests/test_families.py
refused              by an error of this kit, before anything trains
can't be built tiny  by these rules (tests/tiny.py): nothing is known of it
stops                with an error of transformers' in a batch that this kit makes: nothing trains
fails                would train something else than its rows say, and nobody says so: a mistake of this kit
"""
import json
import os
import re
import resource
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

from lib import registry
from lib.models import model, plan, roles, trainable
from lib.run.errors import RowError, StageError
from lib.text.processor import tokenizer_of
from lib.training import loss, rehearsal
from tests import tiny, zoo
from tests.test_families import SEEING, Subject, difference, inputs, picture, text
from tests.zoo.checkpoint import write

FILE = Path(__file__).with_name("classified.json")
LIMIT_SECONDS, LIMIT_BYTES = 240, 6 * 2**30
STOPS, CANT = "stops", "can't be built tiny"
LENGTHS = ("image_seq_length", "image_seq_len", "num_image_tokens", "num_query_tokens")


class Failed(Exception):
    """A check that didn't hold."""


def hold(condition, words: str) -> None:
    """Raise Failed unless the condition holds."""
    if not condition:
        raise Failed(words)


# ---- the suite ----

class Try(Subject):
    """A tiny checkpoint under the generic record, held to the points of `CHECKS`."""

    def __init__(self, model_type: str, folder: Path):
        super().__init__(model_type, folder)
        self.text_only = tokenizer_of(self.encoder.processor) is self.processor
        self.notes = []

    def rows(self, *turns):
        """The encoded samples of a conversation of (number of pictures, question, answer)."""
        messages = []
        for pictures, question, answer in turns:
            shown = [{"type": "image"}] * (0 if self.text_only else pictures)
            messages.append({"role": "user", "content": [*shown, text(question)]})
            messages.append({"role": "assistant", "content": [text(answer)]})
        return [self.encoder.encode(sample.text, sample.spans, [picture(n) for n in range(sample.media)])
                for sample in self.template.conversations(messages)]

    def logits(self, *rows):
        """Of a batch, by the base model."""
        with torch.no_grad():
            return self.base(**inputs(self.batch(rows)), use_cache=False).logits

    def labels_are_the_replies_alone(self):
        """And so no placeholder, whatever the processor wrote for it, is ever supervised."""
        cases = {"a red fox<|end|>": self.rows((1, "What is it?", "a red fox")),
                 "yes<|end|>no<|end|>": self.rows((2, "Two?", "yes"), (1, "and now", "no"))}
        self.row = cases["a red fox<|end|>"][0]
        try:
            self.words = self.rows((0, "Hi", "Hello"))[0]
            cases["Hello<|end|>"] = [self.words]
        except ValueError:                 # 02 rejects such rows by name
            self.notes.append("its processor takes no row without a picture")
            words = "<|user|>Hi<|end|><|assistant|>Hello<|end|>"
            ids = tokenizer_of(self.processor)(words, return_tensors="pt")["input_ids"]
            self.words = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        for wanted, rows in cases.items():
            found = "".join(self.trained_text(row) for row in rows)
            hold(found == wanted, f"trains {found!r}, should train {wanted!r}")

    def pictures_change_the_logits(self):
        seen, tokens = self.logits(self.row), self.row["input_ids"].shape
        hold(seen.shape[:2] == tokens, f"logits for {seen.shape[1]} of {tokens[1]} tokens")
        pixels = {key: value * -0.7 + 0.2 for key, value in self.row.items()
                  if value.is_floating_point() and "mask" not in key}
        hold(self.text_only or pixels and difference(self.logits(self.row | pixels), seen) > 1e-5,
             "another picture leaves the logits as they are")

    def later_words_change_no_earlier_logits(self):
        longer = self.rows((1, "What is it?", "a red foxglove in a garden"))[0]
        ids, longer_ids = self.row["input_ids"][0], longer["input_ids"][0]
        same = int((longer_ids[:len(ids)] == ids).int().cumprod(0).sum())
        hold(same > 4 and difference(self.logits(longer)[:, :same], self.logits(self.row)[:, :same]) < 1e-4,
             "it sees what comes later")

    def towers_are_what_pictures_alone_reach(self):
        self.by_words, self.by_picture = self.reached(self.words), self.reached(self.row)
        for role, names in (("vision", self.by_words), ("audio", self.by_words), ("projector", self.by_words),
                            ("language", self.by_picture - self.by_words)):
            odd = sorted(name for name in names if self.roles.of(name) == role)
            hold(not odd, f"taken for {role}: {', '.join(odd[:2])}")
        found = {self.roles.of(name) for name in self.by_picture - self.by_words}
        hold(self.text_only or found & {"vision", "projector"},      # some have no tower, but embed patches
             f"no tower, only {sorted(map(str, found))}")

    def reached(self, row) -> set[str]:
        """Names of the modules with parameters of their own that a row's forward runs."""
        names = set()
        own = {name.rpartition(".")[0] for name, _ in self.base.named_parameters()}
        handles = [module.register_forward_hook(lambda *_, name=name: names.add(name))
                   for name, module in self.base.named_modules() if name in own]
        self.logits(row)
        for handle in handles:
            handle.remove()
        return names

    def batched_logits_equal_single_ones(self):
        rows = [self.row, *self.rows((2, "Two here?", "yes")), *([] if self.notes else [self.words])]
        single = [self.logits(row)[0] for row in rows]
        if any(difference(row[:len(single[n])], single[n]) > 1e-4
               for order in (range(len(rows)), range(len(rows))[::-1])
               for row, n in zip(self.logits(*(rows[n] for n in order)), order)):
            self.batches_of_several_are_refused(rows)

    def batches_of_several_are_refused(self, rows):
        """By lib/training/rehearsal.py, before the first step."""
        change, limit = rehearsal.leak(self.base, [self.batch([row]) for row in rows], self.batch(rows), typical=True)
        hold(change > limit, "a row's logits depend on its batch")
        self.notes.append("its rows change one another, so that 05 stops unless micro_batch_size is 1")

    def lora_is_on_the_language_models_linears(self):
        peft_model, hits = model.new_adapter(self.plan, self.knobs())
        names = {name for found in hits.values() for name in found}
        linears = {name for name, module in self.base.named_modules()
                   if isinstance(module, torch.nn.Linear) and name in self.by_words
                   and re.search(r"\.\d+\.", name) and self.roles.of(name) != "router"}
        hold(names == linears, f"LoRA and what words reach differ in {sorted(names ^ linears)[:2]}")

    def loss_and_gradients_are_the_models_own(self):
        self.net, self.adapter_folder = self.adapter(self.folder)
        self.net.eval()                    # in training, some have dropout in their frozen parts
        batch = self.batch([self.row, *self.rows((1, "And here, what is it?", "no"))])
        found, gradients = self.step(lambda: loss.forward_loss(self.net, batch)[0])
        own, expected = self.step(lambda: F.cross_entropy(
            self.net(**inputs(batch), use_cache=False).logits[:, :-1].flatten(0, 1).float(),
            batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"))
        hold(abs(found - own) <= 1e-5 * abs(own), f"loss {found:.5g}, the model's own {own:.5g}")
        hold(all(difference(gradients[name], expected[name]) < 1e-3 for name in expected), "other gradients")
        trained = set(model.trained_parameters(self.net))
        hold(gradients.keys() <= trained, "a frozen tensor has a gradient")
        if late := sorted(trained - gradients.keys()):       # what lib/training/optim.py:GradientWatch stops at
            raise StageError(f"{len(late)} trained tensors get no gradient, such as {late[0]}",
                             "leave them out")

    def step(self, compute) -> tuple[float, dict[str, torch.Tensor]]:
        """(loss, the gradients other than zero) by a backward pass."""
        self.net.zero_grad(set_to_none=True)
        total = compute()
        total.backward()
        found = {name: parameter.grad for name, parameter in self.net.named_parameters()}
        return float(total.detach()), {name: gradient.clone() for name, gradient in found.items()
                                       if gradient is not None and bool(gradient.any())}

    def plain_peft_reads_the_adapter(self):
        from peft import PeftModel
        cls, batch = getattr(transformers, self.plan["class"]), inputs(self.batch([self.row]))
        base = cls.from_pretrained(self.folder, dtype=torch.float32,
                                   attn_implementation=self.plan["attn_implementation"])
        plain = PeftModel.from_pretrained(base, self.adapter_folder)
        with torch.no_grad():
            theirs, ours = (net.eval()(**batch, use_cache=False).logits for net in (plain, self.net))
        hold(difference(theirs, ours) < 1e-6, "logits differ after reloading")

    def two_steps_lower_the_loss(self):
        optimizer = torch.optim.AdamW(model.trained_parameters(self.net).values(), lr=1e-2)
        model.checkpoint_trained_layers(self.net.train(), self.roles, {"language"})
        losses = []
        for _ in range(3):
            losses.append(self.step(lambda: loss.forward_loss(self.net, self.batch([self.row]))[0])[0])
            optimizer.step()
        hold(losses[2] < losses[0] < 1e4, "two steps don't lower the loss")


CHECKS = (Try.labels_are_the_replies_alone, Try.pictures_change_the_logits,
          Try.later_words_change_no_earlier_logits, Try.towers_are_what_pictures_alone_reach,
          Try.batched_logits_equal_single_ones, Try.lora_is_on_the_language_models_linears,
          Try.loss_and_gradients_are_the_models_own, Try.plain_peft_reads_the_adapter,
          Try.two_steps_lower_the_loss)


# ---- verdicts ----

def classify(model_type: str, folder: Path) -> dict:
    """{class, verdict, reason, roles, checks} of a model type, by what happens to it."""
    found = {"class": tiny.MODELS[model_type], "verdict": "passes", "reason": "", "roles": {}, "checks": []}
    facts, tried = {}, []
    while True:
        try:
            found["roles"], found["checks"] = {}, []
            attempt(model_type, folder, facts, found)
        except (StageError, RowError) as error:
            reason = error.what if isinstance(error, StageError) else error.reason
            found |= {"verdict": "refused", "reason": reason}
        except Failed as error:
            found |= {"verdict": "fails", "reason": str(error)}
        except Exception as error:
            # How many tokens a picture takes is known to the processor and the model, each for itself.
            options = lengths(str(error)) if len(tried) < 9 else []
            tried.append(facts)
            facts = next((option for option in options if option not in tried), None)
            if facts is not None:
                continue
            reason = " ".join(str(error).split())[:200]
            found |= {"verdict": STOPS if len(found["checks"]) > 1 else CANT,
                      "reason": f"{type(error).__name__}: {reason}"}
        found["reason"] = found["reason"].replace(str(folder), "FOLDER")
        return found


def attempt(model_type: str, folder: Path, facts: dict, found: dict) -> None:
    """Note in `found` which checks held; raise what the first other one raised."""
    with plan.quiet():
        config = tiny.configuration(model_type)
        trainable.refuse_other_objectives(config)
        with torch.device("meta"):
            empty = registry.model_class(config)._from_config(config)
        trainable.refuse_other_losses(empty)
        roles.roles_of(empty, registry.family_of(model_type))
        write(tiny.parts(model_type, picture(0), facts), folder, seed=0, dtype="float32")
        tried = Try(model_type, folder)
        found["class"], found["roles"] = tried.plan["class"], dict(sorted(tried.plan["parameters"].items()))
        for check in CHECKS:
            check(tried)
            found["checks"].append(check.__name__)
        found["reason"] = "; ".join(tried.notes)


def lengths(message: str) -> list[dict]:
    """What a processor may be told about a picture's tokens, after a model's complaint about their number."""
    numbers = re.search(r"tokens:? (\d+),? *features:? (\d+)", message)
    if not numbers:
        return []
    tokens, features = map(int, numbers.groups())
    ratio = max(tokens / max(features, 1), 1) ** 0.5
    of_each = max(1, (tiny.SIDE // tiny.PATCH) ** 2 * features // max(tokens, 1))
    return [*(dict.fromkeys(LENGTHS, n) for n in (of_each, features, features // tiny.WIDTH, 16, 4)),
            {"num_additional_image_tokens": 1}, {"patch_size": round(tiny.PATCH * ratio)},
            {"image_patch_size": round(tiny.PATCH / ratio)}, {"times": round(ratio)}]


def apart(work) -> dict | None:
    """What `work` returns in a process of its own; None where it took more time or memory than allowed.

    This process itself only imports: after a forked tokenizer's first call its threads would be missed.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        signal.alarm(LIMIT_SECONDS)
        resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_BYTES, LIMIT_BYTES))
        with os.fdopen(writing, "w", encoding="utf-8") as pipe:
            json.dump(work(), pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return json.loads(told) if told else None


def entry_of(model_type: str) -> dict:
    """`classify` in a folder and a process of its own."""
    def work():
        with tempfile.TemporaryDirectory() as folder:
            return classify(model_type, Path(folder))
    return apart(work) or {"class": tiny.MODELS[model_type], "verdict": CANT, "roles": {},
                           "reason": "it takes more time or memory than allowed", "checks": []}


def of_the_zoo() -> dict[str, dict]:
    """{model type: entry} of those with a variant in the zoo, which tests/test_families.py holds to more."""
    entries = {}
    for name in SEEING:
        with tempfile.TemporaryDirectory() as folder, plan.quiet():
            planned = Subject(name, zoo.build(name, folder)).plan
        entry = entries.setdefault(planned["model_type"], {
            "class": planned["class"], "verdict": "passes", "reason": "in the zoo as",
            "roles": dict(sorted(planned["parameters"].items())), "checks": ["tests/test_families.py"]})
        entry["reason"] += f" {name}"
    return {model_type: entry for model_type, entry in entries.items() if model_type in tiny.MODELS}


def sentence(table: dict) -> str:
    """What the README says of the table."""
    found = Counter(entry["verdict"] for entry in table["types"].values())
    in_zoo = sum(entry["checks"] == ["tests/test_families.py"] for entry in table["types"].values())
    return (f"Of the {len(table['types'])} types in that table (transformers {table['transformers']}), "
            f"{in_zoo} have a variant in the zoo, {found['passes'] - in_zoo} more pass a generic suite on a "
            "tiny model, "
            f"{found['refused']} are refused by name, "
            + (f"{found[STOPS]} stop with an error of transformers', " if found[STOPS] else "") +
            f"and {found[CANT]} couldn't be built tiny, so nothing is known of them "
            "(`tests/classified.json`, made by `python -m tests.classify`).")


def main(types: list[str]) -> None:
    """Classify these types, or all, and write the file."""
    known = json.loads(FILE.read_text(encoding="utf-8"))["types"] if types else apart(of_the_zoo)
    for model_type in types or [name for name in tiny.MODELS if name not in known]:
        known[model_type] = found = entry_of(model_type)
        print(f"{model_type}: {found['verdict']}. {found['reason']}", flush=True)
    table = {"transformers": transformers.__version__, "types": dict(sorted(known.items()))}
    FILE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
