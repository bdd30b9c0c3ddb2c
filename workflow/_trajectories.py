"""Whole sampling trajectories to learn from: how far masks move the latents that they end with, with a gradient."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.candidate import Cut, SamplingPlan, Seeds
from ..core.errors import UserError
from ..core.files import write_bytes
from ..core.stages import PruneStage
from ._lesson import Book
from ._subject import Subject

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.driving.steering import Call, Next
    from ..core.masking import Masks

FILE = "whole-latents.safetensors"
CHECKED = 64  # trajectories at most that a choice of cuts is measured on


class Trajectories(Book):
    """The pipeline's own loop along its own schedule, from the same seeds and conditions with masks and without."""

    what = "E |z(pruned) - z|^2 of the final latents of seeds that were not learned from, as a share of their variance"

    def __init__(self, stage: PruneStage, subject: Subject, config: Any, folder: Path, identity: str) -> None:
        """config: the method's, with `images`, `solver_steps`, `batch`, `by_block`. UserError where no plan can be followed."""
        from ..core import driving

        super().__init__(stage, subject, config, folder, identity)
        self.seeds = Seeds(role="calibrate", base=subject.context.recipe.seed, count=config.images)
        self.plan = _own(subject, config.solver_steps or subject.default_steps)
        driving.check(subject.model.pipe, self.plan)
        self._whole: Tensor | None = None

    def lesson(self) -> "Trajectories":
        """See `Task.lesson`."""
        return self

    @property
    def whole(self) -> "Tensor":
        """The final latents of the whole model, (N, …) on the CPU; read where they were made before."""
        if self._whole is None:
            self._whole = self._kept()
        return self._whole

    def distance(self, positions: Sequence[int], masks: "Masks") -> "Tensor":
        """See `Lesson.distance`."""
        import torch

        from ..core.sampling import silent

        images, value = sorted({n % self.seeds.count for n in positions}), 0.0
        measure = self._of_steps if self.config.objective == "steps" else self._of_latents
        # Checkpointed calls are computed again in the backward pass, which therefore has to end before the masks are taken off: it
        # goes to copies of the factors here, and on to whatever they are made of when the caller asks.
        copies = {address: (what, f.detach().requires_grad_()) for address, (what, f) in masks.items()}
        with silent(self.subject.model.pipe), self.subject.asking():
            for run in _runs(images, self.chunk):  # a call of the pipeline takes images that follow one another
                arguments = self.subject.sampler.arguments(self.seeds, run, len(self.plan.steps))
                value += measure(run, arguments, copies, len(images))
        through = [
            (f - f.detach()) * g.grad
            for (_, f), (_, g) in zip(masks.values(), copies.values(), strict=True)
            if g.grad is not None
        ]
        return value + torch.stack([one.sum() for one in through]).sum()

    def _of_latents(self, run: range, arguments: dict[str, Any], masks: "Masks", images: int) -> float:
        """What these images add to the distance of all that are compared; its gradients go to the masks."""
        from ..core import masking
        from ..core.trajectory import differentiable

        whole, variance = self.whole, self.variance  # sampled, the first time, before there are masks
        with masking.masked(self.denoiser, masks):
            last = differentiable(self.subject.model.pipe, self.plan, arguments, by_block=self.by_block)
            gap = last[: len(run)].float() - whole[run.start : run.stop].to(last.device)
            part = gap.square().flatten(1).mean(1).sum() / (images * variance)
            part.backward()
        return part.item()

    def _of_steps(self, run: range, arguments: dict[str, Any], masks: "Masks", images: int) -> float:
        """The same for the answers of single calls, each on what the whole model came to: no error is carried on."""
        import torch

        from ..core import masking
        from ..core.trajectory import visited

        value = 0.0

        def each(call: "Call", following: "Next") -> Any:
            nonlocal value
            whole = following(call)
            if call.module is self.denoiser:
                with masking.masked(self.denoiser, masks), torch.enable_grad():
                    gap = (following(call)[0] - whole[0]).float().square().flatten(1).mean(1)
                    gap = gap / whole[0].float().flatten(1).var(1).clamp(min=1e-12)  # of each answer: whatever is asked with it
                    part = gap.mean() * len(run) / (images * len(self.plan.steps))
                    part.backward()
                value += part.item()
            return whole

        visited(self.subject.model.pipe, self.plan, arguments, each)
        return value

    @property
    def variance(self) -> float:
        """Of the whole model's latents, over images and all else."""
        return _variance(self.whole)

    def __call__(self, options: Sequence[tuple[Cut, ...]]) -> list[float]:
        """How far the final latents of other seeds move with each choice of cuts."""
        from ..core import surgery

        count = self.seeds.count
        others = self.seeds.model_copy(update={"start": count, "count": min(CHECKED, count)})
        whole, found = self._sampled(others), list[float]()
        for cuts in options:
            with surgery.applied(self.denoiser, cuts):
                gap = self._sampled(others) - whole
            found.append(float(gap.square().mean()) / _variance(whole))
        return found

    def facts(self) -> dict[str, object]:
        """What was learned from, for the report."""
        shape = " x ".join(map(str, self.whole.shape[1:]))
        return {"images": self.seeds.count, "solver steps": len(self.plan.steps), "latents": shape}

    def _sampled(self, seeds: Seeds) -> "Tensor":
        import torch

        sampler, memo = self.subject.sampler, self.subject.sampler.memo
        sampler.memo = None  # it knows nothing of masks and cuts
        try:
            with self.subject.asking():
                batches = list(sampler.images(self.plan, seeds, output="latents"))
        finally:
            sampler.memo = memo
        return torch.cat([batch.latents.float().cpu() for batch in batches if batch.latents is not None])

    def _kept(self) -> "Tensor":
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import save

        path = self.folder / FILE
        if path.is_file():
            try:
                with safe_open(path, framework="pt") as file:
                    if (file.metadata() or {}).get("identity") == self.identity:
                        found: Tensor = file.get_tensor("latents")
                        return found
            except SafetensorError:
                pass  # not written by us, who write it whole: made again
        self.subject.context.progress.say(f"sampling the final latents of {self.seeds.count} images with the whole model")
        whole = self._sampled(self.seeds).contiguous()
        write_bytes(path, save({"latents": whole}, metadata={"identity": self.identity}))
        return whole


def _own(subject: Subject, steps: int) -> SamplingPlan:
    """The pipeline's own schedule of so many steps, as a plan."""
    from ..core import spacing

    subject.check_steps(steps, "solver_steps")
    subject.check_solver()
    scheduler = subject.model.pipe.scheduler
    found = spacing.fixed(scheduler, steps)
    own = str(scheduler.config.get("timestep_spacing", ""))
    name = next((n for n in ("stock", own) if n in found), next(iter(found), None))
    if name is None:
        raise UserError(
            f"{type(scheduler).__name__}: has no schedule that a plan could follow. Use --scheduler of another kind."
        )
    return found[name]


def _variance(latents: "Tensor") -> float:
    return max(float(latents.var()), 1e-12)


def _runs(images: Sequence[int], most: int) -> list[range]:
    """Images that follow one another, at most so many together.

    >>> _runs([0, 1, 5, 6, 7], 2)
    [range(0, 2), range(5, 7), range(7, 8)]
    """
    found: list[range] = []
    for i in images:
        if found and found[-1].stop == i and len(found[-1]) < most:
            found[-1] = range(found[-1].start, i + 1)
        else:
            found.append(range(i, i + 1))
    return found
