"""hollow: a training step on tensors that have shapes, types and aliases but no memory, and what it holds.

`Count` adds up the storages that are alive, of real tensors as well. `Hollow` makes new floats as torch's fake
tensors; whole numbers (ids, masks, grids), by whose values models choose shapes, stay real.
`CudaKernels` has attention and norms take the memory that they take on CUDA, on any machine.

Fork me to: count another device's kernels (`CudaKernels`).
"""
import math
import weakref

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REAL_ELEMENTS = 2**24                     # larger results have no values, and nothing reads such ones
aten = torch.ops.aten
BY_MASK = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class Count(TorchDispatchMode):
    """Bytes of the storages that are alive now, and at most, of what was made or named inside."""

    def __init__(self):
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        made = self.run(op, args, kwargs or {})
        self.add(made)
        return made

    def run(self, op, args, kwargs):
        """What an operation returns."""
        return op(*args, **kwargs)

    def add(self, tensors) -> None:
        """Nothing; counts the storages of these tensors, each once, until they are freed."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._storages:
                    self._storages.add(key)
                    self.live_bytes += storage.nbytes()
                    self.peak_bytes = max(self.peak_bytes, self.live_bytes)
                    weakref.finalize(storage, self._freed, key, storage.nbytes())

    def _freed(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.live_bytes -= size


class Hollow(Count):
    """A Count inside of which operations cost no memory, but for those on whole numbers."""

    def __init__(self):
        super().__init__()
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)

    def run(self, op, args, kwargs):
        """What an operation returns: real where all it reads is real and small, else hollow."""
        if op in BY_MASK:
            args = (args[0], [part for index in args[1] for part in places(index)], *args[2:])
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if not any(isinstance(tensor, FakeTensor) or tensor.is_meta for tensor in given):
            if given and elements(given) <= REAL_ELEMENTS:
                return op(*args, **kwargs)
            if not given:
                with self.fakes:
                    made = op(*args, **kwargs)
                if all(leaf.numel() <= REAL_ELEMENTS and not leaf.is_floating_point()
                       or leaf.numel() <= 2**14 for leaf in tree_leaves(made)):
                    return op(*args, **kwargs)
                return made
        with self.fakes:
            return op(*args, **kwargs)

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """A hollow tensor on the CPU like this one on meta, and counted."""
        made = FakeTensor(self.fakes, tensor.detach(), torch.device("cpu"))
        self.add(made)
        return made


def places(index) -> tuple:
    """An index as numbers: a real mask is one index for each of its axes."""
    masked = isinstance(index, torch.Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor)
    return index.nonzero(as_tuple=True) if masked else (index,)


def elements(tensors: list[torch.Tensor]) -> int:
    """An upper bound of what an operation on these tensors makes, as most operations broadcast."""
    try:
        return math.prod(torch.broadcast_shapes(*(tensor.shape for tensor in tensors)))
    except RuntimeError:
        return max(tensor.numel() for tensor in tensors)


class CudaKernels(TorchFunctionMode):
    """Inside, attention holds what CUDA's memory-efficient kernel holds, and autocast's norms are float32."""

    IN_FLOAT32 = {F.layer_norm, F.group_norm, F.softmax, torch.softmax, torch.Tensor.softmax}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return attention(*args, **kwargs)
        if function in self.IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args = tuple(a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)
        return function(*args, **kwargs)


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
              enable_gqa=False) -> torch.Tensor:
    """Attention's output [B, H, T, D]; no scores are kept, only their log-sum for each row."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]
