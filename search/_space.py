"""What a search varies: K timesteps as a set, layers that a step leaves out, who makes it, and cuts of the model, under budgets.

A step leaves a layer out by skipping it or by reusing what it did before (`Step`): one gene of each step and layer, with up to
three states. A step that another model makes leaves nothing out.
"""

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..core.candidate import Candidate, Cut, SamplingPlan, Scheduler, Step

Way = Literal["skip", "reuse"]  # how a step leaves a layer out: the fields of Step


@dataclass(frozen=True)
class Genome:
    """A candidate as methods vary it."""

    steps: tuple[Step, ...]  # by descending timestep; a timestep and what it leaves out always travel together
    shape: tuple[int, ...] = ()  # of every site of the space, which option is chosen; 0: the site is left whole

    @property
    def times(self) -> tuple[float, ...]:
        return tuple(step.timestep for step in self.steps)


@dataclass(frozen=True)
class Choice:
    """Something that can be cut from the model, as one of the options of a site."""

    name: str
    cuts: tuple[Cut, ...]
    lost: frozenset[str]  # addresses of the layers that are gone then; another choice that loses one of them excludes this one


@dataclass(frozen=True)
class Price:
    """One kind of cost (MACs, milliseconds, parameters), and what saves how much of it."""

    whole: float  # of one denoiser evaluation, nothing left out
    layers: Mapping[str, float] = field(default_factory=dict)  # saved where one evaluation skips the layer
    choices: Mapping[str, float] = field(default_factory=dict)  # saved in every evaluation by a choice, by its name
    beside: float = 0.0  # what a run costs besides: text encoder, solver, decoder
    models: Mapping[str, float] = field(default_factory=dict)  # one evaluation of another model, by its name

    @property
    def dearest(self) -> float:
        """One evaluation of the model that costs most."""
        return max(self.whole, *self.models.values()) if self.models else self.whole


