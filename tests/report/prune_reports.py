"""Synthetic reports of pruned models: U-Nets as in Stable Diffusion 1.5 (38 layers) and SDXL (87), DiTs of 12 and 57 blocks."""

import random

from lissom.core.candidate import Cut, Seeds
from lissom.core.measurement import Measurement
from lissom.report.prune_schema import Additivity, Latency, LayerScore, PruneReport, Scored, Size
from lissom.report.schema import Ratio

EVIL = "a|b</title><script>alert(1)</script>\n\n# c \"'&$x$ ![d](http://evil/e.png) `f`"
FAST = (Latency(batch=1, before=31.2, after=24.6, ratio=Ratio(value=0.788, low=0.771, high=0.803)),)
FAST += (Latency(batch=64, before=802.0, after=586.0, ratio=Ratio(value=0.731, low=0.722, high=0.74)),)
SLOW = (Latency(batch=1, before=10.0, after=11.2, ratio=Ratio(value=1.12, low=1.08, high=1.16)), FAST[1])
LEVEL = (Latency(batch=1, before=10.0, after=9.9, ratio=Ratio(value=0.99, low=0.97, high=1.01)), FAST[1])


def sd15() -> list[tuple[str, str]]:
    """22 resnets and 16 attentions, in the order of `named_modules`: attentions before resnets, the middle last."""
    found = []
    for stage in range(4):
        attentions = 0 if stage == 3 else 2
        found += [(f"down_blocks.{stage}.attentions.{i}", "attention") for i in range(attentions)]
        found += [(f"down_blocks.{stage}.resnets.{i}", "resnet") for i in range(2)]
    for stage in range(4):
        found += [(f"up_blocks.{stage}.attentions.{i}", "attention") for i in range(0 if stage == 0 else 3)]
        found += [(f"up_blocks.{stage}.resnets.{i}", "resnet") for i in range(3)]
    found += [("mid_block.attentions.0", "attention"), *((f"mid_block.resnets.{i}", "resnet") for i in range(2))]
    return found


def sdxl() -> list[tuple[str, str]]:
    """17 resnets and 70 transformer blocks."""
    deep = {("down_blocks", 1): 2, ("down_blocks", 2): 10, ("up_blocks", 0): 10, ("up_blocks", 1): 2}
    found = []
    for arm, count in (("down_blocks", 2), ("up_blocks", 3)):
        for stage in range(3):
            for i in range(count):
                inside = f"{arm}.{stage}.attentions.{i}.transformer_blocks"
                found += [(f"{inside}.{j}", "transformer_block") for j in range(deep.get((arm, stage), 0))]
            found += [(f"{arm}.{stage}.resnets.{i}", "resnet") for i in range(count)]
    found += [(f"mid_block.attentions.0.transformer_blocks.{j}", "transformer_block") for j in range(10)]
    return found + [(f"mid_block.resnets.{i}", "resnet") for i in range(2)]


def blocks(**lists: int) -> list[tuple[str, str]]:
    return [(f"{name}.{i}", "transformer_block") for name, n in lists.items() for i in range(n)]


NETWORKS = {
    "sd15": sd15(),
    "sdxl": sdxl(),
    "dit12": blocks(transformer_blocks=12),
    "flux": blocks(transformer_blocks=19, single_transformer_blocks=38),
}


def layers(network: str, cut: float = 0.25) -> tuple[LayerScore, ...]:
    """Scores over four decades, higher at both ends of the network; the cheapest are cut."""
    rng, names = random.Random(network), NETWORKS[network]
    scores = {a: 10 ** rng.uniform(-4.2, -1.2) * (4 if ".0." in a else 1) for a, _ in names}
    gone = sorted(scores, key=lambda a: scores[a])[: int(cut * len(names))]
    return tuple(
        LayerScore(
            address=address,
            kind=kind,
            params=int(10 ** rng.uniform(5.5, 7.2)),
            macs=int(10 ** rng.uniform(8, 9.8)),
            score=scores[address],
            cut=address in gone,
        )
        for address, kind in names
    )


