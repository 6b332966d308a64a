"""The fast paths compute what the libraries compute: losses and gradients of every family, packed and not."""
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from lib import fast
from lib.fast import adapted, alignment, attention, blocks, last, norms
from lib.models import model
from lib.models.roles import Roles
from lib.training import loss
from tests.test_families import NAMES, find
from tests.test_packing import REFUSED, gradients, packed_batch, rows_of


LIMIT = 2e-3                              # the libraries' own are up to 4e-4 from what float64 gives


@pytest.fixture(params=NAMES)
def subject(request, tmp_path_factory):
    return find(request.param, tmp_path_factory)


def assert_same(found, wanted):
    """Sums of losses and gradients are equal but for rounding."""
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert (found[1][name] - gradient).norm() <= LIMIT * gradient.norm() + 1e-7, name


def test_losses_and_gradients_are_the_libraries_own(subject, tmp_path, monkeypatch):
    sizes = {"ROWS_MASKED": 16, "ROWS_UNMASKED": 12, "FEWEST_ROWS": 1, "KEEP_TOKENS": 40}   # tiny rows: several blocks
    for name, size in sizes.items():
        monkeypatch.setattr(blocks, name, size)
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


@pytest.mark.parametrize("name", ["llama_text", "qwen2_5_vl", "gemma3"])
def test_layers_that_run_again_in_the_backward_do_so_on_the_fast_paths(name, tmp_path_factory, tmp_path):
    subject = find(name, tmp_path_factory)
    net, _ = subject.adapter(tmp_path)
    batches = [subject.batch(rows_of(subject)[:1])]
    wanted = gradients(net.eval(), batches)
    assert model.checkpoint_trained_layers(net.train(), subject.roles, {"language"}) == 1
    with fast.paths(net, subject.roles):
        assert_same(gradients(net, batches), wanted)


def test_both_fast_paths_are_taken_and_left_again(tmp_path_factory, tmp_path, monkeypatch):
    subject = find("qwen2_5_vl", tmp_path_factory)
    net, _ = subject.adapter(tmp_path)
    batch, called = packed_batch(subject, net, rows_of(subject)), []
    for place, name in ((attention, "squares"), (adapted, "adapted_forward"), (adapted, "gated_forward")):
        own = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *words, own=own, name=name: (called.append(name), own(*words))[1])
    with fast.paths(net, subject.roles):
        gradients(net, [batch])
    layers, linears = 2, 7
    # A row of three samples and one of one: four squares a layer, and the tower's pictures.
    assert called.count("squares") >= 4 * layers
    assert called.count("adapted_forward") == (linears - 1) * layers and called.count("gated_forward") == layers
    called.clear()
    gradients(net, [batch])
    assert called == []


def test_the_last_mlp_sees_only_positions_at_which_something_is_predicted(tmp_path_factory, tmp_path):
    subject = find("qwen2_5_vl", tmp_path_factory)
    net, _ = subject.adapter(tmp_path)
    first, mlp = (module for name, module in net.named_modules() if adapted.is_gated(module) and ".layers." in name)
    batch, seen = packed_batch(subject, net, rows_of(subject)), []
    tokens = batch["input_ids"].numel()
    assert len(batch["targets"]) < last.FULL < tokens
    with fast.paths(net, subject.roles):
        for each in (first, mlp):
            each.up_proj.register_forward_pre_hook(lambda layer, given: seen.append(given[0].shape[:-1].numel()))
        loss.forward_loss(net, batch)
        assert last.parts(net, subject.roles) == [mlp] and seen == [tokens, last.FULL]
        loss.forward_loss(net, batch | {"positions": batch["positions"][:0], "targets": batch["targets"][:0]})[0].backward()
        assert seen[2:] == [tokens, last.FULL]
        assert not any(p.grad.any() for p in net.parameters() if p.grad is not None)
        last.of_batch({})                                                        # as before answers are generated
        net(**{key: batch[key] for key in ("input_ids", "pixel_values", "image_grid_thw", "mm_token_type_ids")})
        assert seen[-1] == tokens


