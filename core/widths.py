"""What can be made narrower inside a denoiser: heads of its attentions, units of its feed-forwards, channels of its ResNets."""

from dataclasses import dataclass
from typing import Any

from . import narrowing
from .anatomy import uncompiled


@dataclass(frozen=True)
class Width:
    """The width of one layer, of which a cut may leave a part."""

    address: str
    what: str  # keep_heads, keep_units, keep_channels: `Cut.what`
    count: int  # heads, units or channels there are
    granule: int  # how many in a row go together: 1, or the channels in a group of the ResNet's GroupNorm

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Indices that go together. Any of the groups may go, as long as one stays.

        >>> Width("mid_block.resnets.0", "keep_channels", 6, 2).groups
        ((0, 1), (2, 3), (4, 5))
        """
        return tuple(tuple(range(start, start + self.granule)) for start in range(0, self.count, self.granule))


def widths(denoiser: Any) -> list[Width]:
    """Every width that can be cut so that what stays computes what it would with the rest masked, in the order of `named_modules()`.

    Channels may go from inside the groups of a ResNet too, equally many from each (`narrowing.narrowed`); that changes the
    groups' statistics and is not listed. Nor is a layer with a single head, unit or group.
    """
    found = []
    for address, module in uncompiled(denoiser).named_modules():
        for what in narrowing.NARROWS:
            try:
                count, granule = narrowing.width(module, what)
            except ValueError:
                continue
            if count > granule:
                found.append(Width(address, what, count, granule))
    return found


def rounded(kept: int, multiple: int, most: int) -> int:
    """The multiple nearest to a count of what stays (the larger one in between), but not zero and not more than there are.

    Kernels are fast for widths that are multiples of 8 or 64.

    >>> rounded(100, 64, 320), rounded(96, 64, 320), rounded(3, 64, 320), rounded(300, 64, 310)
    (128, 128, 64, 310)
    """
    return min(max((2 * kept + multiple) // (2 * multiple), 1) * multiple, most)
