"""Weights from file to file: a smaller model is written tensor by tensor, so that memory holds one shard of it at a time.

The numbers are those of the parent's files, whatever precision the parent was loaded in.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from .errors import UserError, one_line
from .files import disk_errors

NAME = "diffusion_pytorch_model"  # what diffusers calls the weight files of its models
Ranges = tuple[tuple[int, int], ...]  # (start, stop), one after the other; (): all
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def variant_of(folder: Path) -> str | None:
    """The variant (fp16, …) of a model's weight files where no plain ones are beside them; None otherwise."""
    found = {
        m[1]
        for p in folder.glob("*.safetensors")
        if (m := re.fullmatch(r"\w+(?:\.(\w+))?(?:-\d+-of-\d+)?\.safetensors", p.name))
    }
    return None if None in found else next(iter(sorted(found)), None)


def files_of(folder: Path) -> list[Path]:
    """The safetensors files that hold a model of diffusers. UserError where the index names one that is missing."""
    variant = variant_of(folder)
    index = folder / f"{NAME}.safetensors.index.{variant + '.' if variant else ''}json"
    single = folder / f"{NAME}.{variant + '.' if variant else ''}safetensors"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{index}: not an index of weight files ({one_line(e)}). Fetch the folder again.") from e
        if missing := next((n for n in names if not (folder / n).is_file()), None):
            raise UserError(
                f"{folder / missing}: missing, although {index.name} names it. The folder is partial: fetch it again."
            )
        return [folder / n for n in names]
    if single.is_file():
        return [single]
    raise UserError(f"{folder}: holds no {NAME}.safetensors. Fetch the folder again.")


class Source(NamedTuple):
    """Where a tensor of a smaller model comes from."""

    key: str | None  # name in the parent's files; None: zeros
    shape: torch.Size  # that it has in the end
    rows: Ranges = ()  # of the first dimension
    columns: Ranges = ()  # of the second one


class Reader:
    """The tensors of a model's files by name, read when asked for. A context manager."""

    def __init__(self, folder: Path) -> None:
        self.files = files_of(folder)
        self._stack = ExitStack()
        self._where: dict[str, Any] = {}

    def __enter__(self) -> Self:
        from safetensors import SafetensorError, safe_open

        for file in self.files:
            try:
                opened = self._stack.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as e:
                self._stack.close()
                raise UserError(f"{file}: broken or half-downloaded ({one_line(e)}). Fetch it again.") from e
            self._where |= dict.fromkeys(opened.keys(), opened)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def get(self, key: str, rows: Ranges = (), columns: Ranges = ()) -> Tensor:
        """A tensor, or ranges of its first and of its second dimension, one after the other.

        Of rows only those are read. Columns lie in pieces all over the file: they are picked from the one tensor in memory.
        """
        whole = self._where[key]
        if rows:
            part = whole.get_slice(key)
            tensor: Tensor = torch.cat([part[start:stop] for start, stop in rows])
        else:
            tensor = whole.get_tensor(key)
        return torch.cat([tensor[:, start:stop] for start, stop in columns], 1) if columns else tensor

    def dtype(self, key: str) -> torch.dtype:
        """Without reading the tensor."""
        return _DTYPES[self._where[key].get_slice(key).get_dtype()]


class Held:
    """What `Reader` gives, of tensors in memory: of a model that has learned what its files do not say."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.files = tensors, [Path("the model in memory")]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def get(self, key: str, rows: Ranges = (), columns: Ranges = ()) -> Tensor:
        """See `Reader.get`."""
        tensor = self.tensors[key].detach().cpu()
        tensor = torch.cat([tensor[start:stop] for start, stop in rows]) if rows else tensor
        return torch.cat([tensor[:, start:stop] for start, stop in columns], 1) if columns else tensor

    def dtype(self, key: str) -> torch.dtype:
        return self.tensors[key].dtype


def type_of(folder: Path) -> str | None:
    """The type (a key of DTYPES) of a model's files; None where they are of several."""
    with Reader(folder) as reader:
        found = {reader.dtype(key) for key in reader if reader.dtype(key).is_floating_point}
    return next((name for name, kind in DTYPES.items() if found == {kind}), None)


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@contextmanager
def rounded(denoiser: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, a denoiser computes with the weights that it has after being saved in this type, in its own type again.

    The weights are rounded while the module that holds them runs, or that reads those of its parts: there is no second copy of
    the model.
    """
    held: list[list[tuple[dict[str, Any], dict[str, Any]]]] = []

    def swap(module: Any, *_: Any) -> None:
        parts: list[Any] = [*module.modules()] if getattr(module, "reads_parts", False) else [module]
        places: list[tuple[dict[str, Any], set[str]]] = []
        for part in parts:
            places += [(part._parameters, set()), (part._buffers, part._non_persistent_buffers_set)]
        held.append([(place, dict(place)) for place, _ in places])
        for place, not_saved in places:
            for name, value in place.items():
                if value is not None and value.is_floating_point() and not value.is_meta and name not in not_saved:
                    place[name] = value.detach().to(dtype).to(value.dtype)

    def back(*_: Any) -> None:
        for place, before in held.pop():
            place.update(before)

    hooks = []
    for module in denoiser.modules():
        hooks += [module.register_forward_pre_hook(swap), module.register_forward_hook(back, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def write(
    sources: Mapping[str, Source],
    reader: Reader | Held,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    shard: int | str = "5GB",
) -> int:
    """Write a model's weight files as diffusers does; returns their bytes.

    sources: name -> what is read for it. dtype: None keeps each tensor's own. shard: bytes (or "5GB") of a file at most; beyond
    that there are several and an index. variant: put into the names.
    """
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    middle = f".{variant}" if variant else ""
    if absent := next((s.key for s in sources.values() if s.key is not None and s.key not in reader), None):
        raise UserError(f"{reader.files[0]}: holds no {absent}, which the model has. Save it anew with `save_pretrained`.")

    def kind(key: str) -> torch.dtype:
        source = sources[key].key
        own = reader.dtype(source) if source is not None else reader.dtype(next(s.key for s in sources.values() if s.key))
        return dtype if dtype is not None and own.is_floating_point else own

    plan = split_state_dict_into_shards_factory(
        {k: (k, source.shape) for k, source in sources.items()},  # any object stands for a tensor, a string is passed over
        get_storage_size=lambda entry: entry[1].numel() * kind(entry[0]).itemsize,
        filename_pattern=f"{NAME}{middle}{{suffix}}.safetensors",
        max_shard_size=shard,
    )
    total = 0
    for name, keys in plan.filename_to_tensors.items():
        held = {}
        for key in keys:
            key_there, shape, rows, columns = sources[key]
            tensor = torch.zeros(shape) if key_there is None else reader.get(key_there, rows, columns)
            held[key] = tensor.to(kind(key)).contiguous()
        with disk_errors(folder / name):
            try:
                save_file(held, folder / name, metadata={"format": "pt"})
            except SafetensorError as e:  # holds what the operating system says as text
                if code := re.search(r"\(os error (\d+)\)", str(e)):
                    raise OSError(int(code[1]), os.strerror(int(code[1]))) from e
                raise
        total += (folder / name).stat().st_size
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        path = folder / f"{NAME}.safetensors.index{middle}.json"
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return total
