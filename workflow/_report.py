"""From the stored trials to report.json, report.md, report.html and reproduce.py. Nothing is measured here."""

import platform
import shlex
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..core import artifact
from ..core.candidate import Candidate, SamplingPlan, Seeds
from ..core.cost import Costs, plan_macs
from ..core.errors import UserError
from ..core.files import write_text
from ..core.measurement import Measurement, Trial, ratio
from ..core.recipe import SearchStage
from ..core.store import TrialStore
from ..report import html, markdown, reproduce
from ..report.schema import Ratio, Row, Scored, SearchReport, Spent
from .context import Options

if TYPE_CHECKING:
    from ._subject import Subject
    from .search import Plans

REPRODUCED = 16  # images that reproduce.py makes


def facts(
    stage: SearchStage, module: ModuleType, config: Any, subject: "Subject", plans: "Plans", folder: Path
) -> dict[str, Any]:
    """What the report says about the run beside its trials, as JSON that is stored with the study."""
    model, evaluate = subject.model, subject.context.recipe.evaluate
    return {
        "command": again(folder, subject.context.options),
        "model": model.ref,
        "model_hash": model.fingerprint,
        "pipeline": type(model.pipe).__name__,
        "denoiser_parameters": model.parameters,
        "method": stage.method,
        "settings": config.model_dump(mode="json"),
        "paper": module.Config.paper,
        "objective": stage.objective,
        "steps": stage.steps,
        "trials": stage.trials,
        "samples": stage.samples,
        "report_samples": evaluate.samples,
        "budget": dict(stage.budget),
        "call": subject.call,
        "reference": {"search": f"{subject.reference} (search)", "report": f"{subject.reference} (report)"},
        "fixed": {name: plan.plain() for name, plan in plans.fixed.items()},
        "costs": {"total": plans.costs.total, "layers": dict(plans.costs.layers), "params": plans.costs.params},
        "shared_reference": subject.shared_reference,
        "environment": environment(model.device, model.dtype),
    }


def again(folder: Path, options: Options) -> str:
    """The command that makes the whole run anew, from where this one was started."""
    run = folder if (folder / "recipe.yaml").is_file() else folder.parent
    usual, words = Options(), ["lissom", "run", str(run / "recipe.yaml"), "--out", f"{run}-again"]
    for name in ("device", "dtype", "offload", "chunk"):
        if (value := getattr(options, name)) != getattr(usual, name):
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def environment(device: str, dtype: str) -> dict[str, str]:
    """Versions and machine, for the record."""
    from importlib.metadata import version

    import torch

    names = ("torch", "diffusers", "transformers", "optuna", "deap", "open_clip_torch")
    found = {name: version(name) for name in names}
    kind = torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine()
    return {
        "lissom": __version__,
        "python": platform.python_version(),
        **found,
        "device": f"{device} ({kind})",
        "dtype": dtype,
        "threads": str(torch.get_num_threads()),
    }


def build(stores: Mapping[str, TrialStore], folder: Path) -> SearchReport:
    """The report of a search from its three studies. Raises UserError while the search is unfinished."""
    attributes = stores["search"].study.user_attrs
    known = attributes.get("facts")
    winner_text = attributes.get("winner")
    if known is None or winner_text is None:
        raise UserError(f"{folder}: the search is not finished, so there is nothing to report yet. Go on with --resume.")
    winner, objective, steps = SamplingPlan.model_validate_json(winner_text), known["objective"], known["steps"]
    costs = Costs(total=known["costs"]["total"], layers=known["costs"]["layers"], params=known["costs"]["params"])

    def share(plan: SamplingPlan) -> float:
        return plan_macs(costs, plan) / (steps * costs.total)

    by_plan = {name: {t.request.candidate.digest(): t for t in store.trials.values()} for name, store in stores.items()}
    last = by_plan["report"].get(_digest(winner))
    if last is None:
        raise UserError(f"{folder}: the winner is not scored on the report's seeds yet. Go on with `lissom run {folder}`.")
    if last.state == "failed":
        raise UserError(
            f"{folder}: the winner failed on the report's seeds: {last.error} Try it again with `lissom run {folder}`."
        )

    def scored(name: str, plan: SamplingPlan, trial: Trial) -> Scored:
        digest = trial.request.candidate.digest()
        first, second = by_plan["search"].get(digest), by_plan["rescore"].get(digest)
        own = first.measured(objective) if first else None
        sheet = f"samples/{name}.png"
        return Scored(
            name=name,
            plan=plan,
            measurements=trial.measurements,
            macs=plan_macs(costs, plan),
            macs_ratio=share(plan),
            sheet=sheet if (folder / sheet).is_file() else None,
            searched_value=own.value if own else None,
            rescored=second.measured(objective) if second else None,
        )

    best = scored("searched", winner, last)
    schedules = {name: SamplingPlan.model_validate(plan) for name, plan in known["fixed"].items()}
    trials = {name: by_plan["report"].get(_digest(plan)) for name, plan in schedules.items()}
    fixed = tuple(scored(n, schedules[n], t) for n, t in trials.items() if t is not None and t.state == "complete")
    if not fixed:
        errors = "; ".join(dict.fromkeys(t.error or "" for t in trials.values() if t is not None)) or "not scored yet"
        raise UserError(f"{folder}: no fixed schedule to compare with on the report's seeds ({errors}).")
    top = min(fixed, key=lambda s: _cost(s, objective))
    found = _measured(best, objective)
    quotient = _ratio(_measured(top, objective), found)
    everything = [t for store in stores.values() for t in store.trials.values()]
    warnings = _warnings(known, attributes.get("stopped"), stores)
    rows = sorted(
        (_row(t, objective, by_plan["rescore"], share) for t in stores["search"].trials.values()), key=lambda r: r.number
    )
    return SearchReport(
        lissom=__version__,
        **{k: known[k] for k in known if k in SearchReport.model_fields},
        objective_label=found.label,
        winner=best,
        baselines=fixed,
        best_fixed=top.name,
        ratio=quotient,
        candidates=tuple(rows),
        spent=Spent(
            evaluations=len(everything),
            calls=sum(t.calls for t in everything),
            plain_calls=sum(t.plain_calls for t in everything),
            seconds=round(sum(t.seconds for t in everything), 1),
        ),
        stock_call=reproduce.stock_call(winner, known["pipeline"], known["call"]),
        warnings=warnings,
    )


