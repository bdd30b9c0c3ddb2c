"""The candidates that cheap evaluation is tried on, and what is kept of their images: each part in a file, made once."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ..core.candidate import Candidate, SamplingPlan, Seeds
from ..core.files import write_bytes
from ..search import autodiffusion
from ..search._operators import mutate
from ..search._space import Genome
from ..search._task import Fresh
from . import _results
from ._search_bench import Bench, searched

STEPS = 4
EVOLVED_WITH = 1  # seed of the search that candidates come from: none of its images is seen again
PARENTS = 3  # its best candidates, whose mutants are near-elite
LATENTS = 64  # images whose latents are kept
FD = "fid"


@dataclass(frozen=True)
class Drawn:
    """Candidates, and which of them are near the best, as far as was known before any of them was scored here."""

    candidates: list[Candidate]
    near: list[bool]
    reference: Candidate  # the best fixed schedule by the search that candidates come from


@dataclass(frozen=True)
class Images:
    """What is kept of a block of N images."""

    features: Tensor  # (N, D) float32
    latents: Tensor  # (at most LATENTS, …) float32


class Kept:
    """Images of candidates, in the files of one model."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.folder = _results.RUNS / f"cheap-evaluation-{bench.subject.model.fingerprint[:8]}"

    def of(self, name: str, plan: SamplingPlan | None, seeds: Seeds, steps: int | None = None) -> Images:
        """Those of a plan, from their file where they are there: a killed run loses at most one block."""
        path = self.folder / f"{name}-{seeds.role}-{seeds.start}-{seeds.count}.safetensors"
        if not path.is_file():
            subject = self.bench.subject
            features: list[Tensor] = []
            latents: list[Tensor] = []
            for batch in subject.sampler.images(plan, seeds, steps=steps):
                assert batch.pixels is not None and batch.latents is not None  # zoo models show both
                features.append(subject.features.extract(batch.pixels))
                if sum(len(part) for part in latents) < LATENTS:
                    latents.append(batch.latents.float().cpu())
            found = {"features": torch.cat(features), "latents": torch.cat(latents)[:LATENTS].contiguous()}
            write_bytes(path, save(found))
        found = load_file(path)
        return Images(found["features"], found["latents"])


def draw(bench: Bench, count: int) -> Drawn:
    """A quarter random, half from an evolution's trajectory, a quarter mutants of its best; all different, with skips."""
    space, rng, fresh = bench.plans.space, random.Random(0), Fresh()
    file = _results.RUNS / f"cheap-evaluation-evolved-{count}.jsonl"
    trials = searched(bench, "autodiffusion", EVOLVED_WITH, max(6, round(0.6 * count)), file)
    known, evolved = trials[: len(bench.plans.fixed)], trials[len(bench.plans.fixed) :]
    reference = min(known, key=lambda t: t.value(FD)).request.candidate
    half, quarter = count // 2, count // 4
    parts: list[tuple[Genome, bool]] = []

    def add(genome: Genome | None, near: bool) -> bool:
        new = genome is not None and fresh.take(genome)
        if new and genome is not None:
            parts.append((genome, near))
        return new

    for place in _spread(len(evolved), half):
        add(space.genome(evolved[place].request.candidate), near=2 * place >= len(evolved))
    best = sorted(evolved, key=lambda t: t.value(FD))[:PARENTS]
    parents = [genome for t in best if (genome := space.genome(t.request.candidate)) is not None]
    mutants = 0
    while mutants < quarter:
        made = mutate(rng.choice(parents), space=space, config=autodiffusion.Config(), rng=rng, second=True)
        mutants += add(made, near=True)
    while len(parts) < count:
        genome = space.random_times(rng)
        skips = [tuple(sorted(rng.sample(space.layers, rng.randint(0, 2)))) for _ in genome.steps]
        steps = (s.model_copy(update={"skip": skip}) for s, skip in zip(genome.steps, skips, strict=True))
        add(Genome(tuple(steps), genome.shape), near=False)
    return Drawn([space.candidate(genome) for genome, _ in parts], [near for _, near in parts], reference)


def _spread(length: int, count: int) -> Sequence[int]:
    """`count` places of a list, evenly."""
    return sorted({round(i * (length - 1) / max(1, count - 1)) for i in range(count)})
