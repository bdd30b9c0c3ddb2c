"""Synthetic reports of searches with cuts and parts, of several objectives with a front, with predicted times."""

import itertools
import math
import random
from typing import Any

from lissom.core.candidate import Cut, SamplingPlan, Scheduler, Seeds, Step
from lissom.core.measurement import Measurement, ratio
from lissom.report.schema import Gained, LatencyTable, Ratio, Row, Scored, SearchReport, Spent
from lissom.tests.report.prune_reports import EVIL, sd15

LAYERS = tuple(address for address, _ in sd15())
BASELINES = {"leading": (761, 501, 251, 1), "trailing": (999, 749, 499, 249), "linspace": (999, 666, 333, 0)}
FIXED = {"leading": 31.7, "trailing": 20.1, "linspace": 28.2}
UPWARD = ("clip_score", "accuracy")
CUTS = (
    Cut(address="down_blocks.3.resnets.1", what="remove"),
    Cut(address="mid_block.attentions.0", what="remove"),
    Cut(address="up_blocks.1.attentions.2.transformer_blocks.0.attn1", what="keep_heads", value=(0, 1, 2, 5)),
    Cut(address="up_blocks.2", what="keep_layers", value=(0, 2)),
    Cut(address="up_blocks.3.attentions.2", what="replace", value="empty"),
)


def plan(times: tuple[float, ...], skips: dict[int, tuple[str, ...]] | None = None) -> SamplingPlan:
    steps = tuple(Step(timestep=t, skip=(skips or {}).get(i, ())) for i, t in enumerate(times))
    return SamplingPlan(scheduler=Scheduler(name="DDIMScheduler", config={"num_train_timesteps": 1000}), steps=steps)


def measured(metric: str, value: float, role: str = "report", n: int = 2048, bare: bool = False) -> Measurement:
    """A value with half-samples, most of whose spread is shared by all of the same seeds; bare: without."""
    shared, own = random.Random(f"{metric}{role}"), random.Random(f"{metric}{value}{role}")
    return Measurement(
        metric=metric,
        value=value,
        direction="higher" if metric in UPWARD else "lower",
        features="zoo:judge",
        reference="ab12" * 16 if metric == "fid" else None,
        n=n,
        prompts="cd34" * 16,
        seeds=Seeds(role=role, base=0, count=n),  # type: ignore[arg-type]
        replicates=() if bare else tuple(value * (1 + shared.gauss(0, 0.013) + own.gauss(0, 0.006)) for _ in range(40)),
        versions={"torch": "2.14", "diffusers": "0.42"},
    )


def quotient(before: Scored, after: Scored) -> Ratio:
    value, interval = ratio(before.measurements[0], after.measurements[0])
    assert interval is not None
    return Ratio(value=value, low=interval[0], high=interval[1])


def scored(
    name: str,
    times: tuple[float, ...],
    fid: float,
    clip: float = 0.66,
    skips: Any = None,
    cuts: tuple[Cut, ...] = (),
    **changes: Any,
) -> Scored:
    """Measured on the report's seeds; costs are made up from what is left out, unless they are given."""
    chosen = plan(times, skips)
    left_out = sum(len(step.skip) for step in chosen.steps) / len(chosen.steps)
    macs = round((1 - 0.021 * left_out) * (1 - 0.055 * len(cuts)), 4)
    record: dict[str, Any] = {
        "name": name,
        "plan": chosen,
        "cuts": cuts,
        "measurements": (measured("fid", fid), measured("clip_score", clip)),
        "macs": int(macs * 3e9),
        "macs_ratio": macs,
        "costs": {"latency": round(0.12 + 0.88 * macs, 4), "params": round(1 - 0.061 * len(cuts), 4)},
        "searched_value": round(fid * 1.42 + 0.4, 3),
        "rescored": measured("fid", round(fid * 1.19, 3), "rescore", 1024, bare=True),
    }
    return Scored(**{**record, **changes})


