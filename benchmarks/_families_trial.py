"""What can be done with one tiny pipeline: followed along a plan, layers skipped, cut, saved. Every answer comes of a run."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core import anatomy, export, stock, surgery
from ..core.anatomy import Layer
from ..core.candidate import Cut, SamplingPlan, Scheduler, Step
from ..core.conditions import UNCONDITIONAL
from ..core.cost import outermost
from ..core.driving import CannotFollow, Run, follow, watch
from ..core.driving.drive import drive
from ..core.driving.refusals import UNDRIVABLE, check, check_pipeline
from ..core.driving.schedulers import kind_of
from ..core.driving.steering import Call, Next, denoisers
from ..core.errors import UserError, one_line
from ..core.models import Model
from . import _families_building as building
from ._families_found import Found

SHARES = (0.9, 0.5, 0.1)  # of the training timesteps: a plan that no spacing rule makes
INSTEAD = {"CogVideoXDDIMScheduler": "DDIMScheduler"}  # the same solver under another name
ASKED = (3, 50, 2)  # inference steps that a pipeline on a plan is asked for, and must not care about


@dataclass
class Row:
    """A pipeline's line of the page. Empty: not reached."""

    found: Found
    denoiser: str = ""
    scheduler: str = ""
    searched: str = ""
    skipped: str = ""
    cut: str = ""
    saved: str = ""
    notes: list[str] = field(default_factory=list)


class NotTried(Exception):
    """A tiny pipeline could not be made or called here: it says nothing about real ones."""


def tried(found: Found, saved_before: set[str]) -> Row:
    """Try everything with one pipeline. saved_before: denoiser classes that were saved and opened again already."""
    row = Row(found)
    if found.missing:
        row.searched = f"not tried: needs the package {' and '.join(found.missing)}"
        return row
    try:
        _try(row, saved_before)
    except NotTried as e:
        if row.searched:
            row.notes.append("refused by its class; none was built here")
        else:
            row.searched = f"not tried: {e}"
    except CannotFollow as e:
        row.searched = f"no: {_plain(e).partition(' Use --scheduler')[0].rstrip('.')}"
    return row


def _try(row: Row, saved_before: set[str]) -> None:
    found = row.found
    if found.name in UNDRIVABLE:
        row.searched = f"no: {UNDRIVABLE[found.name]}"
    pipe = _built(found)
    row.scheduler = type(pipe.scheduler).__name__ if getattr(pipe, "scheduler", None) is not None else ""
    row.denoiser = " + ".join(dict.fromkeys(type(module).__name__ for module in denoisers(pipe).values()))
    if row.searched:
        return
    check_pipeline(pipe)
    call = _callable(row, pipe)
    plan = _plan(row, pipe)
    _follow(row, pipe, plan, call)
    _equal_to_its_own(row, pipe, call)
    denoiser = next(iter(denoisers(pipe).values()))
    offered = _skip(row, pipe, denoiser, plan, call)
    probe = _probe(pipe, plan, call)
    _save(row, pipe, denoiser, _cut(row, pipe, denoiser, offered, plan, call), probe, saved_before)


def _built(found: Found) -> Any:
    try:
        return building.build(found)
    except NotImplementedError as e:
        raise NotTried(f"needs {e}") from e
    except Exception as e:
        raise NotTried(f"no tiny one could be built ({_said(e)})") from e


Caller = Callable[..., Any]


def _callable(row: Row, pipe: Any) -> Caller:
    """Calls the pipeline with two images, or with one if it takes no more. NotTried if neither works without a plan."""
    first: Exception | None = None
    for n in (2, 1) if "video" not in row.found.call else (1,):

        def call(steps: int = ASKED[0], seed: int = 0, n: int = n) -> Any:
            torch.manual_seed(seed)
            given = building.arguments(row.found, n)
            generators = [torch.Generator().manual_seed(i) for i in range(n)]
            extra = {"num_inference_steps": steps, "generator": generators if n > 1 else generators[0]}
            with torch.no_grad():
                return pipe(**given, **{k: v for k, v in extra.items() if k in row.found.call})

        try:
            call()
        except Exception as e:  # noqa: BLE001
            first = first or e
            continue
        if first is not None:
            row.notes.append(f"one image a call ({_said(first)})")
        return call
    assert first is not None
    raise NotTried(f"its own call does not take what is made up for it ({_said(first)})")


def _plan(row: Row, pipe: Any) -> SamplingPlan:
    """Three uneven steps with the pipeline's own scheduler, or with one that its model can be sampled with as well."""
    own = Scheduler.of(pipe.scheduler)
    n = pipe.scheduler.config.get("num_train_timesteps", 1000)
    steps = tuple(Step(timestep=int(n * share)) for share in SHARES)
    if kind_of(own.name, own.config) is None and own.name in INSTEAD:
        own = Scheduler(name=INSTEAD[own.name], config=own.config)
    plan = SamplingPlan(scheduler=own, steps=steps)
    check(pipe, plan)
    return plan