def write(folder: Path, stores: Mapping[str, TrialStore]) -> SearchReport:
    """Write report.json, report.md and report.html."""
    report = build(stores, folder)
    write_text(folder / "report.json", report.model_dump_json(indent=2) + "\n")
    write_text(folder / "report.md", markdown.render(report))
    write_text(folder / "report.html", html.render(report, folder))
    return report


def write_reproduce(folder: Path, plan: SamplingPlan, subject: "Subject", seeds: Seeds) -> None:
    """Write reproduce.py: the same images with torch and diffusers alone. Says so where a short script cannot."""
    model = subject.model
    few = seeds.model_copy(update={"count": min(REPRODUCED, seeds.count)})
    local = model.ref.startswith("zoo:") or Path(model.ref).is_dir()
    call = reproduce.ModelCall(
        pipeline=type(model.pipe).__name__,
        reference=str(model.folder) if local else model.ref.partition("@")[0],
        revision=None if local else model.ref.partition("@")[2] or None,
        seeds=few.values(),
        rows=tuple(subject.conditions.row(i) for i in few.indices()),
        arguments=subject.call,
        layers=reproduce.layer_classes(model.denoiser, plan),
        denoiser=model.denoiser_name,
        dtype=model.dtype,
        device=model.device,
        trust_remote_code=subject.context.options.trust_remote_code or needs_code(model.folder),
    )
    try:
        write_text(folder / "reproduce.py", reproduce.emit(plan, call))
    except UserError as e:
        subject.context.progress.warn(str(e))


def needs_code(folder: Path) -> bool:
    """Whether plain diffusers opens a model that lissom made with trust_remote_code only."""
    made = artifact.manifest(folder)
    return made is not None and made.opens == "remote_code"


def _digest(plan: SamplingPlan) -> str:
    return Candidate(plan=plan).digest()


def _row(trial: Trial, objective: str, rescored: Mapping[str, Trial], share: Any) -> Row:
    plan = trial.request.candidate.plan
    assert plan is not None
    own, again = trial.measured(objective), rescored.get(trial.request.candidate.digest())
    second = again.measured(objective) if again else None
    return Row(
        number=trial.number,
        origin=trial.request.origin,
        state=trial.state,
        plan=plan,
        value=own.value if own else None,
        others={m.metric: m.value for m in trial.measurements if m.metric != objective},
        macs_ratio=share(plan),
        rescored=second.value if second else None,
        calls=trial.calls,
        seconds=trial.seconds,
        error=trial.error,
    )


def _measured(scored: Scored, objective: str) -> Measurement:
    return next(m for m in scored.measurements if m.metric == objective)


def _cost(scored: Scored, objective: str) -> float:
    found = _measured(scored, objective)
    return found.value if found.direction == "lower" else -found.value


def _ratio(fixed: Measurement, searched: Measurement) -> Ratio | None:
    """Above 1: searched is better, whichever way the metric points."""
    pair = (fixed, searched) if searched.direction == "lower" else (searched, fixed)
    if pair[1].value <= 0:
        return None
    value, interval = ratio(*pair)
    return Ratio(value=value, low=interval and interval[0], high=interval and interval[1])


def _warnings(known: Mapping[str, Any], stopped: int | None, stores: Mapping[str, TrialStore]) -> tuple[str, ...]:
    found = []
    if known["shared_reference"]:
        found.append("search and report were compared with the same reference images: the gain may be optimistic.")
    if stopped is not None:
        found.append(f"stopped by --max-time after {stopped} of {known['trials']} candidates.")
    failed = sum(t.state == "failed" for store in stores.values() for t in store.trials.values())
    if failed:
        found.append(f"{failed} evaluations failed; the table of candidates names the errors.")
    return tuple(found)
