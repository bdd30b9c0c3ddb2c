"""From what a distill stage trained, saved and measured to report.json, report.md and report.html. Nothing is measured here."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..core import artifact, methods
from ..core.artifact import Artifact
from ..core.candidate import SamplingPlan
from ..core.errors import UserError, one_line
from ..core.files import write_text
from ..report import distill_html, distill_markdown, model_card
from ..report.distill_schema import Check, DistillReport, Line
from ._prune_report import opens_with
from ._report import again, environment
from .distill import LOSS

if TYPE_CHECKING:
    from ..core.export import Saved
    from ..distill._loop import Outcome
    from ._before_after import Quality
    from .distill import Lesson

POINTS = 400  # of the curves of losses at most


def build(
    lesson: "Lesson", outcome: "Outcome", saved: "Saved", quality: "Quality", seconds: float, folder: Path
) -> DistillReport:
    """The report of a stage, without images: those are scored apart. seconds: spent on training in this session."""
    stage, student, teacher, trainer = lesson.stage, lesson.student, lesson.teacher, lesson.trainer
    context, structure = student.context, saved.structure
    plan_steps = stage.steps or student.default_steps
    report = DistillReport(
        lissom=__version__,
        model=student.model.ref,
        model_hash=student.model.fingerprint,
        teacher=teacher.model.ref,
        teacher_hash=teacher.model.fingerprint,
        pipeline=type(student.model.pipe).__name__,
        denoiser=structure.cls.removeprefix("Pruned"),
        preset=stage.distill,
        losses={term.name: term.weight for term in trainer.terms},
        paper=methods.presets()[stage.distill].paper,
        stage={k: v for k, v in stage.plain().items() if k != "settings"},
        seed=context.recipe.seed,
        params=student.model.parameters,
        teacher_params=teacher.model.parameters,
        scales=lesson.scales,
        sites={term.name: tuple(site.student for site in term.sites) for term in trainer.terms if term.sites},
        curve=curve(trainer.log, [term.name for term in trainer.terms]),
        check_label=_label(lesson, outcome),
        checks=tuple(_check(at, value, folder) for at, value in outcome.checks),
        iterations=outcome.iteration,
        asked=stage.iterations,
        stopped_early=outcome.stopped_early,
        restarts=outcome.restarts,
        frozen=outcome.frozen,
        opens_plain=structure.opens == "stock",
        open_with=opens_with(structure.opens, saved.variant, saved.folder),
        not_plain_because=structure.reason,
        reload_difference=saved.difference,
        data=lesson.data.facts,
        spent={"training_seconds": seconds, "iterations": float(trainer.done_here)} if trainer.done_here else {},
        command=again(folder, context.options),
        environment=environment(student.model.device, student.model.dtype),
    )
    if not quality.scores:
        return report
    known = {"samples": quality.evaluate.samples, "steps": plan_steps, "reference": teacher.reference}
    return report.model_copy(update=known)


def curve(log: Path, terms: list[str]) -> tuple[Line, ...]:
    """The lines of losses.jsonl; of many, neighbours are averaged."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    every = -(-len(rows) // POINTS) or 1
    groups = [rows[k : k + every] for k in range(0, len(rows), every)]
    return tuple(_averaged(group, terms) for group in groups)


def _averaged(rows: list[dict[str, float]], terms: list[str]) -> Line:
    def mean(name: str) -> float:
        return sum(row[name] for row in rows) / len(rows)

    return Line(
        iteration=int(rows[-1]["iteration"]),
        terms={name: mean(name) for name in terms},
        total=mean("total"),
        gradient_norm=mean("gradient_norm"),
        learning_rate=rows[-1]["learning_rate"],
    )


def write(folder: Path, report: DistillReport) -> None:
    """Write report.json, report.md and report.html."""
    write_text(folder / "report.json", report.model_dump_json(indent=2) + "\n")
    write_text(folder / "report.md", distill_markdown.render(report))
    write_text(folder / "report.html", distill_html.render(report, folder))


def rewrite(folder: Path) -> None:
    """Write the Markdown and the HTML page again from report.json. UserError while there is none."""
    path = folder / "report.json"
    if not path.is_file():
        raise UserError(f"{folder}: the stage is not finished, so there is nothing to report yet. Go on with --resume.")
    try:
        report = DistillReport.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{path}: not a report of this version ({one_line(e)}). Run the stage again.") from e
    write(folder, report)


def finish(
    folder: Path,
    report: DistillReport,
    model: Path,
    plan: SamplingPlan | None,
    license_: dict[str, str],
    origin: str,
    stage: str,
) -> Artifact:
    """Write card and manifests; the stage's own comes last, and says that it is complete. stage: its hash."""
    written = artifact.manifest(model)
    assert written is not None  # by `_pruned_model.save`
    measurements = next((s.measurements for s in report.scored if s.name == "after"), ())
    final = written.model_copy(update={"measurements": measurements, "stage": stage})
    write_text(model / "README.md", model_card.distilled(report, license_, origin=origin))
    artifact.save(model, final, plan)
    artifact.save(folder, final, plan)
    return Artifact(ref=str(folder), plan=plan)


def _label(lesson: "Lesson", outcome: "Outcome") -> str:
    images = "" if lesson.watched == LOSS else f" on {lesson.stage.check_samples} images"
    return f"{lesson.watched}{images}" if outcome.checks else ""


def _check(at: int, value: float, folder: Path) -> Check:
    sheet = f"samples/iteration-{at:06}.png"
    return Check(iteration=at, value=value, sheet=sheet if (folder / sheet).is_file() else None)
