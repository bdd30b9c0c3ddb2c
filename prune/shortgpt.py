"""ShortGPT: blocks that hardly turn the hidden state go, wherever they are. Block influence = 1 - cos(before, after).

Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", arXiv 2403.03853; for diffusion
transformers it is a baseline of TinyFusion (Fang et al., arXiv 2412.01199).

The cosine is taken over the channels of each token and averaged over tokens, samples and noise levels. The inputs are recorded
denoiser calls: noised, each at the timestep that belongs to its noise, which is not so in every implementation. Of blocks with
two streams the picture's counts.
"""

import random
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from . import _depth
from ._task import Option, Pruned, Task, gathered, until_met, within

calibrated = True  # asks for recorded calls
units = _depth.KINDS


class Config(BaseModel):
    """No settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.03853"


def prune(task: Task, config: Config, rng: random.Random) -> Pruned:
    """Cut the blocks of least influence until enough is saved."""
    influence = influences(task)

    def of(option: Option) -> float:
        return sum(influence[cut.address] for cut in option.cuts)

    answers = []
    for space in within(task.spaces, task.need):
        least = [min(site, key=of) for site in space.sites]
        taken = until_met(sorted(least, key=of), space.base, task.need)
        answers.append((sum(map(of, taken)), gathered(space.base, taken)))
    return Pruned(cuts=min(answers, key=lambda answer: answer[0])[1], scores=influence, label="block influence")


def influences(task: Task) -> dict[str, float]:
    """1 - cos(before, after) of every block, on all recorded calls."""
    import torch

    sums = {layer.address: [0.0, 0] for layer in task.layers}
    hooks = []

    def watch(address: str) -> Any:
        def seen(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            before = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            after = _picture(output, before)
            cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
            sums[address][0] += float((1 - cosine).sum())
            sums[address][1] += cosine.numel()

        return seen

    try:
        for address in sums:
            hooks.append(task.denoiser.get_submodule(address).register_forward_hook(watch(address), with_kwargs=True))
        task.run()
    finally:
        for hook in hooks:
            hook.remove()
    return {address: total / max(count, 1) for address, (total, count) in sums.items()}


def _picture(output: Any, before: Any) -> Any:
    """Of the outputs of a block the one that goes on from the picture's tokens: the last of their shape."""
    outputs = output if isinstance(output, tuple) else (output,)
    return next(out for out in reversed(outputs) if out is not None and out.shape == before.shape)
