"""Diff-Pruning: heads, units and channels go by the Taylor importance of the training loss over the informative timesteps.

Fang, Ma, Wang, "Structural Pruning for Diffusion Models", NeurIPS 2023, arXiv 2305.10924.
L_t = |eps_theta(x_t, t) - eps|^2 on one batch x_0 and one noise eps for all t. Losses are large at low noise and fall with t;
steps whose loss is small hardly say what matters, and their noisy gradients blur those of the others. So step t counts while
L_t / L_max >= T, g = sum over these t of the gradient of L_t, and what goes together weighs as much as the sum over its
parameters of |w g|. The least goes, the same share in every layer. T = 0 counts all steps.

Notation: threshold -> T; losses -> L_t by t, L_max their largest so far; scores -> sum |w g| of each head, unit, channel group.
T of the authors' scripts: 0.05 CIFAR-10, 0.00 CelebA-HQ 64, 0.01 LSUN 256, 0.1 latent diffusion on ImageNet.

Steps are visited from t = 0 up and end at the first below T, which is not added: the test stands before the backward pass, as
in the released scripts ddpm_exp and ldm_exp (ddpm_prune adds that step too). Torch-Pruning computes the importances, from
groups that _coupled.py builds. What is pruned differs: the paper narrows whole ResNet stages, the residual stream with them; here only what
lies inside a layer gets narrower (heads of attentions, units of feed-forwards, whole norm groups of channels between a ResNet's
convolutions), so that nothing around it changes and what stays computes what it did. Ours too: every stride-th step instead of
each, `scope: global`, biases and norms in the sum, that a target in parameters or MACs decides how much goes, and models that
predict something else than eps, whose L_t is the loss that they were trained with.
"""

import random
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from ._task import Pruned, Task
from ._widths import Narrowing, chosen, ladders, many_shapes, means

calibrated = "gradients"  # asks for those of the training loss
narrows = True  # cuts widths, not layers


class Config(Narrowing):
    """Settings of Diff-Pruning."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2305.10924"

    threshold: float = Field(default=0.05, ge=0, le=1)  # T: steps count while their loss is at least this share of the largest
    stride: int = Field(default=10, ge=1)  # every n-th timestep is visited; the paper's 1 takes ten times as long
    multivariable: bool = False  # |sum w g| instead of sum |w g|: with threshold 0 the paper's plain Taylor baseline
    solver_steps: int | None = Field(default=None, ge=1)  # of the trajectories that make x_0; the pipeline's own by default


def prune(task: Task, config: Config, rng: random.Random) -> Pruned:
    """The heads, units and channels of least importance, as many as the target needs.

    Raises UserError where the settings leave too few that may go.
    """
    from ._coupled import importances, taylor

    steps = ladders("diff_pruning", task, config)

    def counts(losses: Sequence[float]) -> bool:
        return losses[-1] >= config.threshold * max(losses)

    scorer = taylor(config.multivariable)
    with task.gradients(config.stride, counts) as losses:
        scores = {width: importances(task.denoiser, width, scorer).tolist() for width in steps}
    added = len(losses) - (not counts(list(losses.values())))
    task.say(f"{added} of {len(losses)} visited timesteps count; the largest loss is {max(losses.values()):.4g}")
    alone = "one timestep alone passed the threshold, so that its gradient decides: lower the threshold, or the stride"
    cuts = chosen(task, steps, scores, config)
    warnings = (*((alone,) if added == 1 else ()), *many_shapes(task, cuts))
    return Pruned(cuts=cuts, scores=means(scores), label="mean importance", warnings=warnings)
