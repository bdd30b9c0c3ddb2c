"""From what the user names (zoo:NAME, a folder, a hub id) to a pipeline on a device, with everything that identifies it."""

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import artifact, lending, opening
from .candidate import SamplingPlan
from .conditions import Conditions
from .conditions import read as read_conditions
from .errors import MissingOffline, UserError, one_line
from .methods import suggest
from .opening import DENOISERS

ZOO = Path(__file__).parent.parent / "zoo"
# Files of a hub model that are no pipeline's to diffusers: its card and licence, what it was pruned from, its plan and settings.
BESIDE = ("README.md", "LICENSE*", artifact.MANIFEST, artifact.PLAN, "conditions.jsonl", "call.json")
HUB_TIMEOUT = 10.0  # seconds for the hub's first answer
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


@dataclass
class Model:
    """A loaded pipeline and what identifies it."""

    pipe: Any  # diffusers.DiffusionPipeline
    ref: str  # as the user gave it, a hub id with its revision pinned
    folder: Path
    fingerprint: str  # sha256 over configs and weights, scheduler excepted: plans hold that
    conditions: Conditions | None  # shipped with the model
    plan: SamplingPlan | None  # an artifact's own plan
    device: str
    dtype: str
    others: dict[str, artifact.Other] = field(default_factory=dict)  # that may make steps of plans, by name

    @property
    def origin(self) -> str:
        """The model that this one was pruned from, at the beginning of the line; the model itself if it was not."""
        made = opening.builds_on(self.folder)
        return (made.chain[0].parent if made.chain else made.parent) if made else self.ref

    @property
    def denoiser(self) -> Any:
        """The first denoiser of the pipeline (nn.Module)."""
        return getattr(self.pipe, self.denoiser_name)

    @property
    def denoiser_name(self) -> str:
        """The component that holds it: unet, transformer, ..."""
        return next(n for n in DENOISERS if getattr(self.pipe, n, None) is not None)

    @property
    def parameters(self) -> int:
        """Number of parameters of all denoisers."""
        parts: list[Any] = [getattr(self.pipe, n, None) for n in DENOISERS]
        return sum(p.numel() for part in parts if hasattr(part, "parameters") for p in part.parameters())