@pytest.mark.parametrize("kind, size", [(torch.nn.Conv3d, (2, 4, 4)), (torch.nn.Conv2d, (4, 4))])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_over_patches_is_one_product_and_any_other_its_own(kind, size, bias, monkeypatch):
    layer = kind(3, 8, size, stride=size, bias=bias).requires_grad_(False)
    forward, convolved = fast.forward_of(layer, cuda=False), []
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda *given: (convolved.append(1), own(*given))[1])
    for more, convolves in ((1, False), (3, True)):
        x = torch.randn(5, 3, *(more * each for each in size))
        torch.testing.assert_close(forward(x), own(layer, x))
        assert bool(convolved) == convolves
    assert fast.forward_of(kind(3, 8, size), cuda=False) is None                 # it learns


def masks_of(kind: str, tokens: int) -> torch.Tensor | None:
    """A mask [2, 1, tokens, tokens] of a kind."""
    rows, columns = torch.arange(tokens)[:, None], torch.arange(tokens)
    causal = columns <= rows
    some = (torch.rand(2, 1, tokens, tokens) > 0.4) | (columns == 0)
    sees = {"causal": causal, "window": causal & (columns > rows - 3), "a picture both ways": causal | (columns < 6),
            "padded": causal & (columns < torch.tensor([tokens, tokens - 4])[:, None, None, None])}
    return {"none": None, "bool": some, "added": torch.where(some, 0.0, torch.finfo(torch.float32).min)}.get(
        kind, sees.get(kind, causal).expand(2, 1, tokens, tokens))


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", ["none", "bool", "added", "causal", "window", "a picture both ways", "padded"])
def test_attention_in_blocks_is_torchs(kind, groups, kept, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(blocks, "ROWS_MASKED", 4)
    monkeypatch.setattr(blocks, "ROWS_UNMASKED", 5)
    monkeypatch.setattr(blocks, "KEEP_TOKENS", 9 if kept else 8)
    monkeypatch.setattr(blocks, "FEWEST_ROWS", 1)
    query = torch.randn(2, 4, 9, 8, requires_grad=True)
    key = torch.randn(2, groups, 9, 8, requires_grad=True)
    value = torch.randn(2, groups, 9, 6, requires_grad=True)
    mask = masks_of(kind, 9)
    wanted = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True)
    found = attention.squares(query, key, value, mask, 0.3)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), (query, key, value)) for out in (found, wanted))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_blocks_see_no_column_that_a_mask_hides_from_all_of_their_rows(monkeypatch):
    monkeypatch.setattr(blocks, "ROWS_MASKED", 4)
    monkeypatch.setattr(blocks, "FEWEST_ROWS", 1)
    query = torch.empty(2, 1, 9, 8)

    def seen(kind):
        return [(columns.start, columns.stop) for _, columns in blocks.blocks(query, masks_of(kind, 9))]
    assert seen("none") == [(0, 9)] and seen("causal") == [(0, 4), (0, 8), (0, 9)]
    assert seen("window") == [(0, 4), (2, 8), (6, 9)] and seen("a picture both ways") == [(0, 6), (0, 8), (0, 9)]
    nothing = torch.zeros(2, 1, 9, 9, dtype=torch.bool)
    assert [columns for _, columns in blocks.blocks(query, nothing)] == [slice(0, 1)] * 3
    assert not attention.squares(*[torch.zeros(2, 1, 9, 8)] * 3, nothing, 1.0).any()      # and no NaN
    monkeypatch.setattr(blocks, "MOST_SCORES", 2 * 9 * 3)
    assert [rows.stop for rows, _ in blocks.blocks(query, None)] == [3, 6, 9]


@pytest.mark.parametrize("kept", [True, False])
def test_of_weights_only_those_that_are_seen_are_kept(kept, monkeypatch):
    monkeypatch.setattr(blocks, "KEEP_TOKENS", 512 if kept else 511)
    query, key, value = (torch.randn(1, 1, 512, 4, requires_grad=True) for _ in range(3))
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: held.append(tensor.numel()) or tensor, lambda tensor: tensor):
        attention.squares(query, key, value, masks_of("causal", 512)[:1], 0.5)
    assert sum(size for size in held if size < 512 * 512) - 3 * 512 * 4 == kept * 128 * (128 + 256 + 384 + 512)