def _follow(row: Row, pipe: Any, plan: SamplingPlan, call: Caller) -> None:
    """Follow the plan whatever number of steps the pipeline is asked for; what else decides the result goes into the notes."""
    results: list[Tensor | None] = []
    for asked in ASKED:
        try:
            with follow(pipe, plan) as run:
                call(asked)
        except CannotFollow:
            raise
        except Exception as e:
            if not results:
                raise CannotFollow(f"its loop breaks on a plan ({_said(e)})") from e
            row.notes.append(f"must be asked for as many steps as the plan has ({_said(e)} otherwise)")
            break
        if run.last is None or run.steps != len(plan.steps):
            raise CannotFollow(f"its loop took {run.steps} of {len(plan.steps)} steps")
        results.append(run.last)
    else:
        if not all(torch.equal(results[0], other) for other in results[1:] if results[0] is not None and other is not None):
            raise CannotFollow("the result depends on the number of steps that it is asked for, beside the plan")
    with follow(pipe, plan) as run:
        call(seed=1)
    if results[0] is not None and run.last is not None and not torch.equal(results[0], run.last):
        row.notes.append("draws from torch's global state too: the images' own seeds do not settle them")
    changed = "" if plan.scheduler.name == row.scheduler else f" (with {plan.scheduler.name})"
    row.searched = f"yes{changed}"


def _equal_to_its_own(row: Row, pipe: Any, call: Caller) -> None:
    """The pipeline's own schedule, given as a plan, must give its own samples bit for bit."""
    own = Scheduler.of(pipe.scheduler)
    if (kind := kind_of(own.name, own.config)) is None:
        return
    with watch(pipe) as stock_run:
        call(4)
    times = pipe.scheduler.timesteps.tolist()
    levels = pipe.scheduler.sigmas.tolist() if kind == "flow" else [None] * len(times)
    taken = list(zip(times, levels, strict=False))[len(times) - stock_run.evals :]
    steps = tuple(Step(timestep=t, sigma=s) for t, s in dict(taken).items())
    try:
        with follow(pipe, SamplingPlan(scheduler=own, steps=steps)) as run:
            call(4)
    except CannotFollow as e:
        row.notes.append(f"its own schedule is no plan ({_plain(e)})")
        return
    if run.last is not None and stock_run.last is not None and not torch.equal(run.last, stock_run.last):
        scale = float((run.last - stock_run.last).abs().max() / stock_run.last.abs().max())
        row.notes.append(f"its own schedule as a plan differs from its own run by {scale:.0e}")


