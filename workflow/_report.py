"""From the stored trials to report.json, report.md, report.html and reproduce.py. Nothing is measured here."""

import platform
import shlex
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..core import artifact, models
from ..core.candidate import Candidate, SamplingPlan, Seeds
from ..core.errors import UserError
from ..core.files import write_text
from ..core.measurement import Measurement, Trial, ratio
from ..core.models import Model
from ..core.stages import SearchStage
from ..core.store import TrialStore
from ..report import html, markdown, reproduce
from ..report.schema import Gained, LatencyTable, Ratio, Row, Scored, SearchReport, Spent
from ._elites import parts
from .context import Options

if TYPE_CHECKING:
    from ._plans import Plans
    from ._subject import Subject

REPRODUCED = 16  # images that reproduce.py makes


def facts(
    stage: SearchStage,
    module: ModuleType,
    config: Any,
    subject: "Subject",
    plans: "Plans",
    latency: LatencyTable | None,
    folder: Path,
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
        "objective": stage.objective[0],
        "objectives": list(stage.objective) if len(stage.objective) > 1 else [],
        "space": list(stage.space),
        "steps": stage.steps,
        "trials": stage.trials,
        "samples": stage.samples,
        "report_samples": evaluate.samples,
        "budget": dict(stage.budget),
        "call": subject.call,
        "reference": {"search": f"{subject.reference} (search)", "report": f"{subject.reference} (report)"},
        "fixed": {name: plan.plain() for name, plan in plans.fixed.items()},
        "uncut_macs": plans.space.prices["macs"].dearest * sum(plans.space.evaluations),
        "latency": latency.plain() if latency else None,
        "conditions": _conditions(stage) | _models(plans, model),
        "shared_reference": subject.shared_reference,
        "environment": environment(model.device, model.dtype),
    }


def _models(plans: "Plans", model: Model) -> dict[str, str]:
    """The other models that may make steps, and what one of their evaluations costs beside the pipeline's own."""
    price = plans.space.prices["macs"]
    return {
        f"model {name}": f"{model.others[name].model}, {price.models[name] / price.whole:.3f} of the MACs, "
        f"weights hash {model.others[name].model_hash}"
        for name in plans.space.models
    }


