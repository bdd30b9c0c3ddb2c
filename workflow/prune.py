"""The prune stage: what may be cut, the method's choice, the saved and verified model, and what was lost and won."""

import gc
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..core import artifact, methods, recipe
from ..core.artifact import Artifact
from ..core.candidate import Cut, canonical
from ..core.errors import UserError
from ..core.recipe import PruneStage
from ._gauge import TEXT_TOKENS, Gauge, layer_times
from ._losses import Losses
from ._stage import stage_hash
from ._subject import Subject
from .context import Context, Progress

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.anatomy import Layer
    from ..core.calibration import Inputs
    from ..core.candidate import SamplingPlan
    from ..prune._task import Pruned, Space
    from ..report.prune_schema import PruneReport
    from ._before_after import Quality

UNITS = ("resnet", "attention", "transformer_block", "block")


@dataclass(frozen=True)
class Job:
    """A denoiser, what may be cut from it, and how much must go."""

    module: ModuleType
    config: Any
    gauge: Gauge
    layers: "tuple[Layer, ...]"  # that may be cut, none inside another
    spaces: "tuple[Space, ...]"
    total: float  # cost of the whole, in what the target is set in
    need: float  # to be saved at least


@dataclass(frozen=True)
class Made:
    """The saved model, and all that is known of it and its parent before the parent is let go."""

    folder: Path
    report: "PruneReport"  # measurements of the pruned model are missing
    quality: "Quality"
    plan: "SamplingPlan | None"  # the parent's, on the pruned model
    license: dict[str, str]  # lines of the parent's card
    origin: str


def run_stage(stage: PruneStage, artifact_in: Artifact, folder: Path, context: Context) -> Artifact:
    """Prune, and leave model/, reports and samples in `folder`. Goes on with what is in the folder already."""
    from . import _prune_report, _pruned_model

    made = _make(stage, artifact_in, folder, context)
    report = made.report
    if made.quality.paints:
        gc.collect()  # two models of full size need not fit into memory together
        pruned = Subject.load(str(made.folder.resolve()), context, painting=False)
        report = report.model_copy(update={"scored": (*report.scored, made.quality.of("after", pruned, made.plan))})
        context.progress.advance()
    _prune_report.write(folder, report)
    result = _pruned_model.finish(folder, report, made, stage_hash(stage, artifact_in, context))
    return result


def _make(stage: PruneStage, artifact_in: Artifact, folder: Path, context: Context) -> Made:
    from ..core import export
    from . import _before_after, _prune_report, _pruned_model

    module = methods.load("prune", stage.method)
    subject = Subject.load(artifact_in.ref, context, painting=module.calibrated)
    model, progress = subject.model, context.progress
    export.check(model, folder / artifact.MODEL)
    gauge = gauge_of(subject)
    job = job_of(stage, gauge, model.parameters - gauge.params, model.ref, model.device, folder, model.fingerprint)
    plan = artifact_in.plan or (model.plan if stage.steps is None else None)  # a finished search brings its own
    quality = _before_after.Quality(subject, stage, folder)
    losses = None
    if module.calibrated:
        losses = Losses(model.pipe, _calls(stage, subject), folder / "scores.jsonl", _identity(stage, subject), progress)
    result = choose(job, losses, context.recipe.seed, progress)
    joint = losses([result.cuts])[0] if losses is not None and result.cuts else None
    progress.say(f"{len(result.cuts)} cuts; saving, and opening the result in a fresh process")
    saved = _pruned_model.save(stage, context.recipe.seed, model, result.cuts, gauge.probe(), folder)
    progress.say("timing denoiser calls before and after, in turns")
    measured = _prune_report.Measured(
        *_prune_report.sizes(model, gauge, result.cuts, saved),
        layers=job.layers or tuple(_chosen(stage, gauge, model.ref)),
        loss=joint,
        latency=_before_after.latency(stage, gauge, result.cuts, subject, folder),
    )
    report = _prune_report.build(stage, job, subject, result, saved, measured, losses, folder)
    if quality.paints:
        progress.phase("images before and after", 2)
        report = report.model_copy(update={"scored": (quality.of("before", subject, plan),)})
        progress.advance()
    if quality.scores:
        steps = len(plan.steps) if plan else stage.steps or subject.default_steps
        known = {"samples": quality.evaluate.samples, "steps": steps, "reference": subject.reference}
        report = report.model_copy(update=known)
    moved = plan and _pruned_model.moved_plan(plan, saved.structure.names)
    return Made(saved.folder, report, quality, moved, _pruned_model.license_of(model.folder), model.origin)