@dataclass(frozen=True)
class Space:
    """What a candidate may contain. All randomness comes in as an argument; genomes go out repaired: K distinct, sorted, valid."""

    scheduler: Scheduler
    steps: int  # K
    low: float  # lowest and highest timestep that the scheduler takes
    high: float
    whole: bool  # timesteps are integers (else fractions of 1/1000 of the range)
    prices: Mapping[str, Price]  # by name: macs, latency, params
    layers: tuple[str, ...] = ()  # that a step may leave out, none inside another
    sites: tuple[tuple[Choice, ...], ...] = ()  # of the model, each whole or cut in one of several ways
    budget: Mapping[str, float] = field(default_factory=dict)  # at most this share of the uncut K-step run of the dearest model
    evaluations: tuple[int, ...] = ()  # denoiser evaluations of each step; one where nothing is given
    ways: tuple[Way, ...] = ("skip",)  # how a step may leave them out
    models: tuple[str, ...] = ()  # others than the pipeline's own that may make a step

    @property
    def grid(self) -> float:
        """The finest difference between two timesteps."""
        return 1.0 if self.whole else (self.high - self.low) / 1000

    def snap(self, t: float) -> float:
        """The nearest valid timestep."""
        t = min(max(t, self.low), self.high)
        return float(round(t)) if self.whole else round(t, 4)

    def draw(self, rng: random.Random) -> float:
        """A timestep, uniformly."""
        if self.whole:
            return float(rng.randint(int(self.low), int(self.high)))
        return self.snap(rng.uniform(self.low, self.high))

    def random_times(self, rng: random.Random) -> Genome:
        """K distinct timesteps, uniformly; nothing left out, nothing cut."""
        return self.repair([Step(timestep=self.draw(rng))], (), rng)

    def random_steps(self, rng: random.Random) -> Genome:
        """K distinct timesteps, and who makes each where several models can, uniformly; nothing left out, nothing cut."""
        genome = self.random_times(rng)
        if not self.models:
            return genome
        makers = (None, *self.models)
        return Genome(tuple(made_by(step, rng.choice(makers)) for step in genome.steps), genome.shape)

    def repair(self, genes: Sequence[Step], shape: Sequence[int], rng: random.Random) -> Genome:
        """Exactly K distinct valid timesteps, sorted; surplus genes leave at random, missing ones are drawn.

        A noise level of its own (a step of the stock schedule has one) stays behind: it belongs to its old neighbours. Of two
        choices that exclude each other the one of the earlier site stays, and what is cut cannot be left out.
        """
        kept: dict[float, Step] = {}
        for gene in genes:
            t = self.snap(gene.timestep)
            kept.setdefault(t, gene.model_copy(update={"timestep": t, "sigma": None}))
        while len(kept) > self.steps:
            del kept[rng.choice(sorted(kept))]
        while len(kept) < self.steps:
            t = self.draw(rng)
            kept.setdefault(t, Step(timestep=t))
        return self.consistent(Genome(tuple(kept[t] for t in sorted(kept, reverse=True)), tuple(shape)))

    def consistent(self, genome: Genome) -> Genome:
        """The genome without choices that earlier ones exclude; what is cut is not left out of a step, nor is anything in a step of
        another model; what no earlier step executed is executed where it was to be reused.
        """
        lost: set[str] = set()
        shape = []
        for site, pick in zip(self.sites, genome.shape or (0,) * len(self.sites), strict=True):
            gone = site[pick - 1].lost if pick else frozenset()
            fits = not any(_within(a, b) or _within(b, a) for a in gone for b in lost)
            shape.append(pick if fits else 0)
            lost |= gone if fits else set()
        steps = tuple(step if step.model is None else made_by(step, step.model) for step in genome.steps)
        if lost:
            steps = tuple(_without(step, {a for a in step.left_out if any(_within(a, b) for b in lost)}) for step in steps)
        done: list[Step] = []
        for step in steps:
            new = {a for a in step.reuse if not any(earlier.executes(a) for earlier in done)}
            done.append(_without(step, new) if new else step)
        return Genome(tuple(done), tuple(shape))

    def chosen(self, genome: Genome) -> tuple[Choice, ...]:
        return tuple(site[pick - 1] for site, pick in zip(self.sites, genome.shape, strict=True) if pick)

    def left(self, genome: Genome) -> tuple[str, ...]:
        """The layers that no cut has taken: a step may leave these out."""
        lost = [a for choice in self.chosen(genome) for a in choice.lost]
        return tuple(a for a in self.layers if not any(_within(a, b) for b in lost))

    def cost(self, genome: Genome, name: str = "macs") -> float:
        """Of all steps, per image."""
        price, chosen = self.prices[name], self.chosen(genome)
        one = price.whole - sum(price.choices[choice.name] for choice in chosen)
        # Of a layer that has lost a part, leaving it out saves what is left of it.
        gone: dict[str, float] = {}
        for choice in chosen:
            for a in {a for a in self.layers if all(_within(b, a) for b in choice.lost)}:
                gone[a] = gone.get(a, 0.0) + price.choices[choice.name]

        def of(step: Step) -> float:
            if step.model is not None:
                return price.models.get(step.model, one)
            # (Parameters are saved by no step: then a layer has no price, and what a cut saved of it stays saved.)
            return one - sum(price.layers[a] - gone.get(a, 0.0) for a in step.left_out if a in price.layers)

        return price.beside + sum(count * of(step) for count, step in zip(self._counts, genome.steps, strict=True))

    def share(self, genome: Genome, name: str = "macs") -> float:
        """A cost as a share of that of K uncut steps of the dearest model."""
        price = self.prices[name]
        return self.cost(genome, name) / (price.beside + sum(self._counts) * price.dearest)

    def shares(self, genome: Genome) -> dict[str, float]:
        """All costs as shares, rounded so that they read and compare well."""
        return {name: round(self.share(genome, name), 9) for name in self.prices}

    def fits(self, genome: Genome) -> bool:
        """Whether every budget holds."""
        return not self.broken(genome)

    def broken(self, genome: Genome) -> dict[str, float]:
        """The budgets that do not hold, and by how much."""
        over = {name: self.share(genome, name) - most for name, most in self.budget.items()}
        return {name: excess for name, excess in over.items() if excess > 1e-9}

    def cheapest(self, name: str) -> Genome:
        """The candidate that leaves out every layer and cuts what saves most of a cost, of options that exclude each other the
        larger first; or another model in every step, if that costs less. Its timesteps mean nothing."""
        price, shape, lost = self.prices[name], [0] * len(self.sites), set[str]()
        options = [
            (price.choices[choice.name], k, pick) for k, site in enumerate(self.sites) for pick, choice in enumerate(site, 1)
        ]
        for saved, k, pick in sorted(options, reverse=True):
            gone = self.sites[k][pick - 1].lost
            if saved > 0 and not shape[k] and not any(_within(a, b) or _within(b, a) for a in gone for b in lost):
                shape[k] = pick
                lost |= gone
        times = [self.snap(self.high - i * self.grid) for i in range(self.steps)]
        out = {way: self.layers for way in self.ways[:1]}  # what a first step cannot reuse is executed there
        own = self.consistent(Genome(tuple(Step.model_validate({"timestep": t, **out}) for t in times), tuple(shape)))
        others = [Genome(tuple(Step(timestep=t, model=other) for t in times), tuple(shape)) for other in self.models]
        return min(own, *others, key=lambda genome: self.cost(genome, name)) if others else own

    def fill(self, genome: Genome, rng: random.Random) -> Genome:
        """Leave out further layers and make further cuts, drawn at random among those that save something of a budget that does
        not hold yet, until every budget holds. Where earlier choices exclude what would, the cuts that save most replace them.
        """
        last = False
        while broken := self.broken(genome):
            ways = self._ways(genome, broken)
            if not ways and not last:
                last, most = True, max(broken, key=lambda name: broken[name])
                genome = self.consistent(Genome(genome.steps, self.cheapest(most).shape))
                continue
            if not ways:
                return genome
            rng.shuffle(ways)
            steps = [*genome.steps]
            for i, what in ways:  # layers, until a budget holds or another thing's turn has come: the ways are others then
                if isinstance(what, int):
                    genome = self.recut(Genome(tuple(steps), genome.shape), i, what)
                    break
                if isinstance(what, Maker):
                    steps[i] = made_by(steps[i], what.model)
                    genome = self.consistent(Genome(tuple(steps), genome.shape))
                    break
                way, layer = what
                if layer in steps[i].left_out:  # by now, in the other way
                    continue
                steps[i] = leaving(steps[i], way, {*getattr(steps[i], way), layer})
                saved = self._counts[i] / sum(self._counts)
                broken = {
                    n: more - saved * self.prices[n].layers.get(layer, 0.0) / self.prices[n].dearest
                    for n, more in broken.items()
                }
                if min(broken.values()) <= 1e-9:
                    genome = self.consistent(Genome(tuple(steps), genome.shape))
                    break
            else:
                genome = self.consistent(Genome(tuple(steps), genome.shape))
        return genome

    def recut(self, genome: Genome, site: int, pick: int) -> Genome:
        """The genome with another option at one site; layers that are cut then are not left out any more."""
        shape = [*genome.shape]
        shape[site] = pick
        return self.consistent(Genome(genome.steps, tuple(shape)))

    def candidate(self, genome: Genome) -> Candidate:
        cuts = [cut for choice in self.chosen(genome) for cut in choice.cuts]
        return Candidate(plan=SamplingPlan(scheduler=self.scheduler, steps=genome.steps), cuts=tuple(cuts))

    def genome(self, candidate: Candidate) -> Genome | None:
        """The genome of a candidate; None where this space does not hold its cuts."""
        if candidate.plan is None:
            return None
        cuts, shape = set(candidate.cuts), []
        for site in self.sites:
            fitting = [i for i, choice in enumerate(site, 1) if cuts.issuperset(choice.cuts)]
            shape.append(max(fitting, key=lambda i: len(site[i - 1].cuts), default=0))
        found = self.consistent(Genome(candidate.plan.steps, tuple(shape)))
        return found if set(self.candidate(found).cuts) == cuts else None

    @property
    def _counts(self) -> tuple[int, ...]:
        return self.evaluations or (1,) * self.steps

    def _ways(self, genome: Genome, names: Iterable[str]) -> "list[tuple[int, tuple[Way, str] | Maker | int]]":
        """All that saves some of these costs: (step, layer to leave out and how), (step, who else makes it) and (site, option that
        saves more than the present one)."""
        names = list(names)
        layers = [a for a in self.left(genome) if any(self.prices[name].layers.get(a, 0) > 0 for name in names)]
        ways: list[tuple[int, tuple[Way, str] | Maker | int]] = []
        chosen = self.chosen(genome)
        prices = {n: self.prices[n] for n in {*names, *self.budget}} if self.models else {}
        uncut = {n: price.whole - sum(price.choices[choice.name] for choice in chosen) for n, price in prices.items()}
        for i, step in enumerate(genome.steps):
            ways += [(i, Maker(other)) for other in (self._cheaper(step, names, uncut) if self.models else ())]
            if step.model is not None:
                continue
            out = set(step.left_out)
            for way in self.ways:
                able = (a for a in layers if a not in out)
                ways += [(i, (way, a)) for a in able if way == "skip" or any(s.executes(a) for s in genome.steps[:i])]
        for k, site in enumerate(self.sites):
            others = (
                other[pick - 1].lost
                for j, (other, pick) in enumerate(zip(self.sites, genome.shape, strict=True))
                if pick and j != k
            )
            lost = [a for gone in others for a in gone]
            now = site[genome.shape[k] - 1].name if genome.shape[k] else None
            ways += [
                (k, pick)
                for pick, choice in enumerate(site, 1)
                if self._saves(choice.name, now, names)
                and not any(_within(a, b) or _within(b, a) for a in choice.lost for b in lost)
            ]
        return ways

    def _cheaper(self, step: Step, names: Iterable[str], uncut: Mapping[str, float]) -> list[str | None]:
        """Models that save some of these costs if they make a step, and raise none that has a budget; None: the pipeline's own.

        uncut: what an evaluation of the pipeline's own model costs, its cuts counted. What later steps can no longer reuse of this
        one is not: whether a budget holds is looked at afterwards.
        """
        now = {n: self._step_cost(step, n, uncut[n]) for n in uncut}
        found = []
        for other in (None, *self.models):
            then = {n: uncut[n] if other is None else self.prices[n].models.get(other, uncut[n]) for n in uncut}
            saved = {n: now[n] - then[n] for n in uncut}
            if other != step.model and any(saved[n] > 0 for n in names) and all(saved[n] >= 0 for n in self.budget):
                found.append(other)
        return found

    def _step_cost(self, step: Step, name: str, uncut: float) -> float:
        price = self.prices[name]
        if step.model is not None:
            return price.models.get(step.model, uncut)
        return uncut - sum(price.layers.get(a, 0.0) for a in step.left_out)

    def _saves(self, choice: str, now: str | None, names: Iterable[str]) -> bool:
        """Whether a choice saves more than another (None: nothing cut) of one of these costs, and no less of any with a budget."""

        def more(name: str) -> float:
            return self.prices[name].choices[choice] - (self.prices[name].choices[now] if now else 0.0)

        return any(more(name) > 0 for name in names) and all(more(name) >= 0 for name in self.budget)


