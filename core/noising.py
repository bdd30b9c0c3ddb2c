"""Training inputs of a denoiser: clean samples and noise to what it is shown at a noise level, and what it should answer.

Variance-preserving schedules: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps (Ho et al., 2006.11239, eq. 4), whichever scheduler class
samples with them; the sigma schedulers show the denoiser the same x_t. Flow matching: x_s = (1 - s) x_0 + s eps, answer
eps - x_0 (Liu et al., 2209.03003; as Stable Diffusion 3 and FLUX count s and sign).
"""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from .errors import UserError

ANSWERS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Noising:
    """How a scheduler's models were trained."""

    kind: Literal["variance_preserving", "flow"]
    levels: int  # training timesteps
    answer: str  # epsilon, v_prediction, sample; flow models answer the velocity
    alphas: Tensor | None = None  # cumulated, (levels,), of variance-preserving schedules
    shift: float = 1.0  # of flow models' noise levels (Esser et al., 2403.03206, Sec. 5.3.2)

    @classmethod
    def of(cls, scheduler: Any) -> "Noising":
        """Read off a diffusers scheduler. UserError for schedules that are neither."""
        config, name = scheduler.config, type(scheduler).__name__
        levels = int(config.get("num_train_timesteps") or 1000)
        if "FlowMatch" in name or config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
            shift = config.get("flow_shift" if "flow_shift" in config else "shift", 1.0) or 1.0
            return cls("flow", levels, "velocity", shift=float(shift))
        alphas, answer = getattr(scheduler, "alphas_cumprod", None), config.get("prediction_type", "epsilon")
        if not isinstance(alphas, Tensor) or answer not in ANSWERS:
            raise UserError(
                f"{name} (prediction_type {answer}): how its models are trained is not known here; there are variance-preserving "
                f"schedules that predict {', '.join(ANSWERS)}, and flow matching."
            )
        return cls("variance_preserving", len(alphas), str(answer), alphas=alphas.detach().float().cpu())

    def times(self, u: Tensor) -> Tensor:
        """Timesteps for uniform numbers in [0, 1), as the scheduler counts them: whole numbers, or levels * s for flow models."""
        if self.kind == "variance_preserving":
            return (u * self.levels).long()
        s = 1 - u  # in (0, 1]: at s = 0 there would be nothing to learn
        return self.levels * (self.shift * s / (1 + (self.shift - 1) * s))

    def __call__(self, clean: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """What the denoiser is shown and what it should answer. clean, noise: (B, …); times: (B,)."""
        shape = (-1, *[1] * (clean.ndim - 1))
        if self.kind == "flow":
            s = (times.float() / self.levels).view(shape).to(clean.device)
            return (1 - s) * clean + s * noise, noise - clean
        assert self.alphas is not None
        a = self.alphas[times.cpu()].view(shape).to(clean.device)
        shown = a.sqrt() * clean + (1 - a).sqrt() * noise
        if self.answer == "epsilon":
            return shown, noise
        return shown, clean if self.answer == "sample" else a.sqrt() * noise - (1 - a).sqrt() * clean
