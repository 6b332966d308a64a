"""hollow: tensors with shapes, types and aliases but no memory, and a count of what they stand for.

`Count` adds up the storages that are alive, of real tensors as well. Inside a `Hollow`, which is one, floats
are torch's fake tensors and cost nothing; whole numbers (ids, masks, grids), by whose values models choose
shapes, stay real. So models run as they are. What CUDA would hold of them is lib/on_cuda.py's.
"""
import math
import weakref
from collections import Counter
from collections.abc import Callable

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REAL_ELEMENTS = 2**24                     # a larger result is hollow, too: nothing reads its values
CPU = torch.device("cpu")
aten = torch.ops.aten
BY_MASK = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class Count(TorchDispatchMode):
    """Bytes of the storages that are alive, of the most that ever were, and of the most in each phase.

    aside_bytes: what of them is counted elsewhere; `most_besides_bytes` is the most that was but for it.
    taken: storage bytes -> bytes that an allocator takes for them.
    """

    def __init__(self, taken: Callable[[int], int] = int):
        super().__init__()
        self.taken = taken
        self.phase, self.live_bytes, self.aside_bytes = "", 0, 0
        self._storages: set[int] = set()
        self.start_again()

    @property
    def peak_bytes(self) -> int:
        """The most that was alive at once."""
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
        """What an operation returns."""
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
    """A Count inside of which operations cost no memory, but for those on whole numbers."""

    def __init__(self, taken: Callable[[int], int] = int):
        super().__init__(taken)
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)

    def run(self, op, args, kwargs):
        """What an operation returns: real where all that it reads is, and where it is small."""
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
        """A hollow tensor, and counted, of the shape and type of one on any device."""
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
    """Whether a new tensor is such that a model may choose shapes by its values."""
    return tensor.numel() <= (2**14 if tensor.is_floating_point() else REAL_ELEMENTS)


def places(index) -> tuple:
    """An index as numbers: a mask is one index for each of its axes, and a hollow one hides nothing."""
    if isinstance(index, torch.Tensor) and index.dtype == torch.bool:
        return (torch.ones(index.shape) if is_hollow(index) else index).nonzero(as_tuple=True)
    return (index,)


def at_most(tensors: list[torch.Tensor]) -> int:
    """How many elements an operation on these tensors makes at most, as long as it only broadcasts."""
    try:
        return math.prod(torch.broadcast_shapes(*(tensor.shape for tensor in tensors)))
    except RuntimeError:
        return max(tensor.numel() for tensor in tensors)
