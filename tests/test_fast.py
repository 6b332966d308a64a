"""The fast paths compute what the libraries compute: losses and gradients of every family, packed and not."""
import pytest
import torch
import torch.nn.functional as F

from lib import fast
from tests.test_families import NAMES, find
from tests.test_packing import REFUSED, gradients, packed_batch, rows_of


@pytest.fixture(params=NAMES)
def subject(request, tmp_path_factory):
    return find(request.param, tmp_path_factory)


def assert_same(found, wanted):
    """Sums of losses and gradients are equal but for rounding."""
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert (found[1][name] - gradient).norm() <= 5e-4 * gradient.norm() + 1e-7, name


def test_losses_and_gradients_are_the_libraries_own(subject, tmp_path):
    net, _ = subject.adapter(tmp_path)
    net.eval()
    rows = rows_of(subject)
    alike = [rows[0], rows[3]] if subject.encoder.batch == "alike" else rows
    batches = [[subject.batch(alike)]]
    if subject.name not in REFUSED:
        batches.append([packed_batch(subject, net, rows)])
    for batch in batches:
        wanted = gradients(net, batch)
        with fast.paths(net, subject.roles):
            assert_same(gradients(net, batch), wanted)


def test_both_fast_paths_are_taken_and_left_again(tmp_path_factory, tmp_path, monkeypatch):
    subject = find("qwen2_5_vl", tmp_path_factory)
    net, _ = subject.adapter(tmp_path)
    batch, called = packed_batch(subject, net, rows_of(subject)), []
    for name in ("squares", "adapted_forward"):
        own = getattr(fast, name)
        monkeypatch.setattr(fast, name, lambda *words, own=own, name=name: (called.append(name), own(*words))[1])
    with fast.paths(net, subject.roles):
        gradients(net, [batch])
    layers, linears = 2, 14
    # A row of three samples and one of one: four squares a layer, and the tower's pictures.
    assert called.count("squares") >= 4 * layers and called.count("adapted_forward") == linears
    called.clear()
    gradients(net, [batch])
    assert called == []


@pytest.mark.parametrize("masked", [None, "bool", "added"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_plain_products_are_torchs_attention(masked, groups):
    torch.manual_seed(0)
    query = torch.randn(2, 4, 9, 8, requires_grad=True)
    key, value = (torch.randn(2, groups, 9, 8, requires_grad=True) for _ in range(2))
    mask = torch.rand(2, 1, 9, 9) > 0.4
    mask[..., 0] = True
    given = {None: None, "bool": mask, "added": torch.where(mask, 0.0, torch.finfo(torch.float32).min)}[masked]
    wanted = F.scaled_dot_product_attention(query, key, value, attn_mask=given, scale=0.3, enable_gqa=True)
    found = fast.squares(query, key, value, given, 0.3)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), (query, key, value)) for out in (found, wanted))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_an_adapted_layer_has_the_gradients_of_its_formula():
    torch.manual_seed(0)
    x, a, b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 5, 6), (3, 6), (4, 3)))
    weight, bias = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, a, b: fast.AdaptedLinear.apply(x, weight, bias, a, b, 0.7), (x, a, b))


def test_layers_with_dropout_or_a_variant_are_left_to_peft(tmp_path_factory, tmp_path):
    subject = find("llama_text", tmp_path_factory)
    for number, knobs in enumerate(({"lora_dropout": 0.1}, {"peft_use_dora": True})):
        (tmp_path / str(number)).mkdir()
        net, _ = subject.adapter(tmp_path / str(number), **knobs)
        assert not any(fast.is_plain_lora(module) for module in net.modules())
