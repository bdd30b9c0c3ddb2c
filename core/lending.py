"""Other models that may make steps of a pipeline's plans: loaded when a plan first names them, and checked then."""

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from .artifact import Other
from .errors import UserError

if TYPE_CHECKING:
    from .driving.switch import Denoisers
    from .models import Model


def lend(model: "Model", others: Mapping[str, Other], load: "Callable[[str], Model]", offload: str = "none") -> None:
    """Let plans of this model name others. Nothing is loaded yet. load: opens a reference on the model's device, in its dtype.

    Once a plan needs one: UserError where it cannot be loaded, has other weights than it is known by, or does not fit the model.
    """
    from .driving.switch import lend as lend_one

    for name, other in others.items():
        lend_one(model.pipe, name, functools.partial(_load, name, other, model, load, offload))


def _load(name: str, other: Other, own: "Model", load: "Callable[[str], Model]", offload: str) -> "Denoisers":
    from .driving.steering import denoisers
    from .fit import misfit

    if offload != "none":
        raise UserError(f"--offload {offload}: the plan's model {name} stays on the device. Leave --offload out.")
    try:
        there = load(other.model)
    except UserError as e:
        raise type(e)(f"models: {name}: {e} Say where it is: --models {name}=MODEL.") from e
    if there.fingerprint != other.model_hash:
        raise UserError(
            f"models: {name}: {other.model} has weights of the hash {there.fingerprint[:16]}…, the plan was found with "
            f"{other.model_hash[:16]}…. Give the model of then: --models {name}=MODEL."
        )
    if reason := misfit(own.pipe, there.pipe):
        raise UserError(
            f"models: {name}: {other.model} cannot make steps of {own.ref}: {reason}. Both have to work on the same latents, "
            "along the same noise schedule, and predict the same thing."
        )
    return denoisers(there.pipe)
