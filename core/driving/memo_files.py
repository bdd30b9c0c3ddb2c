"""Results of denoiser calls in files, so that workers share prefixes: a second level behind the memo in memory.

A file is named by all that its content depends on: the context (weights, seeds, conditions), the plan up to the call, every
input bit for bit, the libraries and the kind of processor. Equal names are equal bits, whoever wrote the file. What a denoiser
was changed by that none of these shows (FreeU, a hook of one's own) is not seen: such models need another folder.

Nothing is pickled. Files are written beside and renamed; one that cannot be read, is torn, or fails its checksum counts as
missing and is removed. A folder that cannot be written to costs time and nothing else.
"""

import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import math
import os
import platform
import re
import secrets
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import BaseOutput
from safetensors import SafetensorError
from torch import Tensor
from torch.utils import _pytree as pytree

from ..candidate import canonical

LIMIT = 16 * 2**30  # bytes of a folder
FORMAT = 1  # raised when files of older versions must not be read
LEAVE = 7 / 8  # of the limit, after old files were removed
LOOK = 1 / 64  # of the limit: so much is written by one process before it looks again how large the folder is
ABANDONED = 3600.0  # seconds after which what a killed process was writing is removed

NAMED = re.compile(r"[0-9a-f]{64}\.safetensors")  # nothing else is ever read or removed: the folder may hold other things

WRITTEN = re.compile(r"\.[0-9a-f]{16}\.lissom")  # a result on its way

# What the content of a damaged file provokes in its readers.
DAMAGED = (SafetensorError, struct.error, ValueError, LookupError, TypeError, AttributeError, ImportError, RuntimeError)


class Unstorable(Exception):
    """A value that has no plain form."""


class Files:
    """A folder of results, used by any number of processes at once, on one machine or over a network file system.

    About `limit` bytes are kept: what was used longest ago goes first. Each process may pass the limit by a sixty-fourth.
    """

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        """folder: made when something is written."""
        self.folder, self.limit = folder, limit
        self._room = 0.0  # bytes that may be written before the next look

    def name(self, parts: Any, inputs: Any, module: torch.nn.Module) -> str | None:
        """The name of a call's result, or None where an input has no plain form.

        parts: JSON of what the result depends on and inputs (args, kwargs) do not show. module: the denoiser.
        """
        leaves, structure = pytree.tree_flatten(inputs)
        digest = hashlib.sha256(canonical([FORMAT, parts, repr(structure), _machine(), _how(module)]).encode())
        try:
            for leaf in leaves:
                digest.update(_digest(leaf))
        except Unstorable:
            return None
        return digest.hexdigest()

    def get(self, name: str, device: torch.device) -> Any:
        """The stored output, or None. device: where it is computed; what was stored from the processor's memory stays there."""
        path = self._path(name)
        try:
            content = path.read_bytes()  # whole: a mapped file may vanish below
        except OSError:
            return None
        try:
            structure, tensors, kinds = _decoded(content, name)
            output = _restored(structure, tensors)
        except DAMAGED:
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        if all(kind == "cpu" for kind in kinds):
            return output
        moved = [t if kind == "cpu" else t.to(device) for t, kind in zip(tensors, kinds, strict=True)]
        return _restored(structure, moved)

    def put(self, name: str, output: Any) -> None:
        """Store an output, unless it has no plain form, is there already or cannot be written."""
        path = self._path(name)
        try:
            if path.exists():
                return
            content = _encoded(output, name)
            if len(content) > self.limit * (1 - LEAVE):
                return  # a few such would push out everything else
            self._make_room(len(content))
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_name(f".{secrets.token_hex(8)}.lissom")  # process ids repeat from machine to machine
            try:
                beside.write_bytes(content)
                os.replace(beside, path)
            finally:
                beside.unlink(missing_ok=True)
        except (Unstorable, OSError):
            return

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.safetensors"

    def _make_room(self, size: int) -> None:
        self._room -= size
        if self._room >= 0:
            return
        found = sorted(self._files())
        total = size + sum(bytes_ for _, bytes_, _ in found)
        if total > self.limit:
            for _, bytes_, path in found:
                with contextlib.suppress(OSError):  # another process may have removed it
                    os.unlink(path)
                total -= bytes_
                if total <= LEAVE * self.limit:
                    break
        self._room = min(LOOK * self.limit, self.limit - total)

    def _files(self) -> Iterator[tuple[float, int, str]]:
        """(last used, bytes, path) of every result; removes what killed processes left."""
        now = time.time()
        for folder in list(os.scandir(self.folder)) if self.folder.is_dir() else []:
            with contextlib.suppress(OSError):
                for entry in os.scandir(folder.path):
                    with contextlib.suppress(OSError):
                        seen = entry.stat()
                        if NAMED.fullmatch(entry.name) and entry.name.startswith(folder.name):
                            yield seen.st_mtime, seen.st_size, entry.path
                        elif WRITTEN.fullmatch(entry.name) and now - seen.st_mtime > ABANDONED:
                            os.unlink(entry.path)


