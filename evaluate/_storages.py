"""How many bytes of tensors are alive, seen from the operators that make them."""

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Storages(TorchDispatchMode):
    """While it is active, every storage that an operator returns is counted until it is freed. Views share a storage."""

    def __init__(self, there: Iterable[Tensor]) -> None:
        """there: tensors that are alive anyway, and counted from the beginning."""
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.now = self.peak = 0  # bytes
        self._there = [part.untyped_storage() for tensor in there for part in _plain(tensor)]
        for storage in self._there:
            self._note(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in tree_iter(made):
            for part in _plain(value) if isinstance(value, Tensor) else ():
                storage = part.untyped_storage()
                if self._note(storage):
                    weakref.finalize(storage, self._forget, storage._cdata)
        return made

    def _note(self, storage: Any) -> bool:
        """Whether it is a new one; an old one may have grown."""
        before = self._sizes.get(storage._cdata)
        self._sizes[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes() - (before or 0)
        self.peak = max(self.peak, self.now)
        return before is None

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold the numbers: itself, or those inside a wrapper (quantised weights). Of meta there are none."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, name))
    elif tensor.layout is torch.strided and tensor.device.type != "meta":
        yield tensor
