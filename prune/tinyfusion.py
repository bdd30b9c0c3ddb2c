"""TinyFusion: which depth blocks stay is learned, together with what training could make up for.

Fang et al., "TinyFusion: Diffusion Transformers Learned Shallow", CVPR 2025, arXiv 2412.01199.
min over p(m) and dPhi of E_{x, m ~ p} L(x, Phi + dPhi, m), p(m) = prod_k p(m_k): of each group of M blocks N stay, one categorical
choice per group (Sec. 3.2), drawn per sample by a straight-through Gumbel softmax. L is the loss that the model was trained
with. dPhi, the update that retraining would make, is learned beside (Sec. 3.3: LoRA on every linear layer) and thrown away: the
point is a structure that recovers well, not one that loses least. N:M is kept exactly, so that there is no penalty.

Notation: groups -> local structures N:M; scale -> s, temperature -> tau (linear from its first to its second value); update ->
dPhi: lora (rank 8, alpha 16), full, none. Decoded is the likeliest choice by the averaged logits (decay `ema`).

The paper's settings are the defaults but for the length: it searches one epoch of ImageNet, 10,009 steps of 128. Ours: the loss is
the mean squared error alone (DiT's term for the variance is left out), all denoisers of diffusers whose blocks have one kind of
stand-in, noise that is a function of the step (so that a killed run goes on exactly), `noise: false`, which replaces every draw by the
likeliest choice, and that a target may say how many blocks go.
"""

import random
from collections.abc import Generator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from ..core.errors import UserError
from . import _depth
from ._task import Pruned, Task

if TYPE_CHECKING:
    from torch import Tensor

calibrated = "learned"  # asks for samples to learn from
units = _depth.KINDS


def _warm(temperatures: tuple[float, float]) -> tuple[float, float]:
    if min(temperatures) <= 0:
        raise ValueError(f"must be above 0, got {temperatures[0]:g} and {temperatures[1]:g}")
    return temperatures


class Config(_depth.Structured):
    """Settings of TinyFusion."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2412.01199"

    iterations: int = Field(default=500, ge=1)  # steps of the optimiser; the paper: one epoch of ImageNet, 10,009
    batch: int = Field(default=64, ge=1)  # samples behind each step; the paper has 128
    images: int = Field(default=1024, ge=1)  # of the model's own that are learned from, where no data is given
    data_steps: int | None = Field(default=None, ge=1)  # solver steps of these images; the pipeline's default
    update: Literal["lora", "full", "none"] = "lora"  # what may make up for the blocks that go while the choice is learned
    rank: int = Field(default=8, ge=1)  # of LoRA; its scale alpha / rank is 2
    update_rate: float = Field(default=1e-4, gt=0)  # learning rate of the update
    gate_rate: float = Field(default=1e-3, gt=0)  # learning rate of the logits
    scale: float = Field(default=100.0, gt=0)  # s: what logits are multiplied by
    temperature: Annotated[tuple[float, float], AfterValidator(_warm)] = (4.0, 0.1)  # tau of the first and of the last step
    noise: bool = True  # false: the likeliest choice in every step, no draws
    ema: float = Field(default=0.999, ge=0, lt=1)  # decay of the averaged logits; shorter searches average over less
    clip: float = Field(default=1.0, gt=0)  # of the gradient's norm
    by_block: bool = False  # compute blocks again one by one in the backward pass: less memory, one more forward


def prune(task: Task, config: Config, rng: random.Random) -> Pruned:
    """Learn, then remove what is not in the likeliest choice of every group. Raises UserError where the loss ends in NaN."""
    import torch

    from ..core.driving.checkpoint import recomputed
    from ._depth_gates import Gates, decoded, staying
    from ._learning import Loop, split, updated

    groups = _depth.groups(task, config, "tinyfusion")
    lesson, denoiser = task.lesson(), task.denoiser
    gates = Gates(groups, lesson.device)
    seed = rng.getrandbits(62)
    first, last = config.temperature

    def loss(at: int, salt: int) -> "Generator[Tensor, None, None]":
        temperature = first + (last - first) * at / max(config.iterations - 1, 1)
        for few in split(range(config.batch), lesson.chunk):
            kwargs, target = lesson.samples([at * config.batch + n for n in few], salt)
            noise = torch.Generator().manual_seed((seed + 7919 * salt + at) % 2**63) if config.noise else None
            gates.draw(config.batch, config.scale, temperature, noise, few)
            with recomputed(denoiser, lesson.by_block):  # until the backward pass is done
                answer = denoiser(**kwargs, return_dict=False)[0].float()[:, : target.shape[1]]
                yield torch.nn.functional.mse_loss(answer, target.to(answer)) * (len(few) / config.batch)

    logits = {f"group {k}": g for k, g in enumerate(gates.logits)}
    with updated(denoiser, config.update, config.rank, seed) as weights, gates.on(denoiser):
        rates = [{"params": logits, "lr": config.gate_rate}]
        rates += [{"params": weights, "lr": config.update_rate}] if weights else []
        average = Loop(lesson, rates, logits, config, loss).run()
    chances = gates.probabilities(config.scale, list(average.values()))
    gone, sure = decoded(groups, chances)
    stays = staying(groups, chances)
    lesson.keep(average, {"groups": [[list(g.blocks), g.stay] for g in groups], "stays": stays})
    if not gone and task.need > 0:
        raise UserError("tinyfusion: the structure keeps every block. Lower keep, or give a structure such as 1:2.")
    warnings = [
        f"{sum(p < 0.5 for p in sure)} of {len(sure)} groups are undecided (the likeliest choice has less than half): learn for longer"
    ] * any(p < 0.5 for p in sure)
    return Pruned(cuts=_depth.cuts(gone), scores=stays, label="learned chance to stay", warnings=tuple(warnings))
