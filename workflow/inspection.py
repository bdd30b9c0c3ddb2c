"""What a model is made of: its layers, what each weighs, what its absence leaves, which cuts go together, how they are saved."""

from typing import TYPE_CHECKING, Any

from ..core.candidate import Cut
from ._gauge import Gauge
from ._subject import Subject
from .context import Context

if TYPE_CHECKING:
    from ..core.anatomy import Layer


def inspect(ref: str, context: Context, *, layers: bool = False) -> dict[str, Any]:
    """Parameters and MACs of a model's denoiser, and its layers. layers: also how each cut would be saved (slower).

    ref: config:NAME for a structure without weights. MACs are of one image: per solver step, guidance's second half included,
    where the pipeline can be run; per denoiser call for a structure.
    """
    if ref.startswith("config:"):
        from ..core import blueprints

        blueprint = blueprints.load(ref.removeprefix("config:"))
        gauge = Gauge(blueprint.denoiser, latent=blueprint.latent, text_tokens=blueprint.text_tokens)
        made_of = {"model": ref, "pipeline": blueprint.pipeline, "source": blueprint.source}
        total, known = gauge.macs, gauge.layers()
    else:
        subject = Subject.load(ref, context, painting=False)
        gauge, total, known = _loaded(subject)
        made_of = {
            "model": subject.model.ref,
            "model_hash": subject.model.fingerprint,
            "pipeline": type(subject.model.pipe).__name__,
            "scheduler": type(subject.model.pipe.scheduler).__name__,
        }
    return made_of | _described(gauge, total, known, layers)


def _loaded(subject: Subject) -> "tuple[Gauge, int, list[Layer]]":
    from dataclasses import replace

    from ..core import cost
    from ._prune_job import gauge_of

    gauge = gauge_of(subject)
    with subject.asking():
        costs = cost.measure(subject.model.pipe, {**subject.conditions.arguments(range(1)), **subject.call})
    ratio = costs.total / gauge.macs  # 2 with guidance; layers that only tracing found are not in the pipeline's count
    known = [replace(one, macs=costs.layers.get(one.address, round(ratio * (one.macs or 0)))) for one in gauge.layers()]
    return gauge, costs.total, known


def _described(gauge: Gauge, total: int, known: "list[Layer]", layers: bool) -> dict[str, Any]:
    from ..core import anatomy, surgery

    rows = [
        {
            "address": one.address,
            "kind": one.kind,
            "parameters": one.params,
            "freed": one.freed,
            "macs": one.macs,
            "removal": one.removal,
        }
        for one in known
    ]
    found = {
        "denoiser": type(gauge.denoiser).__name__,
        "parameters": gauge.params,
        "label_table_parameters": anatomy.label_tables(gauge.denoiser),
        "macs_per_step": total,
        "layers": rows,
        "together": [[cut.plain() for cut in two] for two in surgery.pairs(gauge.counted)],
    }
    if layers:
        for row, one in zip(rows, known, strict=True):
            row["opens"] = _opens(gauge, Cut(address=one.address, what="remove", value=one.returns))
    return found


def _opens(gauge: Gauge, cut: Cut) -> str:
    """How a model without this one layer would be saved: stock, or remote_code."""
    from ..core import stock, surgery

    with surgery.applied(gauge.denoiser, [cut]):
        return "remote_code" if isinstance(stock.express(gauge.denoiser), str) else "stock"
