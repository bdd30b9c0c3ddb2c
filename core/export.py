"""Saving a cut model: a diffusers folder that opens without lissom, verified in a fresh process before it takes its place.

The weights go from the parent's files to the new ones, never through a second model in memory. Untouched components are
carried over byte for byte, their weights hard-linked where the disk allows. Nothing is left behind when anything fails.
"""

import hashlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Container, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import experts, narrowing, opening, reload_check, slicing, standins, stock, surgery, weights
from .anatomy import uncompiled
from .artifact import MANIFEST, PLAN, renamed
from .candidate import Cut
from .errors import UserError, one_line
from .files import disk_errors, write_text
from .models import PICKLES, Model
from .stock import Part, Stock

# Differences of outputs, relative to their largest, that are none of the weights. They tell apart rounding and a wrong weight
# only as far as they are tight. Where the fresh process holds the same numbers on the same device, by the type computed in:
SAME = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 2e-2}  # on a graphics card too: neither process uses TF32
ROUNDED = 5e-2  # float16 by way of bfloat16 or the reverse: its numbers were rounded in another order. On any device
ELSEWHERE = 2e-2  # at least this where the card had no room for a second model, and the CPU computed the other output. Any type
KILLED = (-9, 128 + 9)  # exit statuses of a process that the system ended, mostly for its memory
OWN = ("model_index.json", "README.md", MANIFEST, PLAN)  # files of the top folder that are written anew


@dataclass(frozen=True)
class Structure:
    """What a cut denoiser will look like in its folder."""

    opens: str  # "stock" or "remote_code"
    reason: str  # why it is not stock
    cls: str  # class name in config.json
    config: dict[str, Any]  # all of config.json but private keys
    code: str | None  # text of the module that it brings along
    sources: dict[str, weights.Source]  # for weights.write
    names: dict[str, str | None]  # module in the parent -> here; None: cut. Modules that kept their name are not in it
    params: int


@dataclass(frozen=True)
class Saved:
    """A model folder that was written and verified."""

    structure: Structure
    folder: Path
    bytes: int  # of the denoiser's weight files
    difference: float  # of outputs, relative to their largest, between memory and a fresh process
    variant: str | None  # that `DiffusionPipeline.from_pretrained` needs to find the weights; None: none


def structure(denoiser: nn.Module, cuts: Sequence[Cut], *, plain_only: bool = False) -> Structure:
    """How a denoiser with these cuts would be saved. plain_only: UserError unless a stock config can express it."""
    target = uncompiled(denoiser)
    base = stock.base_class(target)
    owner = {id(t): key for key, t in target.state_dict(keep_vars=True).items()}
    before = {id(m): a for a, m in target.named_modules() if not isinstance(m, nn.ModuleList)}
    plain = surgery.spelled(target, cuts)
    with surgery.applied(target, cuts):
        found: Stock | str = stock.express(target)
        if isinstance(found, str) and plain_only:
            raise UserError(
                f"these cuts cannot be saved as a model that plain diffusers opens: {found}. "
                "Leave require_plain_load out, or cut other layers."
            )
        state = target.state_dict(keep_vars=True)
        if isinstance(found, Stock):
            parts, moved, opens, reason, code = found.parts, found.modules, "stock", "", None
            built, cls, config = found.model, found.cls.__name__, found.config
        else:
            parts, moved, opens, reason = {k: Part(k) for k in state}, {}, "remote_code", found
            built = target
            earlier = [list(map(dict, group)) for group in target.config.get("cuts", ())]  # type: ignore[union-attr, operator]
            cls, code = f"Pruned{base.__name__}", module_text(base.__name__)
            config = {**stock.base_config(target), "cuts": [*earlier, *([plain] if cuts else [])]}
        shapes = {k: v.shape for k, v in built.state_dict().items()}
        narrow, cut_up = _narrow(target, before)
        sources = {}
        for key, part in parts.items():
            source = owner.get(id(state[part.key])) if part.key is not None else None  # zeros of an emptied layer have no owner
            sources[key] = narrow.get(key, weights.Source(source, shapes[key], part.rows))
        other = {key.rpartition(".")[0] for key, s in sources.items() if s.key is None or s.rows}
        there = {a for a, _ in built.named_modules()} - other - cut_up
        now = {old: to for old, a in _whereabouts(target, before, cuts).items() if (to := renamed(a, moved)) in there}
        params = surgery.parameters(built)
    return Structure(opens, reason, cls, config, code, sources, _names(list(before.values()), now), params)


