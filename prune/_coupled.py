"""What goes together with a head, a unit or a group of channels, as a group of Torch-Pruning, whose importances weigh it.

Torch-Pruning (Fang et al., "DepGraph: Towards Any Structural Pruning", arXiv 2301.12900) finds such groups by tracing a
forward. Here they are built by hand from the rows and columns that a cut takes (`core.widths.shares`), for every model
alike: what is scored is then exactly what goes. Traced, the groups of diffusers' models are others: the residual stream is one
of them, and the output of the time embedding; the halves of a gated projection and the heads of an attention come apart unless
each is named in the pruner's dictionaries; and with some transformers (PixArt) they do not fit at all. Only the importances of
Torch-Pruning are used: they change no module, so that no attribute of a layer gets stale.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.widths import Width

Scorer = Callable[[Any], "Tensor"]  # an importance of Torch-Pruning


def taylor(multivariable: bool = False) -> Scorer:
    """Sum over the parameters of a group of |w g|; multivariable: of |sum of w g|, row by row and column by column.

    Left to itself it skips biases, and norms although it has a branch for them: they are no target of its. Both are named here.
    """
    import torch_pruning as tp
    from torch import nn

    kinds = [nn.modules.conv._ConvNd, nn.Linear, nn.GroupNorm]
    return tp.importance.GroupTaylorImportance(
        "sum", normalizer=None, multivariable=multivariable, bias=True, target_types=kinds
    )


def magnitude(p: int) -> Scorer:
    """Sum over the weights and biases of a group of |w|^p. Torch-Pruning weighs no GroupNorm by its size: those are near 1."""
    import torch_pruning as tp

    return tp.importance.GroupMagnitudeImportance(p, "sum", normalizer=None, bias=True)


def importances(denoiser: Any, width: "Width", scorer: Scorer) -> "Tensor":
    """The importance of each of `width.groups`, (groups,) float32 on the CPU."""
    found = scorer(group(denoiser, width))
    return found[: len(width.groups)].float().cpu()  # Torch-Pruning makes it as long as the first operator has rows


def group(denoiser: Any, width: "Width") -> Any:
    """A Torch-Pruning group of all that belongs to a width, whose root indices are the numbers in `width.groups`."""
    from torch import nn
    from torch_pruning.dependency import Group
    from torch_pruning.dependency.dependency import Dependency
    from torch_pruning.dependency.node import Node
    from torch_pruning.pruner import function

    from ..core.widths import shares

    handlers = {
        nn.Conv2d: (function.prune_conv_out_channels, function.prune_conv_in_channels),
        nn.Linear: (function.prune_linear_out_channels, function.prune_linear_in_channels),
        nn.GroupNorm: (function.prune_groupnorm_out_channels, function.prune_groupnorm_in_channels),
    }
    owners: dict[tuple[str, int], list[tuple[int, int]]] = {}  # (operator, rows 0 or columns 1) -> (index, group)
    for number, members in enumerate(width.groups):
        for name, sides in shares(denoiser, width.address, width.what, members).items():
            for side, runs in enumerate(sides):
                owners.setdefault((name, side), []).extend((i, number) for start, stop in runs for i in range(start, stop))
    found = Group()
    for (name, side), pairs in owners.items():
        if not pairs:
            continue
        operator = denoiser.get_submodule(name)
        kind = next(kind for kind in handlers if isinstance(operator, kind))
        node, handler = Node(operator, None, name), handlers[kind][side]
        pairs.sort()  # Torch-Pruning sorts the indices, and not the groups beside them
        found.add_dep(Dependency(handler, handler, node, node), [i for i, _ in pairs])
        found[len(found) - 1].root_idxs = [number for _, number in pairs]
    return found
