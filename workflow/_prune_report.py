"""From what a prune stage chose, saved and measured to report.json, report.md and report.html. Nothing is measured here."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..core.errors import UserError, one_line
from ..core.files import write_text
from ..core.stages import PruneStage
from ..report import prune_html, prune_markdown
from ..report.prune_schema import Additivity, Latency, LayerScore, PruneReport, Size
from ._gradients import Gradients
from ._latents import Latents
from ._lesson import Lessons
from ._losses import Losses
from ._prune_job import structured
from ._report import again, environment
from ._subject import Subject
from ._trajectories import Trajectories

if TYPE_CHECKING:
    from ..core.anatomy import Layer
    from ..core.candidate import Cut
    from ..core.export import Saved
    from ..core.models import Model
    from ..prune._task import Pruned
    from ._gauge import Gauge
    from ._prune_job import Job


@dataclass(frozen=True)
class Measured:
    """What the stage found out, beside the method's own answer."""

    before: Size
    after: Size
    layers: "tuple[Layer, ...]"  # that could have been cut
    loss: float | None  # of all cuts together
    latency: tuple[Latency, ...]


def sizes(model: "Model", gauge: "Gauge", cuts: "tuple[Cut, ...]", saved: "Saved") -> tuple[Size, Size]:
    """What the denoiser weighs, before and after."""
    from ..core import export

    others = model.parameters - gauge.params  # of a second denoiser, which stays as it is
    before = Size(params=gauge.params + others, macs=gauge.macs, disk=export.disk_size(model.folder / model.denoiser_name))
    return before, Size(params=saved.structure.params + others, macs=gauge.after(cuts)[1], disk=saved.bytes)


def build(
    stage: PruneStage,
    job: "Job",
    subject: Subject,
    result: "Pruned",
    saved: "Saved",
    measured: Measured,
    losses: Losses | Latents | Lessons | Trajectories | Gradients | None,
    folder: Path,
) -> PruneReport:
    """The report of a stage, without images: those are scored later. subject: the parent."""
    model, structure, module, scores = subject.model, saved.structure, job.module, _by_layer(result.scores)
    counts = {width.address: width.count for width in job.widths}
    return PruneReport(
        lissom=__version__,
        model=model.ref,
        model_hash=model.fingerprint,
        pipeline=type(model.pipe).__name__,
        denoiser=structure.cls.removeprefix("Pruned"),
        method=stage.method,
        settings=job.config.model_dump(mode="json", exclude_none=True),
        paper=module.Config.paper,
        stage={k: v for k, v in stage.plain().items() if k != "settings"},
        seed=subject.context.recipe.seed,
        keep=None if getattr(module, "own_target", False) or structured(job.config) else stage.share,
        of=stage.of,
        before=measured.before,
        after=measured.after,
        latency=measured.latency,
        score_label=result.label,
        layers=tuple(_layer(layer, scores, structure.names, counts) for layer in measured.layers),
        cuts=result.cuts,
        loss=measured.loss,
        loss_is=losses.what if losses is not None else "",
        predicted_loss=result.predicted if losses is not None else None,
        additivity=additivity(result),
        opens_plain=structure.opens == "stock",
        open_with=opens_with(structure.opens, saved.variant, saved.folder),
        not_plain_because=structure.reason,
        renamed=sum(new not in (None, old) for old, new in structure.names.items()),
        reload_difference=saved.difference,
        calibration=_calibration(stage, subject, losses) | _maskable(job, measured),
        spent=losses.spent() if losses is not None else {},
        command=again(folder, subject.context.options),
        environment=environment(model.device, model.dtype),
        warnings=result.warnings,
    )


def write(folder: Path, report: PruneReport) -> None:
    """Write report.json, report.md and report.html."""
    write_text(folder / "report.json", report.model_dump_json(indent=2) + "\n")
    write_text(folder / "report.md", prune_markdown.render(report))
    write_text(folder / "report.html", prune_html.render(report, folder))


def rewrite(folder: Path) -> None:
    """Write the Markdown and the HTML page again from report.json. UserError while there is none."""
    path = folder / "report.json"
    if not path.is_file():
        raise UserError(f"{folder}: the stage is not finished, so there is nothing to report yet. Go on with --resume.")
    try:
        report = PruneReport.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{path}: not a report of this version ({one_line(e)}). Run the stage again.") from e
    write(folder, report)


def opens_with(opens: str, variant: str | None, folder: Path) -> str:
    """Python that opens the model where lissom is not installed."""
    options = [f'"{folder.as_posix()}"', *([f'variant="{variant}"'] if variant else [])]
    if opens != "stock":
        options.append("trust_remote_code=True")
    return f"from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained({', '.join(options)})"


def _by_layer(scores: dict[str, float]) -> dict[str, float]:
    """Scores of options by the layers that they cut: layers that only go together have the score of all of them.

    >>> _by_layer({"a": 1.0, "b (replace)": 2.0, "c + d": 3.0})
    {'a': 1.0, 'b': 2.0, 'c': 3.0, 'd': 3.0}
    """
    return {part.partition(" ")[0]: score for name, score in scores.items() for part in name.split(" + ")}


def _layer(layer: "Layer", scores: dict[str, float], names: dict[str, str | None], counts: dict[str, int]) -> LayerScore:
    gone = any(new is None and (layer.address == a or layer.address.startswith(a + ".")) for a, new in names.items())
    return LayerScore(
        address=layer.address,
        kind=layer.kind,
        params=layer.freed,
        macs=layer.macs,
        score=scores.get(layer.address),
        cut=gone,
        width=counts.get(layer.address),
    )


def additivity(result: "Pruned") -> Additivity | None:
    """Spearman's correlation of sums and losses, and how much larger the losses are; None where there is nothing to compare."""
    from statistics import median

    from scipy.stats import spearmanr

    found = result.additivity
    pairs = [(s, real) for s, real in zip(found.sums, found.losses, strict=True) if s > 0] if found else []
    if len({s for s, _ in pairs}) < 3:  # of fewer there is no order
        return None
    sums, reals = zip(*pairs, strict=True)
    rank = float(spearmanr(sums, reals).statistic)
    if math.isnan(rank):  # all losses alike
        return None
    return Additivity(sums=sums, losses=reals, rank_correlation=rank, ratio=median(real / s for s, real in pairs))


def _maskable(job: "Job", measured: Measured) -> dict[str, object]:
    """Of a method that makes layers narrower: how much could have gone, and how much of that did."""
    if not job.widths or not (could := sum(layer.params for layer in job.layers)):
        return {}
    gone = measured.before.params - measured.after.params
    return {
        "maskable": f"{could / measured.before.params:.1%} of the parameters could have gone; {gone / could:.1%} of them went"
    }


def _calibration(
    stage: PruneStage, subject: Subject, losses: Losses | Latents | Lessons | Trajectories | Gradients | None
) -> dict[str, object]:
    if losses is None:
        return {}
    source = "the model's own trajectories" if stage.data in (None, "teacher") else stage.data
    found = losses.facts()
    return {"images": found.pop("images"), "from": source, **found, "seeds": f"calibrate, base {subject.context.recipe.seed}"}
