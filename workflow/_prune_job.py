"""What a prune stage asks of a denoiser: which layers may be cut, what each saves, how much must go; and the method's answer."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..core import methods, recipe
from ..core.candidate import Cut
from ..core.errors import UserError
from ..core.stages import PruneStage
from ._gauge import TEXT_TOKENS, Gauge, layer_times
from ._kept import kept
from ._subject import Subject
from .context import Progress

if TYPE_CHECKING:
    from ..core.anatomy import Layer
    from ..core.calibration import Inputs
    from ..core.widths import Width
    from ..prune._task import Pruned, Space
    from ._gradients import Gradients

UNITS = ("resnet", "attention", "transformer_block", "block")
OPERATOR = "operator"  # the kind that is listed only where units ask for it
Losses = Callable[[Sequence[tuple[Cut, ...]]], list[float]]  # of each choice of cuts; see Task.losses


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
    of: str = "params"  # what that is
    widths: "tuple[Width, ...]" = ()  # of a method that makes layers narrower: those that may be


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
    from ..prune import _depth, _spaces
    from ..prune._task import Task
    from . import _widths

    module = methods.load("prune", stage.method)
    config = recipe.settings("prune", stage.method, stage.settings)
    own = getattr(module, "own_target", False)
    if own and stage.keep is not None:
        raise UserError(f"{stage.method}: brings its own structure, so that there is no keep to set. Leave keep out.")
    if own and (stage.units or stage.include or stage.exclude):
        raise UserError(f"{stage.method}: brings its own structure; units, include and exclude choose nothing. Leave them out.")
    if module.calibrated == "latents":
        _check_latents(stage)
    if module.calibrated == "gradients" and stage.times != PruneStage.model_fields["times"].default:
        raise UserError(
            f"{stage.method}: visits the noise levels one after the other, so that times chooses none. Leave it out."
        )
    if module.calibrated in ("learned", "trajectories"):
        _check_learned(stage)
    if structured(config) and stage.keep is not None:
        raise UserError(
            f"{stage.method}: structure says how many blocks stay, so that there is no keep to set. Leave one of them out."
        )
    if own:
        return Job(module, config, gauge, (), (), float(gauge.params + others), 0.0)
    usual = getattr(module, "units", UNITS)
    if usual is not UNITS and not stage.units and not any(layer.kind in usual for layer in gauge.layers()):
        raise UserError(
            f"{stage.method}: {name} has no transformer blocks, of which some could stay. laptop cuts the layers of any denoiser."
        )
    widths = _widths.chosen(stage, gauge, name, config) if getattr(module, "narrows", False) else ()
    layers = tuple(_widths.listed(gauge, widths) if widths else cuttable(stage, gauge, name, usual))
    if widths:
        total, saves = float(gauge.macs if stage.of == "macs" else gauge.params + others), _widths.saves(gauge, stage.of)
    elif stage.of == "latency":
        total, table = _times(gauge, layers, name, device, folder, identity)
        saves = _spaces.per_layer(table, gauge.counted, lambda cuts: time_inside(gauge, table, cuts))
    elif stage.of == "macs":
        total, table = float(gauge.macs), {layer.address: float(layer.macs or 0) for layer in layers}
        saves = _spaces.per_layer(table, gauge.counted, lambda cuts: float(gauge.macs - gauge.after(cuts)[1]))
    else:
        total, table = float(gauge.params + others), {layer.address: float(layer.freed) for layer in layers}
        saves = _spaces.per_layer(table, gauge.counted, lambda cuts: float(gauge.params_saved(cuts)))
    keep = stage.share
    need = (1 - keep) * total if not structured(config) else 0.0
    if widths:
        spaces = [_widths.space(widths, saves)]
    elif stage.require_plain_load:
        spaces = _spaces.plain_only(gauge.denoiser, layers, saves)
    else:
        spaces = _spaces.any_layer(layers, saves)
    most = max((space.most for space in spaces), default=0.0)
    if isinstance(config, _depth.Structured):  # one block at least has to stay, whichever it is
        most -= max((option.saved for space in spaces for site in space.sites for option in site), default=0.0)
    if most < need * (1 - 1e-9):
        cuts = "the cuts that a stock config can express" if stage.require_plain_load else "the cuts"
        cuts = f"all {', '.join(_widths.counted(config))} but one of each layer" if widths else cuts
        raise UserError(
            f"keep={keep:g}: cannot be reached; {cuts} hold {most / total:.1%} of the {stage.of} of {name}, so that the smallest keep "
            f"is {_up(1 - most / total):g}."
        )
    reach = tuple(space for space in spaces if space.most >= need * (1 - 1e-9))
    if usual is not UNITS:
        _removable(stage, layers, spaces)
    if isinstance(config, _depth.Structured):  # refuses what does not fit, before anything is learned
        _depth.groups(Task(gauge.denoiser, layers, reach, need, lambda options: []), config, stage.method)
    return Job(module, config, gauge, layers, reach, total, need, stage.of, widths)


def _removable(stage: PruneStage, layers: "Sequence[Layer]", spaces: "Sequence[Space]") -> None:
    """UserError for depth blocks that could not go in the end, whatever is found."""
    if any(layer.returns is not None for layer in layers):
        raise UserError(
            f"{stage.method}: nothing is known of what its blocks hand on, so that none can be masked or left out unseen. laptop looks at "
            "each of them when it is called."
        )
    single = {cut.address for s in spaces for site in s.sites for o in site if len(o.cuts) == 1 for cut in o.cuts}
    if stage.require_plain_load and (bound := [layer.address for layer in layers if layer.address not in single]):
        raise UserError(
            f"{stage.method}: no stock config does without {bound[0]} alone ({len(bound)} of {len(layers)} blocks). Leave "
            "require_plain_load out, or take them out of the choice with exclude."
        )


def structured(config: Any) -> bool:
    """Whether a method was told which structure to leave, so that no target says how much goes."""
    return getattr(config, "structure", None) is not None


def _check_learned(stage: PruneStage) -> None:
    """UserError for settings of recorded calls, where noised samples are learned from."""
    fields = PruneStage.model_fields
    whole = methods.load("prune", stage.method).calibrated == "trajectories"
    if whole and stage.data not in (None, "teacher"):
        raise UserError(
            f"{stage.method}: learns from the model's own trajectories, from noise, so that data has no effect. Leave it out."
        )
    for name in ("times", "calibration"):
        if getattr(stage, name) != fields[name].default:
            raise UserError(
                f"{stage.method}: learns from samples of its own (images, batch), so that {name} has no effect. Leave it out."
            )


def _check_latents(stage: PruneStage) -> None:
    """UserError for settings of recorded calls, where whole trajectories are scored."""
    whole = f"{stage.method}: scores the latents that the model's own trajectories end with"
    if stage.data not in (None, "teacher"):
        raise UserError(f"{whole}, from noise, so that data ({stage.data}) has no effect. Leave data out.")
    if stage.times != PruneStage.model_fields["times"].default:
        raise UserError(
            f"{whole}, over all noise levels, so that times chooses none. Leave it out; solver_steps are the steps."
        )


def trajectory_steps(job: Job) -> int | None:
    """Solver steps of the trajectories that a method scores; None for the pipeline's own number."""
    steps: int | None = getattr(job.config, "solver_steps", None)
    return steps


