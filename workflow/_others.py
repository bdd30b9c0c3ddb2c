"""Other models that may make steps of a plan: named by a recipe or by the plan's own artifact, and loaded when a plan needs them."""

import functools
from typing import TYPE_CHECKING

from ..core import models
from ..core.artifact import Other
from ..core.errors import UserError
from ..core.models import Model
from .context import Context

if TYPE_CHECKING:
    from ..core.driving.switch import Denoisers


def lend(model: Model, context: Context) -> dict[str, Other]:
    """Let plans of this model name those that the recipe gives, and those that its own plan was found with; returns them.

    Nothing is loaded yet. Raises UserError for a reference that leads nowhere.
    """
    from ..core.driving.switch import lend as lend_one

    found = dict(model.others)
    for name, ref in context.recipe.models.items():
        pinned, fingerprint = models.identify(context.path(ref), context.options.trust_remote_code)
        found[name] = Other(model=pinned, model_hash=fingerprint)
    for name, other in found.items():
        lend_one(model.pipe, name, functools.partial(_load, name, other, model, context))
    return found


def _load(name: str, other: Other, own: Model, context: Context) -> "Denoisers":
    from ..core.driving.steering import denoisers
    from ..core.fit import misfit

    options = context.options
    if options.offload != "none":
        raise UserError(f"--offload {options.offload}: the plan's model {name} stays on the device. Leave --offload out.")
    trust = options.trust_remote_code
    there = models.load(other.model, device=own.device, dtype=own.dtype, trust_remote_code=trust)
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
