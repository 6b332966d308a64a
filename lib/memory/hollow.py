"""hollow: tensors with shapes, dtypes and aliases but no memory, and a count of the bytes they stand for.

`Count` adds up the storages that are alive, those of real tensors, too. `Hollow` is a Count inside of which
floating-point tensors are torch's fake tensors and take no memory; integers (ids, masks, grids), by whose
values models choose shapes, stay real. So models run unchanged. on_cuda.py says what CUDA would take.
"""
import math
import weakref
from collections import Counter
from collections.abc import Callable

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REAL_ELEMENTS = 2**24                     # a larger result is hollow in any case: no model reads its values
CPU = torch.device("cpu")
aten = torch.ops.aten
BY_MASK = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class Count(TorchDispatchMode):
    """Counts the bytes of storages: those alive now, the most at any time, and the most in each phase.

    aside_bytes: the part of the living ones that is counted elsewhere; most_besides_bytes: the most at any
    time without that part. taken: a function from a storage's bytes to those that the allocator takes.
    """

    def __init__(self, taken: Callable[[int], int] = int):
        super().__init__()
        self.taken = taken
        self.phase, self.live_bytes, self.aside_bytes = "", 0, 0
        self._storages: set[int] = set()
        self.start_again()

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were alive at once."""
        return max(self.phases_bytes.values())

    def start_again(self) -> None:
        """Forget the peaks so far."""
        self.most_besides_bytes, self.phases_bytes = 0, Counter()
        self.look()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        made = self.run(op, args, kwargs or {})
        self.add(made)
        return made

    def run(self, op, args: tuple, kwargs: dict):
        """The result of an operation; subclasses may compute it in another way."""
        return op(*args, **kwargs)

    def add(self, tensors) -> None:
        """Count the storages of these tensors, each once, until they are freed."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, self.taken(storage.nbytes())
                if key not in self._storages:
                    self._storages.add(key)
                    self.live_bytes += size
                    weakref.finalize(storage, self._freed, key, size)
        self.look()

    def look(self) -> None:
        """Note what is alive now, where it is the most so far."""
        self.phases_bytes[self.phase] = max(self.phases_bytes[self.phase], self.live_bytes)
        self.most_besides_bytes = max(self.most_besides_bytes, self.live_bytes - self.aside_bytes)

    def enter(self, phase: str) -> None:
        """Begin another phase."""
        self.phase = phase
        self.look()

    def watch(self, module: torch.nn.Module, phase: str) -> None:
        """Make the module's forward a phase of its own."""
        before: list[str] = []

        def begin(*_):
            before.append(self.phase)
            self.enter(phase)
        module.register_forward_pre_hook(begin)
        module.register_forward_hook(lambda *_: self.enter(before.pop()))

    def _freed(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.live_bytes -= size


class Hollow(Count):
    """A Count inside of which operations take no memory, except those on small integer tensors."""

    def __init__(self, taken: Callable[[int], int] = int):
        super().__init__(taken)
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)

    def run(self, op, args, kwargs):
        """The result of an operation: real if all its inputs are and it is small, else hollow."""
        if op is torch.ops.prim.device.default:                      # two calls of three; all is "on" the CPU
            return CPU
        if op is aten.nonzero.default and is_hollow(args[0]):
            return torch.ones(args[0].shape).nonzero()                           # at most all of them
        if op is aten._local_scalar_dense.default and is_hollow(args[0]) and args[0].dtype == torch.bool:
            return True
        if op is aten._grouped_mm.default and args[0].dtype == torch.float32:    # no fake one is known
            return self.run(op, [x.bfloat16() for x in args[:2]] + [*args[2:]], kwargs).float()
        if op in BY_MASK:
            args = (args[0], [part for index in args[1] for part in places(index)], *args[2:])
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if given and not any(map(is_hollow, given)) and at_most(given) <= REAL_ELEMENTS:
            return op(*args, **kwargs)
        made = self.fakes.dispatch(op, (), args, kwargs)
        if not given and all(map(is_readable, tree_leaves(made))):
            return op(*args, **kwargs)
        if op is aten.ne.Scalar and is_readable(made):           # what may differ does: no picture is empty
            return torch.ones(made.shape, dtype=torch.bool)
        return made

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """A hollow tensor with the shape and dtype of the given one; it is counted."""
        made = FakeTensor(self.fakes, tensor.detach().to("meta"), CPU)
        self.add(made)
        return made

    def fill(self, model: torch.nn.Module) -> None:
        """Replace the model's parameters and buffers by hollow ones; tied ones stay tied."""
        made: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
        for module in model.modules():
            for name, old in module._parameters.items():
                if old is not None and old not in made:
                    made[old] = torch.nn.Parameter(self.tensor(old), old.requires_grad)
                module._parameters[name] = None if old is None else made[old]
            for name, old in module._buffers.items():
                module._buffers[name] = None if old is None else self.tensor(old)


def is_hollow(tensor: torch.Tensor) -> bool:
    """Whether a tensor has no values."""
    return isinstance(tensor, FakeTensor) or tensor.is_meta


def is_readable(tensor) -> bool:
    """Whether a model may choose shapes by a new tensor's values, as far as its dtype and size tell."""
    return tensor.numel() <= (2**14 if tensor.is_floating_point() else REAL_ELEMENTS)


def places(index) -> tuple:
    """An index as integers: a mask becomes one index for each of its axes; a hollow mask selects all."""
    if isinstance(index, torch.Tensor) and index.dtype == torch.bool:
        return (torch.ones(index.shape) if is_hollow(index) else index).nonzero(as_tuple=True)
    return (index,)


def at_most(tensors: list[torch.Tensor]) -> int:
    """How many elements an operation on these tensors makes at most, as long as it only broadcasts."""
    try:
        return math.prod(torch.broadcast_shapes(*(tensor.shape for tensor in tensors)))
    except RuntimeError:
        return max(tensor.numel() for tensor in tensors)
