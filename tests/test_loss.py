"""The chunked loss is the model's own loss, in value and gradient, for every kind of head."""
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from datasets import load_from_disk

from lib.batches.sampler import Batcher
from lib import collator
from lib.collator import IGNORE_INDEX
from lib.models import model
from lib.models.roles import Roles
from lib.text.chat import Encoder
from lib.training import loss
from lib.training.logits import UNCHANGED
from tests.runner import Run, colour_rows, text_rows

FAMILIES = ("llava", "qwen2_5_vl", "gemma3", "smolvlm2", "llama_text")


class Subject:
    """A family's tiny checkpoint, loaded by the kit, and batches of rows that 02 has made samples of."""

    def __init__(self, name, folder, monkeypatch, zoo, dtype="float32"):
        rows = text_rows(3) if name.endswith("_text") else [*colour_rows(2), *text_rows(1)]
        run = Run(folder, monkeypatch, zoo(name), rows, val_set_size=0, bf16=dtype == "bfloat16")
        run.upto("03_load_model")
        self.plan = run.json("03_load_model/model.json")
        self.roles = Roles.of_plan(self.plan)
        self.model = model.load(self.plan, torch.device("cpu"))
        self.encoder = Encoder.load(run.path / "02_data" / "processor")
        self.rows = [self.encoder(record) for record in load_from_disk(run.path / "02_data" / "train")]

    def batch(self, rows=None):
        return Batcher(self.encoder.pad_id, self.encoder.collate)(self.rows if rows is None else rows)

    def head(self):
        return self.model.get_output_embeddings()


@pytest.fixture
def subject(request, tmp_path, monkeypatch, zoo):
    return Subject(getattr(request, "param", "llava"), tmp_path, monkeypatch, zoo)


def train(subject, *roles):
    """The subject's model, with these roles trained."""
    model.train_roles(subject.model, subject.roles, list(roles))
    return subject.model


def own_loss(net, batch):
    """(loss sum, right answers) from the model's full logits, as a textbook has it."""
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "positions", "targets")}
    logits = net(**inputs, use_cache=False).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORE_INDEX)
    return total, ((logits.argmax(-1) == labels) & (labels != IGNORE_INDEX)).sum()


def gradients(net, total):
    """{name: gradient} of a loss, which are then gone from the model."""
    net.zero_grad(set_to_none=True)
    total.backward()
    found = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad(set_to_none=True)
    return found


def assert_the_same(net, batch, tolerance=1e-5):
    """Assert that loss, right answers and every gradient are those of the full logits."""
    (ours, ours_right), (own, own_right) = loss.forward_loss(net, batch), own_loss(net, batch)
    assert float(ours.detach()) == pytest.approx(float(own.detach()), rel=tolerance)
    assert int(ours_right) == int(own_right)
    ours, own = gradients(net, ours), gradients(net, own)
    assert ours.keys() == own.keys() and ours
    largest = max(float(gradient.abs().max()) for gradient in own.values())
    for name in own:  # some are zero but for rounding: a key's bias moves all scores alike
        scale = max(float(own[name].abs().max()), 1e-4 * largest)
        assert (ours[name] - own[name]).abs().max() < 10 * tolerance * scale, name


@pytest.mark.parametrize("subject", FAMILIES, indirect=True)
def test_loss_and_gradients_are_the_models_own_where_the_head_trains(subject):
    assert_the_same(train(subject, "all"), subject.batch())


@pytest.mark.parametrize("subject", FAMILIES, indirect=True)
def test_loss_and_gradients_are_the_models_own_where_the_head_is_frozen(subject):
    net = train(subject, "language")
    assert not any(p.requires_grad for p in subject.head().parameters())
    assert_the_same(net, subject.batch())


@pytest.mark.parametrize("roles", [["all"], ["language"]])
@pytest.mark.parametrize("subject", ["gemma3_text"], indirect=True)
def test_soft_capped_logits_give_the_models_own_loss(subject, roles):
    net, batch = train(subject, *roles), subject.batch()
    plain = float(loss.forward_loss(net, batch)[0].detach())
    net.config.final_logit_softcapping = 2.0
    assert_the_same(net, batch)
    assert float(loss.forward_loss(net, batch)[0].detach()) != pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("subject", ["gemma3"], indirect=True)
def test_a_soft_cap_that_the_class_ignores_is_ignored(subject):
    net = train(subject, "language")
    net.config.get_text_config().final_logit_softcapping = 2.0
    assert_the_same(net, subject.batch())


@pytest.mark.parametrize("roles", [["all"], ["language"]])
@pytest.mark.parametrize("rows_at_once, wide", [(1, 1), (3, 2), (10**6, 2), (10**6, 10**6)])
def test_where_chunks_end_changes_nothing(subject, roles, rows_at_once, wide, monkeypatch):
    net, batch = train(subject, *roles), subject.batch()
    assert len(batch["targets"]) % 3                               # so that a last chunk is smaller
    monkeypatch.setattr(loss, "CHUNK", rows_at_once)
    monkeypatch.setitem(loss.WIDE_LOGITS, "cpu", wide * net.config.get_text_config().vocab_size)
    assert_the_same(net, batch)