def module_text(base: str) -> str:
    """The self-contained module of an artifact that needs one: torch and diffusers only.

    It is the text of four files, one after the other; none would hold all of it within the 400 lines that a file may have.
    """
    head = f'"""{base} without some of its layers. Written by lissom; needs torch and diffusers, not lissom."""\n'
    texts = [inspect.getsource(module).partition('"""\n')[2] for module in (experts, slicing, narrowing, standins)]
    body = re.sub(r"^from \.(experts|slicing|narrowing) import .*\n", "", "".join(texts), flags=re.MULTILINE)  # it stands above
    return f"{head}{body}\n\nfrom diffusers import {base}  # noqa: E402\n\nPruned{base} = pruned({base})\n"


def check(model: Model, folder: Path) -> None:
    """UserError where `save` would refuse this model or this folder whatever the cuts. Costs nothing, so ask before any work."""
    stock.base_class(uncompiled(model.denoiser))
    if folder.resolve() in (parent := model.folder.resolve(), *parent.parents):
        raise UserError(f"{folder}: is the model that is cut, or holds it. Choose another --out folder.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file. Choose another --out folder.")
    if folder.is_dir() and not (folder / MANIFEST).is_file() and any(folder.iterdir()):
        raise UserError(
            f"{folder}: holds files but no {MANIFEST}, so that it is not replaced. Move it, or choose another --out."
        )


def save(
    model: Model,
    cuts: Sequence[Cut],
    folder: Path,
    probe: dict[str, Any],
    *,
    manifest: dict[str, Any],
    plain_only: bool = False,
    dtype: str | None = None,
    variant: str | None = None,
    shard: int | str = "5GB",
    trained: bool = False,
) -> Saved:
    """Write `folder`, a pipeline whose denoiser has the cuts, and open it in a fresh process. UserError, and nothing left, if not.

    probe: keyword arguments of one forward of the denoiser, to compare outputs on. manifest: fields of lissom.json that the
    caller knows. dtype: of the saved weights (float32, float16, bfloat16), None: as in the parent's files. trained: the
    numbers are those in memory, not those of the parent's files.
    """
    check(model, folder)
    denoiser, source = uncompiled(model.denoiser), model.folder / model.denoiser_name
    plan = structure(denoiser, cuts, plain_only=plain_only)
    if trained and dtype is None:
        dtype = weights.type_of(source)
    if variant is None and (dtype is None or trained):
        variant = weights.variant_of(source)  # other components carry it too: one call has to open them all
    arguments = {k: v for k, v in probe.items() if k != "return_dict"}
    as_saved = weights.rounded(denoiser, weights.DTYPES[dtype]) if dtype else nullcontext()
    with surgery.applied(denoiser, cuts), as_saved, reload_check.without_tf32(), torch.no_grad():
        expected = denoiser(**arguments, return_dict=False)[0]
    if not bool(torch.isfinite(expected).all()):
        raise UserError("the cut model's output holds NaN or infinity, so it was not saved. Cut other layers.")
    partial = folder.with_name(f".{folder.name}.partial")  # one name: what a killed process left is cleared by the next
    shutil.rmtree(partial, ignore_errors=True)
    before = folder.with_name(f".{folder.name}.before")
    _restore(before, folder)
    try:
        with disk_errors(folder):
            size = _write(model, plan, partial, dtype, variant, shard, trained)
            record = {**manifest, "opens": plan.opens, "component": model.denoiser_name, "names": plan.names}
            write_text(partial / MANIFEST, json.dumps(record, sort_keys=True, indent=2) + "\n")
        difference = _verify(partial, model, plan, arguments, expected, dtype)
        needed = _variant_of_all(partial)
        with disk_errors(folder):
            if folder.exists():
                os.replace(folder, before)
            os.replace(partial, folder)
    finally:
        _restore(before, folder)
        shutil.rmtree(partial, ignore_errors=True)
    return Saved(plan, folder, size, difference, needed)