def load(
    ref: str, *, device: str = "auto", dtype: str = "float32", offload: str = "none", trust_remote_code: bool = False
) -> Model:
    """Load MODEL: `zoo:NAME`, a diffusers folder, a lissom run or artifact folder, or a hub id (`id@revision`).

    device: auto, cpu, cuda, cuda:1, mps. dtype: float32, float16, bfloat16. offload: none, model, sequential.
    Weights are read from safetensors only. Raises UserError (missing, partial, pickled or broken folder), MissingOffline.
    """
    folder, pinned, plan, others = _found(ref, trust_remote_code)
    check_folder(folder, trust_remote_code)
    device, (dtype, torch_dtype) = _device(device), _dtype(dtype)
    import diffusers

    try:
        with _silent(diffusers):
            pipe = opening.open_pipeline(folder, torch_dtype, trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as e:
        raise UserError(f"{folder}: diffusers cannot open it ({one_line(e)}). The folder must be a complete pipeline.") from e
    for name, part in pipe.components.items():
        if hasattr(part, "named_parameters"):
            part.requires_grad_(False)
            if empty := [n for n, p in part.named_parameters() if p.is_meta]:
                raise UserError(
                    f"{folder / name}: the weights lack {empty[0]} and {len(empty) - 1} more. Fetch the folder again."
                )
    _place(pipe, device, offload)
    rows = folder / "conditions.jsonl"
    model = Model(
        pipe=pipe,
        ref=pinned,
        folder=folder,
        fingerprint=fingerprint(folder),
        conditions=read_conditions(rows) if rows.is_file() else None,
        plan=plan,
        device=device,
        dtype=dtype,
        others=others,
    )
    lending.lend(model, others, like(model, trust_remote_code), offload)
    return model


def like(model: Model, trust_remote_code: bool = False) -> Callable[[str], Model]:
    """Loads further models on the same device, in the same dtype."""
    return lambda ref: load(ref, device=model.device, dtype=model.dtype, trust_remote_code=trust_remote_code)


def identify(ref: str, trust_remote_code: bool = False) -> tuple[str, str]:
    """The pinned reference and the fingerprint of what `load` would load. Raises as it does."""
    folder, pinned, *_ = _found(ref, trust_remote_code)
    check_folder(folder, trust_remote_code)
    return pinned, fingerprint(folder)


def folder_of(ref: str) -> Path:
    """The folder of the pipeline that a reference means."""
    return _found(ref, trust_remote_code=True)[0]


def _found(ref: str, trust_remote_code: bool) -> tuple[Path, str, SamplingPlan | None, dict[str, artifact.Other]]:
    """The folder of a reference's pipeline, the reference pinned, its plan, and other models that the plan names."""
    folder, pinned = resolve(ref, trust_remote_code)
    plan, others = None, {}
    if made := _run(folder):
        plan, others = artifact.read_plan(folder), made.models
        folder, pinned = resolve(made.parent, trust_remote_code)
    if (model := _made(folder)) is not None:
        folder = model
    if plan is None and (folder / artifact.PLAN).is_file() and (own := artifact.manifest(folder)) is not None:
        plan, others = artifact.read_plan(folder), own.models
    return folder, pinned, plan, others


def identity(ref: str) -> str:
    """What a reference means: a hash of weights for the zoo, folders and runs, the (pinned) reference itself for a hub id."""
    if not ref.startswith("zoo:") and not Path(ref).expanduser().is_dir():
        return ref
    folder, _ = resolve(ref)
    made = _run(folder)
    return identity(made.parent) if made else fingerprint(_made(folder) or folder)


def _run(folder: Path) -> artifact.Manifest | None:
    """The manifest of a lissom run that holds a plan but no model of its own."""
    if (folder / "model_index.json").is_file() or artifact.made_model(folder) is not None:
        return None
    return artifact.manifest(artifact.finished(folder))


def _made(folder: Path) -> Path | None:
    """The model that a lissom run made."""
    return None if (folder / "model_index.json").is_file() else artifact.made_model(folder)


def resolve(ref: str, trust_remote_code: bool = False) -> tuple[Path, str]:
    """The folder that holds a model, and its pinned reference. trust_remote_code: may a hub id bring code of its own."""
    if ref.startswith("zoo:"):
        name = ref.removeprefix("zoo:")
        if name not in zoo():
            known = [f"zoo:{k}" for k in zoo()]
            raise UserError(f"{ref}: no such embedded model; there are {', '.join(known)}.{suggest(ref, known)}")
        return ZOO / name, ref
    if ref.startswith("config:"):
        raise UserError(f"{ref}: a structure without weights cannot be run. Give a folder, a hub id or zoo:NAME.")
    path = Path(ref).expanduser()
    if path.is_dir():
        return path.resolve(), str(path)
    if path.is_file():
        raise UserError(f"{ref}: is a file. Give a diffusers folder (one that holds model_index.json).")
    if ref.startswith((".", "/", "~")) or ref.count("/") != 1 or not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", ref):
        near = suggest(ref, ["zoo:" + k for k in zoo()])
        raise UserError(f"{ref}: no such folder. Give a diffusers folder, a hub id such as owner/name, or zoo:NAME.{near}")
    return _hub(ref, trust_remote_code)


def zoo() -> list[str]:
    """Names of the embedded pipelines."""
    return sorted(p.parent.name for p in ZOO.glob("*/model_index.json"))


def check_folder(folder: Path, trust_remote_code: bool = False) -> None:
    """Refuse, before anything is loaded, what is missing, partial, pickled, broken, or would run its own code."""
    index = folder / "model_index.json"
    if not index.is_file():
        found = sorted(p.name for p in folder.iterdir())[:6]
        pickled = [n for n in found if n.endswith(PICKLES)]
        if pickled:
            raise UserError(
                f"{folder}: holds only pickled weights ({pickled[0]}), which are never read. Convert it to safetensors."
            )
        raise UserError(
            f"{folder}: not a diffusers pipeline, it has no model_index.json (found: {', '.join(found) or 'nothing'})."
        )
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{index}: not valid JSON ({one_line(e)}). Fetch the folder again.") from e
    if not isinstance(parts, dict):
        raise UserError(f"{index}: not a pipeline's index, it holds a {type(parts).__name__}. Fetch the folder again.")
    if isinstance(parts.get("_class_name"), list) and not trust_remote_code:
        raise UserError(
            f"{index}: the pipeline {parts['_class_name']} is the model's own code, which is not run unless you pass "
            "--trust-remote-code."
        )
    own = opening.own_code(folder, parts)  # lissom opens its own without that file
    for name, entry in parts.items():
        if name.startswith("_") or not isinstance(entry, list) or not entry or entry[0] is None:
            continue
        part = folder / name
        if not part.is_dir() or not any(part.iterdir()):
            raise UserError(f"{part}: missing, although model_index.json names it. The folder is partial: fetch it again.")
        code = sorted(p for p in part.rglob("*.py") if p != own)
        if code and not trust_remote_code:
            raise UserError(
                f"{code[0]}: the model comes with its own code, which is not run unless you pass --trust-remote-code."
            )
        safe = sorted(part.glob("*.safetensors"))
        if not safe and (pickled := [p.name for p in part.iterdir() if p.suffix in PICKLES]):
            raise UserError(f"{part / pickled[0]}: pickled weights are never read. Convert the model to safetensors.")
        for file in safe:
            _check_safetensors(file)


def fingerprint(folder: Path) -> str:
    """sha256 over the names and contents of the pipeline's weights and configs.

    Only the components that model_index.json names count, without the scheduler: plans hold that.
    """
    parts = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    files = [folder / "model_index.json"]
    for name in sorted(parts):
        if isinstance(parts[name], list) and name != "scheduler" and (folder / name).is_dir():
            files += sorted(p for p in (folder / name).rglob("*") if p.suffix in (".safetensors", ".json"))
    digest = hashlib.sha256()
    for file in files:
        stamp = file.stat()
        digest.update(f"{file.relative_to(folder).as_posix()}\0".encode())
        digest.update(_content(file, stamp.st_size, stamp.st_mtime_ns))
    return digest.hexdigest()


@functools.cache
def _content(file: Path, size: int, changed: int) -> bytes:
    """sha256 of a file, read once in a process as long as it stays as it is."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").digest()


def _check_safetensors(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as f:  # reads the header and compares it with the file's length
            f.keys()
    except (SafetensorError, OSError) as e:
        raise UserError(f"{file}: broken or half-downloaded ({one_line(e)}). Fetch it again.") from e


def _hub(ref: str, trust_remote_code: bool) -> tuple[Path, str]:
    import diffusers
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    name, _, revision = ref.partition("@")
    trouble = _unreachable(name, revision or None)
    try:
        with _silent(diffusers):
            path = diffusers.DiffusionPipeline.download(
                name,
                revision=revision or None,
                use_safetensors=True,
                local_files_only=trouble is not None,
                trust_remote_code=trust_remote_code,
            )
    except Exception as e:  # hub, HTTP and connection errors share no base class
        if isinstance(trouble, (RepositoryNotFoundError, RevisionNotFoundError)):
            raise UserError(
                f"{ref}: neither a folder here nor a model that the hub shows ({one_line(trouble)}). "
                "Check the name, or log in with `hf auth login` if it is private."
            ) from e
        raise MissingOffline(
            f"{ref}: not a folder here, not in the cache, and the model hub gave nothing ({one_line(trouble or e)}). "
            "Put a copy on this machine and name its folder, or try again with a connection."
        ) from e
    folder = Path(path)
    pinned = folder.name if folder.parent.name == "snapshots" else revision or "main"
    if trouble is None:
        with _silent(diffusers):
            _fetch_beside(name, pinned)
    return folder, f"{name}@{pinned}"


def _fetch_beside(name: str, revision: str) -> None:
    """Put what `DiffusionPipeline.download` leaves out into the same snapshot, where the hub has it."""
    import huggingface_hub

    with suppress(Exception):  # hub, HTTP and connection errors share no base class; the model runs without these files
        huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(BESIDE))


def _unreachable(name: str, revision: str | None) -> Exception | None:
    """Why the hub cannot be asked for a model, or None. A download alone would wait for ever on a silent network."""
    from huggingface_hub import HfApi

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return ConnectionError("HF_HUB_OFFLINE is set")
    try:
        HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT)
    except Exception as e:  # noqa: BLE001  whatever HTTP library the hub's client uses
        return e
    return None


@contextmanager
def _silent(diffusers: Any) -> Iterator[None]:
    """No loading bars and no chatter on stderr: progress is ours, what is wrong comes as an exception."""
    import transformers

    levels = [(library, library.utils.logging.get_verbosity()) for library in (diffusers, transformers)]
    for library, _ in levels:
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        for library, level in levels:
            library.utils.logging.set_verbosity(level)
            library.utils.logging.enable_progress_bar()


def _device(device: str) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {device}: cannot be used here ({one_line(e)}). Try --device cpu.") from e
    return device


def _dtype(name: str) -> tuple[str, Any]:
    """The full name of a dtype and torch's object."""
    import torch

    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    short = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
    if (full := short.get(name, name)) not in known:
        raise UserError(f"--dtype {name}: unknown; there are {', '.join(known)}.{suggest(name, known)}")
    return full, known[full]


def _place(pipe: Any, device: str, offload: str) -> None:
    if offload == "none":
        pipe.to(device)
    elif offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential" and device == "cpu":
        raise UserError(
            "--offload sequential: there is no accelerator here to keep weights off. Leave it out, or name a --device."
        )
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        raise UserError(
            f"--offload {offload}: unknown; there are none, model, sequential.{suggest(offload, ['none', 'model', 'sequential'])}"
        )
