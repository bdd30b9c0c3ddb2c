"""Spaces with everything in them, stand-ins for quality that need no model, and a way to play a method against them."""

import random
from dataclasses import replace

from lissom.core import methods
from lissom.core.candidate import Cut, Scheduler, Seeds, Step
from lissom.core.measurement import Measurement, Trial
from lissom.search._space import Choice, Genome, Price, Space
from lissom.search._task import Task

SEEDS = Seeds(role="search", base=0, count=8)
LAYERS = tuple(f"layer.{i}" for i in range(6))
BEST = (900, 600, 300, 50)  # timesteps


def choice(name, *lost):
    return Choice(name=name, cuts=tuple(Cut(address=a, what="remove") for a in lost), lost=frozenset(lost))


# "both" loses what "second" loses a part of, and "layer" what a step could skip: they exclude each other.
SITES = (
    (choice("first", "block.0"), choice("both", "block.0", "block.1")),
    (choice("second", "block.1.attn"), choice("layer", "layer.5")),
)
PRICES = {
    "macs": Price(100, {a: 5 + i for i, a in enumerate(LAYERS)}, {"first": 4, "both": 9, "second": 3, "layer": 10}),
    "latency": Price(20, dict.fromkeys(LAYERS, 1), {"first": 2, "both": 3, "second": 1, "layer": 1}),
    "params": Price(1000, {}, {"first": 100, "both": 200, "second": 50, "layer": 150}),
}


MADE_BY = {"macs": {"small": 20, "large": 180}, "latency": {"small": 6, "large": 30}}  # what other models cost


def space(
    steps=4, budget=None, layers=LAYERS, sites=SITES, high=999.0, whole=True, prices=PRICES, evaluations=(), ways=("skip",),
    models=(),
):  # fmt: skip
    if models:
        its = {name: {m: cost for m, cost in MADE_BY.get(name, {}).items() if m in models} for name in prices}
        prices = {name: replace(price, models=its[name]) for name, price in prices.items()}
    return Space(
        scheduler=Scheduler(name="DDIMScheduler"), steps=steps, low=0.0 if whole else 1.0, high=high, whole=whole,
        prices=prices, layers=layers, sites=sites, budget=budget or {}, evaluations=evaluations, ways=ways,
        models=tuple(models),
    )  # fmt: skip


def task(name, trials=60, objectives=("fid",), known=(), start=(), **changes):
    """A task on what the method can vary."""
    varies = methods.load("search", name).varies
    parts = {"layers": () if "skips" not in varies else LAYERS, "sites": () if "cuts" not in varies else SITES}
    made = space(**{**parts, **changes})
    asked = Task(space=made, trials=trials, seeds=SEEDS, objectives=objectives, start=tuple(start))
    scored = tuple(answer(asked.request(plain(made, times), "fixed"), -1) for times in known)
    return Task(space=made, trials=trials, seeds=SEEDS, objectives=objectives, known=scored, start=tuple(start))


def plain(made, times):
    """The genome with these timesteps, nothing left out."""
    return made.consistent(Genome(tuple(Step(timestep=t) for t in times)))


def quality(request):
    """Smooth: best at the timesteps BEST, and everything that is left out hurts a little."""
    steps = request.candidate.plan.steps
    off = sum(abs(s.timestep - t) for s, t in zip(steps, BEST, strict=False))
    left_out = 5 * sum(len(s.skip) for s in steps) + 2 * sum(len(s.reuse) for s in steps)
    small = sum(9 * (1000 - s.timestep) / 1000 for s in steps if s.model == "small")  # harmless in the noise
    large = 3 * sum(s.model == "large" for s in steps)
    return 1 + off + left_out + small - large + 8 * len(request.candidate.cuts)


def answer(request, number, fails=lambda n: False):
    if fails(number):
        return Trial(number=number, request=request, state="failed", error="boom")
    measured = Measurement(metric="fid", value=quality(request), direction="lower", n=8)
    return Trial(number=number, request=request, measurements=(measured,))


def play(name, the_task, fails=lambda n: False, seed=0, **settings):
    """All requests of a method, answered by the landscape."""
    module = methods.load("search", name)
    proposals = module.search(the_task, module.Config(**settings), random.Random(seed))
    requests, trials = [], None
    try:
        while True:
            batch = proposals.send(trials)
            trials = [answer(r, len(requests) + i, fails) for i, r in enumerate(batch)]
            requests += batch
    except StopIteration:
        return requests


def best(requests):
    return min(quality(r) for r in requests)


def hypervolume(requests, worst=(700.0, 1.0)):
    """Of quality and MACs: the area that the front dominates, up to a worst point."""
    points = sorted((quality(r), r.costs["macs"]) for r in requests)
    area, height = 0.0, worst[1]
    for value, cost in points:
        if value < worst[0] and cost < height:
            area, height = area + (worst[0] - value) * (height - cost), cost
    return area