def test_pieces_are_attended_to_apart():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 3, 24, 8) for _ in range(3))
    ends = torch.tensor([0, 10, 14, 24])
    found, _ = attention.pieces(None, query, key, value, None, scaling=0.3, cu_seq_lens_q=ends)
    apart = [F.scaled_dot_product_attention(*(x[:, :, a:b] for x in (query, key, value)), scale=0.3)
             for a, b in zip(ends, ends[1:])]
    torch.testing.assert_close(found.transpose(1, 2), torch.cat(apart, dim=2), rtol=1e-5, atol=1e-5)


def test_an_adapted_layer_has_the_gradients_of_its_formula():
    torch.manual_seed(0)
    x, a, b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 5, 6), (3, 6), (4, 3)))
    base = torch.nn.Linear(6, 4, dtype=torch.float64).requires_grad_(False)
    assert torch.autograd.gradcheck(lambda x, a, b: adapted.adapted_forward(adapted.Cast(a, b, 0.7), base, x), (x, a, b))


def test_an_mlp_with_a_gate_has_its_gradients_and_keeps_neither_product_nor_activation(tmp_path_factory, tmp_path):
    subject = find("llama_text", tmp_path_factory)
    net, _ = subject.adapter(tmp_path)
    (mlp, *_) = (module for module in net.modules() if adapted.is_gated(module))
    x, kept, wide = torch.randn(2, 5, 64, requires_grad=True), [], mlp.up_proj.out_features
    parameters = [x, *(p for p in mlp.parameters() if p.requires_grad)]
    wanted = mlp(x)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        with fast.paths(net, subject.roles):
            found = mlp(x)
    torch.testing.assert_close(found, wanted)
    assert len([tensor for tensor in kept if tensor.shape[-1] == wide and tensor.numel() == 10 * wide]) == 2
    slopes = torch.randn_like(wanted)
    for a, b in zip(*(torch.autograd.grad(out, parameters, slopes) for out in (found, wanted))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["gate_proj", "up_proj"])