def gauge_of(subject: Subject) -> Gauge:
    """What weighs a loaded model: at the size and text length that its pipeline feeds it."""
    from ..core import calibration

    if subject.context.options.offload == "sequential":
        raise UserError(
            "--offload sequential: weights are not there to be weighed between calls. Use --offload model, or none."
        )
    with subject.asking():
        call = calibration.first(subject.sampler, subject.context.recipe.seed)
    call = call.part(0, 1)  # one image, without guidance's second half
    text = call.kwargs.get("encoder_hidden_states")
    tokens = text.shape[1] if text is not None and text.ndim == 3 else TEXT_TOKENS
    return Gauge(subject.model.denoiser, latent=_latent(call), text_tokens=tokens, fallback=lambda: call.kwargs)


def _latent(call: "Inputs") -> tuple[int, int, int] | None:
    """(C, H, W) of what the pipeline feeds its denoiser; None where it cannot be told."""
    sample, places = call.kwargs[call.sample], call.kwargs.get("img_ids")
    if sample.ndim == 4:
        return sample.shape[1], sample.shape[2], sample.shape[3]
    if places is None:
        return None
    rows, columns = (int(places[..., axis].max()) + 1 for axis in (1, 2))  # FLUX packs squares of 2 x 2 into one token
    return sample.shape[2] // 4, 2 * rows, 2 * columns


def job_of(
    stage: PruneStage, gauge: Gauge, others: int, name: str, device: str, folder: Path | None = None, identity: str = ""
) -> Job:
    """What the stage asks of this denoiser; UserError for what cannot be met, before any work.

    folder: keeps measured times, of the model that `identity` is a hash of.
    """
    from ..prune import _spaces

    module = methods.load("prune", stage.method)
    config = recipe.settings("prune", stage.method, stage.settings)
    own = getattr(module, "own_target", False)
    if own and stage.keep is not None:
        raise UserError(f"{stage.method}: brings its own structure, so that there is no keep to set. Leave keep out.")
    if own and (stage.units or stage.include or stage.exclude):
        raise UserError(f"{stage.method}: brings its own structure; units, include and exclude choose nothing. Leave them out.")
    if own:
        return Job(module, config, gauge, (), (), float(gauge.params + others), 0.0)
    layers = tuple(_chosen(stage, gauge, name))
    if stage.of == "latency":
        total, table = _times(gauge, name, device, folder, identity)
        saves = _spaces.per_layer(table, gauge.counted, lambda cuts: _inside(gauge, table, cuts))
    elif stage.of == "macs":
        total, table = float(gauge.macs), {layer.address: float(layer.macs or 0) for layer in layers}
        saves = _spaces.per_layer(table, gauge.counted, lambda cuts: float(gauge.macs - gauge.after(cuts)[1]))
    else:
        total, table = float(gauge.params + others), {layer.address: float(layer.freed) for layer in layers}
        saves = _spaces.per_layer(table, gauge.counted, lambda cuts: float(gauge.params_saved(cuts)))
    keep = stage.share
    need = (1 - keep) * total
    if stage.require_plain_load:
        spaces = _spaces.plain_only(gauge.denoiser, layers, saves)
    else:
        spaces = _spaces.any_layer(layers, saves)
    most = max((space.most for space in spaces), default=0.0)
    if most < need * (1 - 1e-9):
        plain = " that a stock config can express" if stage.require_plain_load else ""
        raise UserError(
            f"keep={keep:g}: cannot be reached; the cuts{plain} hold {most / total:.1%} of the {stage.of} of {name}, so that the "
            f"smallest keep is {_up(1 - most / total):g}."
        )
    reach = tuple(space for space in spaces if space.most >= need * (1 - 1e-9))
    return Job(module, config, gauge, layers, reach, total, need)


def choose(job: Job, losses: Losses | None, seed: int, progress: Progress) -> "Pruned":
    """Ask the method."""
    from ..prune._task import Task

    def none(options: Sequence[tuple[Cut, ...]]) -> list[float]:
        raise UserError(f"{job.module.__name__}: asks for losses, but does not say `calibrated = True`.")

    task = Task(job.gauge.denoiser, job.layers, job.spaces, job.need, losses or none, progress.say)
    result: Pruned = job.module.prune(task, job.config, random.Random(seed))
    return result