def _machine() -> list[Any]:
    """What moves the last bits of a result."""
    versions = [importlib.metadata.version(name) for name in ("torch", "diffusers")]
    processor = [platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
    if not torch.cuda.is_available():
        return [*versions, *processor]
    exact = [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()]
    return [*versions, *processor, torch.cuda.get_device_name(), torch.version.cuda, *exact]


def _how(module: torch.nn.Module) -> list[Any]:
    """How a denoiser is run: compiled or not, and by which attention, as far as its modules tell."""
    processors = sorted({type(m.processor).__name__ for m in module.modules() if hasattr(m, "processor")})
    compiled = getattr(module, "_compiled_call_impl", None) is not None
    return [type(module).__name__, compiled, *processors]


def _digest(leaf: Any) -> bytes:
    if isinstance(leaf, Tensor):
        if leaf.layout != torch.strided:
            raise Unstorable("a tensor that is not dense")
        record = repr((str(leaf.dtype), tuple(leaf.shape), leaf.stride(), leaf.device.type)).encode()
        return hashlib.sha256(record + _bytes(leaf)).digest()
    if leaf is None or isinstance(leaf, bool | int | float | str | torch.dtype | torch.device):
        return hashlib.sha256(f"{type(leaf).__name__} {leaf!r}".encode()).digest()
    raise Unstorable(type(leaf).__name__)


def _bytes(tensor: Tensor) -> bytes:
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def _encoded(output: Any, name: str) -> bytes:
    """A safetensors file: the tensors, and in its metadata how they stand together and a checksum."""
    from safetensors.torch import save

    tensors: list[Tensor] = []
    structure = _described(output, tensors)
    layout = [[list(t.stride()), t.device.type] for t in tensors]
    flat = {str(i): t.detach().cpu().contiguous().clone() for i, t in enumerate(tensors)}
    record = {"structure": canonical(structure), "layout": canonical(layout), "name": name, "sum": _sum(flat)}
    return save(flat, record)


def _decoded(content: bytes, name: str) -> tuple[Any, list[Tensor], list[str]]:
    """Structure, tensors, and the kind of device each was on. Raises one of DAMAGED for content that `_encoded` did not give."""
    from safetensors.torch import load

    (size,) = struct.unpack("<Q", content[:8])
    record = json.loads(content[8 : 8 + size])["__metadata__"]
    flat = load(content)
    if record["name"] != name or record["sum"] != _sum(flat):
        raise ValueError(f"{name}: not as it was written")
    tensors, layout = [], json.loads(record["layout"])
    for i, (stride, _) in enumerate(layout):
        tensor = flat[str(i)]  # kernels may take other ways for another layout, with other last bits
        tensors.append(torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor))
    return json.loads(record["structure"]), tensors, [kind for _, kind in layout]


def _sum(flat: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(flat):
        digest.update(_bytes(flat[key]))
    return digest.hexdigest()


def _described(value: Any, tensors: list[Tensor]) -> Any:
    """JSON of a structure; its tensors are appended. Raises Unstorable for what is neither plain nor one of diffusers' outputs."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_quantized or value.is_conj() or value.is_neg() or 0 in value.stride():
            raise Unstorable("a tensor that is not dense")
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if type(value) in (bool, int, str, type(None)) or (type(value) is float and math.isfinite(value)):
        return {"plain": value}
    if type(value) in (tuple, list):
        return {type(value).__name__: [_described(each, tensors) for each in value]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": [[key, _described(each, tensors)] for key, each in value.items()]}
    if isinstance(value, BaseOutput) and type(value).__module__.startswith("diffusers."):
        kind = f"{type(value).__module__}:{type(value).__qualname__}"
        return {"output": kind, "fields": [[key, _described(each, tensors)] for key, each in value.items()]}
    raise Unstorable(type(value).__name__)


def _restored(record: Any, tensors: list[Tensor]) -> Any:
    if "tensor" in record:
        return tensors[record["tensor"]]
    if "plain" in record:
        return record["plain"]
    if "output" in record:
        module, _, name = record["output"].partition(":")
        if not module.startswith("diffusers."):
            raise ValueError(f"{module} is not read")  # importing runs code
        kind = getattr(importlib.import_module(module), name)
        if not issubclass(kind, BaseOutput):
            raise ValueError(f"{name} is no output")
        return kind(**{key: _restored(each, tensors) for key, each in record["fields"]})
    if "dict" in record:
        return {key: _restored(each, tensors) for key, each in record["dict"]}
    many = [_restored(each, tensors) for each in record["tuple" if "tuple" in record else "list"]]
    return tuple(many) if "tuple" in record else many