@pytest.mark.parametrize("roles", [["all"], ["language"]])
def test_a_batch_without_a_supervised_token_has_a_loss_of_zero_and_can_go_backward(subject, roles):
    net, batch = train(subject, *roles), subject.batch()
    batch["positions"], batch["targets"] = batch["positions"][:0], batch["targets"][:0]
    total, right = loss.forward_loss(net, batch)
    assert float(total.detach()) == 0 and int(right) == 0
    assert not any(gradient.any() for gradient in gradients(net, total).values())


@pytest.mark.parametrize("roles", [["all"], ["language"]])
def test_losses_of_a_recipes_own_see_as_few_logits_at_once_as_the_librarys(subject, roles, monkeypatch):
    net, batch, seen = train(subject, *roles), subject.batch(), []
    monkeypatch.setitem(loss.CHUNK_LOGITS, "cpu", 2 * net.config.get_text_config().vocab_size)

    def of_chunk(logits, targets):
        seen.append(len(targets))
        return F.cross_entropy(logits, targets, reduction="sum")
    own, _ = loss.forward_loss(net, batch, of_chunk)
    assert max(seen) == 2 and sum(seen) == len(batch["targets"])
    assert float(own.detach()) == pytest.approx(float(loss.forward_loss(net, batch)[0].detach()))


def test_only_supervised_positions_reach_the_head_and_never_more_than_a_chunk(subject, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 3)
    net, batch, seen = train(subject, "all"), subject.batch(), []
    linear = F.linear
    weight = subject.head().weight
    monkeypatch.setattr(F, "linear", lambda x, w, *rest: (seen.append(x.shape) if w is weight else None,
                                                          linear(x, w, *rest))[1])
    loss.forward_loss(net, batch)
    assert sum(shape[0] for shape in seen) == len(batch["targets"])
    assert all(len(shape) == 2 and shape[0] <= 3 for shape in seen)


def test_the_head_is_itself_again_after_a_forward_that_fails(subject):
    forward = subject.head().forward
    beyond = subject.batch()
    beyond["input_ids"] = beyond["input_ids"] + 10**6
    with pytest.raises(IndexError):
        loss.forward_loss(subject.model, beyond)
    assert subject.head().forward == forward and "forward" not in vars(subject.head())
    assert own_loss(subject.model, subject.batch())[0] > 0


def test_bf16_under_autocast_is_close_to_fp32(tmp_path, monkeypatch, zoo):
    exact = Subject("llava", tmp_path, monkeypatch, zoo)
    (tmp_path / "bf16").mkdir()
    rough = Subject("llava", tmp_path / "bf16", monkeypatch, zoo, "bfloat16")
    assert rough.head().weight.dtype == torch.bfloat16
    found = {}
    for subject in (exact, rough):
        net = train(subject, "language")
        with torch.autocast("cpu", torch.bfloat16, enabled=subject is rough):
            total, _ = loss.forward_loss(net, subject.batch())
        found[subject] = float(total.detach()), gradients(net, total)
    assert found[rough][0] == pytest.approx(found[exact][0], rel=0.02)
    for name, gradient in found[exact][1].items():
        similarity = F.cosine_similarity(gradient.flatten(), found[rough][1][name].flatten(), dim=0)
        assert similarity > 0.99, name


def test_the_loss_of_an_evaluation_makes_no_gradient(subject):
    net = train(subject, "language")
    with torch.no_grad():
        total, _ = loss.forward_loss(net, subject.batch())
    assert not total.requires_grad
    assert float(total) == pytest.approx(float(own_loss(net, subject.batch())[0].detach()), rel=1e-5)


def test_hidden_state_t_predicts_token_t_plus_one():
    labels = torch.tensor([[5, -100, 7, 8], [-100, -100, -100, 9]])  # [B, T]; a first token is no target
    positions, targets = collator.supervised_positions(labels)
    assert positions.tolist() == [1, 2, 6] and targets.tolist() == [7, 8, 9]


def test_of_equal_largest_logits_each_is_right_and_a_smaller_one_is_not():
    weight = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    head = torch.nn.Linear(2, 3, bias=False)
    head.weight.data = weight
    rows, targets = torch.tensor([[2.0, 1]] * 3), torch.tensor([0, 1, 2])
    cross_entropy = partial(F.cross_entropy, reduction="sum")
    frozen = loss.FrozenHeadLoss.apply(rows, weight, None, targets, UNCHANGED, 2, 1)
    trained = loss.trained_head_loss(rows, head, targets, UNCHANGED, 2, cross_entropy)
    assert int(frozen[1]) == int(trained[1]) == 2
    assert float(frozen[0]) == pytest.approx(float(trained[0].detach()))