def measured(metric: str, value: float, n: int = 2048) -> Measurement:
    rng, shared = random.Random(f"{metric}{value}"), random.Random(metric)  # what both models share cancels when paired
    return Measurement(
        metric=metric,
        value=value,
        direction="lower" if metric == "fid" else "higher",
        features="zoo:judge" if metric == "fid" else None,
        reference="ab12" * 16,
        n=n,
        prompts="cd34" * 16,
        seeds=Seeds(role="report", base=0, count=n),
        replicates=tuple(value * (1 + shared.gauss(0, 0.01) + rng.gauss(0, 0.004)) for _ in range(40)),
        versions={"torch": "2.14", "diffusers": "0.42"},
    )


def build(network: str = "sd15", **changes: object) -> PruneReport:
    """A report as `lissom prune laptop` would write it."""
    found = layers(network)
    rng = random.Random(3)
    sums = tuple(10 ** rng.uniform(-3, -0.7) for _ in range(24))
    record: dict[str, object] = {
        "lissom": "0.1",
        "model": "sd-legacy/stable-diffusion-v1-5@451f4fe",
        "model_hash": "ef56" * 16,
        "pipeline": "StableDiffusionPipeline",
        "denoiser": "UNet2DConditionModel",
        "method": "laptop",
        "settings": {"candidates": 38, "seed": 0},
        "paper": "https://arxiv.org/abs/2404.11098",
        "keep": 0.7,
        "before": Size(params=859_520_964, macs=803_000_000_000, disk=3_438_167_540),
        "after": Size(params=601_664_675, macs=652_036_000_000, disk=2_406_717_278),
        "latency": FAST,
        "score_label": "output loss",
        "layers": found,
        "cuts": tuple(Cut(address=layer.address, what="remove") for layer in found if layer.cut),
        "loss": 0.0131,
        "predicted_loss": 0.0094,
        "additivity": Additivity(
            sums=sums, losses=tuple(s * 10 ** rng.gauss(0.12, 0.08) for s in sums), rank_correlation=0.965, ratio=1.32
        ),
        "scored": (
            Scored(name="before", measurements=(measured("fid", 12.3), measured("clip_score", 0.312)), sheet="before.png"),
            Scored(name="after", measurements=(measured("fid", 14.1), measured("clip_score", 0.311)), sheet="after.png"),
        ),
        "samples": 2048,
        "steps": 25,
        "reference": "MS-COCO 2014 val, 5,000 images",
        "opens_plain": True,
        "open_with": 'import diffusers\n\npipe = diffusers.DiffusionPipeline.from_pretrained("runs/sd15/model")',
        "renamed": 7,
        "reload_difference": 3.1e-7,
        "calibration": {"calls": 64, "prompts": "recipe", "dtype": "float16"},
        "spent": {"seconds": 1261.0, "full_forwards": 2496.0},
        "command": "lissom prune laptop sd15 --keep 0.7 --seed 0",
        "environment": {"python": "3.13", "gpu": "H200"},
        "warnings": ("The calibration prompts are few.",),
    }
    return PruneReport.model_validate(record | changes)


def unscored(network: str = "sd15") -> PruneReport:
    """As random_cuts and slim_unet leave it: layers without scores, no losses."""
    found = tuple(layer.model_copy(update={"score": None}) for layer in layers(network))
    nothing = {"score_label": "", "loss": None, "predicted_loss": None, "additivity": None, "calibration": {}, "spent": {}}
    return build(network, method="random_cuts", paper="", layers=found, **nothing)


def hostile() -> PruneReport:
    """Every text that a model, a user or a method brings is made to break out."""
    report = build(opens_plain=False)
    layer = report.layers[0].model_copy(update={"address": EVIL, "kind": EVIL})
    first = report.scored[0].measurements[0].model_copy(update={"features": EVIL, "unit": EVIL, "versions": {EVIL: EVIL}})
    scored = report.scored[0].model_copy(update={"measurements": (first,), "sheet": EVIL})
    texts = (
        "model", "model_hash", "pipeline", "denoiser", "method", "score_label", "reference", "open_with", "not_plain_because",
        "command",
    )  # fmt: skip
    return report.model_copy(
        update={
            **dict.fromkeys(texts, EVIL),
            "paper": "javascript:alert(1)",
            "settings": {EVIL: EVIL},
            "calibration": {EVIL: EVIL},
            "environment": {EVIL: EVIL},
            "spent": {EVIL: 1.0},
            "warnings": (EVIL,),
            "layers": (layer, *report.layers[1:]),
            "cuts": (Cut(address=EVIL, what="replace", value=EVIL), *report.cuts),
            "scored": (scored, report.scored[1]),
        }
    )
