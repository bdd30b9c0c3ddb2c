"""What a denoiser weighs and takes, whole and with cuts: parameters, MACs, time. Counted on a twin without weights where possible."""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from ..core.candidate import Cut
from ..core.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from ..core.anatomy import Layer

TEXT_TOKENS = 77  # of the made-up prompt; the real one's length changes attention to it by little
PROBED = 64  # side of the latents that outputs are compared on, at most
REPEATS, LIMIT = 15, 20.0  # timed calls of each model, and seconds for all of them, whichever is over first


class Gauge:
    """Counts a denoiser. `fallback`: gives the arguments of one real call, for classes whose inputs cannot be made up."""

    def __init__(
        self,
        denoiser: "nn.Module",
        *,
        latent: tuple[int, int, int] | None = None,
        text_tokens: int = TEXT_TOKENS,
        fallback: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        import torch

        from ..core import anatomy

        self.denoiser: Any = anatomy.uncompiled(denoiser)
        self.text_tokens, self.latent = text_tokens, latent or _latent(self.denoiser)
        self._inputs: dict[str, Any] | None = None
        try:
            self.example(1, "meta", torch.float32)
        except UserError:
            if fallback is None:
                raise
            self._inputs = fallback()
            self.counted: Any = self.denoiser
        else:
            first = next(self.denoiser.parameters())
            self.counted = self.denoiser if first.is_meta else _twin(self.denoiser)
        self.known = anatomy.layers(self.denoiser)
        self._after: dict[tuple[Cut, ...], tuple[int, int]] = {}
        self._operators: list[Layer] | None = None
        self.table = self._count()
        if anatomy.unlisted(self.denoiser) and not next(self.denoiser.parameters()).is_meta:
            self.known += anatomy.traced(self.denoiser, lambda: self.denoiser(**self.probe()))

    @property
    def sized(self) -> bool:
        """Whether inputs of any batch size can be made up."""
        return self._inputs is None

    @property
    def params(self) -> int:
        return self.table.params

    @property
    def macs(self) -> int:
        return self.table.total

    def layers(self) -> "list[Layer]":
        """All that can be cut, with the MACs that cutting each saves."""
        from dataclasses import replace

        out = []
        for layer in self.known:
            macs = self.table.layers.get(layer.address)
            if macs is None:
                cut = Cut(address=layer.address, what="remove", value=layer.returns)
                macs = self.macs - self.after([cut])[1]
            out.append(replace(layer, macs=macs))
        return out

    def operators(self) -> "list[Layer]":
        """Single operators that can be cut, with their MACs. They are no part of `layers`: there would be hundreds."""
        import torch

        from ..core.operators import operators

        if self._operators is None:
            self._operators = operators(self.counted, lambda: self.counted(**self.example(1, "meta", torch.float32)))
        return self._operators

    def after(self, cuts: Sequence[Cut]) -> tuple[int, int]:
        """(parameters, MACs) with cuts. Counted once."""
        from ..core import surgery

        if (key := tuple(cuts)) not in self._after:
            with surgery.applied(self.counted, cuts):
                self._after[key] = surgery.parameters(self.counted), self._count().total
        return self._after[key]

    def params_saved(self, cuts: Sequence[Cut]) -> int:
        from ..core import surgery

        with surgery.applied(self.counted, cuts):
            return self.params - surgery.parameters(self.counted)

    def example(self, batch: int, device: Any, dtype: Any, side: int | None = None) -> dict[str, Any]:
        """Arguments of one call. UserError for a class whose inputs cannot be made up."""
        from ..core import blueprints

        if self._inputs is not None:
            return self._inputs
        channels, height, width = self.latent
        latent = (channels, min(height, side or height), min(width, side or width))
        return blueprints.example_inputs(
            self.denoiser, batch=batch, latent=latent, text_tokens=self.text_tokens, device=device, dtype=dtype
        )

    def probe(self) -> dict[str, Any]:
        """Arguments on the denoiser's own device, at a small side where its shape is free: two models are compared on them."""
        first = next(self.denoiser.parameters())
        free = "UNet" in type(self.denoiser).__name__
        return self.example(2, first.device, first.dtype, PROBED if free else None)

    def _count(self) -> Any:
        import torch

        from ..core import cost

        if self._inputs is not None:
            return cost.count(self.counted, **self._inputs)
        return cost.count(self.counted, **self.example(1, "meta", torch.float32))


def _latent(denoiser: Any) -> tuple[int, int, int]:
    """(C, H, W) of what the denoiser was made for."""
    config = denoiser.config
    side = config.get("sample_size") or 64
    height, width = side if isinstance(side, tuple | list) else (side, side)
    packed = type(denoiser).__name__.endswith("FluxTransformer2DModel")
    return (config["in_channels"] // 4 if packed else config["in_channels"]), int(height), int(width)


def _twin(denoiser: Any) -> Any:
    import torch

    config = {k: v for k, v in denoiser.config.items() if k != "auto_map"}  # of the folder, not of the class
    with torch.device("meta"):
        return type(denoiser).from_config(config).eval()


def times(
    calls: "Sequence[Callable[[], Any]]", device: str, around: "Sequence[Callable[[], AbstractContextManager[Any]]]" = ()
) -> list[list[float]]:
    """Milliseconds of several calls, taken in turns: what slows the machine for a while slows them all.

    around: for each call a context that it runs in; entering and leaving it is not timed.
    """
    import torch

    contexts = around or [nullcontext] * len(calls)
    found: list[list[float]] = [[] for _ in calls]
    with torch.no_grad():
        for call, context in zip(calls, contexts, strict=True):
            with context():
                call()  # warm up
        _wait(device)
        began = time.monotonic()
        for turn in range(REPEATS):
            for own, call, context in zip(found, calls, contexts, strict=True):
                with context():
                    start = time.perf_counter()
                    call()
                    _wait(device)
                    own.append(1000 * (time.perf_counter() - start))
            if turn >= 2 and time.monotonic() - began > LIMIT:
                break
    return found


def layer_times(
    denoiser: "nn.Module", inputs: dict[str, Any], addresses: Sequence[str], device: str
) -> tuple[float, dict[str, float]]:
    """Milliseconds of one forward, and of each layer in it: medians over repeated calls."""
    spent: dict[str, list[float]] = {a: [] for a in addresses}
    started: dict[str, float] = {}

    def now() -> float:
        _wait(device)
        return time.perf_counter()

    hooks = []
    for address in addresses:
        module = denoiser.get_submodule(address)
        hooks.append(module.register_forward_pre_hook(lambda *_, a=address: started.__setitem__(a, now())))
        hooks.append(module.register_forward_hook(lambda *_, a=address: spent[a].append(1000 * (now() - started[a]))))
    try:
        (whole,) = times([lambda: denoiser(**inputs)], device)
    finally:
        for hook in hooks:
            hook.remove()
    return statistics.median(whole), {a: statistics.median(t) for a, t in spent.items() if t}


def _wait(device: str) -> None:
    """Until the device has done all that it was asked for."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device.startswith("mps"):
        torch.mps.synchronize()
