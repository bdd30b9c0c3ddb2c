"""How many bytes of tensors are alive, seen from the operators that make them."""

import weakref
from collections.abc import Iterable
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
        self._there = [tensor.untyped_storage() for tensor in there]
        for storage in self._there:
            self._note(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in tree_iter(made):
            if isinstance(value, Tensor) and value.layout is torch.strided:
                storage = value.untyped_storage()
                if self._note(storage):
                    weakref.finalize(storage, self._forget, storage._cdata)
        return made

    def _note(self, storage: Any) -> bool:
        """Whether it is a new one."""
        if storage._cdata in self._sizes:
            return False
        self._sizes[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        return True

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)
