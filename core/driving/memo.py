"""Results of denoiser calls, shared between plans that begin with the same steps.

In a search most candidates are children of others: they differ in the last steps, and all that comes before is the same
computation. A result is looked up by everything it should depend on, and used only if the inputs are equal bit for bit.
`scheduler.step` always runs, so that solver history and random generators advance as in a run without the memo.
"""

import weakref
from collections import Counter, OrderedDict
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .memo_files import Files
from .steering import Call, Next

GIB = 2**30

# Solvers whose state before step i does not depend on how many steps follow. Others look ahead: DPM-Solver++, UniPC and DEIS
# lower their order near the end of the list.
BLIND_TO_LENGTH = {
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
}

# What ControlNets add to a denoiser's arguments: they act in windows that are fractions of the number of steps.
CONTROLS = ("mid_block_additional_residual", "controlnet_block_samples", "block_controlnet_hidden_states")

Value = tuple[list[Any], Any]  # flat leaves (tensors cloned), and the structure they came from


class Memo:
    """Keeps the most recently used results within `limit` bytes, on the device where they were made.

    Two denoiser objects never share results. What changes inside one (new weights, cuts, an adapter's scale) is not seen:
    it belongs in the context. Tensors that several results share (the text embeddings of every step) are kept and counted once.
    """

    def __init__(self, limit: int = 2 * GIB, files: Files | None = None) -> None:
        """files: where results are looked up and left that other processes may share. The context must then name the weights."""
        self.limit, self.files = limit, files
        self.bytes = 0
        self._entries: OrderedDict[Any, tuple[Value, Value]] = OrderedDict()
        self._owners: Counter[int] = Counter()  # id of a kept tensor -> entries that hold it
        self._recent: weakref.WeakValueDictionary[Any, Tensor] = weakref.WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forget everything, for instance when memory ran out."""
        self._entries.clear()
        self._owners.clear()
        self.bytes = 0

    def get(self, key: Any, inputs: Any) -> Any:
        """A copy of the stored output, or None if there is none for exactly these inputs."""
        entry = self._entries.get(key)
        if entry is None or not _equal(entry[0], inputs):
            return None
        self._entries.move_to_end(key)
        leaves, structure = entry[1]
        return pytree.tree_unflatten([_copy(leaf) for leaf in leaves], structure)  # pipelines may write into what they get

    def put(self, key: Any, inputs: Any, output: Any) -> None:
        self._drop(key)
        entry = (self._kept(inputs), self._kept(output))
        self._entries[key] = entry
        for tensor in _tensors(entry):
            self._owners[id(tensor)] += 1
            if self._owners[id(tensor)] == 1:
                self.bytes += tensor.nbytes
        while self.bytes > self.limit:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: Any) -> None:
        for tensor in _tensors(self._entries.pop(key, ())):
            self._owners[id(tensor)] -= 1
            if not self._owners[id(tensor)]:
                del self._owners[id(tensor)]
                self.bytes -= tensor.nbytes

    def _kept(self, value: Any) -> Value:
        leaves, structure = pytree.tree_flatten(value)
        return [self._clone(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure

    def _clone(self, tensor: Tensor) -> Tensor:
        like = (tensor.shape, tensor.dtype, tensor.device)
        known = self._recent.get(like)
        if known is not None and torch.equal(known, tensor):
            return known
        clone = tensor.detach().clone()
        self._recent[like] = clone
        return clone


class Remember:
    """The interceptor that asks a memo first. Outermost: a remembered call touches nothing else."""

    def __init__(self, memo: Memo, context: str) -> None:
        self.memo, self.context = memo, context

    def __call__(self, call: Call, following: Next) -> Any:
        # Gradients need the graph of the call itself; a model's own cache makes a call depend on calls that nobody sees.
        if torch.is_grad_enabled() or getattr(call.module, "is_cache_enabled", False):
            return following(call)
        key, inputs = self._key(call), (call.args, call.kwargs)
        memory_key, memo = (weakref.ref(call.module), *key), self.memo
        # A later step reuses layers of this call: they have to be executed. What they give is as good an answer for others.
        needed = bool(call.run.kept)
        output = None if needed else memo.get(memory_key, inputs)
        if output is not None:
            call.run.served += 1
            return output
        name = memo.files.name(key, inputs, call.module) if memo.files else None
        output = memo.files.get(name, _device(inputs)) if memo.files and name and not needed else None
        if output is not None:
            call.run.served += 1
            memo.put(memory_key, inputs, output)
            return output
        output = following(call)
        memo.put(memory_key, inputs, output)
        if memo.files and name:
            memo.files.put(name, output)
        return output

    def _key(self, call: Call) -> tuple[Any, ...]:
        """All that a result depends on beside its inputs and the module, as plain data."""
        run = call.run
        assert run.plan is not None
        scheduler = run.plan.scheduler
        controlled = any(call.kwargs.get(name) is not None for name in CONTROLS)
        length = len(run.plan.steps) if controlled or scheduler.name not in BLIND_TO_LENGTH else None
        at = run.evals, run.times[run.evals]  # the timestep may be that of the next step, which the prefix leaves open
        return self.context, scheduler.canonical(), run.prefix(), at, call.name, run.ordinal, length


def _equal(kept: Value, value: Any) -> bool:
    leaves, structure = pytree.tree_flatten(value)
    return structure == kept[1] and all(_same(a, b) for a, b in zip(kept[0], leaves, strict=True))


def _same(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return a is b or (type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b))
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _device(inputs: Any) -> torch.device:
    """Where a call is computed: where its first tensor is, the noisy sample."""
    return next((leaf.device for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)), torch.device("cpu"))


def _copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _tensors(entry: Any) -> list[Tensor]:
    return [leaf for leaves, _ in entry for leaf in leaves if isinstance(leaf, Tensor)]
