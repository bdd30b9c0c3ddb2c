"""A convolution of several experts, mixed for each image: capacity for a smaller model at the cost of one convolution.

ME-CondConv (multi-expert conditional convolution) of A-SDM (Zhu et al., arXiv 2406.00210), after CondConv (Yang et al., arXiv 1904.04971):
W(x) = W_0 + sum over e of r_e(x) (W_e - W_0), with r = tanh(R GAP(x)), GAP the mean over positions. Of A-SDM's text only the abstract could be
read; the form is ours. CondConv's router is a sigmoid; with tanh and a router that starts at zero the layer begins as the convolution that was there,
exactly. The other experts begin as convolutions that were cut, so that what they knew is not lost.

This file imports torch and nothing of lissom: its text goes into artifacts, before that of standins.py.
"""

from typing import Any

import torch
from torch import Tensor, nn


class Experts(nn.Module):
    """Takes the place of a Conv2d: (B, C, H, W) -> (B, C', H', W')."""

    reads_parts = True  # the weights of its experts, which it does not run

    def __init__(self, convolutions: Any) -> None:
        """convolutions: Conv2d of one shape; the first is the one that was there."""
        super().__init__()
        first = convolutions[0]
        self.experts = nn.ModuleList(convolutions)
        self.router = nn.Linear(first.in_channels, len(convolutions) - 1).to(first.weight.device, first.weight.dtype)
        self.router.requires_grad_(first.weight.requires_grad)
        with torch.no_grad():
            for parameter in self.router.parameters():
                parameter.zero_()

    def forward(self, x: Tensor) -> Tensor:
        first: Any = self.experts[0]
        mixed = torch.tanh(self.router(x.mean((2, 3))))  # (B, E - 1)
        weight, bias = first.weight[None], None if first.bias is None else first.bias[None]
        for e, expert in enumerate(self.experts[1:]):
            share = mixed[:, e]
            weight = weight + share[:, None, None, None, None] * (expert.weight - first.weight)
            if bias is not None:
                bias = bias + share[:, None] * (expert.bias - first.bias)
        # One convolution for the whole batch: every image is a group with its own weights.
        n = len(x)
        weight = weight.expand(n, *weight.shape[1:]).reshape(-1, *first.weight.shape[1:])
        out = nn.functional.conv2d(
            x.reshape(1, -1, *x.shape[2:]), weight, None, first.stride, first.padding, first.dilation, first.groups * n
        ).unflatten(1, (n, -1))[0]
        return out if bias is None else out + bias.expand(n, -1)[:, :, None, None]


def mixed(layer: Any, others: Any) -> Experts:
    """A convolution with others of its shape as experts beside it. Raises ValueError for what is no such convolution."""
    for one in (layer, *others):
        if type(one) is not nn.Conv2d or one.padding_mode != "zeros":
            raise ValueError(f"a {type(one).__name__} is no plain convolution that could be an expert")
        if one.weight.shape != layer.weight.shape or one.stride != layer.stride or (one.bias is None) != (layer.bias is None):
            raise ValueError(f"experts have to have one shape, not {tuple(layer.weight.shape)} and {tuple(one.weight.shape)}")
    return Experts([layer, *others])