def rows(trials: int, cutting: bool, dropping: bool, fids: tuple[float, ...]) -> list[Row]:
    """What a search proposes: better and cheaper with time, some failures, and with `dropping` many with a sixth of the images."""
    rng, found = random.Random(7), []
    for i in range(trials):
        times = tuple(sorted(rng.sample(range(1000), 4), reverse=True))
        skips = {s: tuple(rng.sample(LAYERS, rng.randint(0, 4))) for s in range(4)}
        cuts = tuple(rng.sample(CUTS, rng.randint(0, 4))) if cutting else ()
        one = scored("", times, 20.0, skips=skips, cuts=tuple(sorted(cuts, key=lambda cut: cut.canonical())))
        value = (
            min(fids) * 1.42 * (1 + 1.6 * math.exp(-3.2 * i / trials) * rng.random()) + 8 * (1 - one.macs_ratio) * rng.random()
        )
        failed, early = rng.random() < 0.06, dropping and rng.random() < 0.55
        found.append(
            Row(
                number=i,
                origin="uniform" if i < 12 else "laptop 0.7" if cutting and i < 15 else f"mutation of {rng.randrange(i)}",
                state="failed" if failed else "complete",
                plan=one.plan,
                cuts=one.cuts,
                samples=64 if early else 0,
                value=None if failed else round(value * (2.1 if early else 1), 3),
                others={} if failed else {"clip_score": round(0.62 + rng.random() / 20, 4)},
                macs_ratio=one.macs_ratio,
                costs=one.costs,
                calls=4,
                seconds=2.5,
                error="OutOfMemoryError: CUDA out of memory at batch 1" if failed else None,
            )
        )
    return found


def timing(checked: int = 9) -> LatencyTable:
    rng = random.Random(5)
    predicted = tuple(round(rng.uniform(0.58, 0.97), 4) for _ in range(checked))
    return LatencyTable(
        batch=8,
        device="cuda (NVIDIA H100 80GB HBM3)",
        latent=(4, 64, 64),
        whole=31.24,
        layers={address: round(rng.uniform(0.2, 1.6), 3) for address in LAYERS},
        predicted=predicted,
        measured=tuple(round(share + rng.gauss(0.008, 0.011), 4) for share in predicted),
    )


def build(winner: Scored, trials: int = 80, cutting: bool = True, dropping: bool = False, **changes: Any) -> SearchReport:
    """A report as `lissom search` would write it."""
    fixed = [
        scored(name, times, FIXED[name], rescored=None, cuts=(), costs={"latency": 1.0, "params": 1.0})
        for name, times in BASELINES.items()
    ]
    best, fid = fixed[1], winner.measurements[0].value if winner.measurements else 12.0
    chosen = changes.get("front") or (winner,)
    found = rows(trials - len(chosen), cutting, dropping, (fid,))
    for number, one in enumerate((*chosen, *fixed), len(found)):
        values = {
            "value": one.searched_value,
            "others": {m.metric: m.value for m in one.measurements[1:]},
            "macs_ratio": one.macs_ratio,
            "costs": one.costs,
        }
        again = one.rescored.value if one.rescored else None
        found.append(
            Row(
                number=number,
                origin="fixed" if one in fixed else "mutation of 30",
                state="complete",
                plan=one.plan,
                cuts=one.cuts,
                rescored=again,
                calls=4,
                **values,
            )
        )
    record: dict[str, Any] = {
        "lissom": "0.2",
        "model": "sd-legacy/stable-diffusion-v1-5@451f4fe",
        "model_hash": "ef56" * 16,
        "pipeline": "StableDiffusionPipeline",
        "denoiser_parameters": 859_520_964,
        "method": "autodiffusion",
        "settings": {"population": 20, "seed": 0},
        "paper": "https://arxiv.org/abs/2309.10438",
        "objective": "fid",
        "objective_label": "FD[zoo:judge]",
        "space": ("timesteps", "skips", "cuts") if cutting else ("timesteps", "skips"),
        "steps": 4,
        "trials": trials,
        "samples": 384,
        "report_samples": 2048,
        "budget": {"macs": 0.75},
        "reference": {"search": "MS-COCO 2014, first half (search)", "report": "MS-COCO 2014, second half (report)"},
        "winner": winner,
        "baselines": tuple(fixed),
        "best_fixed": "trailing",
        "ratio": quotient(best, winner) if winner.measurements else None,
        "candidates": tuple(found),
        "spent": Spent(evaluations=trials + 17, calls=340, plain_calls=412, seconds=4312.0),
        "command": "lissom run runs/sd15/recipe.yaml --out runs/sd15-again --device cuda",
        "environment": {"python": "3.13", "gpu": "H100"},
    }
    return SearchReport.model_validate(record | changes)


