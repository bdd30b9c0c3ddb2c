"""Gates on depth blocks: a categorical choice of what stays of every group, drawn anew for each sample, with a gradient.

Fang et al., "TinyFusion", arXiv 2412.01199. x_{i+1} = m_i phi_i(x_i) + (1 - m_i) x_i for the mask m of a sample; a group's
part of m is a row of the 0/1 matrix O of all its choices, picked by a Gumbel softmax y with a straight-through gradient (Jang
et al., arXiv 1611.01144): forward one-hot, backward soft. All blocks run for every sample, whatever the mask.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..core import anatomy
from ._depth import Group

START = 0.02  # of every logit: all choices alike


class Gates(nn.Module):
    """The logits g_k of all groups, (C_k,) each, and the masks that are drawn from them."""

    def __init__(self, groups: Sequence[Group], device: torch.device | str) -> None:
        super().__init__()
        self.groups = list(groups)
        self.logits = nn.ParameterList([nn.Parameter(torch.full((len(g.ways),), START, device=device)) for g in groups])
        for k, group in enumerate(self.groups):
            rows = torch.zeros(len(group.ways), len(group.blocks), device=device)
            for row, way in zip(rows, group.ways, strict=True):
                row[list(way)] = 1.0
            self.register_buffer(f"ways_{k}", rows, persistent=False)
        self.masks: dict[str, Tensor] = {}  # address -> (B,), of the samples that are being computed

    def draw(
        self, samples: int, scale: float, temperature: float, noise: torch.Generator | None, few: range | None = None
    ) -> None:
        """Masks of so many samples. noise: of the Gumbel numbers; None for the likeliest choice of every group, with a gradient.

        few: those of the samples that are computed now; all by default. The others' numbers are drawn as well: a sample has the
        same mask whatever is computed with it.
        """
        now = slice(None) if few is None else slice(few.start, few.stop)
        self.masks = {}
        for k, group in enumerate(self.groups):
            logits = (scale * self.logits[k]).expand(samples, -1)
            if noise is not None:
                u = torch.rand(logits.shape, generator=noise).clamp_(1e-20, 1 - 1e-7)
                logits = logits + (-torch.log(-torch.log(u))).to(logits)
            soft = (logits / temperature).softmax(-1)
            hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
            mask = (hard + (soft - soft.detach())) @ self.get_buffer(f"ways_{k}")
            self.masks |= {block: mask[now, i] for i, block in enumerate(group.blocks)}

    @contextmanager
    def on(self, denoiser: nn.Module) -> Iterator[None]:
        """Inside, the denoiser's blocks are masked; by name, so that running a block again (checkpointing) finds the same mask."""
        hooks = []
        try:
            for group in self.groups:
                for address in group.blocks:
                    block = denoiser.get_submodule(address)
                    hooks.append(
                        block.register_forward_hook(self._masked(address, anatomy.substitute(block)), with_kwargs=True)
                    )
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _masked(self, address: str, stand_in: anatomy.Substitute) -> Any:
        def hook(block: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            mask = self.masks[address]
            return pytree.tree_map(lambda out, kept: _mixed(out, kept, mask), output, stand_in(block, *args, **kwargs))

        return hook

    def probabilities(self, scale: float, logits: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Of every choice of every group, (C_k,) each. logits: averaged ones, instead of the present ones."""
        return [(scale * g.detach().float().cpu()).softmax(-1) for g in (logits or list(self.logits))]


def _mixed(out: Any, kept: Any, mask: Tensor) -> Any:
    """m phi(x) + (1 - m) x of one output; of what the last block does not hand on, nothing."""
    if not isinstance(out, Tensor) or not isinstance(kept, Tensor):
        return out
    m = mask.to(out).view(-1, *[1] * (out.ndim - 1))
    return m * out + (1 - m) * kept


def decoded(groups: Sequence[Group], probabilities: Sequence[Tensor]) -> tuple[tuple[str, ...], list[float]]:
    """The blocks that go in the likeliest choice of every group, and how likely each choice is."""
    gone, sure = list[str](), []
    for group, p in zip(groups, probabilities, strict=True):
        best = int(p.argmax())
        gone += group.without(group.ways[best])
        sure.append(float(p[best]))
    return tuple(gone), sure


def staying(groups: Sequence[Group], probabilities: Sequence[Tensor]) -> dict[str, float]:
    """How likely every block is to stay."""
    found: dict[str, float] = {}
    for group, p in zip(groups, probabilities, strict=True):
        for i, block in enumerate(group.blocks):
            found[block] = math.fsum(float(p[row]) for row, way in enumerate(group.ways) if i in way)
    return found
