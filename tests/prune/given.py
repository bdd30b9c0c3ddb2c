"""Denoisers of every shape, and what a prune method is given for them: losses and gradients are made up."""

import functools
import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from lissom.core import blueprints, models, stock, surgery
from lissom.core.candidate import Cut
from lissom.core.stages import PruneStage
from lissom.prune._task import Option, Space, Task, enough
from lissom.tests.core import tiny
from lissom.workflow import _widths
from lissom.workflow._gauge import Gauge
from lissom.workflow._prune_job import Job, job_of

SD_TYPES: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
XL_TYPES: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
WIDE: dict[str, Any] = {"block_out_channels": (8, 16, 16), "layers_per_block": 2}


def _dit(alike: int = 4) -> Any:
    """A DiT of four blocks, of which the first so many share the numbers of one embedder; in converted checkpoints all do."""
    config = {**tiny.shared("dit").transformer.config, "num_layers": 4}
    dit = type(tiny.shared("dit").transformer).from_config(config).eval()
    for block in dit.transformer_blocks[1:alike]:
        block.norm1.emb.load_state_dict(dit.transformer_blocks[0].norm1.emb.state_dict())
    return dit


def _longer(family: str, **changes: Any) -> Any:
    transformer = tiny.shared(family).transformer
    return type(transformer).from_config({**transformer.config, **changes}).eval()


DENOISERS: dict[str, Callable[[], Any]] = {
    "sd": lambda: tiny.unet(**SD_TYPES, **WIDE),
    "sd, no pairs to spare": tiny.unet,
    "sd, two stages": lambda: tiny.unet(layers_per_block=2),
    "sd, three pairs": lambda: tiny.unet(**SD_TYPES, block_out_channels=(8, 16, 16), layers_per_block=3),
    "sd, two blocks": lambda: tiny.unet(**SD_TYPES, **WIDE, transformer_layers_per_block=2),
    "sd, one ResNet in the middle": lambda: tiny.unet(**SD_TYPES, **WIDE, mid_block_type="UNetMidBlock2D"),
    "sd, no middle": lambda: tiny.unet(**SD_TYPES, **WIDE, mid_block_type=None),
    "xl": lambda: tiny.unet(**XL_TYPES, **WIDE, transformer_layers_per_block=(1, 2, 3)),
    "xl, one block": lambda: tiny.unet(**XL_TYPES, **WIDE),
    "pixel": tiny.pixel_unet,
    "dit": _dit,
    "dit, trained": lambda: _dit(alike=1),
    "dit, half trained": lambda: _dit(alike=2),
    "sd3": lambda: _longer("sd3", num_layers=4),
    "sd3, dual attention": lambda: _longer("sd3", num_layers=4, dual_attention_layers=(0, 1)),
    "flux": lambda: _longer("flux", num_layers=3, num_single_layers=4),
    "zoo:fashion": lambda: models.load("zoo:fashion", device="cpu").denoiser,
    "zoo:fashion-dit": lambda: models.load("zoo:fashion-dit", device="cpu").denoiser,
}
TINY = [name for name in DENOISERS if ":" not in name]
CONFIGS = ["config:sd15", "config:sdxl", "config:sd3.5-medium", "config:flux", "config:dit-xl"]


@functools.cache
def gauge(name: str) -> Gauge:
    """Of a denoiser that is built once: cuts are undone."""
    if name.startswith("config:"):
        blueprint = blueprints.load(name.removeprefix("config:"))
        return Gauge(blueprint.denoiser, latent=blueprint.latent, text_tokens=blueprint.text_tokens)
    return Gauge(DENOISERS[name](), latent=None if "sd3" not in name else (4, tiny.SIDE, tiny.SIDE))


@functools.cache
def job(name: str, method: str = "random_cuts", **settings: Any) -> Job:
    """What a stage with these settings asks of a denoiser."""
    fields = {k: v for k, v in settings.items() if k in PruneStage.model_fields}
    own = {k: v for k, v in settings.items() if k not in fields}
    stage = PruneStage(prune=method, settings=own, **fields)
    return job_of(stage, gauge(name), 0, name, "cpu", None)


def whole(name: str, plain: bool = False, of: str = "params", method: str = "random_cuts") -> Job:
    """With everything still to choose from. method: any that is given the same."""
    return job(name, method, keep=1.0, of=of, require_plain_load=plain)


def ask(of: Job, keep: float | None = None) -> Task:
    """What a method is given; with another keep than the job's, the spaces that can reach it."""
    need = of.need if keep is None else (1 - keep) * of.total
    spaces = tuple(space for space in of.spaces if enough(space.most, need))
    task = Task(of.gauge.denoiser, of.layers, spaces, need, added, say=lambda line: None)
    if not of.widths:
        return task
    return replace(task, widths=of.widths, saves=_widths.saves(of.gauge, of.of), gradients=gradients(of.gauge.denoiser))


def gradients(denoiser: Any, losses: Sequence[float] = (1.0, 0.5, 0.01, 2.0)) -> Any:
    """Made-up gradients of a denoiser, the same each time, for each loss that counts; noise levels are 0, 1, 2, …."""

    @contextmanager
    def made(stride: int, counts: Callable[[Sequence[float]], bool]) -> Iterator[dict[float, float]]:
        drawn, visited = torch.Generator().manual_seed(0), dict[float, float]()
        parameters = [p for p in denoiser.parameters() if p.is_floating_point()]
        for p in parameters:
            p.grad = torch.zeros_like(p)
        try:
            for t, loss in enumerate(losses[::stride] or losses[:1]):
                visited[float(t)] = loss
                if not counts(list(visited.values())):
                    break
                for p in parameters:
                    p.grad += loss * torch.randn(p.shape, generator=drawn)
            yield visited
        finally:
            for p in parameters:
                p.grad = None

    return made


def added(options: Sequence[tuple[Cut, ...]]) -> list[float]:
    """A loss that is the sum of the cuts' own."""
    return [sum(price(cut) for cut in cuts) for cuts in options]


def price(cut: Cut) -> float:
    """A number from 0.1 to 1 that hangs on the cut alone."""
    digest = hashlib.sha256(cut.canonical().encode()).digest()
    return 0.1 + 0.9 * int.from_bytes(digest[:4], "big") / 2**32


def some_choice(space: Space, rng: random.Random, share: float) -> list[Option]:
    """The base of a space and options of a share of its sites."""
    return [space.base, *(rng.choice(site) for site in space.sites if rng.random() < share)]


def stock_model(denoiser: Any, cuts: Sequence[Cut]) -> Any:
    """The stock model on meta that a cut denoiser is saved as, or the reason why there is none."""
    with surgery.applied(denoiser, cuts):
        found = stock.express(denoiser)
    return found if isinstance(found, str) else stock.build_on_meta(found.cls, found.config)
