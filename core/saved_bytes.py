"""Bytes that a graph costs, counted rather than read off an allocator: the same on any hardware, and exact.

`saved` counts what autograd keeps for the backward pass. `Live` counts every tensor that is alive, so that it also sees what a
backward pass makes: gradients, and what checkpoints compute again. Neither counts what lived before.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass
class Saved:
    """What is kept now, by graphs that were built inside `saved`; it goes down as they are used up or dropped."""

    held: int = 0  # bytes, each storage once
    peak: int = 0
    _holders: Counter[int] = field(default_factory=Counter)  # address of a storage -> saved tensors in it


class _Kept:
    """A saved tensor, for as long as autograd keeps it."""

    def __init__(self, tensor: Tensor, count: Saved) -> None:
        storage = tensor.untyped_storage()
        self.tensor, self.count, self.address, self.bytes = tensor, count, storage.data_ptr(), storage.nbytes()
        count._holders[self.address] += 1
        if count._holders[self.address] == 1:
            count.held += self.bytes
            count.peak = max(count.peak, count.held)

    def __del__(self) -> None:
        self.count._holders[self.address] -= 1
        if not self.count._holders[self.address]:
            del self.count._holders[self.address]
            self.count.held -= self.bytes


@contextmanager
def saved(alive: Iterable[Tensor] = ()) -> Iterator[Saved]:
    """Counts what is saved for the backward pass of what is computed inside. alive: weights and inputs, kept by others anyway."""
    count, free = Saved(), {tensor.untyped_storage().data_ptr() for tensor in alive}

    def pack(tensor: Tensor) -> Tensor | _Kept:
        return tensor if tensor.untyped_storage().data_ptr() in free else _Kept(tensor, count)

    def unpack(packed: Tensor | _Kept) -> Tensor:
        return packed.tensor if isinstance(packed, _Kept) else packed

    with saved_tensors_hooks(pack, unpack):
        yield count


class Live(TorchDispatchMode):
    """Inside, counts the bytes of all tensors that operators make, until they are gone.

        with Live() as live:
            loss(model(x)).backward()
        live.peak

    What an operator needs while it works (a convolution's scratch memory) is no tensor and not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: dict[int, Any] = {}  # address of a storage object -> weak reference to it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for storage in _storages((args, kwargs)):
            self._note(storage, 0)  # never seen as an output: it lived before
        out = func(*args, **kwargs)
        for storage in _storages(out):
            self._note(storage, storage.nbytes())
        return out

    def _note(self, storage: torch.UntypedStorage, size: int) -> None:
        address = storage._cdata
        if address in self._known:
            return

        def gone(_: Any) -> None:
            self._known.pop(address, None)
            self.held -= size

        self._known[address] = weakref.ref(storage, gone)
        self.held += size
        self.peak = max(self.peak, self.held)


def _storages(value: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