def toggled(genome: Genome, i: int, address: str, way: Way = "skip") -> Genome:
    """The genome with one layer of step i skipped (or reused) if it was not, executed if it was."""
    step = leaving(genome.steps[i], way, {*getattr(genome.steps[i], way)} ^ {address})
    return Genome((*genome.steps[:i], step, *genome.steps[i + 1 :]), genome.shape)


@dataclass(frozen=True)
class Maker:
    """Who makes a step: another model, or the pipeline's own (None)."""

    model: str | None


def made_by(step: Step, model: str | None) -> Step:
    """The step as this model makes it; the pipeline's own (None) executes everything then, too."""
    return Step(timestep=step.timestep, sigma=step.sigma, model=model)


def leaving(step: Step, way: Way, addresses: Collection[str]) -> Step:
    """The step with these layers left out in one way; in the other way none of them is."""
    other: Way = "reuse" if way == "skip" else "skip"
    rest = tuple(a for a in getattr(step, other) if a not in addresses)
    return step.model_copy(update={way: tuple(sorted(addresses)), other: rest})


def _without(step: Step, addresses: Collection[str]) -> Step:
    """The step with these layers executed."""
    return step.model_copy(
        update={way: tuple(a for a in getattr(step, way) if a not in addresses) for way in ("skip", "reuse")}
    )


def _within(address: str, other: str) -> bool:
    return address == other or address.startswith(other + ".")