def disk_size(folder: Path) -> int:
    """Bytes of a component's weight files."""
    return sum(file.stat().st_size for file in weights.files_of(folder))


def _variant_of_all(folder: Path) -> str | None:
    """The variant that one call needs to open all components of a pipeline: that of the first which has one."""
    parts = sorted(p for p in folder.iterdir() if p.is_dir())
    return next(filter(None, map(weights.variant_of, parts)), None)


def _restore(before: Path, folder: Path) -> None:
    """Put an earlier model back that was set aside for one that did not come, or remove it if that one is there."""
    if before.exists() and not folder.exists():
        os.replace(before, folder)
    shutil.rmtree(before, ignore_errors=True)


def _whereabouts(target: nn.Module, before: dict[int, str], cuts: Sequence[Cut]) -> dict[str, str]:
    """Address before -> address in the cut denoiser, of the modules that are still there. before: id of a module -> address."""
    emptied = {cut.address for cut in cuts if cut.what == "replace"}
    now = {}
    for address, module in target.named_modules():
        if (old := before.get(id(module))) is not None:
            now[old] = address
            if (above := old.rpartition(".")[0]) in emptied:  # an emptied layer is a copy that shares what it keeps
                now[above] = address.rpartition(".")[0]
    for old, address in surgery.narrowed_since(target, before):  # so is a narrower one
        for name, _ in target.get_submodule(address).named_modules():
            now[f"{old}.{name}".rstrip(".")] = f"{address}.{name}".rstrip(".")
    return now


def _narrow(target: nn.Module, before: Container[int]) -> tuple[dict[str, weights.Source], set[str]]:
    """What narrower layers took from the parent: name of a weight in the cut denoiser -> which of its rows and columns.

    Also the addresses of the operators that lost some, with nothing but a bias left or less.
    """
    found, cut_up = {}, set()
    for old, address in surgery.narrowed_since(target, before):
        layer = target.get_submodule(address)
        for part, (rows, columns) in vars(layer)["narrowed_from"][1].items():
            if rows or columns:
                cut_up.add(f"{address}.{part}")
            for name, p in layer.get_submodule(part).named_parameters():
                picked = columns if p.ndim > 1 else ()  # a bias has only rows
                found[f"{address}.{part}.{name}"] = weights.Source(f"{old}.{part}.{name}", p.shape, rows, picked)
    return found, cut_up


def _names(before: Sequence[str], now: dict[str, str]) -> dict[str, str | None]:
    """The shortest map of module addresses: what is below an address that moved or went, moved or went with it."""
    names: dict[str, str | None] = {}
    for old in sorted(before, key=lambda a: a.count(".")):
        if renamed(old, names) != now.get(old) and old:
            names[old] = now.get(old)
    return names