def one_objective(**changes: Any) -> SearchReport:
    """FD alone, with cuts, its elites and its parts; many candidates were dropped after 64 images."""
    times, skips = (951, 713, 391, 87), {2: LAYERS[:1], 3: LAYERS[4:7]}
    winner = scored("searched", times, 14.9, 0.67, skips, CUTS)
    elites = [
        winner,
        scored("elite 2", (951, 705, 380, 91), 0, skips={1: LAYERS[3:5]}, cuts=CUTS[:2], measurements=()),
        scored("elite 3", (944, 713, 391, 87), 0, skips=skips, cuts=(), measurements=()),
        scored("elite 4", (901, 640, 333, 55), 0, skips=None, cuts=CUTS[1:4], measurements=()),
    ]
    for i, one in enumerate(elites):
        again = measured("fid", (17.4, 17.9, 18.22, 19.6)[i], "rescore", 1024, bare=True)
        elites[i] = one.model_copy(update={"rescored": again, "searched_value": 21.0 + i / 3})
    stages = (
        ("fixed", scored("trailing", BASELINES["trailing"], FIXED["trailing"])),
        ("timesteps", scored("timesteps", times, 13.6, 0.68)),
        ("skips", scored("skips", times, 13.55, 0.68, skips)),
        ("cuts", winner),
    )
    gained = [Gained(part="fixed", scored=stages[0][1])]
    for (_, before), (part, after) in itertools.pairwise(stages):
        gained.append(Gained(part=part, scored=after, ratio=quotient(before, after)))
    record: dict[str, Any] = {
        "front": tuple(elites),
        "gained": tuple(gained),
        "opens": "remote_code",
        "not_plain_because": "no stock config leaves single heads out",
        "open_with": "from diffusers import DiffusionPipeline\n\n"
        'pipe = DiffusionPipeline.from_pretrained("runs/sd15/model", trust_remote_code=True)',
        "conditions": {"control": "values are corrected by what trailing does on the same seeds"},
        "dropping": True,
    }
    record |= changes
    return build(record.pop("winner", elites[0]), **record)


FRONT = ((11.8, 0.962, 1), (12.9, 0.871, 2), (14.6, 0.764, 3), (16.1, 0.702, 4), (19.9, 0.631, 5), (26.0, 0.548, 5))


def members(clips: tuple[float, ...] = (0.70, 0.69, 0.69, 0.68, 0.65, 0.61)) -> tuple[Scored, ...]:
    """Six candidates of rising FD and falling latency."""
    found = []
    for i, (fid, latency, cuts) in enumerate(FRONT):
        times = (951 - 7 * i, 713 - 3 * i, 391 + 5 * i, 87 + i)
        costs = {"latency": latency, "params": round(1 - 0.061 * cuts, 4)}
        skips = {2: LAYERS[:i], 3: LAYERS[i : 2 * i]}
        found.append(scored("searched" if i == 2 else f"front {i + 1}", times, fid, clips[i], skips, CUTS[:cuts], costs=costs))
    return tuple(found)


def two_objectives(picked: int = 3, **changes: Any) -> SearchReport:
    """FD against predicted latency: a front of six, the third picked, with the table of times."""
    front = changes.pop("front", members())
    record: dict[str, Any] = {
        "objectives": ("fid", "latency"),
        "front": front,
        "picked": picked,
        "latency": timing(),
        "budget": {},
        "opens": "stock",
        "open_with": 'from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained("runs/sd15/model")',
    }
    record |= changes
    return build(record.pop("winner", (front or members())[picked - 1]), **record)


def two_metrics(**changes: Any) -> SearchReport:
    """FD against CLIP score: no cost among the objectives."""
    front = members((0.62, 0.64, 0.66, 0.68, 0.69, 0.71))
    return two_objectives(**({"objectives": ("fid", "clip_score"), "latency": None, "front": front} | changes))


def hostile() -> SearchReport:
    """Every new text that a model, a user or a method brings is made to break out."""
    evil = (Cut(address=EVIL, what="replace", value=EVIL),)
    front = tuple(one.model_copy(update={"cuts": evil}) for one in members())
    table = timing().model_copy(update={"device": EVIL, "layers": {EVIL: 1.0}})
    texts = {"not_plain_because": EVIL, "open_with": EVIL, "space": (EVIL,), "conditions": {EVIL: EVIL}, "opens": "remote_code"}
    return two_objectives(front=front, latency=table, gained=one_objective().gained, **texts)
