"""A student and its teacher: loaded, matched layer by layer, and refused where they do not fit."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..core import memory, opening, processes, recipe
from ..core.artifact import Artifact, Manifest, renamed
from ..core.errors import UserError
from ..core.stages import DistillStage
from ._subject import Subject
from .context import Context

if TYPE_CHECKING:
    from torch import nn

    from ..distill._loop import Term
    from ..distill._seen import Pairing

STATES = 5  # float32 copies of the student's weights while it learns: weights, gradients, two moments, average
GIB = 2**30


def student_of(artifact_in: Artifact, context: Context) -> Subject:
    """The model that learns, in float32. Never offloaded: its weights change."""
    if context.options.dtype not in ("float32", "fp32"):
        raise UserError(
            f"--dtype {context.options.dtype}: weights that learn are kept in float32. Leave it out; precision: bf16 (or fp16) "
            "runs the student's forwards in half precision."
        )
    student = Subject.load(artifact_in.ref, replace(context, options=replace(context.options, offload="none")))
    student.sampler.memo = None  # it knows results by the weights that were loaded
    return student


def teacher_of(stage: DistillStage, student: Subject) -> Subject:
    """The model that is learned from. UserError where none is known, or the device has no room for both."""
    context, device = student.context, student.model.device
    ref = teacher_ref(stage, student)
    dtype = stage.teacher_dtype or ("float32" if device.partition(":")[0] in ("cpu", "mps") else "float16")
    try:
        teacher = Subject.load(ref, replace(context, options=replace(context.options, dtype=dtype)))
    except RuntimeError as e:
        if not memory.ran_out(e):
            raise
        raise UserError(
            f"teacher {ref}: does not fit on {device} beside the student. --offload model keeps its other components off the device."
        ) from e
    if device.startswith("cuda"):
        import torch

        room, shares = torch.cuda.mem_get_info(device)[1], processes.count() if processes.spread() else 1
        check_room(student.model.parameters, teacher.model.parameters, dtype, room, device, shares)
    return teacher


def check_room(student: int, teacher: int, dtype: str, room: int, device: str, shares: int = 1) -> None:
    """UserError where weights alone need more than `room` bytes. student, teacher: numbers of parameters. shares: processes
    that the student is spread over; to look at it and to save it, the first has its weights whole beside its share.
    """
    ours, theirs = STATES * 4 * student // shares, (4 if dtype == "float32" else 2) * teacher
    if shares > 1:
        ours += 4 * student
    if ours + theirs > room:
        away = (
            f" --offload model would take the teacher's {theirs / GIB:.1f} GiB off it between its forwards."
            if ours < room
            else ""
        )
        raise UserError(
            f"{device}: has {room / GIB:.1f} GiB; the student needs {ours / GIB:.1f} GiB (weights, gradients, optimiser, average), "
            f"the teacher {theirs / GIB:.1f} GiB, activations not counted.{away} Spread the student over "
            f"{'more' if shares > 1 else 'several'} devices: `accelerate launch --use_fsdp --fsdp_version 2 --num_processes N`."
        )


def teacher_ref(stage: DistillStage, student: Subject) -> str:
    """Where the teacher is: as given, or at the beginning of the line of models that the student was pruned from."""
    made = opening.builds_on(student.model.folder)
    if stage.teacher == "previous" and made is not None:
        return made.parent
    if stage.teacher is not None and stage.teacher != "previous":
        return stage.teacher
    if made is None:
        raise UserError(
            f"{student.model.ref}: nothing says what it was pruned from, so that its teacher is not known. Give --teacher MODEL."
        )
    return student.model.origin


def pairing_of(student: Subject, teacher: Subject) -> "Pairing":
    """Which layer of the student was which of the teacher, by the names that every pruning has kept."""
    from ..core.anatomy import uncompiled
    from ..distill._seen import Pairing

    ours, theirs = student.model, teacher.model
    if ours.denoiser_name != theirs.denoiser_name:
        raise UserError(
            f"student and teacher do not fit: {ours.ref} has a {ours.denoiser_name}, {theirs.ref} a {theirs.denoiser_name}. "
            "Name the model that the student was pruned from as the teacher."
        )
    names = _names(opening.builds_on(ours.folder), theirs.fingerprint)
    there = {address for address, _ in uncompiled(ours.denoiser).named_modules()}
    origin: dict[str, str] = {}
    for address, _ in uncompiled(theirs.denoiser).named_modules():
        now: str | None = address
        for step in names:
            now = renamed(now, step) if now is not None else None
        if now is not None and now in there:
            origin[now] = address
    return Pairing(uncompiled(ours.denoiser), uncompiled(theirs.denoiser), origin)


def _names(made: Manifest | None, teacher: str) -> "list[Mapping[str, str | None]]":
    """The maps of names from the teacher (a fingerprint) to the student, one for each pruning; none where it is not in the line."""
    if made is None:
        return []
    line = [(a.model_hash, a.names) for a in made.chain] + [(made.model_hash, made.names)]
    start = next((i for i, (fingerprint, _) in enumerate(line) if fingerprint == teacher), len(line))
    return [names for _, names in line[start:]]


def terms_of(stage: DistillStage, pairing: "Pairing") -> "list[Term]":
    """The losses of the sum, each with its settings and the places where it watches."""
    from ..core import methods
    from ..distill._loop import Term

    found = []
    for name, given in (stage.losses or methods.presets()[stage.distill].losses).items():
        options = dict(given) if isinstance(given, dict) else {"weight": given}
        weight = float(options.pop("weight", 1.0))
        module = methods.load("distill", name)
        config = recipe.settings("loss", name, options)
        sites = tuple(module.sites(pairing, config)) if hasattr(module, "sites") else ()
        found.append(Term(name, weight, module, config, sites))
    return found


def ready(denoiser: "nn.Module", stage: DistillStage) -> None:
    """Make a denoiser ready to learn. It stays in eval mode: dropout would show student and teacher different things."""
    model: Any = denoiser
    model.requires_grad_(True)
    if stage.checkpointing:
        if not getattr(model, "_supports_gradient_checkpointing", False):
            raise UserError(f"checkpointing: {type(model).__name__} does not support it. Leave it out.")
        model.enable_gradient_checkpointing()
