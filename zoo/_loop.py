"""A resumable, seeded training loop: step k draws the same numbers whether or not the run was interrupted before it."""

import copy
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

CHECKPOINT_SECONDS = 60.0  # kill -9 loses at most this much


def train(
    name: str,
    model: nn.Module,
    loss_of: Callable[[nn.Module, torch.Generator], Tensor],  # draws its own batch from the generator
    work: Path,
    *,
    steps: int,
    lr: float,
    warmup: int = 200,  # steps of linear warm-up
    decay: float = 0.3,  # last share of the steps, over which the rate falls linearly to zero
    weight_decay: float = 0.01,
    ema: float = 0.999,  # 0 turns the average off
    clip: float = 1.0,  # gradient norm
    seed: int = 0,
) -> nn.Module:
    """Train in place with AdamW and return the averaged (EMA) model, in eval mode."""
    path = work / f"{name}.ckpt"
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99))
    start = 0
    if path.is_file():
        saved = torch.load(path, weights_only=True, map_location="cpu")
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        optimiser.load_state_dict(saved["optimiser"])
        start = saved["step"]
    model.train()
    clock, shown, running = time.monotonic(), time.monotonic(), 0.0
    for step in range(start, steps):
        remaining = (steps - step) / max(decay * steps, 1)
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / warmup, remaining)
        loss = loss_of(model, torch.Generator().manual_seed(seed * 1_000_003 + step))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimiser.step()
        keep = min(ema, (step + 1) / (step + 10))  # a short memory at first, or the average drags the random start along
        with torch.no_grad():
            for a, b in zip(average.parameters(), model.parameters(), strict=True):
                a.lerp_(b, 1 - keep)
            for kept, current in zip(average.buffers(), model.buffers(), strict=True):
                kept.copy_(current)  # batch-norm statistics are averages already
        running = loss.item() if step == start else 0.99 * running + 0.01 * loss.item()
        if step + 1 == steps or time.monotonic() - clock > CHECKPOINT_SECONDS:
            clock = time.monotonic()
            state = {"model": model.state_dict(), "average": average.state_dict(), "optimiser": optimiser.state_dict()}
            torch.save({**state, "step": step + 1}, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
        if time.monotonic() - shown > 20:
            shown = time.monotonic()
            print(f"{name}: step {step + 1}/{steps}  loss {running:.4f}", flush=True)
    return average