def test_an_mlp_of_which_one_input_alone_learns_has_its_gradients(target, tmp_path_factory, tmp_path):
    net, _ = find("llama_text", tmp_path_factory).adapter(tmp_path, lora_target_modules=[target, "down_proj"])
    (mlp, *_) = (module for module in net.modules() if adapted.is_gated(module))
    x, trained = torch.randn(2, 5, 64), [p for p in mlp.parameters() if p.requires_grad]
    wanted, found = mlp(x), adapted.forward_of(mlp)(x)
    slopes = torch.randn_like(wanted)
    for a, b in zip(*(torch.autograd.grad(out, trained, slopes) for out in (found, wanted))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_an_mlp_that_computes_something_else_is_left_to_its_class(tmp_path_factory, tmp_path):
    net, _ = find("gemma3n", tmp_path_factory).adapter(tmp_path)
    named = {name: adapted.is_gated(module) for name, module in net.named_modules() if name.endswith("mlp")}
    assert sorted(named.values()) == [False, True, True, True]        # the first layer's gate keeps its largest only


def test_an_adapter_is_cast_once_for_each_update():
    a, b = (torch.nn.Parameter(torch.randn(*shape)) for shape in ((3, 6), (4, 3)))
    cast = adapted.Cast(a, b, 0.5)
    first = cast(torch.bfloat16)
    assert cast(torch.bfloat16)[0] is first[0] and torch.equal(first[1], (b * 0.5).bfloat16())
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    with fast.paths(torch.nn.Linear(1, 1), Roles({})):
        torch.optim.AdamW([a, b], lr=0.1, fused=True).step()
    assert torch.equal(cast(torch.bfloat16)[0], a.bfloat16()) and not torch.equal(first[0], a.bfloat16())


@pytest.mark.parametrize("options", [{}, {"compress_statistics": True, "bias": True}])
def test_an_adapted_layer_in_4_bits_is_pefts(options):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(0)
    own = torch.nn.Linear(64, 128, bias="bias" in options)
    base = bitsandbytes.nn.Linear4bit(64, 128, quant_type="nf4", compute_dtype=torch.bfloat16, **({"bias": False} | options))
    base.load_state_dict(own.state_dict())
    net = torch.nn.Sequential()
    net.add_module("layer", base.to("cpu"))
    net.is_loaded_in_4bit = True
    net = get_peft_model(net, LoraConfig(target_modules=["layer"], r=4, init_lora_weights=False))
    (layer,) = (module for module in net.modules() if adapted.is_plain_lora(module))
    x = torch.randn(3, 5, 64, dtype=torch.bfloat16, requires_grad=True)
    trained = [p for p in net.parameters() if p.requires_grad]
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = fast.forward_of(layer, cuda=False)(x), layer(x)
        slopes = torch.randn_like(wanted)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    for a, b in zip(*(torch.autograd.grad(out, [x, *trained], slopes) for out in (found, wanted))):
        assert (a - b).float().norm() <= 1e-2 * b.float().norm()


def test_layers_with_dropout_or_a_variant_are_left_to_peft(tmp_path_factory, tmp_path):
    subject = find("llama_text", tmp_path_factory)
    for number, knobs in enumerate(({"lora_dropout": 0.1}, {"peft_use_dora": True})):
        (tmp_path / str(number)).mkdir()
        net, _ = subject.adapter(tmp_path / str(number), **knobs)
        assert not any(adapted.is_plain_lora(module) for module in net.modules())


@pytest.mark.parametrize("cuda", [False, True])
def test_norms_are_the_families_own(subject, cuda, tmp_path):
    net, _ = subject.adapter(tmp_path)
    net.eval()
    named = [module for module in net.modules() if "RMSNorm" in type(module).__name__ and hasattr(module, "weight")]
    found = [module for module in net.modules() if norms.kind_of(module) is not None]
    assert found == [module for module in named if "Gated" not in type(module).__name__]
    if cuda:                              # without, every test of the fast paths holds these
        batch = [subject.batch(rows_of(subject)[:1])]
        wanted = gradients(net, batch)
        with fast.paths(net, subject.roles, cuda=True):
            assert_same(gradients(net, batch), wanted)
    for dtype, part in ((torch.bfloat16, 1e-2), (torch.float32, 1e-5)):
        for module in found[:2]:
            x = torch.randn(7, *module.weight.shape, dtype=dtype, requires_grad=True)
            before = x.detach().clone()
            out, wanted = norms.forward_of(module, cuda)(x), module(x)
            assert out.dtype == wanted.dtype or module.weight.dtype == torch.float32
            torch.testing.assert_close(out.float(), wanted.float(), rtol=part, atol=part)
            slopes = torch.randn_like(wanted)
            mine, its = (torch.autograd.grad(each, x, slopes.to(each.dtype))[0] for each in (out, wanted))
            assert (mine - its).float().norm() <= part * its.float().norm()
            assert torch.equal(x, before)


def test_an_odd_layer_filled_up_is_the_same_layer():
    torch.manual_seed(0)
    layer = torch.nn.Linear(20, 13).requires_grad_(False)
    x, weight = torch.randn(2, 5, 20, requires_grad=True), layer.weight.clone()
    wanted = layer(x)
    filled = alignment.filled_up(layer)
    assert filled[0].shape == (16, 24) and torch.equal(layer.weight, weight)
    found = alignment.odd_forward(*filled, 13, x)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (found, wanted)))


@pytest.mark.parametrize("guessed", [True, False])
def test_one_kernel_for_all_samples_is_taken_where_a_record_knows_the_masks(guessed, monkeypatch):
    query, called = torch.randn(1, 2, 6, 8), []
    monkeypatch.setattr(attention, "packed_rows", [[4, 2]])
    monkeypatch.setattr(attention, "own_masks", False)
    monkeypatch.setattr(attention, "has_flash", lambda query: True)
    monkeypatch.setattr(attention, "flash", lambda query, *_: (called.append(1), query)[1])
    module, mask = torch.nn.Identity(), torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    attention.attend(None, {module}, guessed, module, query, query, query, mask)
    assert bool(called) == (not guessed)


def test_a_window_or_a_chunk_that_hides_part_of_a_sample_is_not_plainly_causal(monkeypatch):
    chunked = SimpleNamespace(sliding_window=None, config=SimpleNamespace(attention_chunk_size=8))
    monkeypatch.setattr(attention, "own_masks", False)
    for module in (SimpleNamespace(sliding_window=8), chunked):
        assert attention.is_plainly_causal(module, [[3, 8], [1]])
        assert not attention.is_plainly_causal(module, [[3, 9], [1]])
    assert attention.is_plainly_causal(SimpleNamespace(), [[9000]])
    monkeypatch.setattr(attention, "own_masks", True)
    assert not attention.is_plainly_causal(SimpleNamespace(), [[3]])