def _chosen(stage: PruneStage, gauge: Gauge, name: str) -> "list[Layer]":
    """The layers that may be cut: of the units asked for, matching the patterns, none inside another."""
    from ..core import surgery

    everything = gauge.layers()
    kinds = {layer.kind for layer in everything}
    if not everything:
        raise UserError(
            f"{name}: {type(gauge.denoiser).__name__} has no layer that can be cut. `lissom inspect` shows what it is made of."
        )
    if unknown := [u for u in stage.units if u not in kinds]:
        raise UserError(
            f"units: {unknown[0]!r}: {name} has none; there are {', '.join(sorted(kinds))}.{methods.suggest(unknown[0], kinds)}"
        )
    units = stage.units or UNITS
    found = [layer for layer in everything if layer.kind in units]
    if not stage.units:  # an attention of several transformer blocks is cut block by block
        inner = {
            layer.address.rpartition(".transformer_blocks.")[0] for layer in found if ".transformer_blocks." in layer.address
        }
        several = {a for a in inner if sum(layer.address.startswith(a + ".transformer_blocks.") for layer in found) > 1}
        found = [layer for layer in found if layer.address not in several]
    addresses = [layer.address for layer in everything]
    if stage.include:
        allowed = surgery.matching(stage.include, addresses)
        found = [layer for layer in found if any(_within(layer.address, a) for a in allowed)]
    if stage.exclude:  # what lies in a forbidden layer stays, and so does what holds one
        forbidden = surgery.matching(stage.exclude, addresses)
        found = [x for x in found if not any(_within(x.address, a) or _within(a, x.address) for a in forbidden)]
    if not stage.shortcuts:
        found = [layer for layer in found if not (layer.kind == "resnet" and layer.kept)]
    if not found:
        raise UserError(
            f"{name}: include, exclude and units leave none of the {len(everything)} layers that can be cut. Allow some."
        )
    addresses = [layer.address for layer in found]
    return [layer for layer in found if not any(layer.address.startswith(a + ".") for a in addresses)]


def _within(address: str, other: str) -> bool:
    return address == other or address.startswith(other + ".")


def _times(gauge: Gauge, name: str, device: str, folder: Path | None, identity: str) -> tuple[float, dict[str, float]]:
    """Milliseconds of the whole forward and of each layer. Measured once and kept, so that a resumed run decides alike."""
    from ._before_after import kept

    first = next(gauge.denoiser.parameters())
    if first.is_meta:
        raise UserError(f"of: latency: {name} is a structure without weights; its time cannot be measured. Use params or macs.")

    def make() -> dict[str, Any]:
        inputs = gauge.example(1, first.device, first.dtype)
        whole, table = layer_times(gauge.denoiser, inputs, [layer.address for layer in gauge.known], device)
        return {"batch": 1, "whole": whole, "layers": table}

    conditions = [identity, gauge.latent, gauge.text_tokens, device, str(first.dtype)]
    found = make() if folder is None else kept(folder / "latency.json", conditions, make)
    return float(found["whole"]), dict(found["layers"])


def _inside(gauge: Gauge, table: dict[str, float], cuts: tuple[Cut, ...]) -> float:
    """The time of the listed layers that cuts take out. Of an attention that is emptied, its norm and projections stay."""
    from ..core import surgery

    target, emptied = gauge.counted, [cut.address for cut in cuts if cut.what == "replace"]
    with surgery.applied(target, cuts):
        left = {id(m) for m in target.modules()}
    gone = [a for a in table if a not in emptied and id(target.get_submodule(a)) not in left]
    return sum(table[a] for a in gone if not any(a.startswith(b + ".") for b in gone))


def _up(share: float) -> float:
    """Rounded up, so that the number that is named can be reached."""
    return -(-round(share * 10_000, 6) // 1) / 10_000


def _recorded(subject: Subject, count: int, times: int) -> "list[Inputs]":
    from ..core import calibration

    with subject.asking():
        return calibration.record(subject.sampler, count, times, subject.context.recipe.seed)


def _calls(stage: PruneStage, subject: Subject) -> "list[Inputs]":
    """The calls that losses are measured on: of the model's own trajectories, or made from images."""
    from ..core import calibration

    progress, source = subject.context.progress, stage.data
    pixels = [] if source in (None, "teacher") else _pixels(subject.context.path(str(source)), stage.calibration, progress)
    progress.say(f"recording denoiser calls of {stage.calibration} images at {stage.times} noise levels")
    if not pixels:
        return _recorded(subject, stage.calibration, stage.times)
    with subject.asking():
        return calibration.from_images(subject.sampler, pixels, stage.calibration, stage.times, subject.context.recipe.seed)


def _pixels(source: str, count: int, progress: Progress) -> "list[Tensor]":
    """The first images of a folder or zip that can be read: uint8 (H, W, 3) each."""
    from ..evaluate._images import Images

    images = Images(Path(source))
    pixels = [one[0] for one in islice(images, count)]
    if images.skipped:
        progress.warn(f"{source}: {len(images.skipped)} files cannot be read, e.g. {images.skipped[0]}")
    return pixels


def _identity(stage: PruneStage, subject: Subject) -> str:
    """Of everything that losses depend on, beside call and cuts."""
    from ..core.candidate import Scheduler
    from ..evaluate._images import Images

    model, options = subject.model, subject.context.options
    given = stage.data not in (None, "teacher")
    parts = [
        __version__, model.fingerprint, Scheduler.of(model.pipe.scheduler).plain(), subject.conditions.hash, subject.call,
        subject.context.recipe.seed, stage.calibration, stage.times, model.dtype, model.device.partition(":")[0], options.chunk,
        Images(Path(subject.context.path(str(stage.data)))).signature() if given else None,
    ]  # fmt: skip
    return hashlib.sha256(canonical(parts).encode()).hexdigest()
