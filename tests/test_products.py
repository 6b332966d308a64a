"""Products in 16 bits that are computed in float32: as exact, taken where they pay, and gone afterwards."""
import pytest
import torch

from lib.fast import products

CPU = torch.device("cpu")
SHAPES = [(600, 64, 96), (96, 64, 5000), (96, 9000, 64), (9000, 64, 96), (2100, 520, 2100), (4, 8, 8)]


def operands(shape, dtype):
    """a [M, K], b [K, N] as a transposed weight, bias [N]; of entries whose products have to be rounded."""
    torch.manual_seed(0)
    rows, inner, columns = shape
    return (torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype).T,
            torch.randn(columns).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_rounded_once(shape, dtype):
    """In whole or in pieces, along rows, columns or the inner dimension: float32's result, cast."""
    a, b, bias = operands(shape, dtype)
    exact = a.double() @ b.double()
    wanted = [exact, exact + bias, exact + exact.to(dtype), 2 * exact + bias]
    with products.paths(dtype, CPU, speed=64) as speed:
        found = [torch.mm(a, b), torch.addmm(bias, a, b), torch.addmm(exact.to(dtype), a, b),
                 torch.addmm(bias, a, b, alpha=2)]
    assert speed == 64
    for ours, right in zip(found, wanted):
        assert ours.dtype == dtype and ours.shape == right.shape
        half_a_digit = torch.finfo(dtype).eps / 2 * right.abs() + 1e-4 * right.abs().max() * (dtype == torch.float16)
        assert ((ours - right).abs() <= half_a_digit + 1e-5 * right.abs().max()).all()


@pytest.mark.parametrize("shape", [(3, 70, 64, 70), (40, 300, 64, 300)], ids=str)
def test_products_of_pairs(shape, monkeypatch):
    """As those of each pair, also where not all pairs are cast at once."""
    monkeypatch.setattr(products, "PIECE", 2**18)
    pairs, rows, inner, columns = shape
    a, b = torch.randn(pairs, rows, inner).bfloat16(), torch.randn(pairs, columns, inner).bfloat16().mT
    with products.paths(torch.bfloat16, CPU, speed=64):
        found = torch.bmm(a, b)
    assert torch.allclose(found.float(), (a.float() @ b.float()), rtol=2**-8, atol=1e-5)


def test_every_product_of_a_step_is_met(monkeypatch):
    """A linear layer's under autocast, forward and backward; none in float32, and none outside."""
    met, wide = [], products.wide
    monkeypatch.setattr(products, "wide", lambda a, *rest: met.append(a.dtype) or wide(a, *rest))
    layer, x = torch.nn.Linear(128, 128), torch.randn(2, 64, 128, requires_grad=True)

    def step():
        met.clear()
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        out.float().square().sum().backward()
        layer(x).sum().backward()                                # in float32: the libraries' own
        return met
    with products.paths(torch.bfloat16, CPU, speed=64):
        assert step() == [torch.bfloat16] * 3
    assert step() == []


@pytest.mark.parametrize("dtype, device, speed", [
    (torch.float32, CPU, 64), (torch.bfloat16, CPU, 1), (torch.bfloat16, torch.device("meta"), 64)], ids=str)
def test_nothing_changes_where_nothing_is_gained(dtype, device, speed, monkeypatch):
    """In float32, on another device, or where the CPU is as fast in 16 bits."""
    monkeypatch.setattr(products, "wide", None)
    with products.paths(dtype, device, speed) as found:
        torch.mm(*operands((600, 64, 96), dtype)[:2])
    assert found == 1


def test_narrow_products_stay():
    """Entries that meet few others aren't cast: what a cast takes is not won back."""
    assert products.pays(48, 600, 512, 1536)
    assert not products.pays(48, 600, 512, 8)      # LoRA's A
    assert not products.pays(48, 1, 512, 1536)     # a single token
    assert not products.pays(48, 0, 512, 1536)     # no rows


@pytest.mark.parametrize("words, bfloat16, float16", [
    ("", 8, 8),                                                    # a laptop's: AVX2
    ("avx512_f", 4, 8),
    ("avx512_f avx512_bf16 avx512_fp16", 2, 1),                    # Sapphire Rapids without its AMX
    ("avx512_f avx512_bf16 avx512_fp16 amx_bf16", 1, 1),
    ("avx_ne_convert", 1, 1)])
def test_instructions_decide(words, bfloat16, float16):
    """On Intel's; AMD's with AVX-512 for bfloat16 are faster so, and of others nothing is known."""
    none = dict.fromkeys(["avx512_f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "avx_ne_convert"], False)
    cpu = none | dict.fromkeys(words.split(), True) | {"architecture": "x86_64", "cpu_name": "Intel Xeon"}
    assert products.speed_of_float32(torch.bfloat16, cpu) == bfloat16
    assert products.speed_of_float32(torch.float16, cpu) == float16
    epyc = cpu | {"cpu_name": "AMD EPYC"}
    assert products.speed_of_float32(torch.bfloat16, epyc) == (1 if epyc["avx512_bf16"] else bfloat16)
    assert products.speed_of_float32(torch.bfloat16, cpu | {"architecture": "arm64"}) == 1


def test_this_cpu_is_known():
    """torch names every instruction that decides."""
    assert products.speed_of_float32(torch.bfloat16) in (1, 2, 4, 8)
    assert {"avx512_bf16", "amx_bf16", "cpu_name"} <= set(torch.cpu.get_capabilities()) or \
        torch.cpu.get_capabilities()["architecture"] != "x86_64"
