"""Training samples: clean latents and their conditions, noised anew each time they come up.

Everything about sample number n of a training (which image, noise, level, which row under guidance) is a function of n and the seed.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..core.denoiser_calls import Calls
from ..core.noising import Noising
from ._loop import Sample

Clean = Callable[[Sequence[int]], Tensor]  # indices of images -> clean samples as the denoiser knows them, (B, …) float32


class Noised:
    """Samples of a set of images, epoch by epoch, each epoch in its own order."""

    def __init__(
        self, clean: Clean, conditions: Sequence[int], calls: Calls, noising: Noising, seed: int, device: torch.device | str
    ) -> None:
        """conditions: of each image, the row of the sampler's conditions that belongs to it."""
        self.clean, self.conditions, self.calls, self.noising = clean, conditions, calls, noising
        self.seed, self.device = seed, device

    def __call__(self, positions: Sequence[int], salt: int) -> Sample:
        """The samples of these numbers; see `_loop.Samples`."""
        images = [self._image(n) for n in positions]
        clean = self.clean(images).to(self.device)
        noise, u, rows = [], [], []
        for n in positions:
            drawn = torch.Generator().manual_seed(_hash("sample", self.seed, salt, n))
            noise.append(torch.randn(clean.shape[1:], generator=drawn))
            u.append(torch.rand((), generator=drawn))
            rows.append(int(torch.randint(self.calls.rows, (), generator=drawn)))
        times = self.noising.times(torch.stack(u))
        shown, target = self.noising(clean, torch.stack(noise).to(clean), times)
        return Sample(self.calls([self.conditions[i] for i in images], rows, shown, times), target)

    def _image(self, n: int) -> int:
        epoch, place = divmod(n, len(self.conditions))
        return self._order(epoch)[place]

    @functools.lru_cache(maxsize=2)  # noqa: B019  two epochs meet in a batch
    def _order(self, epoch: int) -> list[int]:
        drawn = torch.Generator().manual_seed(_hash("epoch", self.seed, epoch))
        order: list[int] = torch.randperm(len(self.conditions), generator=drawn).tolist()
        return order


def _hash(*parts: object) -> int:
    """A seed of 63 bits."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1
