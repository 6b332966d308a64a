"""On a GPU: its kernels against the libraries' own, alone and in every family. Skipped where there is none."""
import pytest
import torch
import torch.nn.functional as F

from lib import fast, quant
from lib.fast import alignment, attention, norms
from lib.memory.on_cuda import taken_on_cuda
from tests.test_families import NAMES, find
from tests.test_packing import REFUSED, gradients, packed_batch, rows_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
CUDA = torch.device("cuda")
HALF = dict(device="cuda", dtype=torch.bfloat16)


def assert_near(found, wanted, part=2e-2):
    """Tensors differ by no more than rounding to bfloat16 does."""
    assert (found.float() - wanted.float()).norm() <= part * wanted.float().norm()


def on_gpu(value):
    """A batch on the GPU."""
    if isinstance(value, dict):
        return {key: on_gpu(inner) for key, inner in value.items()}
    return value.to(CUDA) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("width", [16, 80, 128])
def test_one_kernel_for_all_lengths_is_attention_of_each(causal, width):
    torch.manual_seed(0)
    lengths = [7, 64, 1, 200]
    query = torch.randn(sum(lengths), 8, width, **HALF, requires_grad=True)
    key, value = (torch.randn(sum(lengths), 2, width, **HALF, requires_grad=True) for _ in range(2))
    ends = torch.tensor([0, *lengths], device="cuda").cumsum(0, dtype=torch.int32)
    found = attention.flash(query, key, value, ends, max(lengths), 0.2, causal)
    apart = [[part.float().transpose(0, 1)[None] for part in parts]
             for parts in zip(*(x.split(lengths) for x in (query, key, value)))]
    wanted = torch.cat([F.scaled_dot_product_attention(*parts, is_causal=causal, scale=0.2, enable_gqa=True)[0]
                        .transpose(0, 1) for parts in apart])
    assert_near(found, wanted)
    slopes = torch.randn_like(wanted)
    for a, b in zip(torch.autograd.grad(found, (query, key, value), slopes.bfloat16()),
                    torch.autograd.grad(wanted, (query, key, value), slopes)):
        assert_near(a, b)


@pytest.mark.parametrize("width", [64, 256])
def test_attention_under_a_mask_keeps_no_scores(width):
    torch.manual_seed(0)
    query = torch.randn(1, 8, 1024, width, **HALF, requires_grad=True)
    key, value = (torch.randn(1, 2, 1024, width, **HALF, requires_grad=True) for _ in range(2))
    mask = torch.rand(1, 1, 1024, 1024, device="cuda") > 0.5
    before = torch.cuda.memory_allocated()
    found = attention.squares(query, key, value, mask, 0.1)
    kept = torch.cuda.memory_allocated() - before
    assert kept < 8 * 1024 * 1024 * 2                                 # the scores in bf16
    whole = (x.float().repeat_interleave(8 // x.shape[1], 1) for x in (query, key, value))
    assert_near(found, F.scaled_dot_product_attention(*whole, attn_mask=mask, scale=0.1))


@pytest.mark.parametrize("mib", [0.3, 1, 7, 10.2, 11, 43, 44.5, 45, 99.7])
def test_the_allocator_hands_out_what_a_forecast_counts(mib):
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    tensor = torch.empty(int(mib * 2**20), dtype=torch.uint8, device="cuda")
    assert torch.cuda.memory_allocated() - before == taken_on_cuda(tensor.nbytes)


@pytest.mark.parametrize("name", NAMES)
def test_every_family_is_as_near_to_float32_as_with_the_libraries_kernels(name, tmp_path_factory, tmp_path):
    subject = find(name, tmp_path_factory)
    net, _ = subject.adapter(tmp_path)
    net = net.eval().to(CUDA)
    rows = rows_of(subject)
    alike = [rows[0], rows[3]] if subject.encoder.batch == "alike" else rows
    batches = [subject.batch(alike)] + ([packed_batch(subject, net, rows)] if name not in REFUSED else [])
    exact = [gradients(net, [on_gpu(batch)]) for batch in batches]
    net = net.to(torch.bfloat16)
    for batch, (loss, wanted) in zip(map(on_gpu, batches), exact):
        with torch.autocast("cuda", torch.bfloat16):
            library, own = gradients(net, [batch])
            with fast.paths(net, subject.roles):
                ours, found = gradients(net, [batch])
        assert found.keys() == own.keys() == wanted.keys()
        assert abs(ours / loss - 1) <= 1.5 * abs(library / loss - 1) + 5e-3
        if off(own, wanted) < 0.5:        # else a router chose other experts, and nothing is near to anything
            assert off(found, wanted) <= 1.5 * off(own, wanted) + 0.02


def off(found, wanted):
    """How far gradients are from the wanted ones, as a part of these."""
    distance = torch.stack([(found[key].float() - wanted[key]).norm() for key in wanted]).norm()
    return float(distance / torch.stack([gradient.norm() for gradient in wanted.values()]).norm())


def test_fused_norms_have_the_gradients_of_the_librarys():
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    for kind in (Gemma3RMSNorm, Qwen2RMSNorm):
        norm = kind(256).to(**HALF).requires_grad_(False)
        torch.nn.init.normal_(norm.weight)
        x = torch.randn(3, 50, 256, **HALF, requires_grad=True)
        found, wanted = norms.forward_of(norm, cuda=True)(x), norm(x)
        assert_near(found, wanted, 1e-2)
        slopes = torch.randn_like(wanted)
        assert_near(*(torch.autograd.grad(out, x, slopes)[0] for out in (found, wanted)), part=1e-2)


def test_an_odd_layer_is_filled_up_where_it_lies():
    layer = torch.nn.Linear(1280, 3420, **HALF).requires_grad_(False)
    x, weight = torch.randn(5, 1280, **HALF), layer.weight.clone()
    wanted = layer(x)
    forward = alignment.forward_of(layer)
    assert torch.equal(layer.weight, weight) and layer.weight.stride() == (1280, 1)
    assert_near(forward(x), wanted, 1e-2)
    assert alignment.forward_of(torch.nn.Linear(1280, 3424, **HALF).requires_grad_(False)) is None


def test_a_base_in_4_bits_has_pefts_losses_and_gradients(tmp_path_factory, tmp_path):
    pytest.importorskip("bitsandbytes")
    from lib.models import adapter, model
    from lib.models.plan import make_plan
    subject = find("qwen2_5_vl", tmp_path_factory)
    knobs = subject.knobs(bf16=True, load_in_4bit=True)
    plan = make_plan(knobs)
    net, _ = adapter.put_on(model.load(plan, CUDA), plan, knobs)
    net = net.to(CUDA).eval()
    assert len(quant.found_linears(net)) == len(plan["quantisation"]["linears"])
    batch = on_gpu(packed_batch(subject, net, rows_of(subject)))
    with torch.autocast("cuda", torch.bfloat16):
        wanted, own = gradients(net, [batch])
        with fast.paths(net, subject.roles):
            assert any(isinstance(module, tuple(fast.kinds_of_lora())) and "forward" in vars(module)
                       for module in net.modules())
            loss, found = gradients(net, [batch])
    assert loss == pytest.approx(wanted, rel=1e-2)
    assert_near(*(torch.cat([part[key].flatten() for key in own]) for part in (found, own)), part=0.1)
