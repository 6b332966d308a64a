"""Products in 16 bits that are computed in float32: as exact, taken where they pay, and gone afterwards."""
import os
import subprocess
import sys

import pytest
import torch

from lib.fast import products
from lib.run.stage import ROOT

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


def test_a_cpu_without_bfloat16_is_found():
    """The kernels of a CPU with AVX2 alone multiply float32 matrices several times as fast."""
    code = "import torch; from lib.fast import products; print(products.measured(torch.bfloat16))"
    old = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | old, capture_output=True,
                          text=True, check=True)
    assert int(done.stdout) >= 4