def _skip(row: Row, pipe: Any, denoiser: Any, plan: SamplingPlan, call: Caller) -> list[Layer]:
    """Skip one layer of each kind: not executed in its step, and skipped in all steps the same as cut. Returns all layers."""
    offered = anatomy.layers(denoiser)
    if not offered:
        row.skipped = "none known"
        return []
    kinds: dict[tuple[str, str], list[Layer]] = {}
    for layer in offered:
        kinds.setdefault((type(denoiser.get_submodule(layer.address)).__name__, layer.kind), []).append(layer)
    failed: list[str] = []
    reasons: dict[str, list[str]] = {}  # what went wrong -> where
    for (_, kind), layers in kinds.items():
        for layer in dict.fromkeys((layers[-1], layers[0], layers[len(layers) // 2])):
            try:
                wrong = _skipped(pipe, denoiser, layer, plan, call)
            except Exception as e:  # noqa: BLE001
                wrong = _said(e)
            if not wrong:
                break
            reasons.setdefault(wrong, []).append(layer.address)
        else:
            failed.append(kind)
    row.notes += [f"not {', '.join(_outermost(where))} ({wrong})" for wrong, where in reasons.items()]
    row.skipped = f"{len(offered)} layers" if not failed else f"{len(offered)} layers, but for {', '.join(failed)}"
    return offered


def _skipped(pipe: Any, denoiser: Any, layer: Layer, plan: SamplingPlan, call: Caller) -> str:
    """What went wrong when a layer was skipped; empty: nothing."""
    module = denoiser.get_submodule(layer.address)
    stays = {id(m) for name in ("conv_shortcut", "upsample", "downsample") for m in _modules(getattr(module, name, None))}
    executed: list[int] = []
    hooks = [
        leaf.register_forward_hook(lambda *_: executed.append(1))
        for leaf in module.modules()
        if isinstance(leaf, nn.Linear | nn.Conv2d) and id(leaf) not in stays
    ]
    try:
        counts, results = [], []
        for where in ((), (1,), (0, 1, 2)):
            executed.clear()
            steps = tuple(
                s.model_copy(update={"skip": (layer.address,)}) if i in where else s for i, s in enumerate(plan.steps)
            )
            with follow(pipe, SamplingPlan(scheduler=plan.scheduler, steps=steps)) as run:
                call()
            counts.append(len(executed))
            results.append(run.last)
    finally:
        for hook in hooks:
            hook.remove()
    if counts[0] == 0:
        return "is not executed at all"
    if counts[2] or not counts[1] < counts[0]:
        return f"was executed {counts[1]} times where {counts[0]} is all"
    with surgery.applied(denoiser, [Cut(address=layer.address, what="remove")]), follow(pipe, plan) as run:
        call()
    whole, _, without = results
    if run.last is None or whole is None or without is None or not torch.equal(run.last, without):
        return "skipped in all steps is not the same as cut"
    return "" if not torch.equal(whole, without) else "changes nothing"


def _outermost(addresses: list[str]) -> list[str]:
    return list(outermost(tuple(addresses)))


def _modules(module: Any) -> list[nn.Module]:
    return list(module.modules()) if isinstance(module, nn.Module) else []


def _probe(pipe: Any, plan: SamplingPlan, call: Caller) -> dict[str, Any]:
    """Keyword arguments of the denoiser's last call along the plan."""
    import inspect

    seen: dict[str, Any] = {}

    def look(step: Call, following: Next) -> Any:
        names = list(inspect.signature(type(step.module).forward).parameters)[1:]
        seen.clear()
        seen.update({**dict(zip(names, step.args, strict=False)), **step.kwargs})
        return following(step)

    with drive(pipe, Run(plan), [look]):
        call()
    plain = (Tensor, dict, list, tuple, str, int, float, bool, type(None))  # no caches
    return {k: v for k, v in seen.items() if k != "return_dict" and isinstance(v, plain)}


def _cut(row: Row, pipe: Any, denoiser: Any, offered: list[Layer], plan: SamplingPlan, call: Caller) -> list[Cut]:
    """Cut one layer and run; of several the first that a stock config can express. Returns the cut."""
    cuts = [
        Cut(address=x.address, what="remove")
        for x in offered
        if x.kind in ("transformer_block", "middle", "attention", "resnet")
    ]
    if not cuts:
        with follow(pipe, plan):
            traced = anatomy.traced(denoiser, call)
        cuts = [Cut(address=x.address, what="remove", value=x.returns) for x in traced]
    tries: list[tuple[Cut, str]] = []
    for cut in cuts[:12]:
        try:
            with surgery.applied(denoiser, [cut]), follow(pipe, plan):
                call()
                found = stock.express(denoiser)
        except Exception as e:  # noqa: BLE001
            tries.append((cut, f"! {_said(e)}"))
            continue
        row.cut = "yes" if offered else f"yes, {len(cuts)} traced blocks"
        if not isinstance(found, str):
            row.saved = "stock config"
            return [cut]
        tries.append((cut, found))
    working = [(cut, said) for cut, said in tries if not said.startswith("!")]
    if working:
        row.saved = "own code"
        return [working[0][0]]
    row.cut = f"no ({tries[0][1].removeprefix('! ')})" if tries else "none found"
    return []


def _save(row: Row, pipe: Any, denoiser: Any, cuts: list[Cut], probe: dict[str, Any], saved_before: set[str]) -> None:
    """Save the cut model and open it in a fresh process, once for each class of denoiser and way of saving."""
    key = f"{type(denoiser).__name__} {row.saved}"
    if not cuts or key in saved_before:
        return
    scratch = Path(tempfile.mkdtemp())
    try:
        building.complete(row.found, pipe)
        pipe.save_pretrained(scratch / "parent")
        model = Model(pipe, "tiny", scratch / "parent", "", UNCONDITIONAL, None, "cpu", "float32")
        export.save(model, cuts, scratch / "cut", probe, manifest={"parent": "tiny"})
        row.saved += ", opened again"
        saved_before.add(key)
    except (UserError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, NotImplementedError) as e:
        row.notes.append(f"saving as {row.saved} fails ({_said(e).replace(str(scratch), 'folder')})")
        row.saved = "no"
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _said(error: Exception) -> str:
    """The beginning of an error's first line, without anything that differs from run to run."""
    text = one_line(error).replace("|", "/").replace("`", "")
    return f"{type(error).__name__}: {text[:90].rstrip()}{'...' if len(text) > 90 else ''}"


def _plain(error: Exception) -> str:
    return str(error).replace("|", "/").rstrip(".")