def _write(
    model: Model,
    plan: Structure,
    folder: Path,
    dtype: str | None,
    variant: str | None,
    shard: int | str,
    trained: bool = False,
) -> int:
    name = model.denoiser_name
    folder.mkdir(parents=True)
    index = json.loads((model.folder / "model_index.json").read_text(encoding="utf-8"))
    for source in sorted(model.folder.iterdir()):
        if source.is_dir() and source.name != name and isinstance(index.get(source.name), list):
            for path in (p for p in sorted(source.rglob("*")) if p.is_file() and p.suffix not in PICKLES):
                opening.place(path, folder / path.relative_to(model.folder))
        # Weights beside the components are the parent's in one file, for other programs.
        elif source.is_file() and source.name not in OWN and source.suffix not in (".safetensors", *PICKLES):
            opening.place(source, folder / source.name)
    target = folder / name
    target.mkdir()
    before = json.loads((model.folder / name / "config.json").read_text(encoding="utf-8"))
    private = {k: v for k, v in before.items() if k.startswith("_") and k != "_name_or_path"}
    config = {**private, **plan.config, "_class_name": plan.cls}
    index[name] = ["diffusers", plan.cls]
    if plan.code is not None:
        # diffusers keeps local modules flat by file name: with the content's hash in it, two never meet.
        file = f"pruned_{hashlib.sha256(plan.code.encode()).hexdigest()[:8]}"
        write_text(target / f"{file}.py", plan.code)
        config["auto_map"] = {"AutoModel": f"{file}.{plan.cls}"}
        index[name] = [file, plan.cls]
    write_text(target / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_text(folder / "model_index.json", json.dumps(index, indent=2, sort_keys=True) + "\n")
    held: weights.Held | weights.Reader = weights.Reader(model.folder / name)
    if trained:
        held = weights.Held(uncompiled(model.denoiser).state_dict())
    with held as reader:
        chosen = weights.DTYPES[dtype] if dtype else None
        return weights.write(plan.sources, reader, target, dtype=chosen, variant=variant, shard=shard)


def _verify(
    folder: Path, model: Model, plan: Structure, arguments: dict[str, Any], expected: torch.Tensor, dtype: str | None
) -> float:
    """Open the folder in a fresh process and compare. Returns the difference of outputs, relative to their largest.

    How much may differ: `_limit`. UserError for more, for other weights than its config asks for, and where it needs lissom.
    """
    from safetensors.torch import save_file

    tensors = {"out": expected.float().cpu().contiguous()}
    given = _parted(arguments, tensors)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "probe.safetensors"
        save_file(tensors, file)
        job = {
            "folder": str(folder.absolute()), "component": model.denoiser_name, "class": plan.cls, "dtype": model.dtype,
            "device": model.device, "trust": plan.code is not None, "probe": str(file), "arguments": given,
            "variant": weights.variant_of(folder / model.denoiser_name),
            "variant_of_all": _variant_of_all(folder),
        }  # fmt: skip
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(scratch) / "modules")}
        ran = subprocess.run(
            [sys.executable, "-P", reload_check.__file__],  # -P: our folder's file names must not shadow anyone's modules
            check=False,
            input=json.dumps(job),
            capture_output=True,
            text=True,
            env=environment,
            cwd=scratch,
        )
    if ran.returncode in KILLED:
        raise UserError(
            f"{folder.parent}: the fresh process that opens the saved model was killed, most likely because the memory was full. "
            "Close other programs, or load the model with --dtype float16 or bfloat16."
        )
    try:
        found = json.loads(ran.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = ran.stderr.strip().splitlines()[-1:] or [f"exit status {ran.returncode}"]
        raise UserError(
            f"{folder.parent}: the saved model does not open in a fresh process ({one_line(Exception(last[0]))})."
        ) from None
    if found["wrong"] or found["parameters"] != plan.params:
        said = found["wrong"] or f"{found['parameters']} parameters, not {plan.params}"
        raise UserError(f"{folder.parent}: the saved model does not match its config ({said}).")
    if found["lissom"]:
        raise UserError(
            f"{folder.parent}: the saved model opens only where lissom is installed (it loads {found['lissom'][0]})."
        )
    limit = _limit(model, dtype, found["device"])
    if found["difference"] is None or not found["difference"] <= limit:
        raise UserError(
            f"{folder.parent}: a fresh process computes something else than this one (by {found['difference']:.2g} of the largest "
            f"output, at most {limit:g} is rounding)."
        )
    return float(found["difference"])


def _limit(model: Model, dtype: str | None, device: str) -> float:
    """How much of the largest output may be rounding. dtype: of the saved weights; device: that the fresh process computed on.

    On the device of this process SAME by the type that the model computes in, or ROUNDED where the saved weights and those in
    memory were rounded to different short types. On the CPU instead of this process's card ELSEWHERE, if that is more: a
    smaller error than that is not found there.
    """
    twice = dtype not in (None, "float32", model.dtype) and model.dtype != "float32"
    limit = ROUNDED if twice else SAME[model.dtype]
    return limit if device == model.device else max(limit, ELSEWHERE)


def _parted(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Arguments as JSON, their tensors put aside under a number. `reload_check.joined` is the way back."""
    if isinstance(value, torch.Tensor):
        tensors[name := str(len(tensors))] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": {k: _parted(v, tensors) for k, v in value.items()}}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_parted(v, tensors) for v in value]}
    if value is None or isinstance(value, str | int | float | bool):
        return {"plain": value}
    raise UserError(f"a {type(value).__name__} in the denoiser's arguments cannot be handed to a fresh process.")