def _conditions(stage: SearchStage) -> dict[str, str]:
    """What was done to find more for less, in words."""
    found = {}
    if stage.fidelity:
        found["images"] = f"{', '.join(map(str, stage.fidelity))}: only the better part of a batch goes on to the next number"
    if stage.screen is not None:
        found["screened"] = f"{stage.screen:.0%} of every batch by its distance to the model's own many-step images"
    if stage.control:
        found["control variate"] = "values are corrected by the best fixed schedule's on the same images"
    if stage.warm_start is not None:
        found["opened with"] = f"the best plans of {Path(stage.warm_start).name}"
    if stage.unlearned and stage.seeded_by is not None:
        found["first cuts"] = f"those of {stage.seeded_by}"
    if stage.learned:
        found["learned scores"] = f"of {', '.join(Path(run).name for run in stage.learned)}: the least go first"
    return found


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
    recall = stores["search"].recall
    known = recall("facts")
    if known is not None and "uncut_macs" not in known:
        raise UserError(
            f"{folder}: the search was made by an earlier lissom, which did not note costs. Its reports stay as they are."
        )
    if known is None or recall("winner") is None:
        raise UserError(f"{folder}: the search is not finished, so there is nothing to report yet. Go on with --resume.")
    winner, objective = Candidate.model_validate(recall("winner")), known["objective"]
    trials = {name: _by_candidate(store) for name, store in stores.items()}
    last = trials["report"].get(winner.digest())
    if last is None:
        raise UserError(f"{folder}: the winner is not scored on the report's seeds yet. Go on with `lissom run {folder}`.")
    if last.state == "failed":
        raise UserError(
            f"{folder}: the winner failed on the report's seeds: {last.error} Try it again with `lissom run {folder}`."
        )
    scored = _Scores(known, trials, folder)
    best = scored.of("searched", winner)
    assert best is not None  # it is complete
    schedules = {name: Candidate(plan=SamplingPlan.model_validate(plan)) for name, plan in known["fixed"].items()}
    fixed = scored.several(schedules)
    if not fixed:
        found = [trials["report"].get(candidate.digest()) for candidate in schedules.values()]
        errors = "; ".join(dict.fromkeys(t.error or "" for t in found if t is not None)) or "not scored yet"
        raise UserError(f"{folder}: no fixed schedule to compare with on the report's seeds ({errors}).")
    top = min(fixed, key=lambda s: _cost(s, objective))
    members = {str(n): Candidate.model_validate(plain) for n, plain in enumerate(recall("members"), 1)}
    everything = [t for store in stores.values() for t in store.trials.values()]
    rows = sorted((scored.row(t) for t in trials["search"].values()), key=lambda r: r.number)
    return SearchReport(
        lissom=__version__,
        **{k: known[k] for k in known if k in SearchReport.model_fields},
        objective_label=_measured(best, objective).label,
        winner=best,
        front=tuple(scored.of(number, member) or scored.unmeasured(number, member) for number, member in members.items()),
        picked=recall("picked"),
        gained=scored.gained(top, winner),
        baselines=fixed,
        best_fixed=top.name,
        ratio=_ratio(_measured(top, objective), _measured(best, objective)),
        candidates=tuple(rows),
        spent=Spent(
            evaluations=len(everything),
            calls=sum(t.calls for t in everything),
            plain_calls=sum(t.plain_calls for t in everything),
            seconds=round(sum(t.seconds for t in everything), 1),
        ),
        stock_call=None
        if winner.cuts or winner.plan is None
        else reproduce.stock_call(winner.plan, known["pipeline"], known["call"]),
        **recall("opens", {}),
        warnings=_warnings(known, recall("stopped"), stores),
    )


def _by_candidate(store: TrialStore) -> dict[str, Trial]:
    """The trials of a study by their candidate's digest; of one that was scored on several numbers of images, the largest."""
    ordered = sorted(
        store.trials.values(), key=lambda t: (t.request.seeds.count, t.state == "complete", -t.request.seeds.start)
    )
    return {t.request.candidate.digest(): t for t in ordered}


class _Scores:
    """What the studies know of a candidate."""

    def __init__(self, known: Mapping[str, Any], trials: Mapping[str, Mapping[str, Trial]], folder: Path) -> None:
        """trials: by study, then by the candidate's digest."""
        self.known, self.trials, self.folder = known, trials, folder

    def of(self, name: str, candidate: Candidate) -> Scored | None:
        """On the report's seeds; None where that failed or is missing."""
        digest, objective = candidate.digest(), self.known["objective"]
        trial = self.trials["report"].get(digest)
        if trial is None or trial.state == "failed" or candidate.plan is None:
            return None
        first, sheet = self.trials["search"].get(digest), f"samples/{name}.png"
        whole = first is not None and first.request.seeds.count == self.known["samples"]
        own = first.measured(objective) if first is not None and whole else None
        return self.unmeasured(name, candidate).model_copy(
            update={
                "measurements": trial.measurements,
                "sheet": sheet if (self.folder / sheet).is_file() else None,
                "searched_value": own.value if own else None,
            }
        )

    def unmeasured(self, name: str, candidate: Candidate) -> Scored:
        """Without what the report's seeds say."""
        digest = candidate.digest()
        studies = (self.trials[study].get(digest) for study in ("rescore", "report", "search"))
        trial, second = next(t for t in studies if t is not None), self.trials["rescore"].get(digest)
        costs = trial.request.costs
        assert candidate.plan is not None
        return Scored(
            name=name,
            plan=candidate.plan,
            cuts=candidate.cuts,
            measurements=(),
            macs=round(costs["macs"] * self.known["uncut_macs"]),
            macs_ratio=costs["macs"],
            costs={k: v for k, v in costs.items() if k != "macs"},
            rescored=second.measured(self.known["objective"]) if second else None,
        )

    def several(self, candidates: Mapping[str, Candidate]) -> tuple[Scored, ...]:
        found = (self.of(name, candidate) for name, candidate in candidates.items())
        return tuple(scored for scored in found if scored is not None)

    def gained(self, fixed: Scored, winner: Candidate) -> tuple[Gained, ...]:
        """The way from the best fixed schedule to the winner, part by part; nothing where a part could not be scored."""
        way, before = [Gained(part="fixed", scored=fixed)], fixed
        for part, candidate in parts(winner).items():
            scored = self.of(part, candidate)
            if scored is None:
                return ()
            objective = self.known["objective"]
            ratio_ = _ratio(_measured(before, objective), _measured(scored, objective))
            way.append(Gained.model_validate({"part": part, "scored": scored, "ratio": ratio_}))
            before = scored
        return tuple(way)

    def row(self, trial: Trial) -> Row:
        plan, objective, costs = trial.request.candidate.plan, self.known["objective"], trial.request.costs
        assert plan is not None
        own, again_ = trial.measured(objective), self.trials["rescore"].get(trial.request.candidate.digest())
        second = again_.measured(objective) if again_ else None
        return Row(
            number=trial.number,
            origin=trial.request.origin,
            state=trial.state,
            plan=plan,
            cuts=trial.request.candidate.cuts,
            samples=trial.request.seeds.count,
            value=own.value if own else None,
            others={m.metric: m.value for m in trial.measurements if m.metric != objective},
            macs_ratio=costs["macs"],
            costs={k: v for k, v in costs.items() if k != "macs"},
            rescored=second.value if second else None,
            calls=trial.calls,
            seconds=trial.seconds,
            error=trial.error,
        )