def choose(job: Job, losses: "Losses | Gradients | None", seed: int, progress: Progress) -> "Pruned":
    """Ask the method."""
    from ..prune._task import Task
    from . import _widths

    def none(options: Sequence[tuple[Cut, ...]]) -> list[float]:
        raise UserError(f'{job.module.__name__}: asks for losses, but does not say `calibrated = True` or `= "latents"`.')

    task = Task(job.gauge.denoiser, job.layers, job.spaces, job.need, losses or none, progress.say)
    if job.widths:
        task = replace(task, widths=job.widths, saves=_widths.saves(job.gauge, job.of))
    given = {name: found for name in ("gradients", "run", "lesson") if (found := getattr(losses, name, None)) is not None}
    task = replace(task, **given)
    result: Pruned = job.module.prune(task, job.config, random.Random(seed))
    for text in result.warnings:
        progress.warn(f"{job.module.__name__.rpartition('.')[2]}: {text}")
    return result


def cuttable(stage: PruneStage, gauge: Gauge, name: str, usual: Sequence[str] = UNITS) -> "list[Layer]":
    """The layers that may be cut: of the units asked for, matching the patterns, none inside another.

    usual: the units where none are asked for.
    """
    from ..core import surgery

    operators = gauge.operators() if OPERATOR in stage.units else []
    everything = [*gauge.layers(), *operators]
    kinds = {layer.kind for layer in everything}
    if not everything:
        raise UserError(
            f"{name}: {type(gauge.denoiser).__name__} has no layer that can be cut. `lissom inspect` shows what it is made of."
        )
    if unknown := [u for u in stage.units if u not in kinds]:
        there = sorted(kinds | ({OPERATOR} if OPERATOR not in stage.units else set()))
        raise UserError(
            f"units: {unknown[0]!r}: {name} has none; there are {', '.join(there)}.{methods.suggest(unknown[0], there)}"
        )
    units = stage.units or usual
    found = [layer for layer in everything if layer.kind in units]
    if not stage.units and "attention" in units:  # an attention of several transformer blocks is cut block by block
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


def _times(
    gauge: Gauge, layers: "Sequence[Layer]", name: str, device: str, folder: Path | None, identity: str
) -> tuple[float, dict[str, float]]:
    """Milliseconds of the whole forward and of each layer. Measured once and kept, so that a resumed run decides alike."""
    first = next(gauge.denoiser.parameters())
    if first.is_meta:
        raise UserError(f"of: latency: {name} is a structure without weights; its time cannot be measured. Use params or macs.")

    single = [layer for layer in layers if layer.kind == OPERATOR]

    def make() -> dict[str, Any]:
        inputs = gauge.example(1, first.device, first.dtype)
        whole, table = layer_times(gauge.denoiser, inputs, [layer.address for layer in (*gauge.known, *single)], device)
        return {"batch": 1, "whole": whole, "layers": table}

    conditions = [identity, gauge.latent, gauge.text_tokens, device, str(first.dtype), *(layer.address for layer in single)]
    found = make() if folder is None else kept(folder / "latency.json", conditions, make)
    return float(found["whole"]), dict(found["layers"])


def time_inside(gauge: Gauge, table: dict[str, float], cuts: tuple[Cut, ...]) -> float:
    """The time of the listed layers that cuts take out. Of an attention that is emptied, its norm and projections stay.

    A layer that only gets narrower counts in full: how its time shrinks with its width is not in the table.
    """
    from ..core import surgery

    target, copied = gauge.counted, [cut.address for cut in cuts if cut.what == "replace"]
    before = {id(m) for m in target.modules()}
    with surgery.applied(target, cuts):
        left = {id(m) for m in target.modules()}
        for old, now in surgery.narrowed_since(target, before):
            copied += [old, *(f"{old}.{part}" for part in vars(target.get_submodule(now))["narrowed_from"][1])]
    gone = [a for a in table if a not in copied and id(target.get_submodule(a)) not in left]
    return sum(table[a] for a in gone if not any(a.startswith(b + ".") for b in gone))


def _up(share: float) -> float:
    """Rounded up, so that the number that is named can be reached."""
    return -(-round(share * 10_000, 6) // 1) / 10_000
