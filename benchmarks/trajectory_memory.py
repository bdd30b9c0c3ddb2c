"""What gradients through a trajectory cost: `python -m lissom.benchmarks.trajectory_memory` (a few minutes on one slow core).

Bytes saved for the backward pass, and the peak of all tensors alive over forward and backward, for trajectories of T steps of
`zoo:fashion` under guidance: everything kept, per step, per block, and nested. Beside each stands what is foretold from one
call of the denoiser alone. Then the time of each over that of the full graph, in turns; the process's own, as other processes
would slow one way and not the next.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core import models
from ..core.candidate import SamplingPlan
from ..core.driving import follow
from ..core.driving.checkpoint import checkpoint_blocks
from ..core.driving.steering import Call, Next
from ..core.saved_bytes import Live, saved
from ..core.spacing import fixed
from ..core.trajectory import differentiable
from . import _results

LENGTHS, TIMED, TURNS = (2, 4, 8, 16, 32), 8, 7
IMAGES = (1, 32)  # timed: of one image much of the time is Python's
GATED = ("to_out.0", "ff.net.2")
WAYS: dict[str, dict[str, bool]] = {
    "full graph": {"by_step": False},
    "per step": {},
    "per block": {"by_step": False, "by_block": True},
    "nested": {"by_block": True},
}


@dataclass(frozen=True)
class Parts:
    """Bytes and seconds of one call of the denoiser; the letters of the formulas."""

    a: int  # A: saved by the call
    lh: int  # L h: saved by it under block checkpoints
    z: int  # z': its noised input
    w: int  # largest scratch beyond what is saved, forward and backward
    b: int  # a_b + w: the same under block checkpoints, one block's insides included
    text: int  # its text embeddings, which all steps share
    forward: float
    backward: float

    def saved(self, way: str, steps: int) -> int:
        each = {"full graph": self.a, "per block": self.lh}.get(way, self.z)
        return steps * each + self.text

    def peak(self, way: str, steps: int) -> int:
        above = {"full graph": self.w, "per step": self.a + self.w, "per block": self.b, "nested": self.lh + self.b}
        return self.saved(way, steps) + above[way]

    def ratio(self, way: str) -> float:
        forwards = {"full graph": 1, "per step": 2, "per block": 2, "nested": 3}[way]
        return (forwards * self.forward + self.backward) / (self.forward + self.backward)


@contextmanager
def gates(denoiser: Any) -> Iterator[list[Tensor]]:
    """Factors on the inputs of attention's and feed-forward's last layers, as learned pruning has them; weights are frozen."""
    denoiser.requires_grad_(False)
    layers = [layer for name, layer in denoiser.named_modules() if name.endswith(GATED)]
    made = [torch.ones(layer.in_features, requires_grad=True) for layer in layers]
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, gate=gate: (args[0] * gate, *args[1:]))
        for layer, gate in zip(layers, made, strict=True)
    ]
    try:
        yield made
    finally:
        for hook in hooks:
            hook.remove()


def one_call(pipe: Any, plan: SamplingPlan, arguments: dict[str, Any], held: list[Tensor]) -> Parts:
    """Measured on the first call of a plan, with a sample that has a graph, as those after the first have."""
    found: dict[bool, tuple[int, int, float, float]] = {}
    sizes: dict[str, int] = {}

    def look(on: bool, call: Call, following: Next) -> Any:
        text = call.kwargs["encoder_hidden_states"]
        x, kwargs = call.args[0].detach().requires_grad_(), {**call.kwargs, "return_dict": False}
        sizes.update(z=x.nbytes, text=text.nbytes)
        again = replace(call, args=(x, *call.args[1:]), kwargs=kwargs)
        alive, times = [*call.module.parameters(), *call.module.buffers(), *held, text], []
        with torch.enable_grad():
            for _ in range(TURNS):
                began = time.process_time()
                loss = following(again)[0].sum()
                between = time.process_time()
                torch.autograd.grad(loss, [x, *held])
                times.append((between - began, time.process_time() - between))
            with saved(alive) as count:
                loss = following(again)[0].sum()
            keeps = count.held
            del loss
            with Live() as live:
                torch.autograd.grad(following(again)[0].sum(), [x, *held])
        found[on] = keeps, live.peak - keeps, *(statistics.median(t[i] for t in times) for i in (0, 1))
        return following(call)

    for on in (False, True):
        with follow(pipe, plan, inside=[functools.partial(look, on), checkpoint_blocks(on)]):
            pipe(**arguments)
    (a, w, forward, backward), (lh, b, _, _) = found[False], found[True]
    return Parts(a, lh, sizes["z"], w, b, sizes["text"], forward, backward)


def timed(pipe: Any, run: Callable[[str, int], list[Tensor]], images: int, parts: Parts) -> list[list[str]]:
    """Time ratios to the full graph, beside those foretold; asserts that all ways give the same bits."""
    wanted, seconds = run("full graph", TIMED), {way: list[float]() for way in WAYS}
    for _ in range(TURNS):
        for way in WAYS:
            began = time.process_time()
            found = run(way, TIMED)
            seconds[way].append(time.process_time() - began)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), f"{way}: other bits"
    rows = []
    for way in WAYS:
        ratios = sorted(own / full for own, full in zip(seconds[way], seconds["full graph"], strict=True))
        rows.append(
            [str(images), way, str(executed(pipe, run, way)), f"{statistics.median(ratios):.2f}"]
            + [
                f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
                f"{parts.ratio(way):.2f}",
                f"{replace(parts, forward=1, backward=1).ratio(way):.1f}",
            ]
        )
    return rows


def executed(pipe: Any, run: Callable[[str, int], list[Tensor]], way: str) -> int:
    """How often a layer inside a checkpointed block runs: denoiser forwards, recomputed ones included."""
    layer = next(layer for name, layer in pipe.unet.named_modules() if name.endswith("ff.net.2"))
    calls: list[int] = []
    hook = layer.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        run(way, TIMED)
    finally:
        hook.remove()
    return len(calls)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    pipe = models.load("zoo:fashion", device="cpu").pipe
    pipe.set_progress_bar_config(disable=True)
    plans = {n: fixed(pipe.scheduler, n)["leading"] for n in (1, *LENGTHS)}

    def arguments(images: int) -> dict[str, Any]:
        generators = [torch.Generator().manual_seed(i) for i in range(images)]
        return {
            "prompt": ["a photo of a sneaker"] * images,
            "guidance_scale": 3.0,
            "generator": generators,
            "output_type": "latent",
        }

    def run(images: int, way: str, steps: int) -> list[Tensor]:
        last = differentiable(pipe, plans[steps], arguments(images), **WAYS[way])
        return [last.detach(), *torch.autograd.grad(last.square().mean(), held)]

    def keeps(way: str, steps: int) -> int:
        with saved([*pipe.unet.parameters(), *held]) as count:
            last = differentiable(pipe, plans[steps], arguments(1), **WAYS[way])
        assert last.requires_grad  # alive until it is counted
        return count.held

    def peak(way: str, steps: int) -> int:
        with Live() as live:
            run(1, way, steps)
        return live.peak

    with gates(pipe.unet) as held:
        parts = {images: one_call(pipe, plans[1], arguments(images), held) for images in IMAGES}
        one, many = parts[1], parts[IMAGES[-1]]
        kept = [[str(n), *(_beside(keeps(way, n), one.saved(way, n)) for way in WAYS)] for n in LENGTHS]
        peaks = [[str(n), *(_beside(peak(way, n), one.peak(way, n)) for way in WAYS)] for n in LENGTHS]
        times = [row for n in IMAGES for row in timed(pipe, functools.partial(run, n), n, parts[n])]
    conditions = (
        f"`zoo:fashion`, DDIM, under guidance (two rows an image), {len(held)} gates, weights frozen; {_results.machine()}. "
        f"Of one call for one image, in MB: A {one.a / 1e6:.2f}, L·h {one.lh / 1e6:.2f}, z' {one.z / 1e6:.4f}, w {one.w / 1e6:.2f}, "
        f"a_b + w {one.b / 1e6:.2f}, text {one.text / 1e6:.4f}. Every latent and gradient timed below is bit-equal to the full graph's."
    )
    note_saved = (
        "MB saved for the backward pass when the forward is done, one image; in brackets foretold from that one call: T·A, T·z', T·L·h, "
        "T·z', each with the text. (The first step's sample has no graph, so that it saves less.)"
    )
    note_peak = (
        "MB of all tensors alive at the peak of forward and backward, one image, weights not counted; foretold: T·A + w, T·z' + A + w, "
        "T·L·h + a_b + w, T·z' + L·h + a_b + w, each with the text."
    )
    note_time = (
        f"Processor time of forward and backward over the full graph's at T = {TIMED}, {TURNS} turns; foretold from one call's forward F "
        f"and backward B as (nF + B)/(F + B) for n forwards (B/F is {one.backward / one.forward:.2f} for 1 image, "
        f"{many.backward / many.forward:.2f} for {IMAGES[-1]}), and where B = F."
    )
    head = ["images", "", "forwards", "time ratio", "range", "foretold", "B = F"]
    tables = [_results.table(["T", *WAYS], kept), _results.table(["T", *WAYS], peaks), _results.table(head, times)]
    text = [conditions, note_saved, tables[0], note_peak, tables[1], note_time, tables[2]]
    _results.write("trajectory_memory", "\n\n".join(text))


def _beside(measured: int, foretold: int) -> str:
    return f"{measured / 1e6:.3f} ({foretold / 1e6:.3f})"


if __name__ == "__main__":
    main()