def write(folder: Path, stores: Mapping[str, TrialStore]) -> SearchReport:
    """Write report.json, report.md and report.html."""
    report = build(stores, folder)
    write_text(folder / "report.json", report.model_dump_json(indent=2) + "\n")
    write_text(folder / "report.md", markdown.render(report))
    write_text(folder / "report.html", html.render(report, folder))
    return report


def write_reproduce(
    folder: Path, plan: SamplingPlan, subject: "Subject", seeds: Seeds, layers: Mapping[str, str], cut: Path | None = None
) -> None:
    """Write reproduce.py: the same images with torch and diffusers alone. Says so where a short script cannot.

    layers: class of each layer that the plan skips. cut: the folder of the model that was cut; the plan is for that one.
    """
    model = subject.model
    few = seeds.model_copy(update={"count": min(REPRODUCED, seeds.count)})
    local = cut is not None or model.ref.startswith("zoo:") or Path(model.ref).is_dir()
    opened = cut or model.folder
    others = {name: model.others[name].model for name in plan.models}
    folders = [models.folder_of(ref) for ref in others.values()]
    places = [
        str(at) if ref.startswith("zoo:") or Path(ref).is_dir() else ref.partition("@")[0]
        for ref, at in zip(others.values(), folders, strict=True)
    ]
    call = reproduce.ModelCall(
        pipeline=type(model.pipe).__name__,
        reference=str(opened) if local else model.ref.partition("@")[0],
        revision=None if local else model.ref.partition("@")[2] or None,
        seeds=few.values(),
        rows=tuple(subject.conditions.row(i) for i in few.indices()),
        arguments=subject.call,
        layers=layers,
        denoiser=model.denoiser_name,
        dtype=model.dtype,
        device=model.device,
        trust_remote_code=subject.context.options.trust_remote_code or any(map(needs_code, (opened, *folders))),
        models=dict(zip(others, places, strict=True)),
    )
    try:
        write_text(folder / "reproduce.py", reproduce.emit(plan, call))
    except UserError as e:
        (folder / "reproduce.py").unlink(missing_ok=True)  # that of an earlier session's winner
        subject.context.progress.warn(str(e))


def needs_code(folder: Path) -> bool:
    """Whether plain diffusers opens a model that lissom made with trust_remote_code only."""
    made = artifact.manifest(folder)
    return made is not None and made.opens == "remote_code"


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
