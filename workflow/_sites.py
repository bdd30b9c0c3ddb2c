"""What a search may cut, as sites of its space: single layers, the moves of the slim U-Nets' grammar, and what was learned."""

from typing import TYPE_CHECKING

from ..core.candidate import Cut
from ..core.errors import UserError
from ..core.stages import PruneStage, SearchStage
from ._gauge import Gauge
from ._learned import Learned
from ._prune_job import cuttable

if TYPE_CHECKING:
    from ..search._space import Choice

    Sites = tuple[tuple[Choice, ...], ...]


def sites(stage: SearchStage, gauge: Gauge, name: str, learned: Learned) -> "Sites":
    """The sites of the space that the stage asks for, those of learned scores last. UserError where the denoiser has none.

    name: of the model, in messages.
    """
    slim, last = _slim(gauge, name) if "slim" in stage.space else (), learned.sites()
    if "cuts" not in stage.space:
        return slim + last
    # A layer that another site removes by itself is no site of its own: one candidate would have two names.
    removed = {cut.address for site in slim + last for choice in site for cut in choice.cuts if cut.what == "remove"}
    return slim + tuple(site for site in _single(gauge, name) if not site[0].lost & removed) + last


def _single(gauge: Gauge, name: str) -> "Sites":
    """Every layer that can be cut alone."""
    from ..search._space import Choice

    found = cuttable(PruneStage(prune="laptop"), gauge, name)
    cuts = {layer.address: Cut(address=layer.address, what="remove", value=layer.returns) for layer in found if layer.freed}
    return tuple((Choice(address, (cut,), frozenset({address})),) for address, cut in cuts.items())


def _slim(gauge: Gauge, name: str) -> "Sites":
    from ..prune._grammar import moves
    from ..search._space import Choice

    try:
        found = moves(gauge.denoiser)
    except UserError as e:
        raise UserError(f"space: slim: {name}: {e} In a search, take cuts instead of slim.") from e
    if not found:
        raise UserError(f"space: slim: the U-Net of {name} has nothing that it can lose that way. Take cuts instead.")
    return tuple(tuple(Choice(move.name, move.cuts, move.lost) for move in site) for site in found)
