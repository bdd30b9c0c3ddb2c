"""Steps that another model makes: a small one where it is as good, the pipeline's own elsewhere.

Pan et al., "T-Stitch: Accelerating Sampling in Pre-Trained Diffusion Models with Trajectory Stitching", ICLR 2025,
https://arxiv.org/abs/2402.14167, lets a small model make the steps of high noise. A-SDM (Zhu et al.,
https://arxiv.org/abs/2406.00210) calls the same multi-UNet switching; of that paper only the abstract could be read.

Both predict on the same latents along one schedule, so that the solver, its history and the noise know nothing of it. Guidance
is made inside each model. What the models must have in common is `core.fit`'s to say.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from .steering import Call, Next

Denoisers = Mapping[str, nn.Module]  # by component of the pipeline, e.g. {"unet": ...}


class Lent(Mapping[str, Denoisers]):
    """The models that plans of a pipeline may name. Each is loaded when a plan first needs it, and then stays."""

    def __init__(self) -> None:
        self._load: dict[str, Callable[[], Denoisers]] = {}
        self._there: dict[str, Denoisers] = {}

    def __getitem__(self, name: str) -> Denoisers:
        if name not in self._there:
            self._there[name] = self._load[name]()
        return self._there[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._load)

    def __len__(self) -> int:
        return len(self._load)

    def add(self, name: str, load: Callable[[], Denoisers]) -> None:
        self._load[name] = load
        self._there.pop(name, None)


def lend(pipe: Any, name: str, load: Callable[[], Denoisers]) -> None:
    """Let plans of this pipeline name another model.

    load: gives its denoisers by component, on the pipeline's device and in its dtype. Called once, when a plan needs it.
    """
    pipe.__dict__.setdefault("_lissom_lent", Lent()).add(name, load)


def lent(pipe: Any) -> Mapping[str, Denoisers]:
    """The models that plans of this pipeline may name."""
    found: Lent = pipe.__dict__.get("_lissom_lent", Lent())
    return found


def switch(call: Call, following: Next) -> Any:
    name = call.run.step.model
    if name is None:
        return following(call)
    other = call.run.models[name][call.name]
    return following(replace(call, module=other, execute=other))
