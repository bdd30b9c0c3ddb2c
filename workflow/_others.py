"""Other models that may make steps of a plan, as a run knows them: by its recipe, or by the run that a plan came from."""

from ..core import lending, models
from ..core.artifact import Other
from ..core.errors import UserError
from ..core.models import Model
from .context import Context


def lend(model: Model, context: Context) -> dict[str, Other]:
    """Let plans of this model name those of the recipe and of the plan's own run, and those that the model came with; returns them.

    Nothing is loaded yet. Raises UserError for a reference that leads nowhere.
    """
    options = context.options
    found = {**model.others, **context.others}
    for name, ref in context.recipe.models.items():
        try:
            pinned, fingerprint = models.identify(context.path(ref), options.trust_remote_code)
        except UserError as e:
            raise type(e)(f"models: {name}: {e}") from e
        found[name] = Other(model=pinned, model_hash=fingerprint)
    lending.lend(model, found, models.like(model, options.trust_remote_code), options.offload)
    return found
